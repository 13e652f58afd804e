/* Named lists of latents that a person puts together, with notes: kept by the browser, one set per model. */
"use strict";

(() => {
  const LISTS = 50; // most lists
  const LATENTS = 500; // most latents of a list
  const NAME = 80; // characters of a name
  const REMARK = 500; // characters of a remark on a latent
  const NOTE = 4000; // characters of the note on a list
  const state = { lists: [], chosen: 0, linked: null }; // linked: a list of an address that is none of the lists

  const key = () => `lists.${jsae.data.manifest.fingerprint ?? ""}`;
  const hooks = () => jsae.data.manifest.hooks;
  const line = (text, most) => (typeof text === "string" ? text.slice(0, most) : "");
  const fresh = (name = "My latents") => ({ name, note: "", items: [] });

  /* ---- what comes from elsewhere ---- */

  /* Return an item with the fields that it should have; null for what is none. */
  function item(one) {
    const latent = one?.latent;
    if (typeof one?.hook !== "string" || !Number.isInteger(latent) || latent < 0 || latent >= 2 ** 31) return null;
    const sae = /^[0-9a-f]{64}$/.test(one.sae) ? one.sae : null;
    return { hook: one.hook.slice(0, 300), latent, sae, remark: line(one.remark, REMARK) };
  }

  const list = (one) => ({
    name: line(one.name, NAME) || "Unnamed", note: line(one.note, NOTE),
    items: one.items.map(item).filter(Boolean).slice(0, LATENTS),
  });

  /* Return the lists of a file or of the browser: one list, or an object with several.

     Throws an Error that says what is wrong with the text. */
  function parse(text) {
    let value;
    try {
      value = JSON.parse(text);
    } catch (error) {
      throw new Error(`this is not JSON: ${error.message}`);
    }
    const several = Array.isArray(value?.lists) ? value.lists : [value];
    const good = several.filter((one) => Array.isArray(one?.items)).slice(0, LISTS).map(list);
    if (!good.length && several.length) throw new Error("this file holds no lists: a list has a name and items, each with hook and latent");
    return good;
  }

  /* ---- the browser ---- */

  /* Read the lists; what another version kept is left alone until it is replaced. */
  function open() {
    try {
      state.lists = parse(jsae.remembered.get(key()) ?? '{"lists":[]}');
    } catch {
      state.lists = [];
    }
    if (!state.lists.length) state.lists.push(fresh());
    state.chosen = Math.min(Number(jsae.remembered.get(`${key()}.chosen`)) || 0, state.lists.length - 1);
  }

  function keep() {
    jsae.remembered.set(key(), JSON.stringify({ lists: state.lists }));
    jsae.remembered.set(`${key()}.chosen`, String(state.chosen));
  }

  /* Return the list that is shown. */
  const current = () => state.linked ?? state.lists[state.chosen];

  /* Append a list under a name that no other has, and choose it. Throws an Error where there are too many. */
  function append(one) {
    if (state.lists.length >= LISTS) throw new Error(`a browser keeps at most ${LISTS} lists: delete one first`);
    const taken = new Set(state.lists.map(({ name }) => name));
    let name = one.name;
    for (let n = 2; taken.has(name); n++) name = `${one.name.slice(0, NAME - 5)} (${n})`;
    state.chosen = state.lists.push({ ...one, name }) - 1;
    state.linked = null;
    keep();
  }

  function choose(number) {
    state.linked = null;
    state.chosen = number;
    keep();
  }

  /* Delete the chosen list; the last one is emptied. */
  function remove() {
    state.lists.splice(state.chosen, 1);
    if (!state.lists.length) state.lists.push(fresh());
    choose(Math.min(state.chosen, state.lists.length - 1));
  }

  /* Append a latent to a list. Returns what is to be told. Throws an Error where the list has it or is full. */
  function add(number, { info }, latent) {
    const to = state.lists[number];
    if (to.items.some((one) => one.sae === info.sae && one.latent === latent)) throw new Error(`#${latent} is in “${to.name}” already`);
    if (to.items.length >= LATENTS) throw new Error(`a list holds at most ${LATENTS} latents`);
    to.items.push({ hook: info.name, latent, sae: info.sae, remark: "" });
    choose(number);
    return `#${latent} is in “${to.name}”`;
  }

  /* Return the number of the hook of an item on this page; -1 if its SAE is not here. */
  function place({ hook, latent, sae }) {
    const named = jsae.data.hookNumber(hook);
    const isNamed = sae === null || hooks()[named]?.sae === sae; // two runs may have the same SAE
    const number = isNamed ? named : hooks().findIndex((one) => one.sae === sae);
    return number >= 0 && latent < hooks()[number].d_sae ? number : -1;
  }

  /* ---- addresses ---- */

  /* Return the parameters of an address with a list: those of its latents that are on this page. */
  function spell({ name, note, items }) {
    const here = items.filter((one) => place(one) >= 0);
    return { name, note, item: here.map((one) => `${hooks()[place(one)].name},${one.latent},${one.remark}`) };
  }

  /* Choose the list of an address: the one of the browser that it is, else one that is not kept. */
  function follow(asked) {
    const items = asked.getAll("item").map((text) => {
      const [hook, latent, ...remark] = text.split(",");
      const one = { hook, latent: /^\d+$/.test(latent ?? "") ? Number(latent) : -1, remark: remark.join(",") };
      return { ...one, sae: hooks()[jsae.data.hookNumber(hook)]?.sae ?? null };
    });
    const linked = list({ name: asked.get("name") ?? "", note: asked.get("note") ?? "", items });
    linked.items = linked.items.filter((one) => place(one) >= 0);
    const same = (one) => JSON.stringify(spell(one)) === JSON.stringify(spell(linked));
    const number = state.lists.findIndex(same);
    if (number >= 0) choose(number);
    else state.linked = linked;
  }

  /* Show the list of the browser again, whatever an address held. */
  const leave = () => { state.linked = null; };

  jsae.shelf = { state, open, keep, current, append, choose, remove, add, place, spell, follow, leave, parse, fresh, most: { NAME, REMARK, NOTE } };
})();
