// Elements, and marks on a canvas.

// An element: properties, listeners (`onclick`), attributes, and what is inside.
export function element(tag, properties = {}, ...inside) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && name !== "role") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...inside);
  return node;
}

const FONT = '11.5px system-ui, -apple-system, "Segoe UI", sans-serif';

// An empty canvas of this height, as wide as its place, sharp on every screen.
export function cleared(canvas, height) {
  const width = canvas.clientWidth || 600;
  const ratio = devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) {
    Object.assign(canvas, { width: w, height: h });
    canvas.style.height = `${height}px`;
  }
  const g = canvas.getContext("2d");
  g.setTransform(ratio, 0, 0, ratio, 0, 0);
  g.clearRect(0, 0, width, height);
  g.font = FONT;
  g.textBaseline = "middle";
  return { g, width };
}

export function crisp(place) { return Math.round(place) + 0.5; }

export function write(g, words, x, y, color, align = "left", weight = "") {
  g.save();
  if (weight) g.font = `${weight} ${FONT}`;
  g.textAlign = align;
  g.fillStyle = color;
  g.fillText(words, x, y);
  g.restore();
}

// Words with the ground's colour around them, over whatever is there.
export function writeOver(g, words, x, y, color, ground, align = "left") {
  g.save();
  Object.assign(g, { lineWidth: 4, strokeStyle: ground, textAlign: align, font: `600 ${FONT}` });
  g.strokeText(words, x, y);
  g.restore();
  write(g, words, x, y, color, align, "600");
}

export function line(g, x0, y0, x1, y1, color, width = 1) {
  g.strokeStyle = color;
  g.lineWidth = width;
  g.beginPath();
  g.moveTo(x0, y0);
  g.lineTo(x1, y1);
  g.stroke();
}

export function box(g, x, y, width, height, color) {
  g.fillStyle = color;
  g.fillRect(x, y, width, height);
}

export function rounded(g, x, y, width, height, radius, fill, stroke = null) {
  g.beginPath();
  g.roundRect(x, y, width, height, radius);
  g.fillStyle = fill;
  g.fill();
  if (!stroke) return;
  g.strokeStyle = stroke;
  g.stroke();
}

export function dot(g, x, y, fill, stroke) {
  g.beginPath();
  g.arc(x, y, 3.5, 0, 7);
  g.fillStyle = fill;
  g.fill();
  if (!stroke) return;
  Object.assign(g, { strokeStyle: stroke, lineWidth: 1.5 });
  g.stroke();
}
