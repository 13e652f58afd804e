/* The picture of an attribution graph: tokens at the bottom, layers upwards, logits on top. */
"use strict";

(() => {
  const { el, svg, number } = jsae;
  const MARGIN = { left: 46, right: 84, top: 92, bottom: 72 };
  const ROW = { least: 34, most: 64 };
  const COLUMN = { least: 30, most: 260, step: 13, logits: 17 };
  const DRAWN = { nodes: 2500, links: 220, own: 120 };
  const R = 5;
  const SHAPES = {
    feature: `M${-R} 0a${R} ${R} 0 1 0 ${2 * R} 0a${R} ${R} 0 1 0 ${-2 * R} 0z`, error: `M0 ${-R - 1}L${R + 1} 0L0 ${R + 1}L${-R - 1} 0z`,
    token: `M${-R} ${-R}h${2 * R}v${2 * R}h${-2 * R}z`, logit: `M${-R} ${-R}h${2 * R}v${2 * R}h${-2 * R}z`,
  };

  /* Return the nodes to show: tokens and logits, pinned ones, and the others up to a share of the influence. */
  function visible(graph, view) {
    const pinned = new Set([...view.pinned, view.clicked]);
    const inner = graph.nodes.filter(({ kind }) => kind === "feature" || kind === "error");
    const chosen = inner.filter((node) => node.influence <= view.nodes + 1e-9 || pinned.has(node.id));
    chosen.sort((a, b) => a.influence - b.influence);
    return [...graph.nodes.filter(({ kind }) => kind === "token" || kind === "logit").slice(0, DRAWN.nodes), ...chosen.slice(0, DRAWN.nodes)];
  }

  /* Return the places of nodes: columns as wide as their fullest row needs, rows as high as the room allows. */
  function layout(graph, nodes, wide, high) {
    const cells = new Map();
    const cell = ({ row, position }) => `${row} ${position}`;
    for (const node of nodes) cells.set(cell(node), [...(cells.get(cell(node)) ?? []), node]);
    const widths = graph.tokens.map(() => COLUMN.least);
    for (const some of cells.values()) {
      const { position } = some[0];
      const step = some[0].kind === "logit" ? COLUMN.logits : COLUMN.step;
      widths[position] = Math.max(widths[position], Math.min(COLUMN.most, some.length * step + 10));
    }
    const room = wide - MARGIN.left - MARGIN.right;
    const needed = widths.reduce((sum, one) => sum + one, 0);
    const spare = Math.max(0, room - needed) / graph.tokens.length;
    const starts = [MARGIN.left];
    for (const one of widths) starts.push(starts.at(-1) + one + spare);
    const rows = graph.layers + 2;
    const step = Math.max(ROW.least, Math.min(ROW.most, (high - MARGIN.top - MARGIN.bottom) / (rows - 1)));
    const height = MARGIN.top + MARGIN.bottom + step * (rows - 1);
    const y = (row) => height - MARGIN.bottom - row * step;
    const places = new Map();
    for (const some of cells.values()) {
      const { position, row } = some[0];
      const [from, to] = [starts[position], starts[position + 1]];
      const gap = Math.min(COLUMN.step + 8, (to - from - 8) / some.length);
      some.sort((a, b) => b.total - a.total);
      some.forEach((node, i) => {
        places.set(node.id, { x: (from + to) / 2 + (i - (some.length - 1) / 2) * gap, y: y(row) });
      });
    }
    return { places, starts, y, step, width: starts.at(-1) + MARGIN.right, height };
  }

  const nameOf = (token) => jsae.tokens.line(token.replaceAll("⏎", "\n"));
  const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

  /* A picture in a box. `acts` has the reactions: select(id), pin(id), leave(), tip(node) and label(node). */
  class Picture {
    constructor(box, graph, acts) {
      Object.assign(this, { box, graph, acts, hovered: null, shapes: new Map() });
      this.links = svg("g", { class: "links", "aria-hidden": "true" });
      this.nodes = svg("g", { class: "nodes" });
      this.ground = svg("g", { class: "ground", "aria-hidden": "true" });
      this.names = svg("g", { class: "names", "aria-hidden": "true" });
      this.image = svg("svg", {
        class: "picture", tabindex: 0, role: "group",
        "aria-label": "Graph: arrows move from node to node, Enter selects, p pins, i and o follow the strongest input and output",
        on: { keydown: (event) => this.press(event) },
      }, this.ground, this.links, this.nodes, this.names);
      box.replaceChildren(this.image);
      box.addEventListener("scroll", () => this.names.setAttribute("transform", `translate(${box.scrollLeft} 0)`), { passive: true });
    }

    /* Draw the graph for a view. Shapes that stay where they are keep their elements: one that is replaced between the
       press and the release of a button loses the click. */
    draw(view) {
      this.view = view;
      const nodes = visible(this.graph, view);
      const room = [this.box.clientWidth, Math.max(360, this.box.clientHeight)];
      const drawn = [...room, ...nodes.map(({ id }) => id)].join("\n");
      if (drawn === this.drawn) {
        for (const node of nodes) this.shapes.get(node.id).setAttribute("aria-label", this.acts.label(node));
        this.update(view);
        return;
      }
      this.drawn = drawn;
      const atEnd = this.box.scrollLeft + this.box.clientWidth >= this.box.scrollWidth - 4;
      this.shown = nodes;
      this.at = layout(this.graph, nodes, ...room);
      this.image.setAttribute("width", this.at.width);
      this.image.setAttribute("height", this.at.height);
      if (atEnd || !this.shapes.size) this.box.scrollLeft = this.box.scrollWidth; // at the logits
      this.drawGround();
      const focused = this.nodes.contains(document.activeElement) ? document.activeElement.dataset.id : null;
      this.shapes = new Map(nodes.map((node) => [node.id, this.shape(node)]));
      this.nodes.replaceChildren(...this.shapes.values());
      this.update(view);
      if (focused && this.shapes.has(focused)) this.shapes.get(focused).focus({ preventScroll: true });
    }

    drawGround() {
      const { y, starts, width, step } = this.at;
      const rows = Array.from({ length: this.graph.layers + 2 }, (_, row) => row);
      const name = (row) => (row === 0 ? "tokens" : row === this.graph.layers + 1 ? "logits" : `L${row - 1}`);
      this.ground.replaceChildren(
        ...rows.filter((row) => row % 2 === 1).map((row) => svg("rect", { class: "band", x: 0, y: y(row) - step / 2, width, height: step })),
        ...starts.slice(1, -1).map((x) => svg("line", { class: "rule", x1: x, x2: x, y1: y(rows.length - 1) - step / 2, y2: y(0) + step / 2 })),
        ...this.graph.tokens.map((token, i) => {
          const x = (starts[i] + starts[i + 1]) / 2;
          return svg("text", { class: "word", "text-anchor": "end", transform: `translate(${x + 4} ${y(0) + 20}) rotate(-38)` }, cut(nameOf(token), 14) || "∅");
        }));
      const top = y(rows.length - 1) - step / 2;
      const height = y(0) + 12 - top; // down to the words of the tokens
      this.names.replaceChildren(svg("rect", { class: "behind", x: 0, y: top, width: 46, height }), ...rows.map((row) => svg("text", { class: "rowname", x: 8, y: y(row) + 4 }, name(row))));
    }

    shape(node) {
      const { x, y } = this.at.places.get(node.id);
      const word = node.kind === "logit" && svg("text", { class: "word", transform: "translate(4 -11) rotate(-60)" },
        `${cut(nameOf(node.token), 10)} ${(100 * node.probability).toFixed(node.probability < 0.1 ? 1 : 0)}%`);
      return svg("g", {
        class: `node ${node.kind}`, transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`, "data-id": node.id, tabindex: -1, role: "button",
        "aria-label": this.acts.label(node), tip: () => this.acts.tip(node),
        on: {
          click: (event) => (event.shiftKey ? this.acts.pin(node.id) : this.acts.select(node.id)),
          pointerenter: () => this.hover(node), pointerleave: () => this.hover(null),
          focus: () => this.hover(node), blur: () => this.hover(null),
        },
      }, svg("circle", { class: "hit", r: 9 }), svg("path", { d: SHAPES[node.kind] }), word);
    }

    hover(node) {
      this.hovered = node;
      this.update(this.view);
      if (node) this.acts.near(node);
    }

    /* Draw links and emphasis again, for a view with the same visible nodes. */
    update(view) {
      this.view = view;
      const center = this.hovered ?? this.graph.byId.get(view.clicked) ?? null;
      const links = this.linksOf(center, view);
      const near = new Set(links.flatMap(({ source, target }) => [source.id, target.id]));
      const most = Math.max(...links.map((link) => this.size(link, center)), 1e-12);
      this.links.replaceChildren(...links.toReversed().map((link) => this.curve(link, this.size(link, center) / most, center)));
      const pinned = new Set(view.pinned);
      for (const [id, shape] of this.shapes) {
        shape.classList.toggle("clicked", id === view.clicked);
        shape.classList.toggle("pinned", pinned.has(id));
        shape.classList.toggle("far", center !== null && id !== center.id && !near.has(id));
        shape.setAttribute("aria-pressed", String(id === view.clicked));
      }
    }

    size = (link, center) => (center ? Math.abs(link.weight) : link.score);

    /* Return the links to draw: those of a node, else the strongest of all. */
    linksOf(center, { links, edges }) {
      const here = ({ source, target }) => this.shapes.has(source.id) && this.shapes.has(target.id);
      if (!center) return this.strongest(edges, here);
      const inputs = links === "output" ? [] : center.inputs.filter(here).slice(0, DRAWN.own);
      const outputs = links === "input" ? [] : center.outputs.filter(here).slice(0, DRAWN.own);
      return [...inputs, ...outputs].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
    }

    /* Return the links of the highest scores, up to a share of all scores. */
    strongest(edges, here) {
      const some = [];
      for (const link of this.graph.links) {
        if (link.place > edges || some.length === DRAWN.links) break;
        if (here(link)) some.push(link);
      }
      return some;
    }

    curve({ source, target, weight }, size, center) {
      const [a, b] = [this.at.places.get(source.id), this.at.places.get(target.id)];
      const bend = (a.y - b.y) * 0.45;
      return svg("path", {
        class: weight < 0 ? "link cool" : "link warm", "data-source": source.id, "data-target": target.id,
        d: `M${a.x} ${a.y - R}C${a.x} ${a.y - bend} ${b.x} ${b.y + bend} ${b.x} ${b.y + R}`,
        vars: { "--w": `${(0.6 + 3.4 * size).toFixed(2)}px`, "--o": ((center ? 0.3 : 0.16) + (center ? 0.65 : 0.5) * size).toFixed(2) },
      });
    }

    /* ---- keyboard ---- */

    press(event) {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const node = this.graph.byId.get(event.target.dataset.id);
      const act = { Enter: () => this.acts.select(node.id), " ": () => this.acts.select(node.id), p: () => this.acts.pin(node.id) }[event.key];
      if (event.key === "Escape") this.acts.leave();
      else if (node && act) act();
      else if (!this.move(node, event.key)) return;
      event.preventDefault();
      event.stopPropagation();
    }

    /* Focus the next node in a direction, or along the strongest link; return whether the key is for that. */
    move(node, key) {
      const along = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[key];
      const link = { i: "inputs", o: "outputs" }[key];
      if (!along && !link) return false;
      const start = node ?? this.graph.byId.get(this.view.clicked) ?? this.shown[0];
      const next = !node ? start : along ? this.beside(node, along) : this.ahead(node, link);
      if (next) this.focus(next.id);
      return true;
    }

    beside(node, [dx, dy]) {
      const place = (one) => this.at.places.get(one.id);
      const here = place(node);
      const away = (one) => Math.abs(place(one).x - here.x);
      const rows = dy ? this.shown.filter(({ row }) => (row - node.row) * dy > 0) : this.shown.filter(({ row }) => row === node.row);
      const row = dy ? Math[dy > 0 ? "min" : "max"](...rows.map((one) => one.row)) : node.row;
      const some = rows.filter((one) => one.row === row && (dy || (place(one).x - here.x) * dx > 0));
      return some.reduce((best, one) => (best === null || away(one) < away(best) ? one : best), null);
    }

    ahead(node, side) {
      const link = node[side].find(({ source, target }) => this.shapes.has((side === "inputs" ? source : target).id));
      return link && (side === "inputs" ? link.source : link.target);
    }

    focus(id) {
      const shape = this.shapes.get(id);
      shape?.focus({ preventScroll: true });
      shape?.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
  }

  jsae.graphDraw = { Picture, nameOf, cut, signed: (value) => `${value < 0 ? "−" : "+"}${number(Math.abs(value))}`, legend };

  /* Return what shapes and colours mean. */
  function legend() {
    const mark = (kind) => svg("svg", { viewBox: "-8 -8 16 16", width: 14, height: 14, "aria-hidden": "true", class: `node ${kind}` }, svg("path", { d: SHAPES[kind] }));
    const line = (kind) => svg("svg", { viewBox: "0 0 18 8", width: 18, height: 8, "aria-hidden": "true" }, svg("path", { class: `link ${kind}`, d: "M1 4h16", vars: { "--w": "2.5px", "--o": "0.9" } }));
    return el("ul", { class: "legend" }, el("li", {}, mark("feature"), "feature"), el("li", {}, mark("error"), "error"),
      el("li", {}, mark("token"), "token, logit"), el("li", {}, line("warm"), "raises"), el("li", {}, line("cool"), "lowers"));
  }
})();
