// The sliders: one for each dimension, and one for each extra expert.

import { STEP, positionsOf, weightText, weightsOf } from "./profile.js";

export class Sliders {
  #root;
  #inputs = [];
  #show = [];
  #onMove;
  #onSettle;

  /** `onMove` is called at every move of a slider, `onSettle` when it is released. */
  constructor(root, { onMove, onSettle }) {
    this.#root = root;
    this.#onMove = onMove;
    this.#onSettle = onSettle;
    this.sliders = [];
  }

  build(sliders) {
    this.sliders = sliders;
    this.#inputs = [];
    this.#show = [];
    const sided = sliders.filter(({ low }) => low).map((slider) => this.#row(slider));
    const extra = sliders.filter(({ low }) => !low).map((slider) => this.#row(slider));
    const children = sided;
    if (extra.length) {
      const title = Object.assign(document.createElement("h3"), { textContent: "Extra experts", id: "extra-title" });
      const group = document.createElement("div");
      group.setAttribute("role", "group");
      group.setAttribute("aria-labelledby", title.id);
      group.append(title, ...extra);
      children.push(group);
    }
    if (!sliders.length) children.push(quiet("The server has no experts yet. Train one with psoups train."));
    this.#root.replaceChildren(...children);
    this.#root.setAttribute("aria-busy", "false");
  }

  get weights() {
    return weightsOf(this.sliders, this.#inputs.map((input) => input.valueAsNumber));
  }

  /** Move the sliders to the weights. Return whether their positions equal the weights. */
  place(weights) {
    const { positions, isExact } = positionsOf(this.sliders, weights);
    positions.forEach((position, at) => {
      const input = this.#inputs[at];
      // a saved 0.33 lies between two steps, and the input would round it
      input.step = Math.abs(position / STEP - Math.round(position / STEP)) < 1e-6 ? STEP : "any";
      input.valueAsNumber = position;
      this.#show[at]();
    });
    return isExact;
  }

  #row(slider) {
    const { name, about, low, high } = slider;
    const row = document.getElementById("slider").content.cloneNode(true).firstElementChild;
    const part = (selector) => row.querySelector(selector);
    const input = part("input");
    const reset = part(".reset");
    part(".name").textContent = low ? name : (high.dimension ?? "");
    part(".low").textContent = (low ?? high).name;
    part(".high").textContent = low ? high.name : "";
    row.classList.toggle("extra", !low);
    reset.setAttribute("aria-label", `Reset ${name} to 0`);
    input.setAttribute("aria-label", low ? `${name}: ${low.name} to ${high.name}` : name);
    input.step = STEP;

    const show = () => {
      const position = input.valueAsNumber;
      const leaning = position === 0 ? null : position < 0 && low ? low : high;
      const weight = low ? Math.abs(position) : position;
      part(".about b").textContent = weightText(weight);
      part(".about span").textContent = (leaning ? leaning.about : about) ?? about ?? "";
      const neither = low ? `0, neither ${low.name} nor ${high.name}` : `${name} 0`;
      input.setAttribute("aria-valuetext", leaning ? `${leaning.name} ${weightText(weight)}` : neither);
      row.dataset.side = position < 0 ? "low" : position > 0 ? "high" : "";
      row.style.setProperty("--from", Math.min(0.5, (position + 1) / 2));
      row.style.setProperty("--to", Math.max(0.5, (position + 1) / 2));
    };
    const toZero = () => {
      input.step = STEP;
      input.valueAsNumber = 0;
      show();
      this.#onMove();
      this.#onSettle();
    };
    input.addEventListener("input", () => {
      input.step = STEP;
      show();
      this.#onMove();
    });
    input.addEventListener("change", () => this.#onSettle());
    input.addEventListener("dblclick", toZero);
    reset.addEventListener("click", () => {
      toZero();
      input.focus(); // the button disappears
    });
    // Inputs keep the order of `sliders`, in whichever group a row is shown.
    const at = this.sliders.indexOf(slider);
    this.#inputs[at] = input;
    this.#show[at] = show;
    show();
    return row;
  }
}

function quiet(text) {
  return Object.assign(document.createElement("p"), { className: "quiet", textContent: text });
}
