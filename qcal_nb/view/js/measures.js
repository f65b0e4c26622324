// What colours the map: what a tensor costs the model, its noise, or its outliers; from 0 to 1, more is worse.
import { HAND } from "./answers.js";
import { inDecibels, inFigures, inNats } from "./words.js";

const DECADES = 3; // of costs that the colours tell apart

function sorted(values) { return values.filter(Number.isFinite).sort((a, b) => a - b); }

function at(values, share) { return values[Math.round(share * (values.length - 1))] ?? NaN; }

const COST = {
  title: ({ format }, what) => `What ${format} costs the model: ${what}`,
  cap: "Costs most", words: inNats, isWorse: (a, b) => a > b,
  legend: ([low, high]) => [`${inFigures(low, 2)} nats or less`, `${inNats(high)}`],
  range: (values) => { const most = at(values, 1) || 1e-9; return [most / 10 ** DECADES, most]; },
  harm: (value, [low, high]) => (value > 0 ? Math.log10(value / low) / Math.log10(high / low) : 0),
};
const NOISE = {
  title: ({ format }, what) => `Where ${format} is noisy: ${what}`,
  cap: "Most noise", words: inDecibels, isWorse: (a, b) => a < b,
  legend: ([low, high]) => [`${inDecibels(high)} or more`, `${inDecibels(low)}, noisiest`],
  range: (values) => [at(values, 0), at(values, 0.95)], // one clean tensor must not darken all others
  harm: (value, [low, high]) => (value === Infinity ? 0 : (high - value) / Math.max(high - low, 3)),
};
const OUTLIERS = {
  title: (_, what) => `Where the outliers are: ${what}`,
  cap: "Largest outliers", words: (ratio) => `${inFigures(ratio)}×`, isWorse: (a, b) => a > b,
  legend: ([low, high]) => [`${inFigures(low, 2)}×`, `${inFigures(high, 2)}× the bulk`],
  range: (values) => [at(values, 0.05), at(values, 1)],
  harm: (value, [low, high]) => Math.log10(value / low) / Math.max(Math.log10(high / low), 0.3),
};

// The observer whose ranges the map shows. A range by hand is that of one tensor alone, and an attached observer may
// have found no single scale: then the recipe's, or the whole range.
function mapObserver(answers, state, tensors) {
  const asked = [state.observer, tensors.find((tensor) => tensor.own)?.own].filter((name) => name && name !== HAND);
  const isKnown = (name) => tensors.some((tensor) => answers.peek(tensor, name, state) !== null);
  return asked.find(isKnown) ?? "static_minmax";
}

// What the map shows now: {value(tensor), words, …, range, harm}; a value is NaN where it is not known (yet).
export function measureOf(answers, state) {
  const tensors = answers.shown(state.base_name);
  const observer = mapObserver(answers, state, tensors);
  const cost = (tensor) => answers.costOf(tensor, observer, state);
  const noise = (tensor) => answers.peek(tensor, observer, state)?.sqnr ?? NaN;
  const outliers = (tensor) => tensor.ratio ?? NaN;
  if (state.color === "outliers") return { ...OUTLIERS, value: outliers, observer, isSlow: false };
  if (tensors.some((tensor) => Number.isFinite(cost(tensor)))) return { ...COST, value: cost, observer, isSlow: false };
  return { ...NOISE, value: noise, observer, isSlow: true };
}

export function rangeOf(measure, tensors) { return measure.range(sorted(tensors.map(measure.value))); }
