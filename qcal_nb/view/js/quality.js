// What a scale costs: error, clipping, levels used; with a bound on how far off that can be.
import { cellsOf, placesOf, signalOf } from "./buckets.js";
import { ROUND, wider } from "./rounding.js";

const SLACK = 1 + 1e-6; // a value at the limit is not clipped

// One value through the format and back, and the code point between.
function quantizer(tensor, format, { scale, zero }) {
  const places = tensor.exact ? tensor.dtype : "float32";
  const forth = ROUND[wider(places, tensor.dtype)];
  const back = ROUND[tensor.dtype];
  const { low, high, round } = format;
  const code = (x) => {
    const scaled = forth(x / scale);
    const moved = zero ? forth(scaled + zero) : scaled;
    return round(moved < low ? low : moved > high ? high : moved);
  };
  return { code, value: (point) => back(back(back(point) - zero) * scale) };
}

// The squared errors at the places of one bucket, from number `first` on.
function errorsIn(values, first, per, { code, value }, seen) {
  const found = { mean: 0, spread: 0, least: Infinity, most: 0 };
  let sum = 0;
  let fourth = 0;
  for (let k = first; k < first + per; k++) {
    const point = code(values[k]);
    const error = Math.abs(value(point) - values[k]);
    sum += error * error;
    fourth += error ** 4;
    found.least = Math.min(found.least, error);
    found.most = Math.max(found.most, error);
    seen?.(point, values[k]);
  }
  found.mean = sum / per;
  found.spread = Math.sqrt(Math.max(fourth / per - found.mean ** 2, 0));
  return found;
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

// Σ (QDQ(x) - x)² over all values, and how far off that sum can be. `seen`: called with every place and its bucket.
function noiseOf(tensor, format, scaled, seen) {
  const { values, per } = placesOf(tensor);
  const { codes, counts } = tensor;
  const how = quantizer(tensor, format, scaled);
  const cells = tensor.exact ? null : cellsOf(tensor);
  let noise = 0;
  let off = 0;
  let evens = 0;
  for (let i = 0; i < codes.length; i++) {
    const errors = errorsIn(values, i * per, per, how, seen && ((point, x) => seen(point, x, counts[i] / per)));
    noise += counts[i] * errors.mean;
    if (tensor.exact) continue;
    if (isAlone(codes, i)) off += counts[i] * worst(errors, (cells.high[i] - cells.low[i]) / (2 * per));
    else evens += (counts[i] * errors.spread) ** 2;
  }
  return { noise, off: tensor.exact ? 0 : 4 * Math.sqrt(evens) + off };
}

// SQNR in dB alone, for curves.
export function sqnrOf(tensor, format, scaled) {
  return decibels(signalOf(tensor), noiseOf(tensor, format, scaled).noise);
}

function entropyInBits(masses) {
  const total = masses.reduce((sum, mass) => sum + mass, 0);
  let found = 0;
  for (const mass of masses) if (mass > 0) found -= (mass / total) * Math.log2(mass / total);
  return found + 0; // no negative zero
}

export function qualityOf(tensor, format, scaled) {
  const masses = new Float64Array(format.points.length);
  const [under, over] = format.limits.map((limit) => limit * SLACK);
  let clipped = 0;
  const { noise, off } = noiseOf(tensor, format, scaled, (point, x, share) => {
    masses[format.place(point)] += share;
    const units = x / scaled.scale + scaled.zero;
    if (units < under || units > over) clipped += share;
  });
  return {
    clipped: clipped / tensor.count,
    mse: noise / tensor.count,
    sqnr: decibels(signalOf(tensor), noise),
    bound: boundInDecibels(noise, off),
    levels: masses.filter((mass) => mass >= 0.5).length,
    bits: entropyInBits(masses),
  };
}
