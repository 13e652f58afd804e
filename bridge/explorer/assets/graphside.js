/* Beside an attribution graph: what a node is, what moves it and what it moves, and the texts that a feature fires on. */
"use strict";

(() => {
  const { el, number, percent } = jsae;
  const FIRST = 8; // links of a list before it is expanded
  const TEXTS = 6;
  const BEFORE = 28; // characters of a text in a tooltip
  const AFTER = 20;
  const IN_TIP = 3;
  const details = new Map(); // of features, by id: what the tooltips show

  /* ---- records of features ---- */

  /* Return the number of the hook whose records are those of a feature; -1 without any. */
  function hookOf(graph, node) {
    if (node.kind !== "feature" || node.latent === null) return -1;
    return jsae.data.manifest.hooks.findIndex(({ layer, sae, d_sae: size }) => layer === node.layer && sae === graph.digests[layer] && node.latent < size);
  }

  const lists = new Map(); // of labels, by hook: those that have arrived

  async function listOf(hook) {
    const list = await jsae.data.list(hook);
    lists.set(hook, list);
    return list;
  }

  /* Load the labels of the layers of a graph, if they are not too many. */
  async function loadLabels(graph, most = 200000) {
    const hooks = [...new Set(graph.nodes.map((node) => hookOf(graph, node)))].filter((hook) => hook >= 0);
    const size = hooks.reduce((sum, hook) => sum + jsae.data.manifest.hooks[hook].d_sae, 0);
    if (size <= most) await Promise.all(hooks.map(listOf));
  }

  /* Return the label of a feature: that of the records, where a person may have changed it, else that of the file. */
  function labelOf(graph, node) {
    const list = lists.get(hookOf(graph, node));
    return list?.labels[node.latent] || node.label;
  }

  /* Return a name of a node for lists and pictures. */
  function nameOf(graph, node) {
    const token = jsae.graphDraw.nameOf(graph.tokens[node.position]);
    if (node.kind === "token") return `“${token}”`;
    if (node.kind === "logit") return `“${jsae.graphDraw.nameOf(node.token)}”`;
    if (node.kind === "error") return "error";
    return jsae.tokens.shown(labelOf(graph, node)) || (node.latent === null ? node.id : `latent ${node.latent}`);
  }

  function placeOf(graph, node) {
    const token = jsae.graphDraw.nameOf(graph.tokens[node.position]);
    if (node.kind === "token") return `token ${node.position}`;
    if (node.kind === "logit") return percent(node.probability);
    return `L${node.layer}${node.latent === null ? "" : ` #${node.latent}`} on “${token}”`;
  }

  /* Load the texts of a feature for its tooltip. */
  async function near(graph, node, ready) {
    const hook = hookOf(graph, node);
    if (hook < 0 || details.has(node.id)) return;
    details.set(node.id, []);
    await listOf(hook);
    const { examples, list } = await jsae.data.latent(hook, node.latent);
    details.set(node.id, examples.filter(({ group }) => group === 0).slice(0, IN_TIP).map((example) => [number(example.value), snippet(example)]));
    ready(list);
  }

  /* Return the text around the strongest token of an example, which is in brackets. */
  function snippet(example) {
    const tokens = jsae.tokens.spell(example.ids, example.cut);
    const peak = example.position - example.from;
    const join = (some) => jsae.tokens.shown(some.map(({ text }) => text).join("")).replace(/\s+/g, " ");
    return `${join(tokens.slice(Math.max(0, peak - 12), peak)).slice(-BEFORE)}⟦${join(tokens.slice(peak, peak + 1))}⟧${join(tokens.slice(peak + 1, peak + 12)).slice(0, AFTER)}`;
  }

  /* Return the tooltip of a node. */
  const tip = (graph, node) => [["", nameOf(graph, node)], ["", placeOf(graph, node)],
    ...(node.activation !== null ? [["activation", number(node.activation)]] : []),
    ...(node.influence !== null && node.kind !== "logit" ? [["influence up to", percent(node.influence)]] : []),
    ...(details.get(node.id) ?? [])];

  /* ---- the panel ---- */

  /* Return the panel: of the clicked node, of the chosen group, else an entrance to the graph. */
  function panel(graph, view, chosen, acts) {
    if (chosen !== null && view.groups[chosen]) return ofGroup(graph, view.groups[chosen], chosen, acts);
    const node = graph.byId.get(view.clicked);
    return node ? ofNode(graph, view, node, acts) : entrance(graph, acts);
  }

  function ofNode(graph, view, node, acts) {
    const pinned = view.pinned.includes(node.id);
    const hook = hookOf(graph, node);
    const texts = el("section", { class: "card texts-of" });
    if (hook >= 0) show(texts, hook, node.latent);
    return [el("section", { class: "card about" },
      el("p", { class: "quiet small" }, `${node.kind === "feature" ? "Feature" : node.kind === "error" ? "Error of a transcoder" : node.kind === "token" ? "Token of the prompt" : "Next token"} · ${placeOf(graph, node)}`),
      el("h2", { tabindex: -1, id: "node" }, nameOf(graph, node)),
      el("dl", { class: "facts" }, node.activation !== null && fact("activation", number(node.activation)),
        node.kind === "logit" ? fact("probability", percent(node.probability)) : node.influence !== null && fact("among the first", `${percent(node.influence)} of influence`)),
      el("div", { class: "line" },
        el("button", { type: "button", class: pinned ? "plain on" : "plain strong", id: "pin", "aria-pressed": String(pinned), on: { click: () => acts.pin(node.id) } }, pinned ? "Unpin" : "Pin"),
        hook >= 0 && el("a", { class: "plain", href: jsae.link(node.latent, hook) }, "Open latent"),
        hook >= 0 && jsae.live && el("button", { type: "button", class: "plain", id: "rename", on: { click: async () => jsae.trace.rename(await listOf(hook), node.latent) } }, "Name it"),
        el("span", { class: "grow" }),
        el("button", { type: "button", class: "plain", id: "unselect", on: { click: () => acts.select(node.id) } }, "Close"))),
    hook >= 0 && texts,
    node.kind !== "token" && links("Moved by", "what adds to it", node.inputs, "source", graph, view, acts),
    node.kind !== "logit" && links("Moves", "what it adds to", node.outputs, "target", graph, view, acts)];
  }

  const fact = (name, value) => el("div", {}, el("dt", {}, name), el("dd", {}, value));

  /* Return the links of one side of a node, strongest first, with their direct effects. */
  function links(title, note, all, end, graph, view, acts) {
    if (!all.length) return null;
    const most = Math.abs(all[0].weight) || 1;
    const row = (link) => {
      const node = link[end];
      return el("li", {}, entry(graph, node, acts),
        el("span", { class: "number" }, jsae.charts.bar(Math.abs(link.weight) / most, link.weight < 0 ? "cool" : ""), jsae.graphDraw.signed(link.weight)));
    };
    const rest = all.slice(FIRST, 10 * FIRST);
    return el("section", { class: "card", "data-side": end }, el("h2", {}, title, el("small", {}, note)),
      el("ol", { class: "picks" }, all.slice(0, FIRST).map(row)),
      rest.length > 0 && more(`${rest.length} more`, () => el("ol", { class: "picks" }, rest.map(row))));
  }

  function more(name, draw) {
    const box = el("details", { class: "more" }, el("summary", {}, name));
    box.addEventListener("toggle", () => { if (box.open && box.children.length === 1) box.append(draw()); });
    return box;
  }

  /* Return a node as a button that selects it. */
  const entry = (graph, node, acts) => el("button", {
    type: "button", class: "other", "data-id": node.id, title: node.id,
    on: { click: () => acts.select(node.id, true), pointerenter: () => acts.point(node), pointerleave: () => acts.point(null) },
  }, el("span", { class: `dot ${node.kind}` }), el("span", { class: "label" }, nameOf(graph, node)), el("span", { class: "id" }, placeOf(graph, node)));

  /* Show the texts that a feature fires on. */
  async function show(box, hook, latent) {
    try {
      const { examples, list, top, bottom } = await jsae.data.latent(hook, latent);
      lists.set(hook, list);
      const strongest = examples.filter(({ group }) => group === 0).slice(0, TEXTS);
      const tokens = (name, pairs) => el("p", { class: "small writes" }, el("span", { class: "quiet" }, name), pairs.slice(0, 8).map(({ id }) => jsae.tokens.chip(id)));
      box.replaceChildren(el("h2", {}, "Fires on", el("small", {}, `${percent(list.density(latent))} of all tokens`)),
        jsae.tokens.walk(el("div", { class: "groups" }, strongest.map((example) =>
          el("div", { class: "place" }, jsae.tokens.context(example, list.max[latent], { size: "snippet", breaks: false }).node))), "Texts"),
        tokens("raises ", top), tokens("lowers ", bottom));
    } catch (error) {
      box.replaceChildren(el("p", { class: "bad small", role: "alert" }, error.message));
    }
  }

  function ofGroup(graph, group, index, acts) {
    const name = el("input", {
      type: "text", id: "groupname", maxlength: 120, value: group.label, "aria-label": "Name of the group",
      on: { change: () => acts.rename(index, name.value) },
    });
    return [el("section", { class: "card about" }, el("p", { class: "quiet small" }, `Group of ${group.ids.length} node${group.ids.length === 1 ? "" : "s"}`), name,
      el("ol", { class: "picks" }, group.ids.map((id) => el("li", {}, entry(graph, graph.byId.get(id), acts)))),
      el("div", { class: "line" }, el("button", { type: "button", class: "plain", id: "ungroup", on: { click: () => acts.ungroup(index) } }, "Ungroup"),
        el("span", { class: "grow" }), el("button", { type: "button", class: "plain", on: { click: () => acts.choose(null) } }, "Close")))];
  }

  /* Return where to begin: the next tokens, and the features of the largest influence. */
  function entrance(graph, acts) {
    const sorted = (kind, key) => graph.nodes.filter((node) => node.kind === kind).sort((a, b) => key(b) - key(a)).slice(0, FIRST);
    const picks = (title, note, nodes) => nodes.length > 0 && el("section", { class: "card" }, el("h2", {}, title, el("small", {}, note)),
      el("ol", { class: "picks" }, nodes.map((node) => el("li", {}, entry(graph, node, acts)))));
    return [picks("Next tokens", "that the graph explains", sorted("logit", ({ probability }) => probability)),
      picks("Features", "of the largest influence", sorted("feature", ({ total }) => total)),
      picks("Tokens", "of the largest influence", sorted("token", ({ total }) => total))];
  }

  jsae.graphSide = { panel, tip, near, nameOf, placeOf, loadLabels };
})();
