// Numbers and sentences as people read them. No document here: Node.js tests them.
import { HAND } from "./answers.js";

export function inFigures(value, digits = 3) {
  if (value === null || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  const isOdd = size !== 0 && (size < 1e-4 || size >= 1e6);
  const words = isOdd ? value.toExponential(digits - 1).replace("e+", "e") : String(Number(value.toPrecision(digits)));
  return words.replaceAll("-", "−");
}

export function whole(n) { return n.toLocaleString("en"); }

export function inPercent(share) {
  if (!share) return "nothing";
  return share < 1e-6 ? "< 0.0001 %" : `${inFigures(100 * share, 2)} %`;
}

export function inDecibels(db) {
  if (Number.isNaN(db)) return "no signal";
  return db === Infinity ? "no error" : `${db.toFixed(1)} dB`;
}

const TOO_DAMAGED = 0.3; // nats of one tensor: from here on its forecast is no number

export function inNats(kl) {
  if (Number.isNaN(kl)) return "cost not known";
  return kl >= TOO_DAMAGED ? "too damaged to forecast" : `${inFigures(kl, 2)} nats`;
}

export function isJudged(kl) { return kl < TOO_DAMAGED; }

// `model.layers.3.mlp.down_proj`, without what all names begin with.
export function shortPath(path) { return path.replace(/^model\.(?=.)/, ""); }

export function tensorWords(tensor) { return `${shortPath(tensor.name)} · ${tensor.base}`; }

export function factsOf(tensor) {
  const range = `${inFigures(tensor.min, 4)} to ${inFigures(tensor.max, 4)}`;
  const ratio = tensor.ratio > 1.05 ? `; the largest is ${inFigures(tensor.ratio)}× the 99.9th percentile` : "";
  return `${whole(tensor.count)} values, ${tensor.dtype}, ${range}${ratio}`;
}

export function warningOf(tensor) {
  const others = tensor.nan || tensor.inf
    ? `${whole(tensor.nan)} NaN and ${whole(tensor.inf)} infinite values were left out, first ${tensor.first}.` : "";
  const zeros = tensor.min === 0 && tensor.max === 0 ? "All values are 0: any scale will do." : "";
  return [others, zeros].filter(Boolean).join(" ");
}

function rangeWords(clip) { return clip === 1 ? "the whole range" : `${inFigures(100 * clip, 3)} % of the range`; }

function noiseByHand(result, top) {
  if (!top) return ".";
  const more = result.sqnr - top.sqnr;
  if (!(Math.abs(more) > 0.05)) return `, as little noise as ${top.name}.`;
  const difference = `${Math.abs(more).toFixed(1)} dB ${more > 0 ? "more" : "less"}`;
  return `, ${difference} than ${top.name}, the observer with the highest SQNR.`;
}

function noiseOfObserver(result, name, top) {
  const clips = result.clipped ? `clips ${inPercent(result.clipped)}` : "clips nothing";
  const other = top && top.name !== name && top.sqnr - result.sqnr > 0.05
    ? `; ${top.name} has ${inDecibels(top.sqnr)}, the highest SQNR.` : "; no observer here has more.";
  return ` ${clips}: SQNR ${inDecibels(result.sqnr)}${other}`;
}

// What a choice costs, beside the best that is known.
function costWords(cost, least) {
  if (Number.isNaN(cost)) return "";
  const isMore = least && isJudged(least.cost) && cost > 1.02 * least.cost;
  const other = isMore ? `; with ${least.name} ${inNats(least.cost)}` : "";
  if (!isJudged(cost)) return `Too damaged to forecast: measure${other}. `;
  return `Costs the model ${inNats(cost)} per token, by forecast${other}. `;
}

// The sentence about one tensor. `rows`: what is known of its observers, {name, sqnr, cost, …}.
export function sentence(tensor, state, result, rows) {
  if (!result) return `${state.observer} has no single scale for this tensor in ${state.format}.`;
  if (tensor.min === 0 && tensor.max === 0) return "Nothing to lose: every value is 0.";
  const others = rows.filter((row) => row.name !== HAND && row.sqnr === row.sqnr);
  const top = others.reduce((best, row) => (!best || row.sqnr > best.sqnr ? row : best), null);
  const known = others.filter((row) => !Number.isNaN(row.cost));
  const least = known.reduce((best, row) => (!best || row.cost < best.cost ? row : best), null);
  const noise = state.observer === HAND
    ? `By hand, ${rangeWords(state.clip)}: SQNR ${inDecibels(result.sqnr)}${noiseByHand(result, top)}`
    : state.observer + noiseOfObserver(result, state.observer, top);
  const cost = rows.find((row) => row.name === state.observer)?.cost ?? NaN;
  return costWords(cost, least) + noise;
}
