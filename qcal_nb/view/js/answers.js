// What the page knows of its tensors. Each question is answered once; what takes long is answered in pieces.
import { format } from "./formats.js";
import { OBSERVERS } from "./observers.js";
import { qualityOf, sqnrOf } from "./quality.js";
import { byHand, scaleOf } from "./scales.js";

export const FORMATS = ["int8", "int7", "int6", "int5", "int4", "int3", "int2", "fp8", "fp4"];
export const HAND = "by hand";
export const SLOW = new Set(["entropy", "histogram_mse"]);
export const LEAST = 0.002; // of the range: how far a range by hand can shrink
const CLIPS = 97;

// Of some observers of one tensor, that with the largest SQNR; `own` if their bounds cannot tell it from that.
export function highestSqnr(rows, own = "") {
  const known = rows.filter((row) => row.sqnr === row.sqnr);
  if (!known.length) return null;
  const slack = (row) => (Number.isFinite(row.bound) ? row.bound : 0);
  const top = known.reduce((best, row) => (row.sqnr > best.sqnr ? row : best));
  const ties = known.filter((row) => row.sqnr + slack(row) >= top.sqnr - slack(top));
  if (!own) return ties[0].name;
  return (ties.find((row) => row.name === own) ?? top).name;
}

export class Answers {
  constructor(record) {
    this.record = record;
    this.known = new Map();
    this.formats = new Map();
    this.working = new Map(); // generators that are not at their end
  }

  format({ format: name, symmetric }) {
    const key = `${name} ${symmetric}`;
    if (!this.formats.has(key)) this.formats.set(key, format(name, symmetric));
    return this.formats.get(key);
  }

  shown(baseName) {
    return this.once(`shown ${baseName}`, () => this.record.tensors.filter((tensor) => tensor.base === baseName));
  }

  once(key, find) {
    if (!this.known.has(key)) this.known.set(key, find());
    return this.known.get(key);
  }

  key(tensor, state, what) { return `${tensor.stats} ${state.format} ${state.symmetric} ${what}`; }

  // Is the format that of the recording? Only then is known what it costs, and what attached observers found.
  isRecorded(tensor, state) {
    return tensor.format === state.format && tensor.symmetric === this.format(state).symmetric;
  }

  names({ base_name: base }) {
    return this.once(`names ${base}`, () => {
      const attached = this.shown(base).flatMap((tensor) => tensor.observers.map((one) => one.name));
      return [...new Set([...Object.keys(OBSERVERS), ...attached])];
    });
  }

  // What an observer finds: undefined while it is not known, null if it cannot be told here.
  result(tensor, name, state, wait = true) {
    const key = this.key(tensor, state, name);
    if (this.known.has(key)) return this.known.get(key);
    if (!tensor.count) return this.once(key, () => null);
    if (!OBSERVERS[name]) return this.once(key, () => this.attached(tensor, name, state));
    if (!wait && SLOW.has(name)) return undefined;
    while (!this.step(tensor, name, state));
    return this.known.get(key);
  }

  // The same, if it was found already; undefined if it was not.
  peek(tensor, name, state) { return this.known.get(this.key(tensor, state, name)); }

  // Go on with what takes long, until a moment has passed. True when it is known.
  step(tensor, name, state, until = Infinity) {
    const key = this.key(tensor, state, name);
    if (this.known.has(key)) return true;
    if (!tensor.count || !OBSERVERS[name]) {
      this.result(tensor, name, state);
      return true;
    }
    const values = tensor.load();
    const made = this.format(state);
    if (!this.working.has(key)) this.working.set(key, OBSERVERS[name](values, made));
    do {
      const { done, value } = this.working.get(key).next();
      if (!done) continue;
      this.working.delete(key);
      const scaled = { ...value, ...scaleOf(value.low, value.high, made, values.dtype) };
      this.known.set(key, this.judged(values, made, scaled));
      return true;
    } while (performance.now() < until);
    return false;
  }

  judged(values, made, scaled) { return { ...scaled, ...qualityOf(values, made, scaled) }; }

  attached(tensor, name, state) {
    const found = tensor.observers.find((one) => one.name === name);
    if (!found || found.scales !== 1 || !this.isRecorded(tensor, state)) return null;
    return this.judged(tensor.load(), this.format(state), found);
  }

  // Only the last is kept: the next is another range.
  byHand(tensor, state) {
    const key = this.key(tensor, state, state.clip);
    if (this.lastByHand?.key !== key) {
      const values = tensor.load();
      const made = this.format(state);
      this.lastByHand = { key, result: this.judged(values, made, byHand(values, made, state.clip)) };
    }
    return this.lastByHand.result;
  }

  // What a choice costs the model, nats per token; NaN where that is not known.
  costOf(tensor, name, state) {
    if (!this.isRecorded(tensor, state)) return NaN;
    if (name === HAND) return this.costOfClip(tensor, state.clip);
    return tensor.observer_kl?.[name] ?? (name === tensor.own ? tensor.kl : undefined) ?? NaN;
  }

  costOfClip(tensor, clip) {
    const costs = tensor.clip_kl;
    const place = 100 * (1 - clip); // costs are of 100, 99, 98 … percent of the range
    if (!costs || place > costs.length - 1) return NaN;
    const i = Math.min(Math.floor(place), costs.length - 2);
    return costs[i] + (costs[i + 1] - costs[i]) * (place - i);
  }

  // SQNR over the share of the range, from coarse to fine.
  curve(tensor, state) {
    return this.once(this.key(tensor, state, "curve"), () => {
      const clips = Array.from({ length: CLIPS }, (_, i) => LEAST ** (1 - i / (CLIPS - 1)));
      const order = [];
      for (let step = 32; step; step >>= 1) for (let i = 0; i < CLIPS; i += step) if (!order.includes(i)) order.push(i);
      return { clips, db: new Float64Array(CLIPS).fill(NaN), left: order, best: -1 };
    });
  }

  growCurve(tensor, state, until) {
    const curve = this.curve(tensor, state);
    const values = tensor.load();
    const made = this.format(state);
    while (curve.left.length && performance.now() < until) {
      const i = curve.left.shift();
      curve.db[i] = sqnrOf(values, made, byHand(values, made, curve.clips[i]));
      if (curve.best < 0 || curve.db[i] > curve.db[curve.best]) curve.best = i;
    }
    return curve.left.length === 0;
  }
}
