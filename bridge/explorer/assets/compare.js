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

  /* Return what is known of both. Directions are compared where both SAEs write at one hook, firing within one SAE. */
  function relation(a, b) {
    const { hook: other } = a.list.info.across ?? {};
    if (a.list !== b.list && other !== b.list.hook) {
      return `${a.list.info.name} and ${b.list.info.name}: directions of different activations are not compared.`;
    }
    const cosine = jsae.data.cosine(a.decoder, b.decoder);
    const share = a.list === b.list ? a.together.find(({ id }) => id === b.latent)?.value : undefined;
    return [Number.isNaN(cosine) ? "The decoder directions are not known: an SAE's export is missing." : `Cosine of the decoder directions: ${cosine.toFixed(2)}.`,
      share === undefined ? "" : ` #${b.latent} fires on ${percent(share)} of the tokens of #${a.latent}.`].join("");
  }

  /* Return the address of a comparison of two latents, each [number of the hook, latent]. */
  const link = (a, b) => `#view=compare&a=${a.join()}&b=${b.join()}`;

  function side(details) {
    const { list, latent } = details;
    const { fires, writes, contexts } = jsae.latent.parts;
    return el("section", { "data-latent": latent }, el("h2", {}, jsae.latentLink(list, latent)),
      el("p", { class: "quiet small" }, `${list.info.name} · density ${percent(list.density(latent))} · largest ${number(list.max[latent])} · fired ${whole(list.count[latent])} times`),
      fires(details), writes(details), contexts(details, jsae.tokens.walk(el("div", { class: "groups" }), `Texts of #${latent}`)));
  }

  jsae.compare = { show, link };
})();
