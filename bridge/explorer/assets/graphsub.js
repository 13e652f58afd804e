/* The pinned nodes of an attribution graph as a small diagram, and groups of them with names. */
"use strict";

(() => {
  const { el, svg } = jsae;
  const BOX = { width: 172, height: 46, gap: 22, row: 92, margin: 12 };

  /* Return what the diagram shows, a box for every group and every other pinned node, and the links between boxes.

     The weight of a link is the sum of the direct effects of all nodes of one box on all nodes of the other. */
  function boxes(graph, view) {
    const grouped = new Set(view.groups.flatMap(({ ids }) => ids));
    const nodes = (ids) => ids.map((id) => graph.byId.get(id));
    const all = [
      ...view.groups.map(({ label, ids }, group) => ({ label, nodes: nodes(ids), group })),
      ...view.pinned.filter((id) => !grouped.has(id)).map((id) => ({ label: jsae.graphSide.nameOf(graph, graph.byId.get(id)), nodes: nodes([id]), group: null })),
    ];
    const owner = new Map(all.flatMap((box, i) => box.nodes.map(({ id }) => [id, i])));
    const links = new Map();
    for (const { source, target, weight } of graph.links) {
      const [a, b] = [owner.get(source.id), owner.get(target.id)];
      if (a === undefined || b === undefined || a === b) continue;
      links.set(`${a} ${b}`, { from: all[a], to: all[b], weight: weight + (links.get(`${a} ${b}`)?.weight ?? 0) });
    }
    return { all, links: [...links.values()].filter(({ weight }) => weight !== 0) };
  }

  /* Place boxes in rows by their highest layer, and from left to right by position. */
  function place(all, wide) {
    const rows = Map.groupBy(all, ({ nodes }) => Math.max(...nodes.map(({ row }) => row)));
    const order = [...rows.keys()].sort((a, b) => b - a);
    const most = Math.max(...[...rows.values()].map((row) => row.length));
    const width = Math.max(wide, most * (BOX.width + BOX.gap) + 2 * BOX.margin);
    order.forEach((key, r) => {
      const row = rows.get(key);
      const at = ({ nodes }) => nodes.reduce((sum, { position }) => sum + position, 0) / nodes.length;
      row.sort((a, b) => at(a) - at(b));
      const step = Math.min(BOX.width * 1.6, (width - 2 * BOX.margin) / row.length);
      row.forEach((box, i) => {
        Object.assign(box, { x: width / 2 + (i - (row.length - 1) / 2) * step, y: BOX.margin + r * BOX.row });
      });
    });
    return { width, height: 2 * BOX.margin + (order.length - 1) * BOX.row + BOX.height };
  }

  /* Return the diagram of a view; `acts` has the reactions, `choosing` is the set of boxes for a new group, or null. */
  function diagram(graph, view, { chosen, choosing, wide }, acts) {
    const { all, links } = boxes(graph, view);
    const { width, height } = place(all, wide);
    const most = Math.max(...links.map(({ weight }) => Math.abs(weight)), 1e-12);
    const key = ({ group, nodes }) => (group === null ? nodes[0].id : `group ${group}`);
    return el("div", { class: "board", vars: { width: `${width}px`, height: `${height}px` } },
      svg("svg", { width, height, "aria-hidden": "true" }, links.map((link) => line(link, Math.abs(link.weight) / most))),
      all.map((box) => {
        const pressed = choosing ? choosing.has(key(box)) : box.group === null ? box.nodes[0].id === view.clicked : box.group === chosen;
        const note = box.group === null ? jsae.graphSide.placeOf(graph, box.nodes[0]) : `${box.nodes.length} nodes`;
        return el("button", {
          type: "button", class: `box ${box.group === null ? box.nodes[0].kind : "group"}`, "aria-pressed": String(pressed), "data-key": key(box),
          vars: { left: `${box.x - BOX.width / 2}px`, top: `${box.y}px`, width: `${BOX.width}px`, height: `${BOX.height}px` },
          tip: () => [["", box.label], ["", note], ...links.filter(({ from, to }) => from === box || to === box).slice(0, 8)
            .map(({ from, to, weight }) => [`${to === box ? "from" : "to"} ${jsae.graphDraw.cut((to === box ? from : to).label, 30)}`, jsae.graphDraw.signed(weight)])],
          on: { click: () => (choosing ? acts.toggle(key(box)) : box.group === null ? acts.select(box.nodes[0].id) : acts.choose(box.group)) },
        }, el("b", {}, jsae.tokens.shown(box.label)), el("span", {}, note));
      }));
  }

  function line({ from, to, weight }, size) {
    const [y1, y2] = [from.y, to.y + BOX.height];
    const bend = (y1 - y2) * 0.5;
    const path = y1 === from.y && to.y === from.y // in one row: over the boxes
      ? `M${from.x} ${from.y}C${from.x} ${from.y - 26} ${to.x} ${to.y - 26} ${to.x} ${to.y}`
      : `M${from.x} ${y1}C${from.x} ${y1 - bend} ${to.x} ${y2 + bend} ${to.x} ${y2}`;
    return svg("path", { class: weight < 0 ? "link cool" : "link warm", d: path, vars: { "--w": `${(0.8 + 5 * size).toFixed(2)}px`, "--o": (0.35 + 0.55 * size).toFixed(2) } });
  }

  /* Return the section of pinned nodes with its controls. */
  function section(graph, view, state, acts) {
    const { choosing } = state;
    const name = el("input", { type: "text", id: "newgroup", maxlength: 120, placeholder: "Name of the group", "aria-label": "Name of the new group" });
    const form = el("form", { class: "line", on: { submit: (event) => { event.preventDefault(); acts.group(name.value); } } }, name,
      el("button", { type: "submit", class: "plain strong", id: "makegroup", disabled: !choosing?.size }, "Group"),
      el("button", { type: "button", class: "plain", on: { click: () => acts.choosing(false) } }, "Cancel"));
    return el("section", { class: "card pinnedcard" }, el("div", { class: "line head" }, el("h2", {}, "Pinned", el("small", {}, choosing ? "choose what belongs together" : "links are sums of direct effects")),
      el("span", { class: "grow" }),
      choosing ? form : [el("button", { type: "button", class: "plain", id: "togroup", on: { click: () => acts.choosing(true) } }, "Group …"),
        el("button", { type: "button", class: "plain", id: "unpinall", on: { click: () => acts.unpinAll() } }, "Unpin all")]),
    el("div", { class: "scroll" }, diagram(graph, view, state, acts)));
  }

  jsae.graphSub = { section };
})();
