/* Where a latent of a crosscoder over checkpoints comes from: documents, files, and tokens whose loss fell. */
"use strict";

(() => {
  const { el, percent, whole } = jsae;
  const FIRST = 5; // entries of a table before it is expanded

  /* Return the card of a latent's page; null where it was not traced. */
  function card({ origin }) {
    if (!origin) return null;
    return el("section", { class: "card origins" },
      el("h2", {}, "Where it comes from", el("small", {}, `grew most from ${origin.from} to ${origin.to}`)),
      el("p", { class: "quiet small" }, `Of the text in between: ${origin.note}. Read were ${whole(origin.read.tokens)} tokens of ${whole(origin.read.documents)} documents; it fires on ${whole(origin.fired)}.`),
      losses(origin),
      part("Documents", "on which it fires most, by the sum of its values", origin.documents, (row) => [place(row), context(row), row.total.toFixed(1)]),
      part("Files", "and their parts", origin.files, (row) => [el("code", {}, row.file), `${percent(row.density)} of ${whole(row.tokens)} tokens`, row.total.toFixed(1)]),
      part("Tokens learned", "after those on which it fires: mean fall of the loss, in nats", origin.tokens, (row) => [chip(row.token), `${whole(row.occurrences)} times`, `−${row.mean_fall.toFixed(2)}`]),
      part("Where the loss fell most", "the token after, in nats", origin.occurrences, (row) => [el("span", {}, chip(row.predicted), " ", place(row)), context(row, false), `${row.before.toFixed(2)} → ${row.after.toFixed(2)}`]));
  }

  /* Return a sentence on the loss of both checkpoints. */
  function losses({ loss, from, to }) {
    const said = (pair) => `${pair[0].toFixed(2)} to ${pair[1].toFixed(2)}`;
    const { where_it_fires: here, elsewhere } = loss;
    if (!here) return null;
    return el("p", {}, `From ${from} to ${to} the loss of the token after falls from `, el("b", {}, said(here)), " nats where it fires",
      elsewhere && `, and from ${said(elsewhere)} elsewhere`, ".");
  }

  function part(name, note, rows, cells) {
    if (!rows.length) return null;
    const table = (some) => el("table", { class: "numbers" }, el("tbody", {}, some.map((row) =>
      el("tr", {}, cells(row).map((cell, i) => el("td", { class: i === 2 && "number" }, cell))))));
    const rest = rows.slice(FIRST);
    return el("div", {}, el("h3", {}, name, el("small", {}, note)), table(rows.slice(0, FIRST)),
      rest.length > 0 && el("details", { class: "more" }, el("summary", {}, `${rest.length} more`), table(rest)));
  }

  const chip = (text) => el("code", { class: "chip" }, jsae.tokens.line(text) || "◌");

  /* Return the file of a document, and its number where the file has several. */
  const place = (row) => el("span", { class: "from" }, [row.file, row.part].filter(Boolean).join(" "), (row.document > 0 || row.part.startsWith("row group")) && ` · document ${row.document}`);

  /* Return a token with the text around it; the token after is left out where it is the one that is predicted. */
  const context = (row, after = true) => el("code", { class: "around" }, jsae.tokens.line(row.text_before.slice(-50)),
    el("b", {}, jsae.tokens.line(row.at)), after && jsae.tokens.line(row.text_after.slice(0, 30)));

  jsae.origin = { card };
})();
