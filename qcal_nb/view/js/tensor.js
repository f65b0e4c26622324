// One tensor: on one axis of values the noise of every range, the histogram, the values that a format can store, and a
// range for each observer. Two handles move the range by hand.
import { HAND, LEAST, SLOW } from "./answers.js";
import { columnsOf, valueAxis } from "./axes.js";
import { box, cleared, crisp, dot, element, line, rounded, write, writeOver } from "./drawing.js";
import { valuesOfCodes } from "./scales.js";
import { factsOf, inDecibels, inFigures, inNats, inPercent, sentence, shortPath } from "./words.js";
import { isJudged, tensorWords, warningOf, whole } from "./words.js";

const LEFT = 128; // for the labels
const RIGHT = 100; // for the numbers
const LANE = 62;
const AXIS = 22;
const CODES = 22;
const ROW = 24;
const WIDE = 4; // pixels of a column
const NOTE = "Columns: how many values are of that size, on a logarithmic scale. Drag a handle, or press into the "
  + "picture: between the handles the format's values are spread, beyond them is clipped.";
const SIDES = ["Lower end of the range", "Upper end of the range"];

function logarithm(count) { return count < 1 ? 0 : 0.35 + Math.log10(count); }

export class TensorPlot {
  constructor(page) {
    this.page = page;
    this.name = element("h3");
    this.facts = element("p", { className: "dim facts" });
    this.warn = element("div", { className: "warn" });
    this.says = element("p", { className: "says" });
    this.figures = element("dl", { className: "figures" });
    this.canvas = element("canvas", { role: "img" });
    this.grips = SIDES.map((label) => element("div", {
      className: "grip", tabIndex: 0, role: "slider", "aria-label": label,
      "aria-valuemin": 100 * LEAST, "aria-valuemax": 100,
    }));
    this.plot = element("div", { className: "plot" }, this.canvas, ...this.grips);
    this.rows = new Map(); // observer -> its button
    this.pick = element("select", { "aria-label": "Tensor", onchange: () => page.set({ selected: this.pick.value }) });
    this.node = element("section", { "aria-label": "One tensor" }, this.name, this.facts, this.warn, this.says,
      this.figures, this.plot, element("p", { className: "note", textContent: NOTE }),
      element("label", { className: "note" }, "Tensor ", this.pick));
    this.side = null; // which handle is being dragged
    this.listen();
  }

  draw() {
    const { page } = this;
    this.tensor = page.current();
    this.values = this.tensor.load();
    this.format = page.answers.format(page.state);
    this.result = page.result();
    this.table = page.table();
    this.place();
    const { g } = cleared(this.canvas, this.height);
    this.g = g;
    this.drawHistogram();
    this.drawAxis();
    this.drawCurve();
    this.drawCodes();
    this.drawRows();
    if (this.result) this.drawRange();
    this.tell();
  }

  // Where everything is: from above the curve, the histogram, the axis, code points, and a row for each observer.
  place() {
    const width = this.canvas.clientWidth || 600;
    const high = Math.max(150, Math.min(230, width / 3.2));
    this.x0 = LEFT;
    this.x1 = width - RIGHT;
    this.width = width;
    this.histogram = { top: LANE + 14, bottom: LANE + 14 + high };
    this.codes = this.histogram.bottom + AXIS + 4;
    this.below = this.codes + CODES + 4;
    this.height = this.below + this.table.length * ROW + 2;
    const key = [this.tensor.stats, this.format.symmetric, width].join();
    if (key === this.placed) return;
    this.placed = key;
    this.axis = valueAxis(this.values, this.format.symmetric, this.x0, this.x1);
    this.columns = columnsOf(this.values, this.axis, WIDE);
  }

  x(value) { return this.axis.x(value); }

  get tone() { return this.page.state.observer === HAND ? this.page.colors.hand : this.page.colors.ink; }

  ends() { return this.page.rangeEnds(); }

