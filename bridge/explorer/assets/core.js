/* Shared functions of the page: elements, formatting of numbers, and loading of data. */
"use strict";

window.jsae = {};

(() => {
  /* Return a new element. Text is always inserted as text: nothing on this page is parsed as markup. */
  function el(tag, props, ...children) {
    return fill(document.createElement(tag), props, children);
  }

  function svg(tag, props, ...children) {
    return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
  }

  function fill(node, props, children) {
    for (const [name, value] of Object.entries(props ?? {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
      else if (name === "vars") for (const [key, one] of Object.entries(value)) node.style.setProperty(key, one);
      else if (name === "tip") tips.set(node, value);
      else if (name === "value" || name === "checked" || name === "disabled") node[name] = value;
      else node.setAttribute(name, value === true ? "" : String(value));
    }
    node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  }

  /* ---- numbers ---- */

  const whole = new Intl.NumberFormat("en");

  function number(value) {
    if (!Number.isFinite(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e5 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
    return Number(value.toPrecision(3)).toString();
  }

  function percent(share) {
    if (!Number.isFinite(share)) return "–";
    if (share === 0) return "0 %";
    const value = share * 100;
    if (value < 0.001) return "< 0.001 %";
    return `${Number(value >= 10 ? value.toFixed(1) : value.toPrecision(2))} %`;
  }

  function short(count) {
    if (count >= 1e6) return `${Number((count / 1e6).toPrecision(3))} M`;
    return count >= 1e4 ? `${Number((count / 1e3).toPrecision(3))} k` : whole.format(count);
  }

  /* ---- data ---- */

  const arrived = new Map();
  const asked = new Map();
  const folder = document.currentScript.src; // the data files are in the folder of this script

  /* Called by the data files. */
  jsae.put = (name, data) => arrived.set(name, data);

  /* Load a data file with a script element: a page from disk may not fetch. */
  function load(name) {
    if (!asked.has(name)) {
      asked.set(name, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = new URL(`${name}.js`, folder).href;
        script.onload = () => {
          script.remove();
          if (arrived.has(name)) resolve(arrived.get(name));
          else reject(new Error(`${name}.js holds no data: write the page again`));
          arrived.delete(name);
        };
        script.onerror = () => {
          asked.delete(name);
          reject(new Error(`${name}.js does not exist: reload this page, it was rewritten in the meantime`));
        };
        document.head.append(script);
      }));
    }
    return asked.get(name);
  }

  /* ---- tooltips and messages ---- */

  const tips = new WeakMap();

  /* Show the tooltip of the element under the pointer: an array of [name, value], or a function that returns one. */
  function watchTips() {
    const tip = document.getElementById("tip");
    const show = (event) => {
      let node = event.target;
      while (node && !tips.has(node)) node = node.parentElement;
      if (!node) {
        tip.hidden = true;
        return;
      }
      if (event.type === "focusin") node.setAttribute("aria-describedby", "tip");
      const content = tips.get(node);
      tip.replaceChildren(...(typeof content === "function" ? content() : content).map(([name, value]) =>
        el("div", {}, name && el("span", {}, name), el("b", {}, String(value)))));
      tip.hidden = false;
      place(tip, node.getClientRects()[0] ?? node.getBoundingClientRect(), event);
    };
    document.addEventListener("pointerover", show);
    document.addEventListener("focusin", show);
    for (const event of ["wheel", "touchmove", "keydown", "hashchange"]) {
      window.addEventListener(event, () => { tip.hidden = true; }, { passive: true, capture: true });
    }
  }

  function place(tip, box, event) {
    tip.style.left = "0"; // where it was, it may have been squeezed against the edge
    const wide = tip.offsetWidth;
    const broad = box.width > 300 && event.clientX; // then place it at the pointer
    const middle = broad ? event.clientX : box.left + box.width / 2;
    const left = Math.min(Math.max(8, middle - wide / 2), document.documentElement.clientWidth - wide - 8);
    const above = (broad ? event.clientY - 4 : box.top) - tip.offsetHeight - 6;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
  }

  let fading = 0;

  function toast(text, bad = false) {
    const box = document.getElementById("toast");
    box.textContent = text;
    box.classList.toggle("bad", bad);
    box.hidden = false;
    clearTimeout(fading);
    fading = setTimeout(() => { box.hidden = true; }, bad ? 8000 : 1800);
  }

  async function copy(text, what) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const box = el("textarea", { value: text, class: "away" });
      document.body.append(box);
      box.select();
      document.execCommand("copy");
      box.remove();
    }
    toast(`${what} copied`);
  }

  /* Save data as a file with this name, in JSON. */
  function saveJson(name, data) {
    const blob = new Blob([JSON.stringify(data, null, 1)], { type: "application/json" });
    const link = el("a", { href: URL.createObjectURL(blob), download: `${name.replace(/[^\w.-]+/g, "_") || "unnamed"}.json` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  /* Return a button with which a person chooses a file of JSON. */
  function fileButton(text, act, props, id) {
    const file = el("input", { type: "file", id, class: "away", accept: ".json,application/json", tabindex: -1, on: { change: () => {
      if (file.files.length) act(file.files[0]);
      file.value = ""; // the same file may be chosen again
    } } });
    return [el("button", { type: "button", class: "plain", ...props, on: { click: () => file.click() } }, text), file];
  }

  /* Return a function that runs `act` after it has not been called for some time. */
  function later(act, milliseconds) {
    let timer = 0;
    return (...args) => {
      clearTimeout(timer);
      timer = setTimeout(() => act(...args), milliseconds);
    };
  }

  /* Return an icon of lines in a square of 24 units. */
  const icon = (path) => svg("svg", { viewBox: "0 0 24 24", width: 15, height: 15, "aria-hidden": "true", class: "lines" }, svg("path", { d: path }));

  /* Return a choice of one of a few options, as buttons. */
  function segmented(name, options, chosen, act) {
    const group = el("div", { class: "segmented", role: "group", "aria-label": name });
    const choose = (value) => {
      for (const button of group.children) button.setAttribute("aria-pressed", String(button.dataset.value === value));
    };
    group.append(...options.map(([value, text, title]) => el("button", {
      type: "button", "data-value": value, title, on: { click: () => { choose(value); act(value); } },
    }, text)));
    choose(chosen);
    return group;
  }

  const remembered = {
    get(key) {
      try { return localStorage.getItem(`jsae.${key}`); } catch { return null; }
    },
    set(key, value) {
      try { localStorage.setItem(`jsae.${key}`, value); } catch { /* private windows store nothing */ }
    },
  };

  /* The theme is set before anything is drawn. */
  const theme = remembered.get("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;

  Object.assign(jsae, {
    el, svg, number, percent, short, whole: (value) => whole.format(value), load, watchTips, toast, copy, later,
    icon, segmented, remembered, saveJson, fileButton,
  });
})();
