/* A text that the user types, read by two checkpoints side by side, and the features that differ. */
"use strict";

(() => {
  const { el, number, later } = jsae;
  const PAUSE = 300; // milliseconds without a key
  const TOP = 8; // requested features per token
  const SIDES = ["first", "second"]; // parameters of the address and of a request
  const state = { sides: null, light: null };

  function show(main, list, asked) {
    const names = jsae.live.checkpoints;
    const usual = state.sides ?? [names.at(-2), names.at(-1)];
    state.sides = SIDES.map((name, i) => jsae.address.oneOf(asked, name, names) ?? usual[i]);
    const result = el("div", { class: "compared" });
    const ask = jsae.api.latest("compare", (reply) => draw(result, list, reply),
      (error) => result.replaceChildren(el("p", { class: "bad", role: "alert" }, error.message)));
    const read = () => {
      const [first, second] = state.sides;
      if (jsae.trace.state.text) ask({ text: jsae.trace.state.text, hook: list.info.hook, first, second, top_k: TOP });
      else result.replaceChildren(el("p", { class: "quiet" }, "What two checkpoints read in your text appears here as you type."));
    };
    const side = (i, name) => el("select", { id: name, "aria-label": `${name} checkpoint`, on: { change: (event) => {
      state.sides[i] = event.target.value;
      jsae.address.keep({ [name]: event.target.value });
      read();
    } } }, names.map((one) => el("option", { value: one, selected: one === state.sides[i] }, one)));
    const later_ = later(read, PAUSE);
    const box = el("textarea", { class: "typed", id: "compared", rows: 3, "aria-label": "Type or paste text", placeholder: "Type or paste text", spellcheck: "false", value: jsae.trace.state.text, on: { input: (event) => {
      jsae.trace.state.text = event.target.value;
      jsae.address.keep({ text: event.target.value });
      later_();
    } } });
    main.replaceChildren(el("div", { class: "page" },
      el("header", { class: "title" }, el("h1", {}, "What two checkpoints read"),
        el("p", { class: "quiet" }, "Each checkpoint reads your text with its own SAE. A latent means the same in both: the brighter a token, the more its features differ.")),
      el("div", { class: "line pair" }, side(0, SIDES[0]), el("span", { class: "quiet" }, "against"), side(1, SIDES[1])), box, result));
    read();
    box.focus();
  }

  function draw(result, list, reply) {
    const value = (side, i, index) => side.features[i].find((one) => one.index === index)?.value ?? 0;
    const share = (i, index) => {
      const [first, second] = reply.sides.map((side) => value(side, i, index));
      return list.max[index] ? Math.min(1, Math.abs(second - first) / list.max[index]) : 0;
    };
    const strips = reply.sides.map((side) => jsae.tokens.walk(el("div", { class: "text strip" }), `Your text in ${side.checkpoint}`));
    const light = (index) => strips.forEach((strip, which) => {
      const side = reply.sides[which];
      strip.replaceChildren(...reply.tokens.map((token, i) => {
        const some = new Set(reply.sides.flatMap((one) => one.features[i].map((feature) => feature.index)));
        const heat = index === null ? Math.max(0, ...[...some].map((one) => share(i, one))) : list.max[index] ? Math.min(1, value(side, i, index) / list.max[index]) : 0;
        return jsae.tokens.span(token, { heat, breaks: true, tip: () => hover(list, token, side, i) });
      }));
    });
    const rows = reply.differ.map((one) => {
      const link = jsae.latentLink(list, one.index);
      link.classList.add("feature");
      link.addEventListener("pointerenter", () => light(one.index));
      link.addEventListener("pointerleave", () => light(null));
      const token = reply.tokens[one.position];
      return el("tr", {}, el("td", {}, link), el("td", {}, el("code", { class: "chip" }, jsae.tokens.line(token.text) || "◌")),
        ...SIDES.map((which) => el("td", { class: "number" }, jsae.charts.bar(list.max[one.index] ? one[which] / list.max[one.index] : 0, which === "first" ? "cool" : ""), number(one[which]))));
    });
    light(null);
    const losses = reply.sides.map(({ losses: some }) => some.reduce((sum, one) => sum + one, 0) / Math.max(1, some.length));
    result.replaceChildren(
      el("div", { class: "sheets" }, reply.sides.map((side, i) => el("section", { class: "card", "data-side": i }, el("h2", {}, side.checkpoint, el("small", {}, `${losses[i].toFixed(2)} nats per token`)), strips[i]))),
      el("section", { class: "card differ" }, el("h2", {}, "Features that differ most", el("small", {}, "at the token where they differ most")),
        rows.length ? el("table", { class: "numbers" }, el("thead", {}, el("tr", {}, ["Latent", "Token", ...reply.sides.map((side) => side.checkpoint)].map((name) => el("th", {}, name)))), el("tbody", {}, rows))
          : el("p", { class: "quiet" }, "None.")));
  }

  const hover = (list, token, side, i) => [["", jsae.tokens.quoted(token.text)], ["loss", `${number(side.losses[i])} nats`],
    ...side.features[i].slice(0, 4).map(({ index, value }) => [`#${index} ${list.labels[index].slice(0, 28)}`, number(value)])];

  jsae.checkpoints = { show };
})();