  // Beyond these a value is clipped: half a step outside of the ends.
  limits() {
    if (!this.result) return [-Infinity, Infinity];
    return valuesOfCodes(this.format.limits, this.result);
  }

  // --- lanes ---

  drawHistogram() {
    const { top, bottom } = this.histogram;
    const { colors } = this.page;
    const { counts, edges, wide } = this.columns;
    const most = logarithm(counts.reduce((a, b) => Math.max(a, b), 1));
    const up = (count) => ((bottom - top) * logarithm(count)) / most;
    for (let power = 0; logarithm(10 ** power) < most; power += 2) {
      const y = crisp(bottom - up(10 ** power));
      line(this.g, this.x0, y, this.x1, y, colors.line);
      write(this.g, power ? whole(10 ** power) : "1 value", this.x0 - 8, y, colors.dim, "right");
    }
    const [low, high] = this.limits();
    counts.forEach((count, i) => {
      if (count < 0.5) return;
      const middle = (edges[i] + edges[i + 1]) / 2;
      const color = middle < low || middle > high ? colors.clipped : colors.kept;
      box(this.g, this.x0 + i * wide, bottom - up(count), wide - 1, up(count), color);
    });
  }

  drawAxis() {
    const { colors } = this.page;
    const y = this.histogram.bottom;
    line(this.g, this.x0, crisp(y), this.x1, crisp(y), colors.dim);
    let last = -Infinity;
    for (const tick of this.axis.ticks) {
      const x = this.x(tick);
      line(this.g, crisp(x), y, crisp(x), y + 4, colors.dim);
      const words = inFigures(tick);
      const half = this.g.measureText(words).width / 2;
      if (x - half < last + 8) continue;
      write(this.g, words, x, y + 12, colors.dim, "center");
      last = x + half;
    }
    write(this.g, this.axis.isLinear ? "value" : "value (log)", this.x0 - 8, y + 12, colors.dim, "right");
  }

  drawCurve() {
    const { colors, answers, state } = this.page;
    const curve = answers.curve(this.tensor, state);
    const known = [...curve.db].filter(Number.isFinite);
    if (known.length < 5) return;
    const [peak, floor] = [Math.max(...known), Math.max(0, Math.min(...known))];
    this.curveY = (db) => LANE + 4 - (Math.max(0, db - floor) / (peak - floor || 1)) * (LANE - 10);
    write(this.g, "SQNR if the", this.x0 - 8, LANE - 20, colors.dim, "right");
    write(this.g, "range ended here", this.x0 - 8, LANE - 6, colors.dim, "right");
    line(this.g, this.x0, crisp(LANE + 4), this.x1, crisp(LANE + 4), colors.line);
    for (const end of this.whole()) this.drawSide(curve, end, peak);
  }

  // The ends of the whole range that can be dragged.
  whole() {
    const { min, max } = this.values;
    const { most } = this.axis;
    if (this.format.symmetric) return [-most, most];
    return [min, max].filter((end) => end !== 0);
  }

  drawSide(curve, end, peak) {
    const { g } = this;
    const { colors } = this.page;
    Object.assign(g, { strokeStyle: colors.dim, lineWidth: 1.6 });
    g.beginPath();
    curve.clips.forEach((clip, i) => {
      if (Number.isFinite(curve.db[i])) g.lineTo(this.x(clip * end), this.curveY(curve.db[i]));
    });
    g.stroke();
    if (curve.left.length || end < 0) return;
    const x = this.x(curve.clips[curve.best] * end);
    dot(g, x, this.curveY(peak), colors.ground, colors.ink);
    const words = `highest ${peak.toFixed(1)} dB`;
    const [beside, align] = x > this.x1 - 100 ? [-8, "right"] : [8, "left"];
    writeOver(g, words, x + beside, this.curveY(peak) - 1, colors.ink, colors.ground, align);
  }

