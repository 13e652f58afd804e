/* Two latents side by side, of one activation or of two. */
"use strict";

(() => {
  const { el, number, percent, whole } = jsae;

  /* Return the number of the hook and the latent of a parameter, "0,17". */
  function read(asked, name) {
    const [, hook, latent] = /^(\d{1,4}),(\d{1,9})$/.exec(asked.get(name) ?? "") ?? [];
    const info = jsae.data.manifest.hooks[Number(hook)];
    if (!info || Number(latent) >= info.d_sae) {
      throw new Error(`nothing to compare as “${name}”: tick two latents of a list, or give a=HOOK,LATENT and b=HOOK,LATENT, hooks by number from 0 to ${jsae.data.manifest.hooks.length - 1}`);
    }
    return [Number(hook), Number(latent)];
  }

  async function show(main, list, asked, still) {
    const [a, b] = await Promise.all([read(asked, "a"), read(asked, "b")].map(([hook, latent]) => jsae.data.latent(hook, latent)));
    if (!still()) return;
    main.replaceChildren(el("div", { class: "page" },
      el("header", { class: "title" }, el("h1", {}, "Two latents"), el("p", { class: "quiet" }, relation(a, b))),
      el("div", { class: "twins" }, [a, b].map(side))));
  }

  /* Return what the records say of both: only the nearest of one activation know each other. */
  function relation(a, b) {
    if (a.list !== b.list) return `${a.list.info.hook} and ${b.list.info.hook}: directions of different activations are not compared.`;
    const of = (pairs, latent) => pairs.find(({ id }) => id === latent)?.value;
    const cosine = of(a.neighbours, b.latent) ?? of(b.neighbours, a.latent);
    const share = of(a.together, b.latent);
    return [cosine === undefined ? "Neither is among the other's nearest decoder directions." : `Cosine of the decoder directions: ${cosine.toFixed(2)}.`,
      share === undefined ? "" : ` #${b.latent} fires on ${percent(share)} of the tokens of #${a.latent}.`].join("");
  }

  function side(details) {
    const { list, latent } = details;
    const { fires, writes, contexts } = jsae.latent.parts;
    return el("section", { "data-latent": latent }, el("h2", {}, jsae.latentLink(list, latent)),
      el("p", { class: "quiet small" }, `${list.info.hook} · density ${percent(list.density(latent))} · largest ${number(list.max[latent])} · fired ${whole(list.count[latent])} times`),
      fires(details), writes(details), contexts(details, jsae.tokens.walk(el("div", { class: "groups" }), `Texts of #${latent}`)));
  }

  jsae.compare = { show };
})();
