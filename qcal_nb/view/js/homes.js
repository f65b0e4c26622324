// Where the page lives: in a document without a kernel, and in a widget.
import { fromBase64, unpacked } from "./data.js";
import { DEFAULTS, Page } from "./page.js";

// A page in a document: nobody else knows what is chosen.
export async function alive(place, text, state = {}) {
  const record = await unpacked(fromBase64(text));
  const page = new Page(place, record, { get: (name) => state[name] });
  place.qcal = page;
  return page;
}

const OFTEN = 100; // milliseconds between two messages while a hand drags

function bytesOf(view) { return new Uint8Array(view.buffer, view.byteOffset, view.byteLength); }

// A widget's model as a host: what is chosen is known on both sides.
function hostOf(model) {
  let timer = 0;
  const save = () => {
    clearTimeout(timer);
    timer = 0;
    model.save_changes();
  };
  const set = (name, value, isFinal) => {
    model.set(name, value);
    if (isFinal) save();
    else timer ||= setTimeout(save, OFTEN);
  };
  const on = (changed) => {
    const heard = Object.keys(DEFAULTS).map((name) => [`change:${name}`, () => changed(name, model.get(name))]);
    for (const [name, hear] of heard) model.on(name, hear);
    return () => { for (const [name, hear] of heard) model.off(name, hear); };
  };
  return { get: (name) => model.get(name), set, on };
}

export const widget = {
  async render({ model, el }) {
    const place = document.createElement("div");
    el.append(place);
    const page = new Page(place, await unpacked(bytesOf(model.get("data"))), hostOf(model));
    place.qcal = page;
    const again = async () => page.update(await unpacked(bytesOf(model.get("data"))));
    model.on("change:data", again);
    return () => {
      model.off("change:data", again);
      page.close();
    };
  },
};
