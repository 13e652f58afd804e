/* Features of a text that the user types, for all latents or for one; and naming of latents. */
"use strict";

(() => {
  const { el, number, later, whole } = jsae;
  const PAUSE = 300; // milliseconds without a key
  const TOP = 32; // requested features per token
  const SHOWN = 5; // displayed features per token
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
        el("p", { class: "quiet" }, "The strongest latents of ", el("code", {}, list.info.hook), " at every token. Point at a latent to see where else it fires, click on it to open its page.")),
      box, result));
    read();
    box.focus();
  }

  const input = (name, rows, act) => el("textarea", {
    class: "typed", rows, "aria-label": name, placeholder: name, spellcheck: "false", value: state.text,
    on: { input: (event) => {
      state.text = event.target.value;
      jsae.address.keep({ text: state.text });
      act();
    } },
  });

  /* Draw the features, with or without dense latents. */
  function draw(result, list, reply) {
    const left = reply.features.map((some) => some.filter(({ index }) => state.dense || !list.dense(index)));
    const dense = el("label", { class: "check", title: "Latents that fire on more than a tenth of all tokens" }, el("input", {
      type: "checkbox", id: "dense", checked: state.dense, on: { change: (event) => {
        state.dense = event.target.checked;
        draw(result, list, reply);
        document.getElementById("dense").focus();
      } },
    }), "Include dense latents");
    result.replaceChildren(...traced(list, { tokens: reply.tokens, features: left }, dense));
  }

  function traced(list, { tokens, features }, dense) {
    const share = ({ index, value }) => (list.max[index] ? value / list.max[index] : 0); // relative to its largest activation, so that rare features are visible
    const strip = jsae.tokens.walk(el("div", { class: "card text strip" }), "Your text");
    // Nearly every token has a feature at half of its largest activation: the power emphasises those near their largest.
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
      el("div", { class: "features" }, features[i].slice(0, SHOWN).map(link), !features[i].length && el("span", { class: "quiet" }, state.dense ? "nothing fires" : "only dense latents")))));
    light(null);
    return [strip, el("div", { class: "columns" }, el("section", { class: "card" }, el("div", { class: "line" }, el("h2", {}, "Token by token"), el("span", { class: "grow" }), dense), rows),
      el("section", { class: "card" }, el("h2", {}, "Strongest in this text"), strongestOf(features).map(link)))];
  }

  const hover = (list, token, i, features) => [["", jsae.tokens.quoted(token.text)],
    ...features.slice(0, 3).map(({ index, value }) => [`#${index} ${list.labels[index].slice(0, 28)}`, number(value)]), ["position", i], ["token", token.id]];

  /* Return each feature once, with its largest value. */
  function strongestOf(features) {
    const peaks = new Map();
    for (const { index, value } of features.flat()) peaks.set(index, Math.max(value, peaks.get(index) ?? 0));
    return [...peaks].map(([index, value]) => ({ index, value })).sort((a, b) => b.value - a.value || a.index - b.index).slice(0, 16);
  }

  /* ---- one latent ---- */

  /* Return a card for a latent's page that shows where it fires on the user's text; null without a server. */
  function card({ list, latent }) {
    if (!jsae.data.isServed(list.info)) return null;
    const strip = jsae.tokens.walk(el("div", { class: "text strip" }), "Your text");
    const summary = el("p", { class: "quiet small told", role: "status" });
    const ask = jsae.api.latest("latent", ({ tokens, values }) => {
      const max = Math.max(list.max[latent], ...values);
      const fires = values.filter((value) => value > 0).length;
      summary.textContent = fires ? `fires on ${whole(fires)} of ${whole(values.length)} tokens, at most ${number(Math.max(...values))}` : "it does not fire here";
      strip.replaceChildren(...tokens.map((token, i) => jsae.tokens.span(token, {
        heat: max ? values[i] / max : 0, breaks: true,
        tip: [["", jsae.tokens.quoted(token.text)], ["activation", number(values[i])], ["position", i], ["token", token.id]],
      })));
    }, (error) => {
      strip.replaceChildren();
      summary.replaceChildren(el("span", { class: "bad", role: "alert" }, error.message));
    });
    const read = () => {
      if (state.text) ask({ text: state.text, hook: list.info.hook, index: latent });
      else for (const box of [strip, summary]) box.replaceChildren();
    };
    read();
    return el("section", { class: "card try" }, el("h2", {}, "Try it"), input(`Text to see where #${latent} fires`, 2, later(read, PAUSE)), strip, summary);
  }

  /* ---- names ---- */

  function rename(list, latent) {
    const box = document.getElementById("keys");
    const label = el("input", { type: "text", id: "label", maxlength: 512, value: list.byPerson.has(latent) ? list.labels[latent] : "", placeholder: list.labels[latent] || "What does it fire on?" });
    const note = el("textarea", { id: "note", rows: 4, maxlength: 10000, placeholder: "Further remarks", value: list.notes.get(latent) ?? "" });
    const failed = el("p", { class: "bad small", role: "alert" });
    const keep = async (event) => {
      event.preventDefault();
      try {
        list.name(await jsae.api.note({ hook: list.info.hook, latent, label: label.value, note: note.value }));
        box.close();
        jsae.list.redraw();
        jsae.toast(`#${latent} is saved`);
        await jsae.route();
      } catch (error) {
        failed.textContent = error.message;
      }
    };
    box.setAttribute("aria-label", `Name latent ${latent}`);
    box.replaceChildren(el("form", { class: "form", on: { submit: keep } }, el("h2", {}, `Name #${latent}`),
      el("label", {}, "Label", label), el("label", {}, "Note", note),
      el("p", { class: "quiet small" }, "Saved in explorer/notes.jsonl of the run. An empty label restores the automatic one."), failed,
      el("div", { class: "line" }, el("span", { class: "grow" }),
        el("button", { type: "button", class: "plain", on: { click: () => box.close() } }, "Cancel"),
        el("button", { type: "submit", class: "plain strong", id: "keep" }, "Save"))));
    box.showModal();
    label.focus();
  }

  jsae.trace = { show, card, rename, state };
})();
