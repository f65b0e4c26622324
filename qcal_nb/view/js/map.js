// The model: a cell for each tensor, by layer and kind; below, in the same columns, the ranges; and the worst six.
import { HAND } from "./answers.js";
import { symlog } from "./axes.js";
import { choice } from "./controls.js";
import { box, cleared, crisp, element, line, write } from "./drawing.js";
import { measureOf, rangeOf } from "./measures.js";
import { inFigures, inDecibels, shortPath, whole } from "./words.js";

const STRIP = 118; // height of the ranges
const GAP = 26; // between cells and ranges, for the numbers of the layers
const WORST = 6;
const HINT = "Bars: smallest to largest value; dark: 99.8 % of them. Drag over layers to pick some.";

function unique(values) { return [...new Set(values)]; }

function kindOf(tensor) { return tensor.layer === null ? "other" : tensor.kind; }

// Where the cells are: columns of layers, rows of kinds; experts of a layer beside each other in its column.
export function layoutOf(tensors, width) {
  const layers = unique(tensors.map((tensor) => tensor.layer)).sort((a, b) => (a === null) - (b === null) || a - b);
  const kinds = unique(tensors.map(kindOf));
  const label = Math.min(150, Math.max(40, ...kinds.map((kind) => kind.length * 6.4 + 10)));
  const tall = Math.max(2, Math.min(20, 300 / Math.max(1, kinds.length)));
  const wide = Math.min(72, (width - label - 2) / Math.max(1, layers.length));
  const experts = Math.max(1, ...tensors.map((tensor) => (tensor.expert ?? 0) + 1));
  const cells = tensors.map((tensor) => {
    const column = layers.indexOf(tensor.layer);
    const row = kinds.indexOf(kindOf(tensor));
    const part = tensor.expert === null ? wide : wide / experts;
    return { tensor, column, row, x: label + column * wide + (tensor.expert ?? 0) * part, y: row * tall, wide: part };
  });
  return { layers, kinds, label, tall, wide, cells, height: kinds.length * tall, width };
}

function stripScale(cells, top) {
  const sizes = cells.map(({ tensor }) => Math.max(-tensor.min, tensor.max)).filter((size) => size > 0);
  sizes.sort((a, b) => a - b);
  const reach = sizes[sizes.length - 1] ?? 1;
  const small = sizes[Math.floor(sizes.length / 20)] ?? 1;
  const start = Math.max(10 ** Math.floor(Math.log10(small)), 10 ** (Math.ceil(Math.log10(reach)) - 4));
  const { to } = symlog(start);
  const middle = top + STRIP / 2;
  return { reach, start, middle, y: (value) => middle - (to(value) / to(reach)) * (STRIP / 2 - 6) };
}

export class ModelMap {
  constructor(page) {
    this.page = page;
    this.hovered = null;
    this.brush = null; // columns from … to, or null for all
    this.title = element("h3");
    this.legend = element("div", { className: "legend" });
    this.colors = choice(page, "Colour", "color", ["cost", "outliers"], (is) => (is === "cost" ? "harm" : "outliers"));
    this.canvas = element("canvas", { tabIndex: 0, role: "img" });
    this.hint = element("p", { className: "dim hint" });
    this.cap = element("p", { className: "cap" });
    this.worst = element("ol", { className: "worst" });
    this.node = element("section", { "aria-label": "All tensors" }, this.title,
      element("div", { className: "legend" }, this.colors.node, this.legend),
      this.canvas, this.hint, this.cap, this.worst);
    this.still = document.createElement("canvas"); // what does not move with the hand
    this.drawn = "";
    this.listen();
  }

  // What the picture depends on, but for the hand.
  key() {
    const { state, answers, root } = this.page;
    return [state.base_name, state.format, state.symmetric, state.color, this.measure.observer, answers.known.size,
      this.brush, this.canvas.clientWidth, devicePixelRatio, root.dataset.theme, this.page.current()?.path].join("|");
  }

  draw() {
    this.measure = measureOf(this.page.answers, this.page.state);
    const key = this.key();
    if (key !== this.drawn) {
      this.drawn = key;
      this.drawStill();
    }
    this.drawMarks();
  }

