// Search in the header and the sidebar's place. Everything is loaded by <script>: fetch does not work from file://.
(() => {
  const here = document.currentScript.src;                            // …/parts/site.js
  const input = document.querySelector(".search input"), panel = document.querySelector(".panel");
  const list = document.getElementById("results"), said = panel.querySelector(".said");
  const words = text => text.match(/[\p{L}\p{N}_]+/gu) || [];
  let ready = null, engine = null, chosen = -1;

  // `load_tiny_llama` is found whole and by its parts, `CalibrationRecord` as well
  const parts = word => word.split(/_|(?<=[a-z0-9])(?=[A-Z])/).filter(Boolean);
  const tokens = text => words(text).flatMap(w => { const p = parts(w); return p.length > 1 ? [w, ...p] : [w]; });

  const script = name => new Promise((resolve, reject) => {
    const tag = document.createElement("script");
    tag.src = new URL(name, here); tag.onload = resolve; tag.onerror = () => reject(new Error(name));
    document.head.append(tag);
  });

  async function start() {
    await Promise.all([script("minisearch.js"), script("search-data.js")]);
    engine = new MiniSearch({ idField: "id", fields: ["t", "p", "x"], tokenize: tokens });
    engine.addAll(window.QCAL_SEARCH.map((d, id) => ({ id, t: d.t, p: d.p, x: d.x })));
  }

  function search(query) {
    const name = query.trim().replace(/\(.*$/, "").toLowerCase();
    // a name that is typed out comes first, then a heading that is the query, then whatever has the words
    const weight = id => { const d = window.QCAL_SEARCH[id], same = d.t.toLowerCase() === name; return same ? (d.k ? 100 : 10) : d.k === "method" ? 0.5 : 1; };
    return engine.search(query, {
      tokenize: words, combineWith: "AND", prefix: t => t.length > 1, fuzzy: t => t.length > 4 && 0.2,
      boost: { t: 3, p: 2 }, boostDocument: weight,
    }).slice(0, 20).map(found => ({ ...window.QCAL_SEARCH[found.id], terms: found.terms }));
  }

  function marked(text, terms) {                                      // the words around the first hit, hits in <mark>
    const low = text.toLowerCase(), at = Math.min(...terms.map(t => low.indexOf(t)).filter(i => i >= 0));
    const from = Number.isFinite(at) ? Math.max(0, low.lastIndexOf(" ", Math.max(0, at - 60))) : 0;
    const piece = (from ? "…" : "") + text.slice(from, from + 180) + (text.length > from + 180 ? "…" : "");
    const escaped = terms.map(t => t.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    const hits = escaped.length ? piece.split(new RegExp(`(${escaped.join("|")})`, "giu")) : [piece];
    return hits.map((part, i) => { if (i % 2 === 0) return part; const m = document.createElement("mark"); m.textContent = part; return m; });
  }

  function element(tag, className, ...children) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children);
    return made;
  }

  function result(found, i) {
    const link = element("a", "", element("b", "", found.t), " ", element("small", "", found.k ? `${found.k} · ${found.p}` : found.t === found.p ? "" : found.p));
    link.href = new URL("../" + found.u, here); link.id = `result-${i}`;
    link.setAttribute("role", "option"); link.tabIndex = -1;
    if (found.x) link.append(element("span", "words", ...marked(found.x, found.terms)));
    link.addEventListener("click", close);
    return link;
  }

  function choose(i) {
    chosen = i;
    [...list.children].forEach((link, j) => link.setAttribute("aria-selected", j === i));
    if (i >= 0) { input.setAttribute("aria-activedescendant", `result-${i}`); list.children[i].scrollIntoView({ block: "nearest" }); }
    else input.removeAttribute("aria-activedescendant");
  }

  function close() { panel.hidden = true; input.setAttribute("aria-expanded", "false"); choose(-1); }

  async function show() {
    const query = input.value;
    if (!words(query).length) return close();
    try { await (ready ??= start()); }
    catch (error) { list.replaceChildren(); said.textContent = `The search cannot be loaded: ${error.message} is missing.`; panel.hidden = false; return; }
    if (query !== input.value) return;                                // typed on meanwhile
    const found = search(query);
    list.replaceChildren(...found.map(result));
    said.textContent = found.length ? `${found.length === 20 ? "The best 20" : found.length} for “${query}”` : `Nothing found for “${query}”.${words(query).length > 1 ? " Every word has to occur; try fewer." : ""}`;
    panel.hidden = false; input.setAttribute("aria-expanded", "true");
    choose(found.length ? 0 : -1);
  }

  input.addEventListener("input", show);
  input.addEventListener("focus", () => { if (input.value) show(); else ready ??= start(); });
  input.addEventListener("keydown", event => {
    const n = list.children.length, step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && n && !panel.hidden) { event.preventDefault(); choose((chosen + step + n) % n); }
    if (event.key === "Escape") { event.preventDefault(); if (panel.hidden) input.blur(); close(); }
  });
  input.form.addEventListener("submit", async event => {              // Enter, on a telephone too
    event.preventDefault();
    if (panel.hidden) await show();
    if (chosen >= 0) list.children[chosen].click();
  });
  document.addEventListener("keydown", event => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
    event.preventDefault(); input.focus(); input.select();
  });
  document.addEventListener("click", event => { if (!input.form.contains(event.target)) close(); });

  const current = document.querySelector("nav.chapters [aria-current]");
  if (current) { const nav = current.closest("nav"); nav.scrollTop = current.offsetTop - nav.clientHeight / 2; }
})();
