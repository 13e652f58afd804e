/* What fires on a text that a person types: on all its tokens, or one latent's part in it; and names for latents. */
"use strict";

(() => {
  const { el, number, later, whole } = jsae;
  const PAUSE = 300; // milliseconds without a key
  const TOP = 32; // features of a token that are asked for
  const SHOWN = 5; // and shown beside it
  const state = { text: "", dense: false };

  /* ---- all features ---- */

  function show(main, list) {
    const result = el("div", { class: "traced" });
    const ask = jsae.api.latest("activations", (reply) => draw(result, list, reply),
      (error) => result.replaceChildren(el("p", { class: "bad", role: "alert" }, error.message)));
    const read = () => {
      if (state.text) ask({ text: state.text, hook: list.info.hook, top_k: TOP });
      else result.replaceChildren(el("p", { class: "quiet" }, "The features of every token appear here as you type."));
    };
    const box = input("Type or paste text", 4, later(read, PAUSE));
    box.id = "typed";
    main.replaceChildren(el("div", { class: "page" },
      el("header", { class: "title" }, el("h1", {}, "What fires on your text"),
        el("p", { class: "quiet" }, "The strongest latents of ", el("code", {}, list.info.hook), " at every token. Point at one to see where else it fires, click it for its page.")),
      box, result));
    read();
    box.focus();
  }

  const input = (name, rows, act) => el("textarea", {
    class: "typed", rows, "aria-label": name, placeholder: name, spellcheck: "false", value: state.text,
    on: { input: (event) => {
      state.text = event.target.value;
      act();
    } },
  });

  /* What was found, with or without the latents that fire nearly everywhere. */
  function draw(result, list, reply) {
    const left = reply.features.map((some) => some.filter(({ index }) => state.dense || !list.dense(index)));
    const dense = el("label", { class: "check", title: "Latents that fire on more than a tenth of all tokens" }, el("input", {
      type: "checkbox", id: "dense", checked: state.dense, on: { change: (event) => {
        state.dense = event.target.checked;
        draw(result, list, reply);
        document.getElementById("dense").focus();
      } },
    }), "Dense latents too");
    result.replaceChildren(...traced(list, { tokens: reply.tokens, features: left }, dense));
  }

  function traced(list, { tokens, features }, dense) {
    const share = ({ index, value }) => (list.max[index] ? value / list.max[index] : 0); // of its largest: what is rare shows
    const strip = jsae.tokens.walk(el("div", { class: "card text strip" }), "Your text");
    // Nearly every token has a feature at half of its largest: the power lets those stand out that have one at its height.
    const light = (index) => strip.replaceChildren(...tokens.map((token, i) => {
      const some = index === null ? features[i] : features[i].filter((one) => one.index === index);
      return jsae.tokens.span(token, {
        heat: Math.max(0, ...some.map(share)) ** (index === null ? 3 : 1), breaks: true, tip: () => hover(list, token, i, features[i]),
        on: { click: () => rows.children[i].scrollIntoView({ block: "center" }) },
      });
    }));
    const link = ({ index, value }) => {
      const one = jsae.latentLink(list, index);
      one.classList.add("feature");
      one.append(el("span", { class: "number" }, number(value)));
      one.addEventListener("pointerenter", () => light(index));
      one.addEventListener("pointerleave", () => light(null));
      return one;
    };
    const rows = el("ol", { class: "perToken" }, tokens.map((token, i) => el("li", {},
      el("code", { class: "chip" }, token.text === "" ? "◌" : jsae.tokens.line(token.text)),
      el("div", { class: "features" }, features[i].slice(0, SHOWN).map(link), !features[i].length && el("span", { class: "quiet" }, state.dense ? "nothing fires" : "none that is not dense")))));
    light(null);
    return [strip, el("div", { class: "columns" }, el("section", { class: "card" }, el("div", { class: "line" }, el("h2", {}, "Token by token"), el("span", { class: "grow" }), dense), rows),
      el("section", { class: "card" }, el("h2", {}, "Strongest in this text"), strongestOf(features).map(link)))];
  }

  const hover = (list, token, i, features) => [["", jsae.tokens.quoted(token.text)],
    ...features.slice(0, 3).map(({ index, value }) => [`#${index} ${list.labels[index].slice(0, 28)}`, number(value)]), ["position", i], ["token", token.id]];

  /* Each feature once, with its largest value. */
  function strongestOf(features) {
    const peaks = new Map();
    for (const { index, value } of features.flat()) peaks.set(index, Math.max(value, peaks.get(index) ?? 0));
    return [...peaks].map(([index, value]) => ({ index, value })).sort((a, b) => b.value - a.value || a.index - b.index).slice(0, 16);
  }

  /* ---- one latent ---- */

  /* A card on a latent's page: where it fires on a text of one's own. Nothing without a server. */
  function card({ list, latent }) {
    if (!jsae.live) return null;
    const strip = jsae.tokens.walk(el("div", { class: "text strip" }), "Your text");
    const told = el("p", { class: "quiet small told", role: "status" });
    const ask = jsae.api.latest("latent", ({ tokens, values }) => {
      const max = Math.max(list.max[latent], ...values);
      const fires = values.filter((value) => value > 0).length;
      told.textContent = fires ? `fires on ${whole(fires)} of ${whole(values.length)} tokens, at most ${number(Math.max(...values))}` : "it does not fire here";
      strip.replaceChildren(...tokens.map((token, i) => jsae.tokens.span(token, {
        heat: max ? values[i] / max : 0, breaks: true,
        tip: [["", jsae.tokens.quoted(token.text)], ["activation", number(values[i])], ["position", i], ["token", token.id]],
      })));
    }, (error) => {
      strip.replaceChildren();
      told.replaceChildren(el("span", { class: "bad", role: "alert" }, error.message));
    });
    const read = () => {
      if (state.text) ask({ text: state.text, hook: list.info.hook, index: latent });
      else for (const box of [strip, told]) box.replaceChildren();
    };
    read();
    return el("section", { class: "card try" }, el("h2", {}, "Try it"), input(`Text to see where #${latent} fires`, 2, later(read, PAUSE)), strip, told);
  }

  /* ---- names ---- */

  function rename(list, latent) {
    const box = document.getElementById("keys");
    const label = el("input", { type: "text", id: "label", maxlength: 512, value: list.byPerson.has(latent) ? list.labels[latent] : "", placeholder: list.labels[latent] || "What does it fire on?" });
    const note = el("textarea", { id: "note", rows: 4, maxlength: 10000, placeholder: "Anything else worth keeping", value: list.notes.get(latent) ?? "" });
    const failed = el("p", { class: "bad small", role: "alert" });
    const keep = async (event) => {
      event.preventDefault();
      try {
        list.name(await jsae.api.note({ hook: list.info.hook, latent, label: label.value, note: note.value }));
        box.close();
        jsae.list.redraw();
        jsae.toast(`#${latent} is kept`);
        await jsae.route();
      } catch (error) {
        failed.textContent = error.message;
      }
    };
    box.setAttribute("aria-label", `Name latent ${latent}`);
    box.replaceChildren(el("form", { class: "form", on: { submit: keep } }, el("h2", {}, `Name #${latent}`),
      el("label", {}, "Label", label), el("label", {}, "Note", note),
      el("p", { class: "quiet small" }, "Kept in explorer/notes.jsonl of the run. An empty label gives the automatic one back."), failed,
      el("div", { class: "line" }, el("span", { class: "grow" }),
        el("button", { type: "button", class: "plain", on: { click: () => box.close() } }, "Cancel"),
        el("button", { type: "submit", class: "plain strong", id: "keep" }, "Keep"))));
    box.showModal();
    label.focus();
  }

  jsae.trace = { show, card, rename };
})();
