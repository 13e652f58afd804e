/* Search: the latents that match a query, their rank, and the reason. */
"use strict";

(() => {
  /* The kinds of matches, from the best to the weakest. A match has a rank, lower is better, and a reason: a word, and
     a token if the match is about one. */
  const RANKS = ["number", "label as a word", "strongest token", "part of the label", "note", "start of the number",
    "part of a strongest token", "raised token", "part of a raised token", "text"];
  const rank = (name) => RANKS.indexOf(name);

  /* Return the match of a latent with a query in lower case, or null. */
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
    const matches = [
      label.includes(query) && { rank: rank(isWord(label, query) ? "label as a word" : "part of the label"), why: "label" },
      strongest && { rank: rank(strongest.whole ? "strongest token" : "part of a strongest token"), why: "fires on", token: strongest.id },
      (list.notes.get(latent) ?? "").toLowerCase().includes(query) && { rank: rank("note"), why: "note" },
      raised && { rank: rank(raised.whole ? "raised token" : "part of a raised token"), why: "raises", token: raised.id },
    ].filter(Boolean);
    return matches.reduce((best, one) => (one.rank < best.rank ? one : best), { rank: rank("text"), why: "text" });
  }

  /* Return the token that equals the query, apart from blanks, else the first that contains it. */
  function ofTokens(ids, query) {
    const some = Array.from(ids, (id) => ({ id, word: jsae.tokens.word(id).toLowerCase() })).filter(({ word }) => word.includes(query));
    const whole = some.find(({ word }) => word.trim() === query.trim());
    return whole ? { id: whole.id, whole: true } : some.length ? { id: some[0].id, whole: false } : null;
  }

  /* Return whether the query is a whole word of a text: no letter or digit on either side. */
  function isWord(text, query) {
    const at = text.indexOf(query);
    return !/[\p{L}\p{N}_]/u.test((text[at - 1] ?? "") + (text[at + query.length] ?? ""));
  }

  /* Return a comparison of latents: the better match first, then the better label, then the lower number. */
  function compare(list, matches) {
    const fit = (latent) => (Number.isNaN(list.f1[latent]) ? 0 : list.f1[latent]);
    return (a, b) => matches.get(a).rank - matches.get(b).rank || fit(b) - fit(a) || a - b;
  }

  /* Return a match for display next to the label. */
  function reason({ why, token }) {
    return jsae.el("span", { class: "why", title: "why the search found it" }, why, token !== undefined && [" ", jsae.tokens.chip(token)]);
  }

  jsae.search = { match, compare, reason };
})();