  drawCodes() {
    const { g } = this;
    const { points, name } = this.format;
    const { colors } = this.page;
    if (!this.result) return;
    write(g, `${whole(points.length)} values that`, this.x0 - 8, this.codes + 5, colors.dim, "right");
    write(g, `${name} can store`, this.x0 - 8, this.codes + 18, colors.dim, "right");
    g.globalAlpha = points.length > 64 ? 0.55 : 0.9;
    for (const value of valuesOfCodes(points, this.result)) {
      const x = this.x(value);
      if (x >= this.x0 && x <= this.x1) box(g, x - 0.5, this.codes, 1, CODES - 8, this.tone);
    }
    g.globalAlpha = 1;
  }

  // --- a row for each observer ---

  drawRows() {
    const names = this.table.map((row) => row.name);
    this.table.forEach((row, i) => this.drawRow(row, this.below + (i + 0.5) * ROW));
    for (const [name, button] of this.rows) button.hidden = !names.includes(name);
  }

  drawRow(row, y) {
    const { colors, state } = this.page;
    const isOn = state.observer === row.name;
    const color = row.name === HAND ? colors.hand : isOn ? colors.ink : colors.dim;
    if (isOn) {
      const ground = row.name === HAND ? colors["hand-soft"] : colors.panel;
      rounded(this.g, 0, y - ROW / 2 + 1, this.width, ROW - 2, 4, ground);
    }
    const button = this.button(row.name);
    button.style.top = `${y - 11}px`;
    button.setAttribute("aria-pressed", isOn);
    if (!row.result) return write(this.g, this.whyEmpty(row), this.x0, y, colors.faint);
    const ends = valuesOfCodes([this.format.low, this.format.high], row.result);
    const [low, high] = ends.map((end) => Math.max(this.x0, Math.min(this.x1, this.x(end))));
    const thick = isOn ? 3 : 1.5;
    box(this.g, low, y - thick / 2, high - low, thick, color);
    for (const x of [low, high]) box(this.g, x - 0.75, y - 5, 1.5, 10, color);
    const ink = isOn || row.isBest ? colors.ink : colors.dim;
    write(this.g, this.rowWords(row), this.x1 + 8, y, ink, "left", row.isBest ? "600" : "");
  }

  rowWords(row) {
    if (Number.isNaN(row.cost)) return inDecibels(row.sqnr) + (row.isHighest ? " highest" : "");
    return (isJudged(row.cost) ? inNats(row.cost) : "measure") + (row.isBest ? " ★" : "");
  }

  whyEmpty({ name, result }) {
    if (name === HAND) return "drag a handle, or press into the picture";
    if (result === undefined) return "being found …";
    return `only for ${this.tensor.format} with one scale, as recorded`;
  }

  button(name) {
    if (!this.rows.has(name)) {
      const about = { type: "button", className: name === HAND ? "row hand" : "row", textContent: name };
      const button = element("button", { ...about, onclick: () => this.choose(name) });
      this.rows.set(name, button);
      this.plot.append(button);
    }
    return this.rows.get(name);
  }

  choose(name) { this.page.set(name === HAND ? { observer: HAND, clip: this.share() } : { observer: name }); }

  // --- the range, and its handles ---

  drawRange() {
    const { colors } = this.page;
    this.ends().forEach((end, k) => this.drawEnd(end, k));
    const lost = [0, 0];
    const [low, high] = this.limits();
    this.columns.counts.forEach((count, i) => {
      const middle = (this.columns.edges[i] + this.columns.edges[i + 1]) / 2;
      if (middle < low) lost[0] += count;
      if (middle > high) lost[1] += count;
    });
    lost.forEach((count, k) => {
      if (count < 1 || !this.result.clipped) return;
      this.besideEnd(k, `${whole(Math.round(count))} clipped`, this.histogram.top + 8, colors.clipped);
    });
  }

  // Words beside the line of an end, outside of the range where there is room.
  besideEnd(k, words, y, color) {
    const x = this.x(this.ends()[k]);
    const needed = this.g.measureText(words).width + 16;
    const room = k ? this.width - x : x - this.x0;
    const side = (k ? 1 : -1) * (room > needed ? 1 : -1);
    writeOver(this.g, words, x + side * 10, y, color, this.page.colors.ground, side > 0 ? "left" : "right");
  }