  drawStill() {
    const tensors = this.page.tensors();
    this.layout = layoutOf(tensors, this.canvas.clientWidth || 400);
    this.top = this.layout.height + GAP;
    const { g } = cleared(this.canvas, this.top + STRIP + 20);
    this.range = rangeOf(this.measure, tensors);
    for (const cell of this.layout.cells) this.drawCell(g, cell);
    g.globalAlpha = 1;
    this.drawLabels(g);
    this.drawRanges(g);
    Object.assign(this.still, { width: this.canvas.width, height: this.canvas.height });
    this.still.getContext("2d").drawImage(this.canvas, 0, 0);
    this.describe();
  }

  isPicked({ column }) { return !this.brush || (column >= this.brush[0] && column <= this.brush[1]); }

  drawCell(g, cell) {
    const { colors } = this.page;
    const value = this.measure.value(cell.tensor);
    const inset = cell.wide > 7 && this.layout.tall > 7 ? 1 : 0;
    g.globalAlpha = this.isPicked(cell) ? 1 : 0.25;
    const color = Number.isNaN(value) ? colors.panel : colors.ramp(this.measure.harm(value, this.range));
    box(g, cell.x, cell.y, Math.max(1, cell.wide - inset), this.layout.tall - inset, color);
    if (cell.tensor.nan || cell.tensor.inf) this.drawCross(g, cell);
  }

  drawCross(g, { x, y, wide }) {
    const { tall } = this.layout;
    const size = Math.max(1.5, Math.min(wide, tall) / 2 - 3);
    const [cx, cy] = [x + wide / 2, y + tall / 2];
    line(g, cx - size, cy - size, cx + size, cy + size, this.page.colors.ink, 1.2);
    line(g, cx + size, cy - size, cx - size, cy + size, this.page.colors.ink, 1.2);
  }

  drawLabels(g) {
    const { kinds, layers, label, tall, wide, height } = this.layout;
    const { colors } = this.page;
    const every = Math.ceil(11 / tall);
    kinds.forEach((kind, i) => {
      if (i % every === 0) write(g, kind, label - 8, (i + 0.5) * tall, colors.dim, "right");
    });
    const step = [1, 2, 5, 10, 20, 50, 100].find((n) => n * wide >= 24) ?? 200;
    write(g, "layer", label - 8, height + 11, colors.faint, "right");
    layers.forEach((layer, i) => {
      if (layer !== null && i % step) return;
      write(g, layer === null ? "other" : String(layer), label + (i + 0.5) * wide, height + 11, colors.dim, "center");
    });
  }

  drawRanges(g) {
    const { cells, label, width, kinds, wide } = this.layout;
    const { colors } = this.page;
    this.strip = stripScale(cells, this.top);
    const { reach, start, middle, y } = this.strip;
    write(g, "0", label - 8, middle, colors.dim, "right");
    for (const value of unique([reach, start])) if (middle - y(value) > 14) this.drawReach(g, value);
    const bar = wide / (kinds.length + (wide > 10 ? 1.5 : 0));
    for (const cell of cells.filter(({ tensor }) => tensor.count)) this.drawRange(g, cell, bar);
    g.globalAlpha = 1;
    line(g, label, crisp(middle), width, crisp(middle), colors.faint);
  }

  drawReach(g, value) {
    const { label, width } = this.layout;
    for (const end of [value, -value]) {
      const y = this.strip.y(end);
      line(g, label, crisp(y), width, crisp(y), this.page.colors.line);
      write(g, inFigures(end, 2), label - 8, y, this.page.colors.dim, "right");
    }
  }

  drawRange(g, cell, bar) {
    const { colors } = this.page;
    const { tensor } = cell;
    const { y } = this.strip;
    const columnX = this.layout.label + cell.column * this.layout.wide;
    const share = tensor.expert === null ? 0 : (cell.x - columnX) / this.layout.wide;
    cell.barX = columnX + (this.layout.wide > 10 ? bar / 2 : 0) + (cell.row + share) * bar;
    cell.barWide = Math.max(0.7, bar * 0.78);
    g.globalAlpha = this.isPicked(cell) ? 1 : 0.22;
    box(g, cell.barX, y(tensor.max), cell.barWide, Math.max(1, y(tensor.min) - y(tensor.max)), colors["kept-soft"]);
    if (!tensor.band) return;
    const [low, high] = tensor.band;
    box(g, cell.barX, y(high), cell.barWide, Math.max(1, y(low) - y(high)), colors.kept);
  }

