/* The steering of the page as parameters of the address, and back. A link starts nothing by itself. */
"use strict";

(() => {
  const SETTINGS = { temperature: [0, 2], max_tokens: [1, Infinity], seed: [0, 999999], strength_multiplier: [0, 10] };
  const NAMES = ["prompt", "push", "chat", "directions", ...Object.keys(SETTINGS)];

  /* Return the parameters of a state; settings that are as usual are left out. */
  function parameters(state, usual) {
    const settings = Object.keys(SETTINGS).map((name) => [name, state.settings[name] === usual[name] ? "" : String(state.settings[name])]);
    const push = state.pushed.map(({ list, latent, mode, strength, positions }) => [list.info.hook, latent, mode, strength, positions].join(","));
    return { prompt: state.prompt, push, chat: state.chat ? "yes" : "", directions: state.directionsOf ?? "", ...Object.fromEntries(settings) };
  }

  /* Put what the address says into a state; what is invalid, or beyond the server's limits, is left out. */
  async function restore(state, values, usual) {
    if (!NAMES.some((name) => values.has(name)) || same(values, parameters(state, usual))) return;
    state.prompt = values.get("prompt") ?? "";
    state.chat = values.get("chat") === "yes" && jsae.live.model.chat;
    state.directionsOf = jsae.address.oneOf(values, "directions", jsae.live.checkpoints ?? []);
    for (const [name, [low, high]] of Object.entries(SETTINGS)) {
      const most = name === "max_tokens" ? jsae.live.limits.max_tokens : high;
      const value = jsae.address.within(values, name, low, most) ?? usual[name];
      state.settings[name] = Number.isInteger(usual[name]) && name !== "strength_multiplier" ? Math.round(value) : value;
    }
    const pushed = await Promise.all(values.getAll("push").slice(0, jsae.live.limits.features).map(feature));
    state.pushed.splice(0, state.pushed.length, ...pushed.filter(Boolean));
  }

  const same = (values, now) => NAMES.every((name) => {
    const some = [now[name]].flat().filter((one) => one !== "");
    return JSON.stringify(values.getAll(name)) === JSON.stringify(some);
  });

  /* Return the pushed feature that a parameter names, or null. */
  async function feature(text) {
    const parts = text.split(",");
    const [hook, latent, mode, strength, positions] = parts;
    const number = jsae.data.hookNumber(hook);
    const served = number >= 0 && jsae.data.isServed(jsae.data.manifest.hooks[number]);
    const known = served && parts.length === 5 && /^\d{1,9}$/.test(latent) && jsae.live.modes.some(({ name }) => name === mode)
      && jsae.live.positions.includes(positions) && strength.trim() !== "" && Number.isFinite(Number(strength));
    if (!known) return null;
    const list = await jsae.data.list(number);
    if (Number(latent) >= list.size || jsae.data.isTranscoder(list.info)) return null;
    return { list, latent: Number(latent), mode, strength: Number(strength), positions };
  }

  jsae.steerlink = { parameters, restore };
})();
