// The page: what is chosen, when it is drawn, and what is found in between.
import { Answers, HAND, highestSqnr } from "./answers.js";
import { Controls } from "./controls.js";
import { element } from "./drawing.js";
import { ModelMap } from "./map.js";
import { measureOf } from "./measures.js";
import { valuesOfCodes } from "./scales.js";
import { STYLE, isDark, onTheme, paletteOf } from "./style.js";
import { TensorPlot, isWaiting } from "./tensor.js";
import { isJudged } from "./words.js";

export const DEFAULTS = {
  selected: "", base_name: "input", format: "int8", symmetric: true, observer: "static_minmax", clip: 1, color: "cost",
};
const A_MOMENT = 6; // milliseconds between two frames that may be spent

function baseNames(record) {
  const found = [...new Set(record.tensors.map((tensor) => tensor.base))];
  return found.sort((a, b) => (a === "weight") - (b === "weight"));
}

// What a page begins with: the format and the observer of the recording, where nothing else was chosen.
function beginning(record, host) {
  const first = record.tensors.find((tensor) => tensor.own && tensor.base === "input");
  const recorded = first ? { format: first.format, symmetric: first.symmetric, observer: first.own } : {};
  const chosen = Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, host.get(name)])
    .filter(([, value]) => value !== undefined && value !== null));
  const state = { ...DEFAULTS, ...recorded, ...chosen };
  const bases = baseNames(record);
  return bases.length && !bases.includes(state.base_name) ? { ...state, base_name: bases[0] } : state;
}

// host: {get(name), set(name, value, isFinal), on(changed)}: who else knows what is chosen.
export class Page {
  constructor(place, record, host) {
    this.host = host;
    this.state = beginning(record, host);
    this.answers = new Answers(record);
    this.record = record;
    this.frame = this.job = 0;
    this.frames = []; // how long the last ones took, in milliseconds
    this.build(place);
    this.ends = [onTheme(() => this.recolor()), host.on?.((name, value) => this.heard(name, value))];
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(this.root);
    this.recolor();
  }

  build(place) {
    this.shadow = place.shadowRoot ?? place.attachShadow({ mode: "open" });
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(STYLE);
    this.shadow.adoptedStyleSheets = [sheet];
    this.controls = new Controls(this, baseNames(this.record));
    this.map = new ModelMap(this);
    this.plot = new TensorPlot(this);
    this.columns = element("div", { className: "columns" }, this.map.node, this.plot.node);
    this.empty = element("div", { className: "empty" });
    this.bubble = element("div", { className: "tip", hidden: true });
    this.spoken = element("div", { className: "spoken", "aria-live": "polite" });
    const inside = [this.controls.node, this.columns, this.empty, this.bubble, this.spoken];
    this.root = element("div", { className: "view" }, ...inside);
    this.shadow.replaceChildren(this.root);
  }

  // --- what is chosen ---

  set(changes, isFinal = true) {
    Object.assign(this.state, changes);
    for (const [name, value] of Object.entries(changes)) this.host.set?.(name, value, isFinal);
    this.draw();
  }

  heard(name, value) {
    if (!(name in this.state) || this.state[name] === value || this.plot.side !== null) return;
    this.state[name] = value;
    this.draw();
  }

  tensors() { return this.answers.shown(this.state.base_name); }

  // The selected tensor; if none is, the one with the largest outliers.
  current() {
    const seen = this.tensors().filter((tensor) => tensor.count);
    const selected = seen.find((tensor) => tensor.paths.includes(this.state.selected));
    return selected ?? seen.reduce((a, b) => (!a || (b.ratio ?? 0) > (a.ratio ?? 0) ? b : a), null);
  }

  result() {
    const tensor = this.current();
    if (this.state.observer === HAND) return this.answers.byHand(tensor, this.state);
    return this.answers.result(tensor, this.state.observer, this.state, false) ?? null;
  }

  // The ends of what the chosen range can store.
  rangeEnds() {
    const result = this.result();
    if (!result) return null;
    const { low, high } = this.answers.format(this.state);
    return valuesOfCodes([low, high], result);
  }

