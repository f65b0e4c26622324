// What the page looks like: a style sheet of its own inside a shadow tree, so that neither page spoils the other.
export const STYLE = `
:host { display: block; container: view / inline-size; }
* { box-sizing: border-box; }
h3, p, dl, ol { margin: 0; padding: 0; }
[hidden] { display: none !important; }
.view {
  --ground: #fff; --ink: #1c2024; --dim: #60656c; --faint: #70757c; --line: #e3e5e8; --panel: #f6f7f9;
  --kept: #5b7fa8; --kept-soft: #c9d6e5; --clipped: #c8500a; --hand: #6d3fa0; --hand-soft: #efe8f6; --focus: #2f6fd6;
  --h0: #eeece9; --h1: #f7c795; --h2: #e8812f; --h3: #a93c05; --h4: #541c02;
  position: relative; padding: 12px 14px 14px; border-radius: 6px;
  color: var(--ink); background: var(--ground); font-variant-numeric: tabular-nums;
  font: 13px/1.45 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
}
.view[data-theme=dark] {
  --ground: #15181c; --ink: #e8eaed; --dim: #a2a8b0; --faint: #868d96; --line: #2b3036; --panel: #1d2126;
  --kept: #7ea6d3; --kept-soft: #33475e; --clipped: #ff8a4c; --hand: #e6ccff; --hand-soft: #2d2440; --focus: #7fb0ff;
  --h0: #24272b; --h1: #5a3216; --h2: #b45a17; --h3: #f39a47; --h4: #ffe3bd;
}
.bar { display: flex; flex-wrap: wrap; gap: 8px 18px; align-items: center;
  padding-bottom: 10px; border-bottom: 1px solid var(--line); margin-bottom: 12px; }
.bar fieldset { display: flex; flex-wrap: wrap; align-items: center; gap: 7px; min-width: 0;
  border: 0; padding: 0; margin: 0; }
.bar legend { float: left; padding: 0; color: var(--dim); }
.choice { display: inline-flex; flex-wrap: wrap; background: var(--panel); border-radius: 6px; padding: 2px; }
button { font: inherit; color: inherit; background: none; border: 0; border-radius: 4px; padding: 3px 9px;
  cursor: pointer; min-height: 26px; }
.choice button { color: var(--dim); }
.choice button[aria-pressed=true] { background: var(--ground); color: var(--ink); font-weight: 600;
  box-shadow: 0 0 0 1px var(--line), 0 1px 2px #0001; }
.choice button:disabled { opacity: .4; cursor: default; }
select { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line); border-radius: 5px;
  padding: 2px 6px; min-height: 28px; max-width: 100%; }
button:focus-visible, canvas:focus-visible, select:focus-visible {
  outline: 2px solid var(--focus); outline-offset: 1px; }
.columns { display: grid; grid-template-columns: minmax(0, 1fr); gap: 18px 30px; }
@container view (min-width: 1080px) {
  .columns.both { grid-template-columns: minmax(380px, 11fr) minmax(0, 19fr); }
}
@container view (min-width: 560px) and (max-width: 1079px) {
  .worst { display: grid; grid-template-columns: 1fr 1fr; gap: 0 24px; }
}
h3 { font-size: 15px; font-weight: 650; line-height: 1.3; overflow-wrap: anywhere; }
.dim, .note { color: var(--dim); }
.note { font-size: 12px; margin-top: 6px; }
.facts, .hint { min-height: 1.45em; }
canvas { display: block; width: 100%; }
.plot { position: relative; margin-top: 6px; touch-action: pan-y; }
.legend { display: flex; align-items: center; gap: 7px; color: var(--dim); font-size: 12px; margin: 5px 0 7px; }
.ramp { height: 8px; width: 130px; border-radius: 2px; }
.says { font-size: 15px; margin: 8px 0 2px; min-height: 2.9em; }
.figures { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 2px 14px; margin: 8px 0 4px;
  padding: 8px 0; border: solid var(--line); border-width: 1px 0; }
@container view (max-width: 620px) { .figures { grid-template-columns: repeat(3, minmax(0, 1fr)); } }
.figures dt { color: var(--dim); font-size: 11.5px; }
.figures dd { margin: 0; font-size: 17px; font-weight: 600; white-space: nowrap; letter-spacing: -.01em; }
.figures small { font-size: 11.5px; font-weight: 400; color: var(--dim); }
.grip { position: absolute; width: 28px; margin-left: -14px; cursor: ew-resize; border-radius: 5px; touch-action: none;
  outline: none; }
.grip:focus-visible::after { content: ""; position: absolute; left: 5px; top: var(--y); width: 18px; height: 28px;
  border-radius: 6px; box-shadow: 0 0 0 2px var(--focus); }
.row { position: absolute; left: 0; width: 124px; height: 22px; min-height: 0; padding: 0 8px 0 2px; text-align: right;
  font-size: 12px; line-height: 22px; color: var(--dim);
  white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.row[aria-pressed=true] { color: var(--ink); font-weight: 650; }
.row.hand { color: var(--hand); }
.row:hover { color: var(--ink); }
.cap { font-weight: 600; margin-top: 10px; }
.worst { list-style: none; margin-top: 4px; }
.worst button { display: grid; grid-template-columns: minmax(0, 1fr) auto auto; gap: 10px; width: 100%;
  padding: 2px 6px; text-align: left; }
.worst button:hover, .worst button[aria-current=true] { background: var(--panel); }
.worst span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.warn:not(:empty) { border-left: 3px solid var(--clipped); padding: 3px 9px; margin-top: 6px;
  background: var(--panel); }
.empty { padding: 42px 16px; text-align: center; color: var(--dim); background: var(--panel); border-radius: 6px; }
.empty b { display: block; color: var(--ink); font-size: 15px; }
.tip { position: absolute; left: 0; top: 0; z-index: 5; max-width: 340px; padding: 4px 8px; border-radius: 4px;
  pointer-events: none; white-space: pre; font-size: 12px; line-height: 1.4;
  background: var(--ink); color: var(--ground); }
.spoken { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media print { .bar, .grip, .tip { display: none !important; } .view { --ground: #fff; --ink: #000; } }
@media (forced-colors: active) { .choice button[aria-pressed=true] { outline: 2px solid Highlight; } }
`;

