// What a scale costs: error, clipping, levels used; with a bound on how far off that can be.
import { cellsOf, placesOf, signalOf } from "./buckets.js";
import { ROUND, wider } from "./rounding.js";

const SLACK = 1 + 1e-6; // a value at the limit is not clipped

// Every place through the format and back: the code points, and the values that these stand for.
function quantized(tensor, format, { scale, zero }) {
  const { values } = placesOf(tensor);
  const forth = ROUND[wider(tensor.exact ? tensor.dtype : "float32", tensor.dtype)];
  const back = ROUND[tensor.dtype];
  const { low, high, round } = format;
  const points = new Float64Array(values.length);
  const after = new Float64Array(values.length);
  for (let k = 0; k < values.length; k++) {
    const scaled = forth(values[k] / scale);
    const moved = zero ? forth(scaled + zero) : scaled;
    const point = round(moved < low ? low : moved > high ? high : moved);
    points[k] = point;
    after[k] = back(back(back(point) - zero) * scale);
  }
  return { points, after };
}

// The squared errors at the places of one bucket, from number `first` on, into `found`.
function errorsIn(values, after, first, per, found) {
  let sum = 0;
  let fourth = 0;
  let least = Infinity;
  let most = 0;
  for (let k = first; k < first + per; k++) {
    const error = Math.abs(after[k] - values[k]);
    const square = error * error;
    sum += square;
    fourth += square * square;
    if (error < least) least = error;
    if (error > most) most = error;
  }
  found.mean = sum / per;
  found.spread = Math.sqrt(Math.max(fourth / per - found.mean * found.mean, 0));
  found.least = least;
  found.most = most;
}

function isAlone(codes, i) {
  const left = i === 0 || codes[i] - codes[i - 1] > 1;
  return left || i === codes.length - 1 || codes[i + 1] - codes[i] > 1;
}

// How far the sum over a bucket can be off, where nothing lies beside it.
function worst({ mean, least, most }, between) {
  return Math.max((most + between) ** 2 - mean, mean - Math.max(least - between, 0) ** 2);
}

function decibels(signal, noise) {
  if (!signal) return NaN;
  return noise ? 10 * Math.log10(signal / noise) : Infinity;
}

function boundInDecibels(noise, off) {
  if (!off) return 0;
  return off < noise ? 10 * Math.log10(1 / (1 - off / noise)) : Infinity;
}

// Σ (QDQ(x) - x)² over all values, and how far off that sum can be.
function noiseOf(tensor, after) {
  const { values, per } = placesOf(tensor);
  const { codes, counts } = tensor;
  const cells = tensor.exact ? null : cellsOf(tensor);
  const errors = { mean: 0, spread: 0, least: 0, most: 0 };
  let noise = 0;
  let off = 0;
  let evens = 0;
  for (let i = 0; i < codes.length; i++) {
    errorsIn(values, after, i * per, per, errors);
    noise += counts[i] * errors.mean;
    if (tensor.exact) continue;
    if (isAlone(codes, i)) off += counts[i] * worst(errors, (cells.high[i] - cells.low[i]) / (2 * per));
    else evens += (counts[i] * errors.spread) ** 2;
  }
  return { noise, off: tensor.exact ? 0 : 4 * Math.sqrt(evens) + off };
}

// SQNR in dB alone, for curves.
export function sqnrOf(tensor, format, scaled) {
  return decibels(signalOf(tensor), noiseOf(tensor, quantized(tensor, format, scaled).after).noise);
}

// How many values are rounded to each code point, and how many are clipped.
function countsOf(tensor, format, { scale, zero }, points) {
  const { values, per } = placesOf(tensor);
  const masses = new Float64Array(format.points.length);
  const [under, over] = format.limits.map((limit) => limit * SLACK);
  let clipped = 0;
  for (let k = 0; k < values.length; k++) {
    const share = tensor.counts[Math.floor(k / per)] / per;
    const units = values[k] / scale + zero;
    masses[format.place(points[k])] += share;
    if (units < under || units > over) clipped += share;
  }
  return { masses, clipped };
}

function entropyInBits(masses) {
  const total = masses.reduce((sum, mass) => sum + mass, 0);
  let found = 0;
  for (const mass of masses) if (mass > 0) found -= (mass / total) * Math.log2(mass / total);
  return found + 0; // no negative zero
}

export function qualityOf(tensor, format, scaled) {
  const { points, after } = quantized(tensor, format, scaled);
  const { noise, off } = noiseOf(tensor, after);
  const { masses, clipped } = countsOf(tensor, format, scaled, points);
  return {
    clipped: clipped / tensor.count,
    mse: noise / tensor.count,
    sqnr: decibels(signalOf(tensor), noise),
    bound: boundInDecibels(noise, off),
    levels: masses.filter((mass) => mass >= 0.5).length,
    bits: entropyInBits(masses),
  };
}
