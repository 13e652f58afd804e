/* Lenses: what every layer expects after every token of a text, and what a latent's direction writes. */
"use strict";

(() => {
  const { el, number, percent, later, segmented } = jsae;
  const PAUSE = 300; // milliseconds without a key
  const TOP = 5; // tokens per cell
  const KINDS = {
    logit: ["Logit", "Each layer's output, read as if it were the last one's."],
    direct: ["Direct path", "What the model would say if no later layer wrote anything. Exact."],
    jacobian: ["Jacobian", "Each layer's output, carried to the end by the mean derivative of the later layers."],
    tuned: ["Tuned", "Each layer's output, translated by a fit to the model's own output."],
  };
  const COLOURS = [["probability", "Probability", "How sure the lens is of its token"], ["next", "Next token", "How high the lens ranks the token that follows"]];
  const state = { lens: "direct", colour: "probability", sample: 0 }; // typed text is that of the other view

  /* ---- a text ---- */

  const names = () => jsae.live?.lenses ?? jsae.data.manifest.lenses.names;

  function show(main, list, asked) {
    state.lens = jsae.address.oneOf(asked, "lens", names()) ?? state.lens;
    state.sample = jsae.address.within(asked, "sample", 1, jsae.data.manifest.lenses.texts) ?? (state.sample || 1);
    state.colour = jsae.address.oneOf(asked, "colour", COLOURS.map(([name]) => name)) ?? state.colour;
    const result = el("div", { class: "traced" });
    const typed = jsae.trace.state;
    let reply = null;
    const draw = () => reply && result.replaceChildren(...table(reply, list));
    const answered = (answer) => {
      reply = answer;
      draw();
    };
    const failed = (error) => {
      reply = null;
      result.replaceChildren(el("p", { class: "bad", role: "alert" }, error.message));
    };
    const ask = jsae.api.latest("lens", answered, failed);
    const about = el("p", { class: "quiet small" });
    const read = () => {
      about.textContent = KINDS[state.lens][1];
      jsae.address.keep({ lens: state.lens, colour: state.colour, sample: jsae.live ? null : state.sample });
      if (!jsae.live) recorded().then(answered).catch(failed);
      else if (typed.text) ask({ text: typed.text, lens: state.lens, top: TOP });
      else {
        reply = null;
        result.replaceChildren(el("p", { class: "quiet" }, "A table of layers by tokens appears here as you type."));
      }
    };
    const box = el("textarea", {
      class: "typed", id: "lensed", rows: 3, "aria-label": "Type or paste text", placeholder: "Type or paste text", spellcheck: "false", value: typed.text,
      on: { input: later((event) => {
        typed.text = event.target.value;
        jsae.address.keep({ text: typed.text });
        read();
      }, PAUSE) },
    });
    const kinds = names().map((name) => [name, KINDS[name][0], KINDS[name][1]]);
    main.replaceChildren(el("div", { class: "page lens" },
      el("header", { class: "title" }, el("h1", {}, "What every layer expects next"),
        el("p", { class: "quiet" }, "The most likely next token after each layer, from the bottom up to the model's own output. Point at a cell for more.")),
      jsae.live && box,
      el("div", { class: "line lensbar" }, !jsae.live && samples(read), segmented("Lens", kinds, state.lens, (name) => {
        state.lens = name;
        read();
      }), segmented("Colour", COLOURS, state.colour, (name) => {
        state.colour = name;
        jsae.address.keep({ colour: name });
        draw();
      })),
      about, result, missing()));
    read();
    if (jsae.live) box.focus();
  }

  /* Return the choice of a text of the page. */
  function samples(read) {
    const options = Array.from({ length: jsae.data.manifest.lenses.texts }, (_, i) => [String(i + 1), String(i + 1), `Text ${i + 1}`]);
    return [el("span", { class: "quiet small" }, "Text"), segmented("Text", options, String(state.sample), (number) => {
      state.sample = Number(number);
      read();
    })];
  }

  const files = new Map();

  /* Return the table of a text that the page holds, as a server answers. */
  async function recorded() {
    const name = `lens-${state.sample - 1}`;
    if (!files.has(name)) files.set(name, jsae.load(name));
    const { ids, lenses } = await files.get(name);
    return { tokens: jsae.tokens.spell(ids), ...lenses[state.lens] };
  }

  /* Return how to get the lenses that are not there. */
  function missing() {
    const absent = ["jacobian", "tuned"].filter((name) => !names().includes(name));
    if (!absent.length) return null;
    return el("p", { class: "quiet small absent" }, `No ${absent.join(" and no ")} lens yet: fit one with `,
      el("code", {}, `python -m experiments.lens --run_dir=… --fit=${absent[0]}`), `, then ${jsae.live ? "start the server" : "explore the run"} again.`);
  }

  function table(reply, list) {
    const last = reply.layers.length - 1;
    const head = el("tr", {}, el("th", { scope: "col" }, "layer"), reply.tokens.map((token) =>
      el("th", { scope: "col" }, el("code", { class: "chip" }, visible(token.text)))));
    const rows = reply.layers.map((layer, row) => el("tr", { class: layer === list.info.layer && row !== last ? "own" : null },
      el("th", { scope: "row", title: layer === list.info.layer ? "the layer of this SAE" : null }, row === last ? "output" : String(layer)),
      reply.tokens.map((_, at) => cell(reply, row, at)))).reverse();
    const grid = el("div", { class: "lenstable", tabindex: 0, role: "group", "aria-label": "Layers by tokens: arrows move from cell to cell" },
      el("table", {}, el("thead", {}, head), el("tbody", {}, rows)));
    walk(grid);
    return [grid];
  }

  function cell(reply, row, at) {
    const [id] = reply.ids[row][at];
    const next = reply.tokens[at + 1];
    const hit = next && next.id === id;
    return el("td", {
      class: ["hot", hit && "hit"].filter(Boolean).join(" "), vars: { "--h": heat(reply, row, at).toFixed(3) },
      tip: () => hover(reply, row, at),
    }, visible(jsae.tokens.word(id)));
  }

  /* Return the strength of a cell's colour, from 0 to 1. */
  function heat(reply, row, at) {
    if (state.colour === "probability") return reply.probabilities[row][at][0];
    const rank = reply.ranks[row][at];
    return rank === undefined ? 0 : 1 / (1 + Math.log2(1 + rank));
  }

  function hover(reply, row, at) {
    const rank = reply.ranks[row][at];
    const likely = reply.ids[row][at].map((id, place) => [jsae.tokens.quoted(jsae.tokens.word(id)), percent(reply.probabilities[row][at][place])]);
    const next = rank === undefined ? [] : [["next token", `${jsae.tokens.quoted(reply.tokens[at + 1].text)}, rank ${rank + 1}`]];
    return [...likely, ...next, ["entropy", `${number(reply.entropy[row][at])} nats`]];
  }

  /* Return a token in one short line, with blanks as dots; many blanks are counted. */
  function visible(text) {
    if (text === "") return "◌";
    return jsae.tokens.line(text).replace(/ {4,}/g, (blanks) => `·×${blanks.length}`).replaceAll(" ", "·");
  }

  /* Let the arrow keys move from cell to cell; Tab stops at the table once. */
  function walk(grid) {
    grid.addEventListener("keydown", (event) => {
      const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
      if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
      const here = event.target.closest("td");
      const rows = [...grid.querySelectorAll("tbody tr")];
      const row = here ? rows.indexOf(here.parentElement) + step[0] : 0;
      const column = here ? here.cellIndex + step[1] : 1;
      const next = rows[Math.max(0, Math.min(row, rows.length - 1))].cells[Math.max(1, column)];
      event.preventDefault();
      event.stopPropagation();
      if (!next) return;
      next.tabIndex = -1;
      next.focus({ preventScroll: true });
      next.scrollIntoView({ block: "nearest", inline: "nearest" });
    });
  }

  /* ---- a latent ---- */

  /* Return a card with what the latent's direction writes through later layers; null without a Jacobian lens. */
  function card({ list, latent, top, through }) {
    const box = el("section", { class: "card lenscard" }, el("h2", {}, "Through later layers", el("small", {}, "Jacobian lens")));
    if (through) {
      const direct = new Set(top.slice(0, 10).map(({ id }) => id));
      draw(box, { ...through, overlap: through.top.filter(({ id }) => direct.has(id)).length, factor: list.info.direct_path });
      return box;
    }
    if (!jsae.data.isServed(list.info) || !jsae.live.lenses.includes("jacobian")) return null;
    box.setAttribute("aria-busy", "true");
    const failed = (error) => {
      box.removeAttribute("aria-busy");
      box.append(el("p", { class: "quiet small" }, error.message));
    };
    jsae.api.latest("lens/latent", (reply) => fill(box, reply), failed)({ hook: list.info.hook, index: latent });
    return box;
  }

  function fill(box, reply) {
    box.removeAttribute("aria-busy");
    const through = reply.lenses.find(({ name }) => name === "jacobian");
    if (!through) {
      box.append(el("p", { class: "quiet small" }, `The lens has no matrix of layer ${reply.layer}.`));
      return;
    }
    const pairs = (ids, values) => ids.map((id, i) => ({ id, value: values[i] }));
    draw(box, { ...reply, top: pairs(through.top, through.top_values), bottom: pairs(through.bottom, through.bottom_values) });
  }

  function draw(box, reply) {
    const far = Math.max(...[...reply.top, ...reply.bottom].map(({ value }) => Math.abs(value))) || 1;
    box.append(
      el("div", { class: "logits" }, jsae.latent.logits("Raised", reply.top, far, "warm"), jsae.latent.logits("Lowered", reply.bottom, far, "cool")),
      el("p", { class: "quiet small" }, `The mean effect of this direction on the output over ${jsae.whole(reply.n_prompts)} prompts, with the layers that react to it. `
        + `${reply.overlap} of its ten most raised tokens are also the direct path's, whose factor is ${number(reply.factor)}.`
        + (reply.skips_mlp ? " The MLP of the same layer is left out." : "")));
  }

  jsae.lens = { show, card };
})();
