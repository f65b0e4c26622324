// What a format can store: int2 … int8, fp4, fp8.
import { FP4, bitsOf, e2m1, e4m3, even } from "./rounding.js";

function fp8Points() {
  const found = [];
  for (let i = 0; i < 127; i++) found.push(i < 8 ? i / 512 : (1 + (i & 7) / 8) * 2 ** ((i >> 3) - 7));
  return found;
}

function withNegatives(points) {
  const below = points.slice(1).reverse().map((point) => -point);
  return [...below, ...points];
}

function codePoints(isInt, bits) {
  if (!isInt) return withNegatives(bits === 8 ? fp8Points() : FP4);
  return Array.from({ length: 2 ** bits }, (_, i) => i - 2 ** (bits - 1));
}

// From a code point to its place among all, for floats: by the upper 12 bits of the number.
function placesByBits(points) {
  const found = new Int16Array(4096);
  points.forEach((point, i) => { found[bitsOf(point) >>> 20] = i; });
  found[bitsOf(-0) >>> 20] = points.indexOf(0);
  return (point) => found[bitsOf(point) >>> 20];
}

// Beyond these, in units of the scale and counted from the zero point, a value is clipped.
function outerLimits(points) {
  const last = points.length - 1;
  return [points[0] - (points[1] - points[0]) / 2, points[last] + (points[last] - points[last - 1]) / 2];
}

export function format(name, symmetric = true) {
  const isInt = name.startsWith("int");
  const bits = Number(name.slice(isInt ? 3 : 2));
  const points = codePoints(isInt, bits);
  const low = points[0];
  const high = points[points.length - 1];
  return {
    name, isInt, points, low, high,
    symmetric: symmetric || !isInt,
    round: isInt ? even : bits === 8 ? e4m3 : e2m1,
    place: isInt ? (point) => point - low : placesByBits(points),
    limits: outerLimits(points),
  };
}
