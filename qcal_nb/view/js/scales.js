// From a range to a scale and a zero point, as compressed-tensors calculates them in the tensor's dtype.
import { EPS, ROUND, even } from "./rounding.js";

function clamp(x, low, high) { return Math.max(low, Math.min(high, x)); }

function zeroPoint(low, scale, format, round) {
  const wanted = round(format.low - round(low / scale));
  if (Number.isNaN(wanted)) return 0;
  return even(clamp(clamp(wanted, format.low, format.high), -128, 127)) + 0; // no negative zero
}

// `low` and `high` are numbers of the dtype.
export function scaleOf(low, high, format, dtype) {
  const round = ROUND[dtype];
  const from = Math.min(low, 0);
  const to = Math.max(high, 0);
  const span = round(format.high - format.low);
  const exact = format.symmetric ? round(Math.max(-from, to) / round(span / 2)) : round(round(to - from) / span);
  const zero = format.symmetric ? 0 : zeroPoint(from, exact, format, round);
  return { scale: exact === 0 ? EPS[dtype] : exact, zero };
}

// The range and scale for a share of a tensor's range.
export function byHand(tensor, format, clip) {
  const round = ROUND[tensor.dtype];
  const low = round(round(tensor.min) * clip);
  const high = round(round(tensor.max) * clip);
  return { low, high, ...scaleOf(low, high, format, tensor.dtype) };
}

// Code points, or places beside them, as the values that they stand for.
export function valuesOfCodes(codes, { scale, zero }) { return codes.map((code) => (code - zero) * scale); }

// The extremes in the tensor's dtype.
export function extremes(tensor) {
  const round = ROUND[tensor.dtype];
  return { low: round(tensor.min), high: round(tensor.max) };
}

// A range in the tensor's dtype, never beyond the extremes.
export function within(tensor, low, high) {
  const ends = extremes(tensor);
  const put = (x) => Math.max(ends.low, Math.min(ends.high, ROUND[tensor.dtype](x)));
  return { low: put(low), high: put(high) };
}
