/* Assemble the page: the address, the keyboard, the theme, and the connection to the server. */
"use strict";

(() => {
  const { el } = jsae;
  const main = document.getElementById("main");
  const SERVED = ["text", "lens", "steer", "checkpoints"]; // views that need the server
  const at = { hook: 0, latent: null, view: "" };
  let turn = 0;

  /* ---- addresses: #latent=3, #hook=blocks.2.hook_resid_post&latent=3, #view=text ---- */

  function link(latent, hook = at.hook) {
    const { hooks } = jsae.data.manifest;
    return hooks.length > 1 ? `#hook=${encodeURIComponent(hooks[hook].name)}&latent=${latent}` : `#latent=${latent}`;
  }

  function latentLink(list, latent) {
    return el("a", { class: "other", href: link(latent, list.hook) }, el("span", { class: "id" }, `#${latent}`),
      el("span", { class: list.labels[latent] ? "label" : "label none" }, jsae.tokens.shown(list.title(latent))));
  }

  function read() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const latent = /^\d+$/.test(asked.get("latent") ?? "") ? Number(asked.get("latent")) : null;
    const view = asked.get("view") ?? "";
    const hook = asked.has("hook") ? jsae.data.hookNumber(asked.get("hook")) : at.hook;
    return { hook: needsOwn(view) && jsae.data.manifest.hooks[hook]?.run ? 0 : hook, latent, view, asked };
  }

  /* Return whether a view shows only SAEs of the page's own run, the only ones that the server has. */
  const needsOwn = (view) => Boolean(jsae.live) && SERVED.includes(view);

  async function route() {
    const mine = ++turn;
    const still = () => mine === turn;
    const { hook, latent, view, asked } = read();
    jsae.address.forget();
    document.body.toggleAttribute("data-embed", asked.has("embed") && latent !== null);
    if (asked.has("text")) jsae.trace.state.text = asked.get("text");
    try {
      document.body.toggleAttribute("data-wide", view === "graph" || !jsae.data.manifest.hooks.length);
      if (view === "graph" || !jsae.data.manifest.hooks.length) {
        await showGraph(hook, asked, still);
        return;
      }
      if (hook < 0) throw new Error(`no activation ${asked.get("hook")} in this run`);
      const list = await jsae.data.list(hook);
      if (!still()) return;
      if (jsae.list.current !== list) jsae.list.show(list);
      Object.assign(at, { hook, latent, view });
      document.getElementById("hook").value = String(hook);
      mark(view);
      document.body.dataset.view = latent !== null || view ? "main" : "list";
      jsae.list.choose(latent ?? -1);
      if (asked.has("latent") && (latent === null || latent >= list.size)) {
        throw new Error(`no latent ${asked.get("latent")}: this SAE has latents 0 to ${list.size - 1}`);
      }
      document.title = `${latent === null ? "" : `#${latent} ${list.labels[latent]} · `}${jsae.data.manifest.run} · jsae`;
      if (latent !== null) await jsae.latent.show(main, hook, latent, still);
      else await (shownWith(view, list) || jsae.overview).show(main, list, asked, still);
      if (still()) jsae.list.keep();
      if (still() && view && jsae.data.manifest.hooks.length > 1) jsae.address.keep({ hook: jsae.data.manifest.hooks[hook].name });
      if (still() && jsae.live && (latent !== null || (SERVED.includes(view) && view !== "steer"))) jsae.address.keep({ text: jsae.trace.state.text });
    } catch (error) {
      if (still()) main.replaceChildren(el("p", { class: "pad bad", role: "alert" }, error.message));
    }
  }

  /* Return what draws a view: some need a server, some a run on several checkpoints. */
  const shownWith = (view, list) => new Map(Object.entries({
    lists: jsae.lists, compare: jsae.compare, film: list.timeline && jsae.film,
    lens: (jsae.live || jsae.data.manifest.lenses.texts > 0) && jsae.lens,
    ...(jsae.live && { text: jsae.trace, steer: jsae.steer, checkpoints: jsae.live.checkpoints?.length && jsae.checkpoints }),
  })).get(view);

  async function showGraph(hook, asked, still) {
    Object.assign(at, { latent: null, view: "graph" });
    document.body.dataset.view = "main";
    mark("graph");
    await jsae.graph.show(main, asked, still);
  }

  /* Mark the tab of a view. */
  function mark(view) {
    const row = document.getElementById("tabs");
    for (const tab of row.children) {
      tab.toggleAttribute("aria-current", tab.dataset.view === view);
      // scrollIntoView would also move the place from which Tab goes on
      if (tab.dataset.view === view) row.scrollLeft = tab.offsetLeft - row.offsetLeft - (row.clientWidth - tab.offsetWidth) / 2;
    }
  }

  /* ---- keyboard ---- */

  const KEYS = [["j or →", "next latent of the list"], ["k or ←", "previous latent"], ["/", "search"], ["Enter", "open the first result"],
    ["Esc", "leave the search; back to the overview"], ["Tab, ← → ↑ ↓", "move through the tokens of the texts"], ["f", "snippets or full texts"], ["r", "a random latent that fires"], ["In a graph: i, o", "the strongest input or output of a node"], ["In a graph: Enter, p", "select or pin a node"], ["t", "light or dark"], ["?", "this help"]];

  const TYPED = "textarea, select, input:not([type=checkbox]):not([type=range])";

  function press(event) {
    const { target, key } = event;
    const { hooks } = jsae.data.manifest;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (target.closest(TYPED) || document.querySelector("dialog[open]")) return;
    if (target.type === "range" && key.startsWith("Arrow")) return;
    if ((at.view === "graph" || !hooks.length) && !["t", "?", "Escape"].includes(key)) return;
    const step = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[key];
    if (step) location.hash = link(jsae.list.step(at.latent ?? -1, step));
    else if (key === "/") jsae.list.focus();
    else if (key === "Escape") location.hash = "#";
    else if (key === "r") location.hash = link(jsae.list.any());
    else if (key === "t") turnTheme();
    else if (key === "f") document.querySelector(".contexts .segmented [aria-pressed=false]")?.click();
    else if (key === "?") help();
    else return;
    event.preventDefault();
  }

  function help() {
    const box = document.getElementById("keys");
    box.setAttribute("aria-label", "Keyboard");
    box.replaceChildren(el("h2", {}, "Keyboard"), el("dl", {}, KEYS.map(([key, what]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, what)])),
      el("form", { method: "dialog" }, el("button", { class: "plain" }, "Close")));
    box.showModal();
  }

  function turnTheme() {
    const { dataset } = document.documentElement;
    const dark = dataset.theme ? dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    dataset.theme = dark ? "light" : "dark";
    jsae.remembered.set("theme", dataset.theme);
  }

  /* ---- views ---- */

  /* Draw the links to the views. On a wide screen the list and the overview are side by side and need none. */
  async function drawTabs() {
    const { hooks } = jsae.data.manifest;
    const graphs = jsae.live?.graphs || (await jsae.graph.list()).length > 0;
    const steered = jsae.live && !hooks.every(jsae.data.isTranscoder);
    const film = hooks.some((one) => one.over_checkpoints);
    const tabs = [...(hooks.length ? [["", "Latents", "#"], ["overview", "Overview", "#view=overview", true]] : []),
      ...(film ? [["film", "Film", "#view=film"]] : []),
      ...(jsae.live && hooks.length ? [["text", "Your text", "#view=text"], ...(jsae.live.checkpoints?.length ? [["checkpoints", "Checkpoints", "#view=checkpoints"]] : [])] : []),
      ...(hooks.length && (jsae.live || jsae.data.manifest.lenses.texts) ? [["lens", "Lenses", "#view=lens"]] : []),
      ...(steered ? [["steer", "Steer", "#view=steer"]] : []),
      ...(hooks.length ? [["lists", "Lists", "#view=lists"]] : []),
      ...(graphs ? [["graph", "Graphs", "#view=graph"]] : [])];
    document.getElementById("tabs").append(...tabs.map(([view, name, href, narrow]) =>
      el("a", { href, "data-view": view, class: narrow && "narrow" }, name)));
  }

  /* ---- start ---- */

  async function start() {
    const manifest = await jsae.data.open();
    document.getElementById("run").textContent = manifest.run;
    const choice = document.getElementById("hook");
    choice.append(...manifest.hooks.map((one, i) => el("option", { value: i }, one.name)));
    choice.addEventListener("change", () => {
      const { name, run } = manifest.hooks[Number(choice.value)];
      const view = run && needsOwn(at.view) ? "" : at.view; // such a view would not change
      location.hash = `#hook=${encodeURIComponent(name)}${view && `&view=${view}`}`;
    });
    choice.parentElement.hidden = manifest.hooks.length < 2;
    jsae.list.build();
    jsae.list.restore(jsae.address.asked());
    jsae.watchTips();
    document.addEventListener("keydown", press);
    document.getElementById("theme").addEventListener("click", turnTheme);
    document.getElementById("help").addEventListener("click", help);
    document.querySelector(".skip").addEventListener("click", (event) => {
      event.preventDefault(); // the address holds the latent
      main.focus();
    });
    window.addEventListener("hashchange", route);
    await jsae.connect?.();
    await drawTabs();
    await route();
  }

  Object.assign(jsae, { link, latentLink, route });
  start().catch((error) => main.replaceChildren(el("p", { class: "pad bad", role: "alert" }, error.message)));
})();
