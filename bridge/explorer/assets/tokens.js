/* Tokens as text: split characters are joined, invisible characters made visible, with heat and tooltips. */
"use strict";

(() => {
  const { el, number } = jsae;
  let vocabulary = new Uint8Array();
  let starts = new Uint32Array(1);
  let special = new Set();
  let words = []; // texts of single tokens, computed on demand

  const raw = (id) => vocabulary.subarray(starts[id], starts[id + 1]);
  const decoder = () => new TextDecoder("utf-8", { ignoreBOM: true });

  /* Return consecutive tokens as [{id, text, special}]; the texts concatenate to the whole text.

     A character split over tokens belongs to the last of them, and the others have "". If the tokens are cut out of a
     text, a partial character at either end is left out. */
  function spell(ids, { before = false, after = false } = {}) {
    let stream = decoder();
    let inside = before;
    const tokens = [];
    for (const id of ids) {
      if (special.has(id)) {
        if (tokens.length) tokens[tokens.length - 1].text += stream.decode();
        stream = decoder();
        tokens.push({ id, text: decoder().decode(raw(id)), special: true });
        inside = false;
        continue;
      }
      let data = raw(id);
      while (inside && data.length && (data[0] & 0xc0) === 0x80) data = data.subarray(1);
      if (data.length) inside = false;
      tokens.push({ id, text: stream.decode(data, { stream: true }), special: false });
    }
    if (tokens.length && !after) tokens[tokens.length - 1].text += stream.decode();
    return tokens;
  }

  /* Return the text of a single token; bytes that are not a character are escaped. */
  function word(id) {
    words[id] ??= strictly(raw(id));
    return words[id];
  }

  const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

  function strictly(bytes) {
    try {
      return strict.decode(bytes);
    } catch {
      return Array.from(bytes, (byte) => (byte < 0x80 ? String.fromCharCode(byte) : `\\x${byte.toString(16)}`)).join("");
    }
  }

  /* Characters that are invisible or misleading: control characters, and those that change the direction of writing. */
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/gu;

  function shown(text) {
    return text.replace(HIDDEN, (c) => {
      const code = c.codePointAt(0);
      if (code < 0x20) return String.fromCodePoint(0x2400 + code);
      return code === 0x7f ? "\u2421" : `⟨${code.toString(16).padStart(4, "0")}⟩`;
    });
  }

  /* Return a text in one line, with visible line breaks and tabs. */
  const line = (text) => shown(text).replaceAll("\n", "↵").replaceAll("\t", "⇥");

  /* Return a text with marked line ends, broken there if `breaks`. */
  function lines(text, breaks) {
    const parts = shown(text).split("\n");
    return parts.flatMap((part, i) => (i ? [el("i", { class: "end" }), breaks && "\n", part] : [part]));
  }

  /* Return a single token in a frame that shows its blanks. */
  function chip(id) {
    const text = word(id);
    return el("code", { class: special.has(id) ? "chip special" : "chip" }, text === "" ? "∅" : line(text));
  }

  const quoted = (text) => (text === "" ? "a part of a character, or nothing" : `“${line(text)}”`);

  /* Return a token of a text. `heat` is its share of the strongest activation. */
  function span(token, { heat = 0, peak = false, breaks = false, tip, on } = {}) {
    const classes = ["tok", heat > 0 && "hot", peak && "peak", token.special && "special", token.text === "" ? "part" : token.text.trim() === "" && "blank"];
    return el("span", {
      class: classes.filter(Boolean).join(" "), vars: heat > 0 ? { "--h": Math.min(heat, 1).toFixed(3) } : {}, tip, on,
    }, lines(token.text, breaks));
  }

  /* Return an example of a latent: one line around its strongest token, or running text. */
  function context(example, max, { size, breaks }) {
    const tokens = spell(example.ids, example.cut);
    const peak = example.position - example.from;
    const [low, high] = size === "full" ? [0, tokens.length] : [Math.max(peak - 24, 0), Math.min(peak + 25, tokens.length)];
    const spans = tokens.slice(low, high).map((token, i) => {
      const position = example.from + low + i;
      const value = example.values.get(position) ?? 0;
      return span(token, {
        heat: max > 0 ? value / max : 0, peak: low + i === peak, breaks,
        tip: [["", quoted(tokenText(tokens, low + i))], ["activation", number(value)],
          ["position", `${position} of text ${example.row}`], ["token", token.id]],
      });
    });
    const text = tokens.slice(low, high).map((token) => token.text).join("");
    if (size === "full" || breaks) return { node: el("div", { class: "text" }, spans), text };
    const middle = peak - low;
    return { node: el("div", { class: "kwic" }, el("div", { class: "left" }, el("div", {}, spans.slice(0, middle))),
      el("div", { class: "right" }, spans.slice(middle))), text };
  }

  /* Enable keyboard navigation through the tokens of a box: ← and → within a text, ↑ and ↓ between texts, Esc to leave.

     Tab stops at the box once, but not at its tokens: there are thousands. */
  function walk(box, name) {
    let pointed = false; // after a click into the texts the arrows move through the list
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `${name}: arrows move from token to token`);
    box.addEventListener("pointerdown", () => { pointed = true; });
    box.addEventListener("focusout", () => { pointed = false; });
    box.addEventListener("keydown", (event) => {
      const here = event.target.closest(".tok");
      const mine = here || (event.target === box && !pointed);
      const next = mine && !event.ctrlKey && !event.metaKey && !event.altKey && reached(box, here, event.key);
      if (!next) return;
      event.preventDefault();
      event.stopPropagation();
      if (next === here && event.key === "Enter") here.click();
      else meet(next);
    });
    return box;
  }

  const LINES = ".kwic, .text";

  /* Return the target of a key at a token, or at the box itself; null or undefined for other keys. */
  function reached(box, here, key) {
    const lines = box.matches(LINES) ? [box] : [...box.querySelectorAll(LINES)];
    if (!here) return key === "ArrowRight" || key === "ArrowDown" ? entrance(lines[0]) : null;
    const line = here.closest(LINES);
    const along = { ArrowRight: 1, ArrowLeft: -1 }[key];
    const across = { ArrowDown: 1, ArrowUp: -1 }[key];
    if (along) return beside(seen(line), here, along);
    if (across) return lines.length > 1 && beside(lines, line, across) !== line ? entrance(beside(lines, line, across)) : here;
    return { Escape: box, Enter: here }[key];
  }

  const beside = (all, one, by) => all[Math.max(0, Math.min(all.length - 1, all.indexOf(one) + by))];
  const entrance = (line) => line && (line.querySelector(".peak") ?? seen(line)[0]);

  /* Return the tokens of a line that are at least partly visible. */
  function seen(line) {
    const { left, right } = line.getBoundingClientRect();
    return [...line.querySelectorAll(".tok")].filter((token) => {
      const box = token.getBoundingClientRect();
      return box.right > left && box.left < right;
    });
  }

  function meet(node) {
    if (node.matches(".tok")) {
      node.tabIndex = -1;
      (node.closest(".kwic") ?? node).scrollIntoView({ block: "nearest", inline: "nearest" });
    }
    node.focus({ preventScroll: true });
  }

  /* Return the text of a token, or the bytes of a part of a character. */
  const tokenText = (tokens, i) => tokens[i].text || word(tokens[i].id);

  jsae.tokens = {
    use(bytes, offsets, specials) {
      [vocabulary, starts, special, words] = [bytes, offsets, new Set(specials), new Array(offsets.length - 1)];
    },
    spell, word, shown, line, chip, quoted, span, context, walk,
  };
})();
