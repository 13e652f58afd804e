/* The page of one latent: numbers, histograms, logits, similar latents, and the texts on which it fires. */
"use strict";

(() => {
  const { el, number, percent, whole, segmented } = jsae;
  const COPY = "M9 9h11v11H9zM15 9V4H4v11h5";
  const FIRST = 10; // entries of a table before it is expanded
  const GROUPS = 7; // the strongest, five fifths of [0, max], texts without activations
  const view = { size: "snippet", breaks: jsae.remembered.get("breaks") === "yes", log: jsae.remembered.get("scale") !== "linear" };

  async function show(main, hook, latent, still) {
    const details = await jsae.data.latent(hook, latent);
    if (!still()) return;
    const texts = jsae.tokens.walk(el("div", { class: "groups" }), "Texts");
    main.replaceChildren(el("article", { class: "page latent", "data-latent": latent },
      head(details),
      el("div", { class: "columns" },
        el("div", { class: "texts" }, jsae.stages.card(details), jsae.trace?.card(details), contexts(details, texts), jsae.origin.card(details)),
        el("aside", { class: "side", "aria-label": "Numbers" }, fires(details), writes(details), jsae.lens?.card(details), alike(details)))));
    main.scrollTop = 0;
  }

  /* ---- the head ---- */

  function head({ list, latent }) {
    const label = list.labels[latent];
    const { manifest } = jsae.data;
    const step = (by, name, sign) => el("a", { class: "icon", href: jsae.link(jsae.list.step(latent, by)), "aria-label": name, title: name }, sign);
    const title = el("h1", { class: label ? "" : "none" }, jsae.tokens.shown(list.title(latent)));
    const note = list.notes.get(latent);
    const density = list.density(latent);
    return el("header", { class: "title" },
      el("div", { class: "line" }, el("a", { class: "plain back", href: "#" }, "‹ All"),
        el("span", { class: "id" }, `#${latent}`), step(-1, "Previous (k)", "‹"), step(1, "Next (j)", "›"), el("span", { class: "grow" }),
        jsae.data.isServed(list.info) && el("button", { type: "button", class: "plain", id: "rename", on: { click: () => jsae.trace.rename(list, latent) } }, "Name it"),
        jsae.data.isServed(list.info) && !jsae.data.isTranscoder(list.info) && el("button", { type: "button", class: "plain strong", id: "push", on: { click: () => jsae.steer.add(list, latent) } }, "Steer with it"),
        el("button", { type: "button", class: "plain", id: "shelve", on: { click: () => jsae.lists.add(list, latent) } }, "Add to list"),
        el("button", { type: "button", class: "plain", on: { click: () => jsae.copy(location.href, "Link") } }, "Copy link")),
      title,
      el("p", { class: "origin quiet" }, origin(list, latent)),
      note && el("p", { class: "note" }, jsae.tokens.shown(note)),
      el("dl", { class: "facts" },
        fact("Density", percent(density), density ? `1 in ${whole(Math.max(1, Math.round(1 / density)))} tokens` : "never fires"),
        fact("Largest", number(list.max[latent]), "activation"),
        fact("Mean", number(list.mean[latent]), "where it fires"),
        fact("Fired", jsae.short(list.count[latent]), `times in ${jsae.short(list.info.tokens)} tokens`),
        !Number.isNaN(list.recurrence(latent)) && fact("Seeds", jsae.list.seeds(list, latent), "in which it recurs"),
        manifest.hooks.length > 1 && fact("Layer", String(list.info.layer), list.info.name)));
  }

  const fact = (name, value, note) => el("div", {}, el("dt", {}, name), el("dd", {}, el("b", {}, value), el("small", {}, note)));

  function origin(list, latent) {
    if (list.byPerson.has(latent)) return "named by a person";
    if (!list.labels[latent]) return list.dead(latent) ? "it fired on no token of the text" : "no label was found";
    const fit = list.fit.get(latent);
    const score = [jsae.list.badge(list, latent), " F1 of this automatic label on text that was not used to choose it"];
    return fit ? [...score, ` · precision ${number(fit.precision ?? NaN)} · recall ${number(fit.recall ?? NaN)}`] : ["automatic label"];
  }

  /* ---- the side: histograms, logits, other latents ---- */

  const card = (title, note, ...children) => el("section", { class: "card" }, el("h2", {}, title, note && el("small", {}, note)), children);

  function fires({ list, latent, hist, histRange }) {
    if (list.dead(latent)) return null;
    const [from, to] = histRange;
    const middle = (i) => (from + ((to - from) * (i + 0.5)) / hist.length) / list.max[latent];
    const place = el("div", {});
    const draw = () => place.replaceChildren(jsae.charts.histogram(hist, [from, to], {
      label: `Histogram of ${whole(list.count[latent])} activations from ${number(from)} to ${number(to)}${view.log ? ", logarithmic counts" : ""}`, unit: "tokens",
      tone: (i) => ({ kind: "warm", share: middle(i) }), marks: [1, 2, 3, 4].map((k) => (list.max[latent] * k) / 5), log: view.log,
    }));
    draw();
    return card("Activations", "tokens by strength, without zeros", place, el("div", { class: "line" }, el("span", { class: "grow" }),
      segmented("Scale of the counts", [["log", "Log"], ["linear", "Linear"]], view.log ? "log" : "linear", (scale) => {
        view.log = scale === "log";
        jsae.remembered.set("scale", scale);
        draw();
      })));
  }

  function writes({ list, logitHist, logitRange, top, bottom }) {
    const [from, to] = logitRange;
    const far = Math.max(Math.abs(from), Math.abs(to)) || 1;
    const middle = (i) => from + ((to - from) * (i + 0.5)) / logitHist.length;
    const factor = list.info.direct_path;
    return card("Logits", "direct effect on the output",
      jsae.charts.histogram(logitHist, [from, to], {
        label: `Histogram of the logits of all tokens from ${number(from)} to ${number(to)}`, unit: "tokens of the vocabulary",
        tone: (i) => ({ kind: middle(i) < 0 ? "cool" : "warm", share: 0.35 + (0.65 * Math.abs(middle(i))) / far }),
      }),
      el("div", { class: "logits" }, logits("Raised", top, far, "warm"), logits("Lowered", bottom, far, "cool")),
      factor !== null && factor !== 1 && el("p", { class: "quiet small" }, `The model multiplies this layer's direct path to its output by ${number(factor)}; the values include this factor.`));
  }

  function logits(name, pairs, far, kind) {
    const rows = pairs.map(({ id, value }) => el("tr", {}, el("td", {}, jsae.tokens.chip(id)),
      el("td", { class: "number" }, jsae.charts.bar(Math.abs(value) / far, kind), value.toFixed(2))));
    const table = (some, ...caption) => el("table", { class: "numbers" }, caption, el("tbody", {}, some));
    return el("div", {}, table(rows.slice(0, FIRST), el("caption", {}, name)), more(rows.slice(FIRST), (rest) => table(rest)));
  }

  /* Return the rest of a table, folded. */
  const more = (rest, draw) => rest.length > 0 && el("details", { class: "more" }, el("summary", {}, `${rest.length} more`), draw(rest));

  function alike({ list, latent, neighbours, together, across }) {
    const rows = (pairs, format, of = list) => pairs.map(({ id, value }) =>
      el("li", {}, jsae.latentLink(of, id), el("span", { class: "number" }, jsae.charts.bar(value, "grey"), format(value))));
    const table = (some) => el("ol", { class: "picks" }, some);
    const others = (name, note, pairs, format, of) => {
      const all = rows(pairs, format, of);
      return all.length > 0 && card(name, note, table(all.slice(0, FIRST)), more(all.slice(FIRST), table));
    };
    return [
      across && card(across.list.info.run ? `In ${across.list.info.run}` : `In ${jsae.data.manifest.run}`, "cosine of decoder directions",
        table(rows(across.pairs, (value) => value.toFixed(2), across.list)),
        el("p", { class: "small" }, el("a", { href: jsae.compare.link([list.hook, latent], [across.list.hook, across.pairs[0].id]) }, "Side by side with the first"))),
      others("Neighbours", "cosine of decoder directions", neighbours, (value) => value.toFixed(2)),
      others("Fires together with", "share of this latent's tokens", together, percent),
    ];
  }

  /* ---- the texts ---- */

  function contexts(details, groups) {
    const { list, latent } = details;
    const draw = () => groups.replaceChildren(...Array.from({ length: GROUPS }, (_, group) => texts(details, group)).filter(Boolean));
    const breaks = el("label", { class: "check" }, el("input", {
      type: "checkbox", id: "breaks", checked: view.breaks, on: { change: (event) => {
        view.breaks = event.target.checked;
        jsae.remembered.set("breaks", view.breaks ? "yes" : "no");
        draw();
      } },
    }), "Line breaks");
    draw();
    if (!details.examples.length) groups.append(el("p", { class: "quiet pad" }, `#${latent} fired on none of the ${jsae.short(list.info.tokens)} tokens of the text.`));
    return el("section", { class: "contexts" }, el("div", { class: "bartop" }, el("h2", {}, "Texts"), el("span", { class: "grow" }),
      segmented("Size of the context", [["snippet", "Snippet"], ["full", "Full"]], view.size, (size) => {
        view.size = size;
        draw();
      }), breaks), groups);
  }

  function texts(details, group) {
    const { list, latent, shares } = details;
    const max = list.max[latent];
    const some = details.examples.filter((example) => example.group === group);
    if (!some.length) return null;
    const edge = (k) => number((max * k) / 5);
    const [name, note] = group === 0 ? ["Strongest", `up to ${number(max)}`]
      : group === GROUPS - 1 ? ["Silent here", "texts in which it does not fire"]
        : [`${edge(5 - group)} to ${edge(6 - group)}`, `${percent(shares[group])} of all tokens`];
    return el("section", { class: "group", "data-group": group }, el("h3", {}, name, el("small", {}, note)),
      el("ul", {}, some.map((example) => text(example, max))));
  }

  function text(example, max) {
    let size = view.size;
    let raw = "";
    const place = el("div", { class: "place" });
    const draw = () => {
      const { node, text: content } = jsae.tokens.context(example, max, { size, breaks: view.breaks });
      place.replaceChildren(node);
      raw = content;
      value.setAttribute("aria-expanded", String(size === "full"));
    };
    const value = el("button", {
      type: "button", class: "value", title: "Show the whole text, or one line",
      "aria-label": `Activation ${number(example.value)}: show the whole text, or one line`,
      on: { click: () => {
        size = size === "full" ? "snippet" : "full";
        draw();
      } },
    }, example.value ? number(example.value) : "0");
    draw();
    return el("li", { class: "example" }, value, place,
      el("button", { type: "button", class: "icon copy", "aria-label": "Copy this text", title: "Copy this text", on: { click: () => jsae.copy(raw, "Text") } }, jsae.icon(COPY)));
  }

  jsae.latent = { show, logits, parts: { fires, writes, contexts } };
})();