  // What moves: the cell under the pointer, the selected one, and what its range keeps.
  drawMarks() {
    const g = this.canvas.getContext("2d");
    const ratio = devicePixelRatio || 1;
    g.setTransform(1, 0, 0, 1, 0, 0);
    g.clearRect(0, 0, this.canvas.width, this.canvas.height);
    g.drawImage(this.still, 0, 0);
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    const { colors } = this.page;
    const selected = this.page.current();
    for (const cell of this.layout.cells) {
      if (cell.tensor === this.hovered && cell.tensor !== selected) this.outline(g, cell, colors.dim, 1.5);
      if (cell.tensor !== selected) continue;
      this.outline(g, cell, colors.ground, 4);
      this.outline(g, cell, colors.ink, 2);
      this.drawKept(g, cell);
    }
    if (this.brush) this.drawBrush(g);
  }

  outline(g, { x, y, wide }, color, width) {
    Object.assign(g, { strokeStyle: color, lineWidth: width });
    g.strokeRect(x - 0.5, y - 0.5, Math.max(3, wide), this.layout.tall);
  }

  drawKept(g, cell) {
    const ends = this.page.rangeEnds();
    if (!ends || cell.barX === undefined) return;
    const { reach, y } = this.strip;
    const [low, high] = ends.map((end) => y(Math.max(-reach, Math.min(reach, end))));
    const color = this.page.state.observer === HAND ? this.page.colors.hand : this.page.colors.ink;
    const x = cell.barX + cell.barWide / 2;
    for (const end of [low, high]) box(g, x - 5, Math.round(end) - 1, 10, 2, color);
    g.globalAlpha = 0.35;
    box(g, x - 0.5, high, 1, low - high, color);
    g.globalAlpha = 1;
  }

  drawBrush(g) {
    const [from, to] = this.brush;
    const { label, wide } = this.layout;
    Object.assign(g, { strokeStyle: this.page.colors.focus, lineWidth: 1.5 });
    g.strokeRect(label + from * wide, this.top - 1, (to - from + 1) * wide, STRIP + 2);
  }

  // --- words ---

  describe() {
    const picked = this.layout.cells.filter((cell) => this.isPicked(cell)).map((cell) => cell.tensor);
    const what = `${whole(picked.length)} ${this.page.state.base_name}${picked.length === 1 ? "" : "s"}`;
    this.title.textContent = this.measure.title(this.page.state, what);
    this.colors.show();
    const [from, to] = this.measure.legend(this.range);
    this.legend.replaceChildren(element("span", { textContent: from }),
      element("span", { className: "ramp", style: `background: ${this.page.colors.gradient}` }),
      element("span", { textContent: to }));
    const all = { type: "button", textContent: "Show all layers", onclick: () => this.pick(null) };
    this.hint.replaceChildren(this.brush ? element("button", all) : HINT);
    const selected = this.page.current();
    this.canvas.setAttribute("aria-label", `${this.title.textContent}, by layer and kind, ${from} to ${to}. Arrow keys `
      + `move; selected is ${selected ? shortPath(selected.name) : "none"}.`);
    this.listWorst(picked);
  }

  listWorst(tensors) {
    const { value, words, isWorse } = this.measure;
    const known = tensors.filter((tensor) => !Number.isNaN(value(tensor)));
    known.sort((a, b) => (isWorse(value(a), value(b)) ? -1 : isWorse(value(b), value(a)) ? 1 : 0));
    const worst = known.slice(0, WORST);
    this.cap.textContent = worst.length ? this.measure.cap : "";
    while (this.worst.children.length < worst.length) this.worst.append(this.worstButton());
    [...this.worst.children].forEach((item, i) => {
      item.hidden = i >= worst.length;
      if (!item.hidden) this.fillButton(item.firstChild, worst[i], words(value(worst[i])));
    });
  }

  worstButton() {
    const inside = [element("span"), element("span", { className: "dim" }), element("b")];
    const button = element("button", { type: "button" }, ...inside);
    button.addEventListener("click", () => this.page.set({ selected: button.dataset.path }));
    return element("li", {}, button);
  }

  fillButton(button, tensor, words) {
    button.dataset.path = tensor.path;
    button.setAttribute("aria-current", tensor === this.page.current());
    const said = [shortPath(tensor.name), `±${inFigures(Math.max(-tensor.min, tensor.max), 2)}`, words];
    said.forEach((text, i) => { button.children[i].textContent = text; });
  }