  drawEnd(end, k) {
    const grip = this.grips[k];
    const x = this.x(end);
    const isUsable = this.whole().some((one) => (k ? one > 0 : one < 0)) && x >= this.x0 - 1 && x <= this.x1 + 1;
    grip.hidden = !isUsable;
    if (!isUsable) return;
    const { g, tone } = this;
    const { colors, state } = this.page;
    const row = this.table.findIndex((one) => one.name === state.observer);
    line(g, crisp(x), 14, crisp(x), this.below + (row + 0.5) * ROW, tone, 1.5);
    const y = this.histogram.top + (this.histogram.bottom - this.histogram.top) * 0.42;
    rounded(g, x - 6, y, 12, 26, 4, colors.ground, tone);
    for (const dx of [-1.5, 1.5]) line(g, x + dx, y + 8, x + dx, y + 18, tone);
    this.besideEnd(k, inFigures(end), y + 13, tone);
    if (state.observer === HAND && this.curveY) dot(g, x, this.curveY(this.result.sqnr), tone);
    this.placeGrip(grip, x, y, end);
  }

  placeGrip(grip, x, y, end) {
    Object.assign(grip.style, { left: `${x}px`, top: "0px", height: `${this.below}px` });
    grip.style.setProperty("--y", `${y - 1}px`);
    grip.setAttribute("aria-valuenow", (100 * this.share()).toFixed(1));
    const words = `${inFigures(end)}, SQNR ${inDecibels(this.result.sqnr)}, ${inPercent(this.result.clipped)} clipped`;
    grip.setAttribute("aria-valuetext", words);
  }

  // How much of the whole range the present one is.
  share() {
    const { state } = this.page;
    if (state.observer === HAND || !this.result) return state.clip;
    const most = this.format.symmetric ? this.axis.most : Math.max(...this.whole().map(Math.abs));
    const reach = Math.max(Math.abs(this.result.low), Math.abs(this.result.high));
    return Math.max(LEAST, Math.min(1, reach / most));
  }

  // --- words ---

  tell() {
    const { state } = this.page;
    this.name.textContent = tensorWords(this.tensor);
    this.facts.textContent = factsOf(this.tensor);
    this.warn.textContent = warningOf(this.tensor);
    this.says.textContent = sentence(this.tensor, state, this.result, this.table);
    this.figures.replaceChildren(...this.cells());
    const noise = this.table.filter((row) => row.result).map((row) => `${row.name} ${inDecibels(row.sqnr)}`).join("; ");
    const what = `Histogram of the ${this.tensor.base} of ${shortPath(this.tensor.name)}`;
    this.canvas.setAttribute("aria-label", `${what}. ${noise}.`);
    this.listTensors();
  }

  listTensors() {
    const tensors = this.page.tensors();
    if (this.listed !== tensors) {
      this.listed = tensors;
      const option = ({ path, name }) => element("option", { value: path, textContent: shortPath(name) });
      this.pick.replaceChildren(...tensors.map(option));
    }
    this.pick.value = this.tensor.path;
  }

  cells() {
    const cell = (label, value, small = "") => element("div", {}, element("dt", { textContent: label }),
      element("dd", {}, value, small && element("small", { textContent: ` ${small}` })));
    if (!this.result) return [cell("SQNR", "–")];
    const { sqnr, bound, clipped, levels, scale, zero } = this.result;
    const cost = this.table.find((row) => row.name === this.page.state.observer)?.cost ?? NaN;
    const known = isJudged(cost) ? inNats(cost) : "too damaged";
    const last = Number.isNaN(cost) ? cell("MSE", inFigures(this.result.mse)) : cell("forecast cost", known);
    return [
      cell("SQNR", inDecibels(sqnr), bound > 0.005 && bound < 99 ? `± ${inFigures(bound, 2)}` : ""),
      cell("clipped", inPercent(clipped)), cell("levels used", String(levels), `of ${this.format.points.length}`),
      cell("scale", inFigures(scale, 4)), cell("zero point", inFigures(zero, 4)), last,
    ];
  }

