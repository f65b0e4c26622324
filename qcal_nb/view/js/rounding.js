// Numbers as torch rounds them: float64 with every rounding written out. Nothing here knows a document.
const word = new ArrayBuffer(4);
const asFloat = new Float32Array(word);
const asBits = new Uint32Array(word);

export function bitsOf(x) { // of a float32 number
  asFloat[0] = x;
  return asBits[0];
}

export function fromBits(bits) {
  asBits[0] = bits;
  return asFloat[0];
}

const BIG = 6755399441055744; // 1.5 * 2^52: adding it leaves no room for a fraction

// The nearest whole number, ties to even, for |x| < 2^51.
export function even(x) { return x + BIG - BIG; }

export function float64(x) { return x; }

export function float32(x) { return Math.fround(x); }

export function bfloat16(x) { // by way of float32, as torch does
  const bits = bitsOf(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return NaN;
  return fromBits((bits + 0x7fff + ((bits >>> 16) & 1)) & 0xffff0000);
}

export function float16(x) {
  const size = Math.abs(Math.fround(x));
  if (Number.isNaN(size)) return NaN;
  if (size >= 65520) return Math.sign(x) * Infinity;
  const step = 2 ** Math.max((bitsOf(size) >>> 23) - 127 - 10, -24);
  return Math.sign(x) * even(size / step) * step;
}

export const ROUND = { float64, float32, bfloat16, float16 };
export const EPS = { float64: 2 ** -52, float32: 2 ** -23, bfloat16: 2 ** -7, float16: 2 ** -10 };

// The dtype of a result of two.
export function wider(a, b) {
  if (a === b) return a;
  return a === "float64" || b === "float64" ? "float64" : "float32";
}

// fp8: four bits of exponent, three of mantissa; |x| <= 448.
export function e4m3(x) {
  const bits = bitsOf(x);
  const isSubnormal = (bits & 0x7fffffff) < 0x3c800000; // below 2^-6
  if (isSubnormal) return even(x * 512) / 512;
  return fromBits((bits + 0x7ffff + ((bits >>> 20) & 1)) & 0xfff00000);
}

export const FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6];
const FP4_UP_TO = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]; // half way; which of the two takes it alternates

// fp4: two bits of exponent, one of mantissa; |x| <= 6.
export function e2m1(x) {
  const size = Math.abs(x);
  let i = 0;
  while (i < FP4_UP_TO.length && (i % 2 ? size >= FP4_UP_TO[i] : size > FP4_UP_TO[i])) i++;
  return x < 0 ? -FP4[i] : FP4[i];
}
