/* The view of attribution graphs: which graph, what of it is shown, and the reactions of its parts. */
"use strict";

(() => {
  const { el, later } = jsae;
  const state = { graph: null, view: null, list: null, key: "", chosen: null, choosing: null, prompt: "", note: "" };
  let parts = {};
  let picture = null;
  let turn = 0;

  /* Show the graph that the fields of the address name, else the last one, else the latest of the run. */
  async function show(main, asked, still) {
    await list();
    const slug = asked.get("graph");
    const prompt = jsae.live?.graphs ? asked.get("prompt") : null;
    const key = prompt !== null ? `prompt ${prompt}` : slug !== null ? `graph ${slug}` : state.key || (state.list.length ? `graph ${state.list[0].slug}` : "");
    if (!still()) return;
    frame(main);
    if (key === state.key && state.graph) {
      if (asked.has("clickedId") || asked.has("pinnedIds") || asked.has("supernodes")) adopt(asked);
      draw();
    } else if (prompt !== null) await trace(prompt, asked);
    else if (key) await open(key.slice("graph ".length), asked);
    else empty();
  }

  /* Return the graphs of the run; none if the list is not there. */
  async function list() {
    state.list ??= await jsae.load("../graphs/list").catch(() => []);
    return state.list;
  }

  async function open(slug, asked) {
    const mine = ++turn;
    try {
      const graph = jsae.graphFile.read(await jsae.load(`../graphs/${slug}.graph`));
      if (mine === turn) accept(graph, `graph ${slug}`, asked);
    } catch (error) {
      if (mine === turn) refuse(new Error(state.list.some((one) => one.slug === slug) ? error.message : `no graph ${slug} in this run: ${state.list.length ? `there are ${state.list.map((one) => one.slug).join(", ")}` : "python -m experiments.trace writes one"}`));
    }
  }

  async function trace(prompt, asked) {
    const mine = ++turn;
    state.prompt = prompt;
    parts.prompt.value = prompt;
    parts.go.disabled = true;
    say("Tracing …");
    try {
      const document = await jsae.api.graph({ prompt });
      if (mine === turn) accept(jsae.graphFile.read(document), `prompt ${prompt}`, asked);
    } catch (error) {
      if (mine === turn) refuse(error);
    } finally {
      if (parts.go) parts.go.disabled = false;
    }
  }

  async function openFile(file) {
    const mine = ++turn;
    try {
      if (file.size > jsae.graphFile.MOST.bytes) throw new Error(`${file.name} has ${jsae.whole(file.size)} bytes, and at most ${jsae.whole(jsae.graphFile.MOST.bytes)} are read`);
      const graph = jsae.graphFile.parse(await file.text());
      if (mine === turn) accept(graph, `file ${file.name}`, null);
    } catch (error) {
      if (mine === turn) refuse(error);
    }
  }

  function accept(graph, key, asked) {
    Object.assign(state, { graph, view: graph.view, key, chosen: null, choosing: null });
    if (asked) adopt(asked);
    const lost = graph.lost ? `${jsae.whole(graph.lost)} links are left out: they lead to no node of the file, or not upwards` : "";
    draw();
    say(lost);
    jsae.graphSide.loadLabels(graph).then(() => { if (state.graph === graph) draw(); }).catch((error) => jsae.toast(error.message, true));
  }

  /* Say why a graph cannot be shown, and keep the former one. */
  function refuse(error) {
    if (state.graph) draw();
    else empty();
    say(error.message, true);
  }

  /* Take the view from the address. */
  function adopt(asked) {
    const given = Object.fromEntries(asked);
    const some = ["clickedId", "pinnedIds", "supernodes", "linkType", "pruningThreshold", "edgeThreshold"].some((name) => name in given);
    if (some) state.view = jsae.graphFile.readView(given, state.graph);
  }

  /* Write what is shown into the address, so that a reload or a sent link shows the same. */
  const remember = later(() => {
    if (new URLSearchParams(location.hash.slice(1)).get("view") !== "graph" || !state.graph) return;
    const [kind, ...rest] = state.key.split(" ");
    const which = kind === "file" ? [] : [[kind, rest.join(" ")]];
    history.replaceState(null, "", `#${new URLSearchParams([["view", "graph"], ...which, ...jsae.graphFile.fields(state.view)])}`);
  }, 150);

  /* ---- reactions ---- */

  const acts = {
    select(id, moved = false) {
      Object.assign(state, { chosen: null });
      state.view.clicked = state.view.clicked === id && !moved ? "" : id;
      draw();
      if (moved) document.getElementById("node")?.focus({ preventScroll: true });
    },
    pin(id) {
      const { view } = state;
      if (view.pinned.includes(id)) {
        view.pinned = view.pinned.filter((one) => one !== id);
        view.groups = view.groups.map((group) => ({ ...group, ids: group.ids.filter((one) => one !== id) })).filter(({ ids }) => ids.length);
      } else view.pinned = [...view.pinned, id];
      draw();
    },
    leave() {
      if (state.view.clicked) acts.select(state.view.clicked);
      else picture.image.blur();
    },
    point: (node) => picture.hover(node && picture.shapes.has(node.id) ? node : null),
    near(node) {
      jsae.graphSide.near(state.graph, node, () => {
        if (picture.hovered !== node) return;
        picture.shapes.get(node.id)?.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
      }).catch((error) => jsae.toast(error.message, true));
    },
    tip: (node) => jsae.graphSide.tip(state.graph, node),
    label: (node) => `${jsae.graphSide.nameOf(state.graph, node)}, ${jsae.graphSide.placeOf(state.graph, node)}`,
    choose(group) {
      state.chosen = group;
      draw();
    },
    choosing(on) {
      state.choosing = on ? new Set() : null;
      draw();
      document.getElementById(on ? "newgroup" : "togroup")?.focus();
    },
    toggle(key) {
      if (!state.choosing.delete(key)) state.choosing.add(key);
      const name = document.getElementById("newgroup").value;
      draw();
      document.getElementById("newgroup").value = name;
    },
    group(name) {
      const { view, choosing } = state;
      const merged = view.groups.filter((_, i) => choosing.has(`group ${i}`));
      const ids = [...merged.flatMap((group) => group.ids), ...view.pinned.filter((id) => choosing.has(id))];
      if (!ids.length) return;
      const first = jsae.graphSide.nameOf(state.graph, state.graph.byId.get(ids[0]));
      view.groups = [...view.groups.filter((group) => !merged.includes(group)), { label: name.trim() || first, ids: [...new Set(ids)] }];
      Object.assign(state, { choosing: null, chosen: view.groups.length - 1 });
      draw();
    },
    rename(index, name) {
      state.view.groups[index].label = name.trim() || state.view.groups[index].label;
      draw();
    },
    ungroup(index) {
      state.view.groups = state.view.groups.filter((_, i) => i !== index);
      state.chosen = null;
      draw();
    },
    unpinAll() {
      Object.assign(state.view, { pinned: [], groups: [] });
      Object.assign(state, { chosen: null, choosing: null });
      draw();
    },
  };

  /* ---- the page ---- */

  function frame(main) {
    parts = {
      title: el("h1", {}, "Why the next token?"), prompt: null, go: null,
      status: el("p", { class: "small told", role: "status", id: "graphstatus" }),
      which: el("div", { class: "line which" }), controls: el("div", { class: "line graphbar" }),
      said: el("p", { class: "asked" }), box: el("div", { class: "drawing scroll" }), side: el("aside", { class: "side", "aria-label": "Selection" }),
      pinned: el("div", { class: "pins" }),
    };
    const page = el("div", { class: "page graph" }, el("header", { class: "title" }, el("div", { class: "line" }, parts.title, el("span", { class: "grow" }), parts.which), parts.said),
      jsae.live?.graphs && form(), parts.status,
      el("div", { class: "columns" }, el("div", { class: "left" }, el("section", { class: "card picturecard" }, parts.controls, parts.box), parts.pinned), parts.side));
    page.addEventListener("dragover", (event) => event.preventDefault());
    page.addEventListener("drop", (event) => {
      event.preventDefault();
      if (event.dataTransfer.files.length) openFile(event.dataTransfer.files[0]);
    });
    main.replaceChildren(page);
    picture = null;
    new ResizeObserver(later(() => { if (state.graph && picture && parts.box.isConnected) picture.draw(state.view); }, 100)).observe(parts.box);
    drawWhich();
  }

  function form() {
    parts.prompt = el("textarea", { class: "typed", id: "tracedprompt", rows: 2, spellcheck: "false", "aria-label": "Prompt whose next token is explained", placeholder: "Type a prompt: why does the model write what it writes next?", value: state.prompt });
    parts.go = el("button", { type: "submit", class: "plain strong", id: "trace" }, "Trace");
    const send = (event) => {
      event.preventDefault();
      if (parts.prompt.value) location.hash = new URLSearchParams([["view", "graph"], ["prompt", parts.prompt.value]]);
    };
    parts.prompt.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send(event); });
    return el("form", { class: "promptform", on: { submit: send } }, parts.prompt, parts.go);
  }

  /* Draw the choice of a graph, and what opens and saves one. */
  function drawWhich() {
    const kind = state.key.split(" ")[0];
    const options = state.list.map(({ slug, prompt }) => el("option", { value: slug }, jsae.graphDraw.cut(jsae.tokens.line(prompt), 40) || slug));
    const other = state.key && (kind !== "graph" || !state.list.some(({ slug }) => `graph ${slug}` === state.key));
    const choice = el("select", { id: "whichgraph", "aria-label": "Graph", on: { change: () => { if (choice.value) location.hash = `#view=graph&graph=${encodeURIComponent(choice.value)}`; } } },
      other && el("option", { value: "" }, jsae.graphDraw.cut(jsae.tokens.line(state.key.slice(kind.length + 1)), 40)), options);
    if (!other) choice.value = state.key.slice("graph ".length);
    parts.which.replaceChildren(...[options.length + (other ? 1 : 0) > 1 && choice,
      ...jsae.fileButton("Open …", openFile, { id: "openfile", title: "Open a graph file of circuit-tracer, Neuronpedia or experiments.trace; or drop it here" }, "graphfile"),
      state.graph && el("button", { type: "button", class: "plain", id: "savegraph", title: "Save the graph with what is pinned and grouped", on: { click: save } }, "Save"),
      state.graph && kind !== "file" && el("button", { type: "button", class: "plain", id: "copylink", on: { click: () => jsae.copy(location.href, "Link") } }, "Copy link")].filter(Boolean));
  }

  function save() {
    const { graph, view } = state;
    jsae.saveJson(graph.slug, jsae.graphFile.saved(graph, view));
  }

  function say(text, bad = false) {
    parts.status.replaceChildren(bad ? el("span", { class: "bad", role: "alert" }, text) : text);
  }

  function empty() {
    parts.box.replaceChildren(el("p", { class: "quiet pad" }, jsae.live?.graphs ? "Type a prompt above, or open a graph file."
      : "There is no graph here yet: python -m experiments.trace --run_dir=… --prompt=… writes one. Or open a graph file."));
  }

  /* Draw the graph and all that belongs to it. */
  function draw() {
    const { graph, view } = state;
    const best = graph.nodes.filter(({ kind }) => kind === "logit").sort((a, b) => b.probability - a.probability)[0];
    const name = best ? `Why “${jsae.graphDraw.nameOf(best.token)}”?` : "Attribution graph";
    parts.title.textContent = name;
    document.title = `${name} · ${jsae.data.manifest.run} · jsae`;
    parts.said.replaceChildren(el("span", { class: "quiet" }, "after "), ...graph.tokens.map((token) => el("code", { class: "chip" }, jsae.graphDraw.nameOf(token) || "∅")));
    const fresh = picture?.graph !== graph;
    if (fresh) {
      picture = new jsae.graphDraw.Picture(parts.box, graph, acts);
      drawControls();
    }
    picture.draw(view);
    count();
    drawWhich();
    drawSide();
    remember();
  }

  function drawSide() {
    const { graph, view } = state;
    const focused = document.activeElement?.id;
    parts.side.replaceChildren(...jsae.graphSide.panel(graph, view, state.chosen, acts).filter(Boolean));
    parts.pinned.replaceChildren(...(view.pinned.length ? [jsae.graphSub.section(graph, view, { chosen: state.chosen, choosing: state.choosing, wide: parts.pinned.clientWidth - 40 }, acts)] : []));
    if (focused && document.activeElement === document.body) document.getElementById(focused)?.focus({ preventScroll: true });
  }

  function drawControls() {
    const slider = (name, id, key, title) => {
      const output = el("output", {});
      const tell = () => { output.textContent = jsae.percent(state.view[key]); };
      const input = el("input", { type: "range", id, min: 0, max: 1, step: 0.01, value: state.view[key], title, on: { input: () => {
        state.view[key] = Number(input.value);
        tell();
        picture.draw(state.view);
        count();
        remember();
      } } });
      tell();
      return el("label", { class: "field slider", title }, el("span", {}, name), input, output);
    };
    parts.count = el("span", { class: "quiet small", id: "graphcount" });
    parts.controls.replaceChildren(
      slider("Nodes", "prunenodes", "nodes", "Show the features and errors that together have this share of the influence"),
      slider("Links", "prunelinks", "edges", "Show the links that together have this share of the scores, while no node is selected"),
      jsae.segmented("Links of a node", [["both", "Both"], ["input", "In"], ["output", "Out"]], state.view.links, (value) => {
        state.view.links = value;
        picture.update(state.view);
        remember();
      }), el("span", { class: "grow" }), parts.count, jsae.graphDraw.legend());
  }

  function count() {
    const inner = state.graph.nodes.filter(({ kind }) => kind === "feature" || kind === "error");
    const shown = picture.shown.filter(({ kind }) => kind === "feature" || kind === "error");
    parts.count.textContent = `${jsae.whole(shown.length)} of ${jsae.whole(inner.length)} features and errors`;
  }

  jsae.graph = { show, list };
})();