  // --- pointer and keys ---

  listen() {
    this.grips.forEach((grip, k) => {
      grip.addEventListener("pointerdown", (event) => this.begin(event, k));
      grip.addEventListener("keydown", (event) => this.keyed(event, k));
      grip.addEventListener("dblclick", () => this.toHighest());
    });
    this.plot.addEventListener("pointerdown", (event) => this.pressed(event));
    this.plot.addEventListener("pointermove", (event) => this.moved(event));
    this.plot.addEventListener("pointerleave", () => this.page.tip(null, ""));
    for (const name of ["pointerup", "pointercancel"]) this.plot.addEventListener(name, () => this.ended());
  }

  begin(event, k) {
    if (event.button) return;
    event.preventDefault();
    event.stopPropagation();
    this.side = k;
    this.grips[k].focus({ preventScroll: true });
    this.plot.setPointerCapture(event.pointerId);
    this.page.tip(null, "");
  }

  where(event) {
    const { left, top } = this.canvas.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  }

  pressed(event) {
    const [x, y] = this.where(event);
    if (event.target !== this.canvas || event.button || x < this.x0 || x > this.x1 || y > this.below) return;
    this.begin(event, this.axis.value(x) >= 0 ? 1 : 0);
    this.dragTo(event);
  }

  dragTo(event) {
    const value = Math.abs(this.axis.value(this.where(event)[0]));
    const end = this.format.symmetric ? this.axis.most : Math.abs(this.side ? this.values.max : this.values.min);
    this.page.set({ observer: HAND, clip: Math.max(LEAST, Math.min(1, value / (end || this.axis.most))) }, false);
  }

  ended() {
    if (this.side === null) return;
    this.side = null;
    this.page.set({ clip: this.page.state.clip });
    this.page.say(this.says.textContent);
  }

  moved(event) {
    if (this.side !== null) return this.dragTo(event);
    const [x, y] = this.where(event);
    const isInside = event.target === this.canvas && x >= this.x0 && x <= this.x1 && y < this.below;
    this.page.tip(event, isInside ? this.columnWords(x) : "");
  }

  columnWords(x) {
    const { edges, counts, wide } = this.columns;
    const i = Math.max(0, Math.min(counts.length - 1, Math.floor((x - this.x0) / wide)));
    const words = `${inFigures(edges[i])} … ${inFigures(edges[i + 1])}\n${whole(Math.round(counts[i]))} values`;
    if (!this.result) return words;
    const { scale, zero } = this.result;
    const { low, high, round, isInt } = this.format;
    const code = round(Math.max(low, Math.min(high, (edges[i] + edges[i + 1]) / 2 / scale + zero)));
    return `${words}\nstored as ${inFigures((code - zero) * scale)}${isInt ? ` (code ${code})` : ""}`;
  }

  toHighest() {
    const curve = this.page.answers.curve(this.tensor, this.page.state);
    if (curve.best >= 0) this.page.set({ observer: HAND, clip: curve.clips[curve.best] });
  }

  keyed(event, k) {
    if (event.key === "Home") {
      event.preventDefault();
      return this.toHighest();
    }
    const [out, back] = k ? ["ArrowRight", "ArrowLeft"] : ["ArrowLeft", "ArrowRight"];
    const step = event.shiftKey ? 1.1 : 1.01;
    const inward = { [back]: 1 / step, ArrowDown: 1 / step, PageDown: 0.8 };
    const factor = { [out]: step, ArrowUp: step, PageUp: 1.25, End: Infinity, ...inward };
    if (!(event.key in factor)) return;
    event.preventDefault();
    this.page.set({ observer: HAND, clip: Math.max(LEAST, Math.min(1, this.share() * factor[event.key])) });
    this.page.say(this.says.textContent);
  }
}

export function isWaiting(table) { return table.find((row) => row.result === undefined && SLOW.has(row.name)); }
