// The histogram of a tensor: {codes: Int16Array, counts: Float64Array, exact, dtype, min, max, count, mean, std}.
import { ROUND, fromBits } from "./rounding.js";

const INFINITE = 0x7f80; // the bucket of infinity

export function magnitude(code) { return code < 0 ? -1 - code : code; }

function edge(bits) { return bits >= INFINITE * 65536 ? 2 ** 128 : fromBits(bits); }

// The number that stands for a bucket: itself where the bucket holds one number, else its middle.
export function middle(code, exact) {
  const size = magnitude(code);
  const value = size ? edge(size * 65536 + (exact ? 0 : 0x8000)) : 0;
  return code < 0 ? -value : value;
}

// Where a bucket begins and ends.
export function ends(code, exact) {
  const size = magnitude(code);
  const shift = exact ? 0x8000 : 0; // values that were rounded to a number lie around it
  const near = edge(Math.max(size * 65536 - shift, 0));
  const far = edge((size + 1) * 65536 - shift);
  return code < 0 ? [-far, -near] : [near, far];
}

function found(tensor, name, find) {
  tensor.known ??= new Map();
  if (!tensor.known.has(name)) tensor.known.set(name, find());
  return tensor.known.get(name);
}

export function sumsBefore(values) {
  const sums = new Float64Array(values.length + 1);
  values.forEach((value, i) => { sums[i + 1] = sums[i] + value; });
  return sums;
}

// The ends of all buckets.
export function cellsOf(tensor) {
  return found(tensor, "cells", () => {
    const n = tensor.codes.length;
    const cells = { low: new Float64Array(n), high: new Float64Array(n) };
    for (let i = 0; i < n; i++) [cells.low[i], cells.high[i]] = ends(tensor.codes[i], tensor.exact);
    return cells;
  });
}

export const POINTS = 16;

// Where the buckets are looked at: `per` values in each, flat. Those of quality lie within the extremes, in float32.
export function placesOf(tensor, per = POINTS, clipped = true) {
  if (tensor.exact) return found(tensor, "exact places", () => exactPlaces(tensor));
  return found(tensor, `places ${per} ${clipped}`, () => inexactPlaces(tensor, per, clipped));
}

function exactPlaces(tensor) {
  const round = ROUND[tensor.dtype];
  return { values: Float64Array.from(tensor.codes, (code) => round(middle(code, true))), per: 1 };
}

function inexactPlaces(tensor, per, clipped) {
  const { low, high } = cellsOf(tensor);
  const round = clipped ? Math.fround : ROUND[tensor.dtype];
  const inside = clipped ? (x) => Math.max(tensor.min, Math.min(tensor.max, x)) : (x) => x;
  const values = new Float64Array(low.length * per);
  for (let i = 0, k = 0; i < low.length; i++) {
    const from = inside(low[i]);
    const width = inside(high[i]) - from;
    for (let j = 0; j < per; j++, k++) values[k] = round(from + (width * (j + 0.5)) / per);
  }
  return { values, per };
}

// Σ x² of all values.
export function signalOf(tensor) { return tensor.count * (tensor.std ** 2 + tensor.mean ** 2); }

// The value below which a share of all lies, between the two nearest.
export function quantile(values, counts, share) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  const rank = share * (total - 1);
  const [first, second] = [Math.floor(rank), Math.ceil(rank)].map((place) => valueAt(values, counts, place));
  return first + (second - first) * (rank - Math.floor(rank));
}

function valueAt(values, counts, place) {
  let before = 0;
  for (let i = 0; i < counts.length; i++) {
    before += counts[i];
    if (before > place) return values[i];
  }
  return NaN;
}

// The histogram of |x|: bucket numbers from 0 on, their middles, counts, and where they begin and end.
export function absolute(tensor) {
  return found(tensor, "absolute", () => {
    const counts = new Map();
    tensor.codes.forEach((code, i) => {
      const size = magnitude(code);
      counts.set(size, (counts.get(size) ?? 0) + tensor.counts[i]);
    });
    const sizes = [...counts.keys()].sort((a, b) => a - b);
    return {
      sizes,
      values: sizes.map((size) => middle(size, tensor.exact)),
      counts: sizes.map((size) => counts.get(size)),
      ends: sizes.map((size) => ends(size, tensor.exact)),
    };
  });
}

// How many values lie below each of some edges that ascend; those of a bucket are spread evenly over it.
export function countsBelow(lower, upper, counts, edges) {
  const before = sumsBefore(counts);
  let i = 0;
  return Float64Array.from(edges, (edge) => {
    while (i < counts.length && upper[i] <= edge) i++;
    if (i === counts.length || edge <= lower[i]) return before[i];
    return before[i] + (counts[i] / (upper[i] - lower[i])) * (edge - lower[i]);
  });
}

export function differences(sums) { return sums.slice(1).map((sum, k) => sum - sums[k]); }