  // A row for each observer of the selected tensor, and one for the hand.
  table() {
    const tensor = this.current();
    const { state, answers } = this;
    const row = (name, result) => {
      const cost = result === null ? NaN : answers.costOf(tensor, name, state);
      return { name, result, sqnr: result?.sqnr ?? NaN, bound: result?.bound ?? 0, cost };
    };
    const rows = answers.names(state).map((name) => row(name, answers.result(tensor, name, state, false)));
    const own = answers.isRecorded(tensor, state) ? tensor.own : "";
    const highest = highestSqnr(rows, own);
    const best = answers.isRecorded(tensor, state) && tensor.best;
    for (const one of rows) {
      one.isHighest = one.name === highest;
      one.isBest = one.name === best && isJudged(one.cost);
    }
    return [...rows, row(HAND, state.observer === HAND ? this.result() : null)];
  }

  // --- frames ---

  draw() {
    if (!this.frame && !this.closed) this.frame = requestAnimationFrame(() => this.paint());
  }

  paint() {
    this.frame = 0;
    const began = performance.now();
    const isEmpty = !this.current();
    this.columns.hidden = this.controls.node.hidden = isEmpty;
    this.empty.hidden = !isEmpty;
    if (isEmpty) return this.tellEmpty();
    this.controls.draw();
    this.plot.draw();
    this.map.node.hidden = this.record.tensors.length < 2;
    this.columns.classList.toggle("both", !this.map.node.hidden);
    if (!this.map.node.hidden) this.map.draw();
    this.frames.push(performance.now() - began);
    this.later();
  }

  tellEmpty() {
    const hint = this.record.tensors.length
      ? "Tensors are known, but no finite value was seen." : "Every tensor appears here while it runs.";
    this.empty.replaceChildren(element("b", { textContent: "Nothing recorded yet" }), `${hint} Feed a batch.`);
  }

  // What need not be known at once is found between frames, a moment at a time; never while a hand drags.
  later() {
    if (this.job || this.closed || this.plot.side !== null) return;
    this.job = setTimeout(() => {
      this.job = 0;
      if (!this.closed && this.plot.side === null && this.foundMore(performance.now() + A_MOMENT)) this.draw();
    }, 0);
  }

  // Go on with what is not known yet. False if everything is.
  foundMore(until) {
    const tensor = this.current();
    if (!tensor) return false;
    const { answers, state } = this;
    const waiting = isWaiting(this.table());
    if (waiting) return answers.step(tensor, waiting.name, state, until) || true;
    const wasDone = answers.curve(tensor, state).left.length === 0;
    if (!wasDone) return answers.growCurve(tensor, state, until) || true;
    const measure = measureOf(answers, state);
    if (!measure.isSlow) return false;
    const isMissing = (one) => one.count && answers.peek(one, measure.observer, state) === undefined;
    const missing = this.tensors().filter(isMissing);
    for (const one of missing) if (!answers.step(one, measure.observer, state, until)) return true;
    return missing.length > 0;
  }

  // --- beside the picture ---

  recolor() {
    this.root.dataset.theme = isDark() ? "dark" : "light";
    this.colors = paletteOf(this.root);
    this.draw();
  }

  tip(event, words) {
    this.bubble.hidden = !words;
    if (!words) return;
    this.bubble.textContent = words;
    const { left, top, width } = this.root.getBoundingClientRect();
    const [x, y] = [event.clientX - left, event.clientY - top];
    const wide = this.bubble.offsetWidth;
    const beside = x + 14 + wide > width ? Math.max(4, x - wide - 14) : x + 14;
    this.bubble.style.transform = `translate(${beside}px, ${y + 16}px)`;
  }

  say(words) { this.spoken.textContent = words; }

  // While batches run: the same page, with what is known now.
  update(record) {
    this.record = record;
    this.answers = new Answers(record);
    this.map.drawn = this.plot.placed = "";
    this.map.hovered = null;
    this.draw();
  }

  close() {
    this.closed = true;
    cancelAnimationFrame(this.frame);
    clearTimeout(this.job);
    this.resized.disconnect();
    for (const end of this.ends) end?.();
    this.shadow.replaceChildren();
  }
}
