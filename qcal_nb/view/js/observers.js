// The observers that a histogram can answer for, in any format. Each is a generator: it yields now and then, so that a
// page can draw meanwhile, and returns {low, high}.
import { absolute, middle, placesOf, quantile } from "./buckets.js";
import { entropy } from "./entropy.js";
import { ROUND } from "./rounding.js";
import { extremes, scaleOf, within } from "./scales.js";

function* staticMinmax(tensor) { return extremes(tensor); }

const PERCENTILE = 99.99;

function* percentile(tensor, format) {
  const share = PERCENTILE / 100;
  if (format.symmetric) {
    const { values, counts } = absolute(tensor);
    const size = quantile(values, counts, share);
    return within(tensor, -size, size);
  }
  const values = Array.from(tensor.codes, (code) => middle(code, tensor.exact));
  return within(tensor, quantile(values, tensor.counts, 1 - share), quantile(values, tensor.counts, share));
}

const SEARCH = { maxshrink: 0.2, patience: 5, grid: 100, norm: 2.4 };

// Σ |QDQ(x) - x|^norm, every value in the tensor's dtype.
function errorOf(tensor, format, { scale, zero }, ends) {
  const round = ROUND[tensor.dtype];
  const { values, per } = placesOf(tensor, 4, false);
  let total = 0;
  for (let i = 0, k = 0; i < tensor.counts.length; i++) {
    let sum = 0;
    for (let j = 0; j < per; j++, k++) {
      const x = Math.max(ends.low, Math.min(ends.high, values[k]));
      const moved = zero ? round(round(x / scale) + zero) : round(x / scale);
      const code = format.round(moved < format.low ? format.low : moved > format.high ? format.high : moved);
      sum += Math.abs(round(round(round(code) - zero) * scale) - x) ** SEARCH.norm;
    }
    total += tensor.counts[i] * (sum / per);
  }
  return total;
}

function* histogramMse(tensor, format) {
  const round = ROUND[tensor.dtype];
  const share = tensor.dtype === "float64" ? (x) => x : Math.fround;
  const ends = extremes(tensor);
  let best = { error: Infinity, ...ends };
  for (let step = 0, idle = 0; step < Math.trunc(SEARCH.maxshrink * SEARCH.grid); step++) {
    const p = share(1 - step / SEARCH.grid);
    const [low, high] = [round(ends.low * p), round(ends.high * p)];
    const error = errorOf(tensor, format, scaleOf(low, high, format, tensor.dtype), ends);
    idle = error < best.error ? 0 : idle + 1;
    if (error < best.error) best = { error, low, high };
    if (idle >= SEARCH.patience) break;
    yield;
  }
  return { low: best.low, high: best.high };
}

export const OBSERVERS = { static_minmax: staticMinmax, percentile, entropy, histogram_mse: histogramMse };

// Run a generator to its end.
export function atOnce(generator) {
  let step = generator.next();
  while (!step.done) step = generator.next();
  return step.value;
}
