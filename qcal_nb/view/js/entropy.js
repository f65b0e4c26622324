// The range with the least Kullback-Leibler divergence between the clipped and the quantized distribution.
import { absolute, countsBelow, differences, ends, sumsBefore } from "./buckets.js";
import { extremes, within } from "./scales.js";

const BINS = 2048;
const EQUAL = 1e-12; // divergences that differ by less are equal: the widest range counts
const AT_ONCE = 64; // ranges between two pauses

function linspace(from, to, n) {
  const step = (to - from) / n;
  const found = Float64Array.from({ length: n + 1 }, (_, i) => i * step + from);
  found[n] = to;
  return found;
}

// Where one level ends and the next begins, as shares of the range.
export function levelCuts(format) {
  if (format.isInt) return linspace(0, 1, format.points.length / (format.symmetric ? 2 : 1));
  const places = format.points.filter((point) => point >= 0).map((point) => point / format.high);
  return Float64Array.of(0, ...places.slice(1).map((place, i) => (place + places[i]) / 2), 1);
}

// The values without zeros: where the buckets begin and end, and their counts; of |x| if the format is symmetric.
function valuesOf(tensor, format) {
  const all = { lower: [], upper: [], counts: [] };
  const add = ([low, high], count) => {
    all.lower.push(low);
    all.upper.push(high);
    all.counts.push(count);
  };
  if (format.symmetric) {
    const { sizes, counts, ends } = absolute(tensor);
    sizes.forEach((size, i) => { if (size) add(ends[i], counts[i]); });
  } else tensor.codes.forEach((code, i) => {
    if (code !== 0 && code !== -1) add(ends(code, tensor.exact), tensor.counts[i]);
  });
  return all;
}

// Counts in equal bins from `from` to `to`; whatever lies beyond them is in the outermost.
function binned({ lower, upper, counts }, n, from, to) {
  const edges = linspace(from, to, n);
  const below = countsBelow(lower, upper, counts, edges);
  below[0] = 0;
  below[n] = counts.reduce((sum, count) => sum + count, 0);
  return { edges, counts: differences(below), beyond: [0, 0] };
}

function withMargins(values, n, from, to) {
  const width = (to - from) / n;
  const { edges, counts } = binned(values, n + 2, from - width, to + width);
  return { edges: edges.slice(1, -1), counts: counts.slice(1, -1), beyond: [counts[0], counts[n + 1]] };
}

function filledBetween({ edges, counts }, from, to) {
  let found = 0;
  counts.forEach((count, i) => { if (count > 0 && edges[i] >= from && edges[i + 1] <= to) found++; });
  return found;
}

// Bins over as much of the range as they can resolve.
function drawnBins(values, from, to, levels) {
  const total = values.counts.reduce((sum, count) => sum + count, 0);
  let bins = binned(values, BINS, from, to);
  for (;;) {
    [from, to] = to >= -from ? [from, to / 2] : [from / 2, to];
    const closer = withMargins(values, BINS, from, to);
    const lost = closer.beyond[0] + closer.beyond[1];
    if (filledBetween(bins, from, to) >= levels || lost > total / 1000) return bins;
    bins = closer;
  }
}

function timesLog(p, q) { return p * Math.log(p > 0 ? q : 1); }

// What clipping into the outermost bin adds to Σ p log p, Σ p log q and Σ q.
function clippedInto(count, clipped, level, least) {
  if (!(clipped > 0)) return [0, 0, 0];
  const p = count + clipped;
  const before = count > 0 ? level : 0;
  const after = Math.max(before, least);
  return [timesLog(p, p) - timesLog(count, count), timesLog(p, after) - timesLog(count, before), after - before];
}

// D(P‖Q) in nats of the range from bin `first` to `last`.
function divergence({ counts, beyond }, sums, cuts, first, last) {
  const { mass, filled, plogp } = sums;
  const inside = mass[last] - mass[first];
  if (!(inside > 0)) return Infinity;
  const total = mass[counts.length] + beyond[0] + beyond[1];
  const { plogq, levels } = levelsOf(mass, filled, cuts, first, last);
  const left = clippedInto(counts[first], mass[first] + beyond[0], levels[0], inside / total);
  const outside = mass[counts.length] - mass[last] + beyond[1];
  const right = clippedInto(counts[last - 1], outside, levels[1], inside / total);
  const p = left[0] + right[0] + plogp[last] - plogp[first];
  const q = left[1] + right[1] + plogq;
  return (p - q) / total + Math.log((inside + left[2] + right[2]) / total);
}

// Σ p log q over the groups of a range, and what Q says of its first and of its last level.
function levelsOf(mass, filled, cuts, first, last) {
  const bin = (cut) => first + Math.ceil((last - first) * cut - 0.5); // a bin belongs where its middle lies
  const levels = [1, 1];
  let plogq = 0;
  for (let k = 1, from = bin(cuts[0]); k < cuts.length; k++) {
    const to = bin(cuts[k]);
    const count = mass[to] - mass[from];
    const level = count > 0 ? count / Math.max(filled[to] - filled[from], 1) : 1;
    plogq += count * Math.log(level);
    if (k === 1) levels[0] = level;
    levels[1] = level;
    from = to;
  }
  return { plogq, levels };
}

// The ranges that differ from [a, b] at one side, hold zero and have a bin for each level.
function rangesToTry(side, [a, b], zero, levels) {
  const found = [];
  if (side === "right") for (let last = Math.max(a + levels, zero); last <= BINS; last++) found.push([a, last]);
  else for (let first = Math.min(b - levels, zero); first >= 0; first--) found.push([first, b]);
  return found;
}

function* leastDivergence(values, from, to, cuts) {
  const levels = Math.max(cuts.length - 1, 2);
  const bins = drawnBins(values, from, to, levels);
  const { edges, counts } = bins;
  const sums = {
    mass: sumsBefore(counts),
    filled: sumsBefore(counts.map((count) => (count > 0 ? 1 : 0))),
    plogp: sumsBefore(counts.map((count) => timesLog(count, count))),
  };
  const zero = edges.findLastIndex((edge) => edge <= 0);
  let range = [0, BINS];
  for (const side of edges[BINS] >= -edges[0] ? ["right", "left"] : ["left", "right"]) {
    const tries = rangesToTry(side, range, zero, levels);
    const lost = [];
    for (const [first, last] of tries) {
      lost.push(divergence(bins, sums, cuts, first, last));
      if (lost.length % AT_ONCE === 0) yield;
    }
    const least = Math.min(...lost);
    range = tries[lost.findLastIndex((one) => one <= least + EQUAL)];
  }
  return range.map((bin) => edges[bin]);
}

export function* entropy(tensor, format) {
  const ends = extremes(tensor);
  const cuts = levelCuts(format);
  const values = valuesOf(tensor, format);
  if (values.counts.length < cuts.length) return ends;
  const [from, to] = [Math.min(ends.low, 0), Math.max(ends.high, 0)];
  const range = format.symmetric ? [0, Math.max(-from, to)] : [from, to];
  const [low, high] = yield* leastDivergence(values, ...range, cuts);
  return format.symmetric ? within(tensor, -high, high) : within(tensor, low, high);
}
