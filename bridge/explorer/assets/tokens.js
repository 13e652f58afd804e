/* Tokens as text: characters that are split over tokens joined, what could mislead made visible, heat and hover. */
"use strict";

(() => {
  const { el, number } = jsae;
  let vocabulary = new Uint8Array();
  let starts = new Uint32Array(1);
  let special = new Set();
  let words = []; // of tokens by themselves, as they are asked for

  const raw = (id) => vocabulary.subarray(starts[id], starts[id + 1]);
  const decoder = () => new TextDecoder("utf-8", { ignoreBOM: true });

  /* Tokens that follow each other, [{id, text, special}]; their texts together are the text.

     A character split over tokens stands with the token that completes it, and the others have "". Where the tokens
     are cut out of a text, half a character at either end is left out. */
  function spell(ids, { before = false, after = false } = {}) {
    let stream = decoder();
    let inside = before;
    const told = [];
    for (const id of ids) {
      if (special.has(id)) {
        if (told.length) told[told.length - 1].text += stream.decode();
        stream = decoder();
        told.push({ id, text: decoder().decode(raw(id)), special: true });
        inside = false;
        continue;
      }
      let data = raw(id);
      while (inside && data.length && (data[0] & 0xc0) === 0x80) data = data.subarray(1);
      if (data.length) inside = false;
      told.push({ id, text: stream.decode(data, { stream: true }), special: false });
    }
    if (told.length && !after) told[told.length - 1].text += stream.decode();
    return told;
  }

  /* A token by itself; bytes that are no character are written out. */
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

  /* What a reader could not see, or would be misled by: control characters, and those that turn the writing round. */
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/gu;

  function shown(text) {
    return text.replace(HIDDEN, (c) => {
      const code = c.codePointAt(0);
      if (code < 0x20) return String.fromCodePoint(0x2400 + code);
      return code === 0x7f ? "\u2421" : `⟨${code.toString(16).padStart(4, "0")}⟩`;
    });
  }

  /* A text in one line, its line ends and tabs marked. */
  const line = (text) => shown(text).replaceAll("\n", "↵").replaceAll("\t", "⇥");

  /* A text with its line ends marked, beside the text, and broken there or not. */
  function lines(text, breaks) {
    const parts = shown(text).split("\n");
    return parts.flatMap((part, i) => (i ? [el("i", { class: "end" }), breaks && "\n", part] : [part]));
  }

  /* A token by itself, in a frame that shows its blanks. */
  function chip(id) {
    const text = word(id);
    return el("code", { class: special.has(id) ? "chip special" : "chip" }, text === "" ? "∅" : line(text));
  }

  const quoted = (text) => (text === "" ? "a part of a character, or nothing" : `“${line(text)}”`);

  /* A token in a text. `heat` is its share of the strongest activation. */
  function span(token, { heat = 0, peak = false, breaks = false, tip, on } = {}) {
    const classes = ["tok", heat > 0 && "hot", peak && "peak", token.special && "special", token.text === "" ? "part" : token.text.trim() === "" && "blank"];
    return el("span", {
      class: classes.filter(Boolean).join(" "), vars: heat > 0 ? { "--h": Math.min(heat, 1).toFixed(3) } : {}, tip, on,
    }, lines(token.text, breaks));
  }

  /* An example of a latent: in one line around its strongest token, or as running text. */
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

  /* Lets the keyboard walk through the tokens of a box: ← and → along a text, ↑ and ↓ from one to the next, Esc out.

     The box takes one stop of the Tab key, its tokens none: there are thousands. */
  function walk(box, name) {
    let pointed = false; // a click into the texts leaves the arrows to the list
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `${name}: arrows go from token to token`);
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

  /* Where a key leads from a token, or from the box as such; nothing for keys that lead nowhere. */
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

  /* The tokens of a line that are not cut off at its ends. */
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

  /* Tokens of half a character are told by their bytes. */
  const tokenText = (tokens, i) => tokens[i].text || word(tokens[i].id);

  jsae.tokens = {
    use(bytes, offsets, specials) {
      [vocabulary, starts, special, words] = [bytes, offsets, new Set(specials), new Array(offsets.length - 1)];
    },
    spell, word, shown, line, chip, quoted, span, context, walk,
  };
})();
