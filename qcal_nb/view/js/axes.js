// From values to places on a picture, and back.
import { absolute, cellsOf, countsBelow, differences, quantile } from "./buckets.js";

const SMOOTH = 1 / Math.LN10; // decades that the linear part takes

// Decades of a value, with its sign; linear up to `start`, without a kink.
export function symlog(start) {
  const to = (value) => {
    const size = Math.abs(value) / start;
    return Math.sign(value) * (size <= 1 ? size * SMOOTH : SMOOTH + Math.log10(size));
  };
  const from = (place) => {
    const size = Math.abs(place);
    return Math.sign(place) * start * (size <= SMOOTH ? size / SMOOTH : 10 ** (size - SMOOTH));
  };
  return { to, from };
}

const LINEAR = { to: (value) => value, from: (place) => place };
const OUTLYING = 3; // times the bulk: beyond, the axis is logarithmic

export function absQuantile(tensor, share) {
  const { values, counts } = absolute(tensor);
  return quantile(values, counts, share);
}

// Where the logarithmic part begins: at the median of |x|, rounded to a power of ten.
function startOf(tensor, most) {
  const middle = absQuantile(tensor, 0.5) || most / 1000;
  return Math.max(10 ** Math.floor(Math.log10(middle)), most / 1e6);
}

// The axis of one tensor: from its least to its largest value, or as far as its largest |value| both ways.
export function valueAxis(tensor, isSymmetric, left, right) {
  const most = Math.max(Math.abs(tensor.min), Math.abs(tensor.max)) || 1;
  const body = absQuantile(tensor, 0.999);
  const isLinear = !(most > OUTLYING * body) || !body;
  const scale = isLinear ? LINEAR : symlog(startOf(tensor, most));
  const [low, high] = isSymmetric ? [-most, most] : [Math.min(tensor.min, 0), Math.max(tensor.max, 0)];
  const margin = 0.03 * (scale.to(high) - scale.to(low));
  const [from, to] = [scale.to(low) - margin, scale.to(high) + margin];
  return {
    isLinear, most, left, right,
    x: (value) => left + ((scale.to(value) - from) / (to - from)) * (right - left),
    value: (x) => scale.from(from + ((x - left) / (right - left)) * (to - from)),
    ticks: isLinear ? linearTicks(low, high) : logarithmicTicks(most, scale, low, high),
  };
}

function linearTicks(low, high) {
  const rough = (high - low) / 6;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= rough);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(k * step);
  return found;
}

function logarithmicTicks(most, scale, low, high) {
  const found = [0];
  for (let power = Math.floor(Math.log10(most)); power > -12; power--) {
    const value = 10 ** power;
    if (scale.to(value) < SMOOTH) break;
    if (value <= high) found.push(value);
    if (-value >= low) found.push(-value);
  }
  return found.sort((a, b) => a - b);
}

// The columns of a histogram, `wide` pixels each.
export function columnsOf(tensor, axis, wide) {
  const n = Math.max(1, Math.floor((axis.right - axis.left) / wide));
  const edges = Float64Array.from({ length: n + 1 }, (_, i) => axis.value(axis.left + i * wide));
  const { low, high } = cellsOf(tensor);
  return { edges, counts: differences(countsBelow(low, high, tensor.counts, edges)), wide };
}
