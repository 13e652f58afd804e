/* The strength of a pushed feature: a slider that is fine near zero, an exact number, and usual strengths. */
"use strict";

(() => {
  const { el, number } = jsae;
  const FACTORS = [["off", 0], ["half", 0.5], ["twice", 2], ["4 ×", 4]];
  const KINDS = 3; // colours of pushed features

  /* Return usual strengths of a latent with their names; `factor` says that the mode takes a factor. */
  function presets({ list, latent }, factor) {
    if (factor) return FACTORS;
    const [mean, max] = [list.mean[latent], list.max[latent]];
    return max > 0 ? [["against it", -max], ["off", 0], ["mean", mean], ["2 × mean", 2 * mean], ["largest", max], ["2 × largest", 2 * max]] : [];
  }

  /* Map the place of the handle, -1 to 1, to a strength and back: half way is a quarter of the reach. */
  const strengthOf = (place, reach) => Math.sign(place) * place * place * reach;
  const placeOf = (strength, reach) => Math.max(-1, Math.min(1, Math.sign(strength) * Math.sqrt(Math.abs(strength) / reach)));

  /* Return a strength in words: how it compares with what the latent does by itself. */
  function told({ list, latent, strength }, factor) {
    if (factor) return `${number(strength)} times what it is`;
    return list.max[latent] > 0 ? `${number(strength / list.max[latent])} × its largest activation` : "it never fires by itself";
  }

  /* Return the controls of one pushed feature; `changed` is called after each change of its strength. */
  function controls(one, factor, reach, changed) {
    const name = `Strength of #${one.latent}`;
    const slider = el("input", { type: "range", min: -1, max: 1, step: 0.005, value: placeOf(one.strength, reach), "aria-label": name });
    const exact = el("input", { type: "number", step: "any", value: one.strength, "aria-label": `${name}, exactly` });
    const words = el("p", { class: "quiet small", role: "status" });
    const show = (from) => {
      if (from !== slider) slider.value = placeOf(one.strength, reach);
      if (from !== exact) exact.value = one.strength;
      words.textContent = told(one, factor);
      slider.setAttribute("aria-valuetext", `${number(one.strength)}, ${words.textContent}`);
    };
    const take = (value, from) => {
      if (!Number.isFinite(value)) return;
      one.strength = Number(value.toPrecision(4));
      show(from);
      changed();
    };
    slider.addEventListener("input", () => take(strengthOf(Number(slider.value), reach), slider));
    exact.addEventListener("input", () => take(exact.value.trim() === "" ? NaN : Number(exact.value), exact));
    show(null);
    return [el("div", { class: "line" }, slider, exact),
      el("div", { class: "pills", role: "group", "aria-label": `Usual strengths of #${one.latent}` }, presets(one, factor).map(([text, value]) =>
        el("button", { type: "button", class: "pill", on: { click: () => take(value, null) } }, text))), words];
  }

  /* Return the class that colours the feature at a place among the pushed. */
  const colour = (at) => `by-${at % KINDS}`;

  jsae.strength = { controls, colour, strengthOf, placeOf };
})();
