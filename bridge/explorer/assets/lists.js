/* The view of named lists of latents: notes and remarks, comparison of two, links and files. */
"use strict";

(() => {
  const { el } = jsae;
  const LARGEST = 4e6; // bytes of a file
  const { shelf } = jsae;
  const button = (text, act, more = {}) => el("button", { type: "button", class: "plain", ...more, on: { click: act } }, text);

  /* ---- from the page of a latent ---- */

  /* Put a latent into the only list, or into the one that is chosen of several. */
  function add(list, latent) {
    shelf.open();
    if (shelf.state.lists.length === 1) {
      put(0, list, latent);
      return;
    }
    const box = document.getElementById("keys");
    box.setAttribute("aria-label", `Lists for latent ${latent}`);
    box.replaceChildren(el("h2", {}, `Add #${latent} to`), el("div", { class: "choices" }, shelf.state.lists.map(({ name, items }, number) =>
      button([name, el("span", { class: "number" }, String(items.length))], () => {
        put(number, list, latent);
        box.close();
      }))), el("form", { method: "dialog" }, el("button", { class: "plain" }, "Cancel")));
    box.showModal();
  }

  function put(number, list, latent) {
    try {
      jsae.toast(shelf.add(number, list, latent));
    } catch (error) {
      jsae.toast(error.message, true);
    }
  }

  /* ---- the view ---- */

  async function show(main, current, asked, still) {
    shelf.open();
    if (asked.has("item") || asked.has("note")) shelf.follow(asked);
    else shelf.leave();
    const numbers = [...new Set(shelf.current().items.map(shelf.place))].filter((number) => number >= 0);
    const lists = new Map(await Promise.all(numbers.map(async (number) => [number, await jsae.data.list(number)])));
    if (!still()) return;
    const again = () => show(main, current, new URLSearchParams(), () => true);
    const rows = el("ol", { class: "shelf" });
    const draw = () => {
      const { items } = shelf.current();
      rows.replaceChildren(...items.map((one) => row(one, lists.get(shelf.place(one)), draw)));
      if (!items.length) rows.append(el("li", { class: "quiet" }, "Nothing yet: choose “Add to list” on the page of a latent."));
      kept();
    };
    main.replaceChildren(el("div", { class: "page" }, el("header", { class: "title" }, el("h1", {}, "Lists of latents"),
      el("p", { class: "quiet" }, shelf.state.linked ? "This list comes from the address. Keep it, and this browser has it among its own."
        : "They stay in this browser. The address of this page holds all of the list that is shown: send the link, or save a file."),
      el("div", { class: "line" }, choice(again), tools(again)), fields(),
      el("div", { class: "line" }, button("Compare the ticked", compare), button("Copy link", () => jsae.copy(link(), "Link")),
        button("Save list", () => jsae.saveJson(shelf.current().name, shelf.current())),
        !shelf.state.linked && shelf.state.lists.length > 1 && button("Save all lists", () => jsae.saveJson(`lists of ${jsae.data.manifest.model}`, { lists: shelf.state.lists })),
        opener(again))), rows));
    draw();
  }

  /* Return the choice of a list. */
  function choice(again) {
    const { lists, chosen, linked } = shelf.state;
    const box = el("select", { "aria-label": "List", id: "whichlist", on: { change: () => {
      if (Number(box.value) >= 0) shelf.choose(Number(box.value));
      again();
    } } }, linked && el("option", { value: -1 }, `${linked.name} (from the address)`),
    lists.map(({ name, items }, number) => el("option", { value: number }, `${name} (${items.length})`)));
    box.value = String(linked ? -1 : chosen);
    return box;
  }

  function tools(again) {
    const attempt = (act) => () => {
      try {
        act();
        again();
      } catch (error) {
        jsae.toast(error.message, true);
      }
    };
    if (shelf.state.linked) return button("Keep this list", attempt(() => shelf.append(shelf.state.linked)), { class: "plain strong", id: "keeplist" });
    const gone = button("Delete list", () => {
      if (gone.dataset.sure) attempt(shelf.remove)();
      else {
        gone.dataset.sure = "yes";
        gone.textContent = `Delete “${shelf.current().name}” for good`;
      }
    }, { id: "deletelist" });
    return [button("New list", attempt(() => shelf.append(shelf.fresh("New list"))), { id: "newlist" }), gone];
  }

  /* Return the fields for the name of the list and the note on it. */
  function fields() {
    const one = shelf.current();
    const field = (tag, name, most, more) => {
      const box = el(tag, { maxlength: most, value: one[name], ...more, on: { input: () => {
        one[name] = box.value;
        const option = document.querySelector("#whichlist option:checked");
        if (name === "name" && !shelf.state.linked) option.textContent = `${one.name} (${one.items.length})`;
        kept();
      } } });
      return box;
    };
    return el("div", { class: "listfields" },
      field("input", "name", shelf.most.NAME, { type: "text", id: "listname", "aria-label": "Name of the list" }),
      field("textarea", "note", shelf.most.NOTE, { rows: 2, id: "listnote", "aria-label": "Note on the list", placeholder: "What these latents have in common" }));
  }

  /* Keep what was changed, also in the address. */
  function kept() {
    if (!shelf.state.linked) shelf.keep();
    jsae.address.keep(shelf.spell(shelf.current()));
  }

  function row(one, list, draw) {
    const remark = el("input", { type: "text", maxlength: shelf.most.REMARK, value: one.remark, placeholder: "Remark", "aria-label": `Remark on #${one.latent}`, on: { input: () => {
      one.remark = remark.value;
      kept();
    } } });
    const name = list ? jsae.latentLink(list, one.latent)
      : el("span", { class: "quiet" }, el("span", { class: "id" }, `#${one.latent}`), ` of an SAE that is not on this page, ${one.hook}`);
    return el("li", { "data-latent": one.latent },
      el("input", { type: "checkbox", "aria-label": `Compare #${one.latent}`, disabled: !list, value: list ? `${list.hook},${one.latent}` : "" }), name,
      list && jsae.data.manifest.hooks.length > 1 && el("span", { class: "quiet small" }, list.info.name), remark,
      el("button", { type: "button", class: "icon", "aria-label": `Take #${one.latent} out`, on: { click: () => {
        const { items } = shelf.current();
        items.splice(items.indexOf(one), 1);
        draw();
      } } }, "×"));
  }

  /* Return the button that reads lists from a file. */
  function opener(again) {
    return jsae.fileButton("Open lists", async (file) => {
      try {
        if (file.size > LARGEST) throw new Error(`${file.name} has ${jsae.whole(file.size)} bytes: lists have at most ${jsae.whole(LARGEST)}`);
        const lists = shelf.parse(await file.text());
        for (const one of lists) shelf.append(one);
        again();
        jsae.toast(`${lists.length} list${lists.length === 1 ? "" : "s"} read from ${file.name}`);
      } catch (error) {
        jsae.toast(error.message, true);
      }
    }, { id: "openlists" }, "listsfile");
  }

  function link() {
    const { name, note, item } = shelf.spell(shelf.current());
    const values = new URLSearchParams([["view", "lists"], ["name", name], ...(note ? [["note", note]] : []), ...item.map((one) => ["item", one])]);
    return `${location.href.split("#")[0]}#${values}`;
  }

  function compare() {
    const ticked = [...document.querySelectorAll(".shelf input[type=checkbox]:checked")].map((box) => box.value.split(","));
    if (ticked.length !== 2) jsae.toast("tick two latents to compare", true);
    else location.hash = jsae.compare.link(...ticked);
  }

  jsae.lists = { show, add };
})();
