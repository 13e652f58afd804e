/* Lists of latents that a person puts together, with a remark each: kept by the browser, shared by a link or a file. */
"use strict";

(() => {
  const { el } = jsae;
  const MOST = 200; // latents of a list
  const LONGEST = 500; // characters of a remark
  const state = { name: "My latents", items: [] };

  /* Lists of different models have nothing in common. */
  const key = () => `list.${jsae.data.manifest.fingerprint ?? ""}`;

  function open() {
    try {
      take(JSON.parse(jsae.remembered.get(key()) ?? "{}"));
    } catch { /* what another version kept is left alone until it is replaced */ }
  }

  const hooks = () => jsae.data.manifest.hooks;

  /* Take a list from elsewhere; what is not a latent of this run is left out. */
  function take({ name, items }) {
    if (typeof name === "string") state.name = name.slice(0, 80);
    const known = (one) => hooks().some(({ hook, d_sae: size }) => hook === one?.hook && Number.isInteger(one.latent) && one.latent >= 0 && one.latent < size);
    if (Array.isArray(items)) {
      state.items = items.filter(known).slice(0, MOST).map(({ hook, latent, remark }) => ({ hook, latent, remark: String(remark ?? "").slice(0, LONGEST) }));
    }
  }

  function kept() {
    jsae.remembered.set(key(), JSON.stringify(state));
    jsae.address.keep({ name: state.name, item: state.items.map(spell) });
  }

  const spell = ({ hook, latent, remark }) => `${hook},${latent},${remark}`;

  function read(text) {
    const [hook, latent, ...remark] = text.split(",");
    return { hook, latent: Number(latent), remark: remark.join(",") };
  }

  function add(list, latent) {
    open();
    const hook = list.info.hook;
    if (state.items.some((one) => one.hook === hook && one.latent === latent)) jsae.toast(`#${latent} is in “${state.name}” already`);
    else if (state.items.length >= MOST) jsae.toast(`a list holds at most ${MOST} latents`, true);
    else {
      state.items.push({ hook, latent, remark: "" });
      jsae.remembered.set(key(), JSON.stringify(state));
      jsae.toast(`#${latent} is in “${state.name}”`);
    }
  }

  async function show(main, current, asked, still) {
    if (asked.has("item")) take({ name: asked.get("name") ?? state.name, items: asked.getAll("item").map(read) });
    else open();
    const lists = new Map(await Promise.all([...new Set(state.items.map(({ hook }) => hook))].map(async (hook) =>
      [hook, await jsae.data.list(hooks().findIndex((one) => one.hook === hook))])));
    if (!still()) return;
    const rows = el("ol", { class: "shelf" });
    const draw = () => {
      rows.replaceChildren(...state.items.map((one) => item(one, lists.get(one.hook), draw)));
      if (!state.items.length) rows.append(el("li", { class: "quiet" }, "Nothing yet: choose “Add to list” on the page of a latent."));
      kept();
    };
    const title = el("input", { type: "text", id: "listname", maxlength: 80, value: state.name, "aria-label": "Name of the list", on: { input: () => {
      state.name = title.value;
      kept();
    } } });
    main.replaceChildren(el("div", { class: "page" }, el("header", { class: "title" }, el("h1", {}, "A list of latents"),
      el("p", { class: "quiet" }, "It stays in this browser. The address of this page holds all of it: send the link, or open one."),
      el("div", { class: "line" }, title,
        el("button", { type: "button", class: "plain", on: { click: () => compare() } }, "Compare the ticked"),
        el("button", { type: "button", class: "plain", on: { click: () => jsae.copy(link(), "Link") } }, "Copy link"),
        el("button", { type: "button", class: "plain", on: { click: () => jsae.copy(JSON.stringify(state, null, 2), "JSON") } }, "Copy JSON"))), rows));
    draw();
  }

  function item(one, list, draw) {
    const remark = el("input", { type: "text", maxlength: LONGEST, value: one.remark, placeholder: "Remark", "aria-label": `Remark on #${one.latent}`, on: { input: () => {
      one.remark = remark.value;
      kept();
    } } });
    return el("li", { "data-latent": one.latent }, el("input", { type: "checkbox", "aria-label": `Compare #${one.latent}`, value: `${list.hook},${one.latent}` }),
      jsae.latentLink(list, one.latent), hooks().length > 1 && el("span", { class: "quiet small" }, one.hook), remark,
      el("button", { type: "button", class: "icon", "aria-label": `Take #${one.latent} out`, on: { click: () => {
        state.items.splice(state.items.indexOf(one), 1);
        draw();
      } } }, "×"));
  }

  function link() {
    const values = new URLSearchParams([["view", "lists"], ["name", state.name], ...state.items.map((one) => ["item", spell(one)])]);
    return `${location.href.split("#")[0]}#${values}`;
  }

  function compare() {
    const ticked = [...document.querySelectorAll(".shelf input[type=checkbox]:checked")].map((box) => box.value);
    if (ticked.length !== 2) jsae.toast("tick two latents to compare", true);
    else location.hash = `#view=compare&a=${ticked[0]}&b=${ticked[1]}`;
  }

  jsae.lists = { show, add };
})();