// Is the page around this one dark? JupyterLab and VS Code say so; else the system does.
export function isDark() {
  const { dataset, classList } = document.body;
  if (dataset.jpThemeLight) return dataset.jpThemeLight === "false";
  if (classList.contains("vscode-dark") || classList.contains("vscode-high-contrast")) return true;
  if (classList.contains("vscode-light")) return false;
  return !matchMedia("print").matches && matchMedia("(prefers-color-scheme: dark)").matches;
}

// Call `changed` whenever that may have changed. Returns what ends it.
export function onTheme(changed) {
  const media = [matchMedia("(prefers-color-scheme: dark)"), matchMedia("print")];
  const watch = new MutationObserver(changed);
  for (const one of media) one.addEventListener("change", changed);
  watch.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
  return () => {
    for (const one of media) one.removeEventListener("change", changed);
    watch.disconnect();
  };
}

const COLORS = [
  "ground", "ink", "dim", "faint", "line", "panel", "kept", "kept-soft", "clipped", "hand", "hand-soft", "focus",
  "h0", "h1", "h2", "h3", "h4",
];

function channels(hex) {
  const digits = hex.length === 4 ? [...hex.slice(1)].map((digit) => digit + digit).join("") : hex.slice(1);
  return [0, 2, 4].map((i) => parseInt(digits.slice(i, i + 2), 16));
}

// Colours for the canvas, as the style sheet has them; `ramp(0 … 1)`: from little to much harm.
export function paletteOf(root) {
  const style = getComputedStyle(root);
  const found = Object.fromEntries(COLORS.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  const heat = [found.h0, found.h1, found.h2, found.h3, found.h4];
  const stops = heat.map(channels);
  const ramp = (share) => {
    const place = Math.max(0, Math.min(1, share)) * (stops.length - 1);
    const i = Math.min(stops.length - 2, Math.floor(place));
    const mixed = stops[i].map((from, k) => Math.round(from + (stops[i + 1][k] - from) * (place - i)));
    return `rgb(${mixed.join(",")})`;
  };
  return { ...found, ramp, gradient: `linear-gradient(90deg, ${heat.join(",")})` };
}
