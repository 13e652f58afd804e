/* Search: which latents a query finds, how well each one fits, and why. */
"use strict";

(() => {
  /* What a latent is found by, from the best match to the weakest. A match is a rank, lower is better, and a reason:
     a word, and the token it is about where there is one. */
  const RANKS = ["number", "label as a word", "strongest token", "part of the label", "note", "start of the number",
    "part of a strongest token", "raised token", "part of a raised token", "text"];
  const rank = (name) => RANKS.indexOf(name);

  /* Why a latent matches a query in lower case, or null. */
  function match(list, latent, query) {
    return ofNumber(latent, query) ?? (list.haystack(latent).includes(query) ? ofText(list, latent, query) : null);
  }

  function ofNumber(latent, query) {
    if (!/^#?\d+$/.test(query)) return null;
    const digits = query.replace("#", "");
    if (String(latent) === digits) return { rank: rank("number"), why: "number" };
    return String(latent).startsWith(digits) ? { rank: rank("start of the number"), why: "number" } : null;
  }

  function ofText(list, latent, query) {
    const label = list.labels[latent].toLowerCase();
    const strongest = ofTokens(list.strongest(latent), query);
    const raised = ofTokens(list.raised(latent), query);
    const found = [
      label.includes(query) && { rank: rank(isWord(label, query) ? "label as a word" : "part of the label"), why: "label" },
      strongest && { rank: rank(strongest.whole ? "strongest token" : "part of a strongest token"), why: "fires on", token: strongest.id },
      (list.notes.get(latent) ?? "").toLowerCase().includes(query) && { rank: rank("note"), why: "note" },
      raised && { rank: rank(raised.whole ? "raised token" : "part of a raised token"), why: "raises", token: raised.id },
    ].filter(Boolean);
    return found.reduce((best, one) => (one.rank < best.rank ? one : best), { rank: rank("text"), why: "text" });
  }

  /* The token that the query is, blanks aside, else the first that has it as a part. */
  function ofTokens(ids, query) {
    const some = Array.from(ids, (id) => ({ id, word: jsae.tokens.word(id).toLowerCase() })).filter(({ word }) => word.includes(query));
    const whole = some.find(({ word }) => word.trim() === query.trim());
    return whole ? { id: whole.id, whole: true } : some.length ? { id: some[0].id, whole: false } : null;
  }

  /* Whether no letter or digit stands on either side of the query in a text. */
  function isWord(text, query) {
    const at = text.indexOf(query);
    return !/[\p{L}\p{N}_]/u.test((text[at - 1] ?? "") + (text[at + query.length] ?? ""));
  }

  /* Orders latents by their matches: the better match first, then the better label, then the lower number. */
  function compare(list, matches) {
    const fit = (latent) => (Number.isNaN(list.f1[latent]) ? 0 : list.f1[latent]);
    return (a, b) => matches.get(a).rank - matches.get(b).rank || fit(b) - fit(a) || a - b;
  }

  /* A match as a reader sees it beside the label. */
  function reason({ why, token }) {
    return jsae.el("span", { class: "why", title: "why the search found it" }, why, token !== undefined && [" ", jsae.tokens.chip(token)]);
  }

  jsae.search = { match, compare, reason };
})();
