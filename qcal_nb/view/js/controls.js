// The bar above: which tensors, stored as what, with the range of which observer.
import { FORMATS, HAND } from "./answers.js";
import { element } from "./drawing.js";

// A row of buttons of which one is pressed.
class Choice {
  constructor(page, label, name, options, words = String) {
    this.page = page;
    this.name = name;
    this.options = options;
    const buttons = options.map((option) => element("button", {
      type: "button", textContent: words(option), onclick: () => page.set({ [name]: option }),
    }));
    this.node = element("div", { className: "choice", role: "group", "aria-label": label }, ...buttons);
  }

  show(value = this.page.state[this.name]) {
    [...this.node.children].forEach((button, i) => button.setAttribute("aria-pressed", this.options[i] === value));
  }
}

function field(label, node) {
  return element("fieldset", {}, element("legend", { textContent: label }), node);
}

export function choice(...what) { return new Choice(...what); }

export class Controls {
  constructor(page, baseNames) {
    this.page = page;
    this.base = choice(page, "Tensor", "base_name", baseNames, (name) => `${name}s`);
    this.formats = choice(page, "Format", "format", FORMATS);
    this.zero = choice(page, "Zero point", "symmetric", [true, false], (is) => (is ? "symmetric" : "asymmetric"));
    this.observer = element("select", {
      "aria-label": "Observer", onchange: () => page.set({ observer: this.observer.value }),
    });
    this.node = element("div", { className: "bar" }, field("Show", this.base.node),
      field("stored as", this.formats.node), this.zero.node, field("range from", this.observer));
  }

  draw() {
    const { state, answers } = this.page;
    const made = answers.format(state);
    this.base.show();
    this.formats.show();
    this.zero.show(made.symmetric);
    this.zero.node.children[1].disabled = !made.isInt;
    const names = [...answers.names(state), HAND];
    if ([...this.observer.options].map((option) => option.value).join() !== names.join()) {
      this.observer.replaceChildren(...names.map((name) => element("option", { value: name, textContent: name })));
    }
    this.observer.value = state.observer;
  }
}