  tip(tensor) {
    if (!tensor.count) return `${shortPath(tensor.name)}\nno finite value seen`;
    const others = tensor.nan || tensor.inf ? `\n${whole(tensor.nan)} NaN, ${whole(tensor.inf)} infinite` : "";
    const value = this.measure.value(tensor);
    const range = `${inFigures(tensor.min)} … ${inFigures(tensor.max)}, ${whole(tensor.count)} values`;
    const said = Number.isNaN(value) ? "" : `\n${this.measure.words(value)}`;
    const noise = this.page.answers.result(tensor, this.measure.observer, this.page.state, false);
    const isOther = noise && this.measure.words !== inDecibels;
    const more = isOther ? `\n${inDecibels(noise.sqnr)} with ${this.measure.observer}` : "";
    return `${shortPath(tensor.name)}\n${range}${said}${more}${others}`;
  }

  // --- pointer and keys ---

  place(event) {
    const { left, top } = this.canvas.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  }

  column(x) {
    const { layers, label, wide } = this.layout;
    return Math.max(0, Math.min(layers.length - 1, Math.floor((x - label) / wide)));
  }

  inStrip(y) { return y >= this.top && y <= this.top + STRIP; }

  find(x, y) {
    const { cells, label, tall } = this.layout;
    if (x < label) return null;
    if (y < this.layout.height) {
      const isAt = (cell) => x >= cell.x && x < cell.x + cell.wide && y >= cell.y && y < cell.y + tall;
      return cells.find(isAt)?.tensor ?? null;
    }
    if (!this.inStrip(y)) return null;
    const there = cells.filter((cell) => cell.column === this.column(x) && cell.barX !== undefined);
    there.sort((a, b) => Math.abs(a.barX - x) - Math.abs(b.barX - x));
    return there[0]?.tensor ?? null;
  }

  pick(columns) {
    this.brush = columns;
    this.page.draw();
  }

  listen() {
    const on = (name, heard) => this.canvas.addEventListener(name, heard);
    on("pointermove", (event) => this.moved(event));
    on("pointerleave", () => this.left());
    on("pointerdown", (event) => this.pressed(event));
    on("pointerup", (event) => this.released(event));
    on("pointercancel", () => { this.from = null; });
    on("keydown", (event) => this.keyed(event));
  }

  moved(event) {
    const [x, y] = this.place(event);
    if (this.from !== null && this.from !== undefined && this.column(x) !== this.from) this.isBrushing = true;
    if (this.isBrushing) return this.pick([Math.min(this.from, this.column(x)), Math.max(this.from, this.column(x))]);
    const tensor = this.find(x, y);
    this.canvas.style.cursor = tensor ? "pointer" : "default";
    if (tensor !== this.hovered) {
      this.hovered = tensor;
      this.page.draw();
    }
    this.page.tip(event, tensor ? this.tip(tensor) : "");
  }

  left() {
    this.hovered = null;
    this.page.tip(null, "");
    this.page.draw();
  }

  pressed(event) {
    const [x, y] = this.place(event);
    this.isBrushing = false;
    this.from = this.inStrip(y) && x >= this.layout.label && !event.button ? this.column(x) : null;
    if (this.from !== null) this.canvas.setPointerCapture(event.pointerId);
  }

  released(event) {
    const wasBrushing = this.isBrushing;
    this.from = null;
    this.isBrushing = false;
    if (wasBrushing || event.button) return;
    const tensor = this.find(...this.place(event));
    if (tensor?.count) this.page.set({ selected: tensor.path });
  }

  keyed(event) {
    if (event.key === "Escape") return this.pick(null);
    const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = this.neighbour(step);
    if (!next) return;
    this.page.set({ selected: next.path });
    this.page.say(this.tip(next).replaceAll("\n", ", "));
  }

  // The nearest tensor with values in a direction.
  neighbour([right, down]) {
    const here = this.layout.cells.find((cell) => cell.tensor === this.page.current());
    if (!here) return null;
    const ahead = this.layout.cells.filter((cell) => {
      const [dx, dy] = [cell.x - here.x, cell.y - here.y];
      return cell.tensor.count && (right ? dx * right > 0 && dy === 0 : dy * down > 0 && cell.column === here.column);
    });
    const distance = (cell) => Math.abs(cell.x - here.x) + Math.abs(cell.y - here.y);
    ahead.sort((a, b) => distance(a) - distance(b));
    return ahead[0]?.tensor ?? null;
  }
}
