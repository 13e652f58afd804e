/* The list of latents: search, sort and filter; only visible rows are drawn. */
"use strict";

(() => {
  const { el, svg, number, percent, whole, later } = jsae;
  const ROW = 62; // pixels, as in explorer.css
  const AROUND = 4; // extra rows drawn beyond either edge

  const SORTS = {
    match: ["Best match", (list, i) => i, 1], // for a search; without one by number
    index: ["Number", (list, i) => i, 1],
    density: ["Density", (list, i) => list.count[i], -1],
    max: ["Largest activation", (list, i) => list.max[i], -1],
    mean: ["Mean activation", (list, i) => list.mean[i], -1],
    label: ["Label", (list, i) => list.labels[i].toLowerCase() || "\uffff", 1],
    f1: ["F1 of the label", (list, i) => (Number.isNaN(list.f1[i]) ? -1 : list.f1[i]), -1],
    recurs: ["Recurs in other seeds", (list, i) => (Number.isNaN(list.recurrence(i)) ? -1 : list.recurrence(i)), -1],
  };
  const STATES = {
    alive: ["Alive", (list, i) => !list.dead(i), "fire somewhere in the text"],
    dead: ["Dead", (list, i) => list.dead(i), "fire nowhere in the text"],
    dense: ["Dense", (list, i) => list.dense(i), "fire on more than a tenth of the tokens"],
    labelled: ["Labelled", (list, i) => list.labels[i] !== "", "have a label"],
    named: ["Named", (list, i) => list.byPerson.has(i) || list.notes.has(i), "named or noted by a person"],
    stable: ["Stable", (list, i) => list.recurrence(i) === 1, "recur in the SAEs of all other seeds"],
    unique: ["Unique", (list, i) => list.recurrence(i) === 0, "recur in the SAE of no other seed"],
  };
  const sorts = (list) => ({ ...SORTS, ...jsae.stages.sorts(list) });
  const statesOf = (list) => ({ ...STATES, ...jsae.stages.states(list) });
  const OF_SEEDS = ["stable", "unique"]; // states that are known where SAEs of several seeds were compared
  const RANGES = {
    density: { name: "Density", value: (list, i) => list.density(i), format: percent, bounds: () => [1e-6, 1] },
    max: { name: "Largest activation", value: (list, i) => list.max[i], format: number, bounds: maxima },
  };
  const fresh = () => ({ query: "", sort: "match", turned: false, states: new Set(), logit: "", density: [0, 1], max: [0, 1] });

  const view = { list: null, order: [], matches: new Map(), chosen: -1, top: 0, state: fresh(), open: false };
  const drawn = new Map(); // elements of rows, by their index in the order
  let parts = {};

  /* Draw the pane once; `show` fills it with the latents of a hook. */
  function build() {
    parts = {
      search: el("input", {
        type: "search", id: "search", placeholder: "Search labels, tokens, numbers", "aria-label": "Search latents",
        autocomplete: "off", spellcheck: "false", on: { input: later(() => set({ query: parts.search.value }), 80), keydown: enter },
      }),
      sort: el("select", { "aria-label": "Sort by", id: "sort", on: { change: () => set({ sort: parts.sort.value, turned: false }) } },
        Object.entries(SORTS).map(([key, [name]]) => el("option", { value: key, id: `sort-${key}` }, name))),
      turn: el("button", {
        type: "button", class: "icon", id: "turn", "aria-label": "Reverse the order", title: "Reverse the order",
        on: { click: () => set({ turned: !view.state.turned }) },
      }, "⇅"),
      filters: el("button", { type: "button", class: "plain", id: "filters", "aria-expanded": "false", on: { click: unfold } }, "Filter"),
      count: el("span", { class: "count", role: "status" }),
      panel: el("div", { class: "filters", hidden: true }),
      inner: el("div", { class: "inner", role: "list", on: { focusin: follow } }),
    };
    parts.rows = el("div", { class: "rows", tabindex: -1, on: { scroll: draw } }, parts.inner);
    document.getElementById("list").replaceChildren(
      el("div", { class: "tools" }, el("div", { class: "search" }, parts.search, el("kbd", { "aria-hidden": "true" }, "/")),
        el("div", { class: "line" }, parts.sort, parts.turn, parts.filters, el("span", { class: "grow" }), parts.count)),
      parts.panel, parts.rows);
    new ResizeObserver(draw).observe(parts.rows);
  }

  function show(list) {
    view.list = list;
    const compared = list.recurs.length > 0;
    parts.sort.querySelector("#sort-recurs").hidden = !compared;
    if (!compared) {
      for (const name of OF_SEEDS) view.state.states.delete(name);
      if (view.state.sort === "recurs") view.state.sort = "match";
    }
    const further = Object.entries(jsae.stages.sorts(list));
    for (const option of parts.sort.querySelectorAll(".of-stages")) option.remove();
    parts.sort.append(...further.map(([key, [name]]) => el("option", { value: key, class: "of-stages" }, name)));
    if (!(view.state.sort in sorts(list))) view.state.sort = "match";
    for (const name of view.state.states) if (!(name in statesOf(list))) view.state.states.delete(name);
    drawFilters();
    set({});
  }

  function set(change) {
    Object.assign(view.state, change);
    const { list, state } = view;
    ({ order: view.order, matches: view.matches } = search(list, state));
    const searching = state.query.trim() !== "";
    parts.sort.querySelector("#sort-match").hidden = !searching;
    parts.sort.value = state.sort === "match" && !searching ? "index" : state.sort;
    parts.inner.style.height = `${view.order.length * ROW}px`;
    parts.count.textContent = view.order.length === list.size ? `${whole(list.size)} latents` : `${whole(view.order.length)} of ${whole(list.size)}`;
    const narrowed = Object.keys(RANGES).some((key) => state[key][0] > 0 || state[key][1] < 1);
    const active = state.states.size > 0 || narrowed || state.logit !== "";
    parts.filters.classList.toggle("on", active);
    parts.rows.scrollTop = 0;
    redraw();
    keep();
  }

  /* Put search, order and filters into the address; what is as usual is left out. */
  function keep() {
    const { query, sort, turned, states, logit } = view.state;
    const range = (key) => (view.state[key][0] > 0 || view.state[key][1] < 1 ? view.state[key].join("-") : "");
    jsae.address.keep({
      q: query, sort: sort === "match" ? "" : sort, turned: turned ? "yes" : "", only: [...states].join(","), raises: logit,
      ...Object.fromEntries(Object.keys(RANGES).map((key) => [key, range(key)])),
    });
  }

  /* Take search, order and filters from the address; what is unknown there is left as usual. */
  function restore(values) {
    const { state } = view;
    state.query = values.get("q") ?? "";
    state.sort = jsae.address.oneOf(values, "sort", Object.keys(SORTS)) ?? state.sort;
    state.turned = values.get("turned") === "yes";
    state.states = new Set((values.get("only") ?? "").split(",").filter((name) => Object.hasOwn(STATES, name)));
    state.logit = values.get("raises") ?? "";
    for (const key of Object.keys(RANGES)) {
      const ends = /^([01]?\.?\d*)-([01]?\.?\d*)$/.exec(values.get(key) ?? "")?.slice(1).map(Number);
      if (ends && ends[0] >= 0 && ends[0] <= ends[1] && ends[1] <= 1) state[key] = ends;
    }
    parts.search.value = state.query;
  }

  const find = (list, state) => search(list, state).order;

  /* Return the latents that pass the filters, in the chosen order, and their matches with the query; ties are ordered
     by number. */
  function search(list, { query, sort, turned, states, logit, ...rest }) {
    const words = query.toLowerCase().trim();
    const token = logit.toLowerCase();
    const within = Object.keys(RANGES).map((key) => inside(list, key, rest[key]));
    const [, key, direction] = sorts(list)[sort];
    const tests = [...states].map((name) => statesOf(list)[name][1]);
    const latents = [];
    const reasons = new Map();
    for (let i = 0; i < list.size; i++) {
      if (tests.some((fits) => !fits(list, i))) continue;
      if (!within.every((fits) => fits(i))) continue;
      if (token && !Array.from(list.raised(i)).some((id) => matches(jsae.tokens.word(id).toLowerCase(), token))) continue;
      if (words) {
        const match = jsae.search.match(list, i, words);
        if (!match) continue;
        reasons.set(i, match);
      }
      latents.push(i);
    }
    if (sort === "match" && words) {
      const order = latents.sort(jsae.search.compare(list, reasons));
      return { order: turned ? order.reverse() : order, matches: reasons };
    }
    const keys = latents.map((i) => key(list, i));
    const sign = turned ? -direction : direction;
    const compare = (a, b) => (keys[a] < keys[b] ? -sign : keys[a] > keys[b] ? sign : latents[a] - latents[b]);
    return { order: latents.map((_, i) => i).sort(compare).map((i) => latents[i]), matches: reasons };
  }

  /* Return whether a token matches a word: the whole of it, or a part of more than one letter. */
  const matches = (word, token) => word === token || word.trim() === token.trim() || (token.trim().length > 1 && word.includes(token));

  /* ---- filters ---- */

  /* Return the smallest and the largest maximal activation among latents that fire. */
  function maxima(list) {
    let [least, most] = [Infinity, 0];
    for (const value of list.max) if (value > 0) [least, most] = [Math.min(least, value), Math.max(most, value)];
    return most > 0 ? [least, Math.max(most, least * 1.01)] : [0.1, 1];
  }

  /* Map a value to its logarithmic position between the bounds of a range, 0 to 1, and back. */
  const scale = (value, [low, high]) => (value > low ? Math.min(1, Math.log(value / low) / Math.log(high / low)) : 0);
  const unscale = (share, [low, high]) => low * (high / low) ** share;

  /* Return a test whether a latent is in the chosen part of a range; a handle that was not moved excludes nothing. */
  function inside(list, key, [low, high]) {
    const { value, bounds } = RANGES[key];
    const [from, to] = [low, high].map((share) => unscale(share, bounds(list)));
    return (i) => !((low > 0 && value(list, i) < from) || (high < 1 && value(list, i) > to));
  }

  function unfold() {
    view.open = !view.open;
    parts.panel.hidden = !view.open;
    parts.filters.setAttribute("aria-expanded", String(view.open));
  }

  function drawFilters() {
    const { state } = view;
    const states = Object.entries(statesOf(view.list)).filter(([key]) => view.list.recurs.length > 0 || !OF_SEEDS.includes(key));
    const chips = states.map(([key, [name, , title]]) => {
      const button = el("button", {
        type: "button", class: "pill", "data-state": key, title, "aria-pressed": String(state.states.has(key)), on: { click: () => {
          if (!state.states.delete(key)) state.states.add(key);
          button.setAttribute("aria-pressed", String(state.states.has(key)));
          set({});
        } },
      }, name);
      return button;
    });
    const logit = el("input", {
      type: "text", id: "logit", value: state.logit, placeholder: "e.g. return", autocomplete: "off", spellcheck: "false",
      on: { input: later(() => set({ logit: logit.value }), 80) },
    });
    parts.panel.replaceChildren(
      el("div", { class: "pills", role: "group", "aria-label": "Only latents that are" }, chips),
      ...Object.keys(RANGES).map((key) => range(key)),
      el("label", { class: "field" }, "Raises the token", logit),
      el("button", { type: "button", class: "plain", id: "clear", on: { click: clear } }, "Clear all"));
  }

  function clear() {
    view.state = { ...fresh(), sort: view.state.sort, turned: view.state.turned };
    parts.search.value = "";
    drawFilters();
    set({});
  }

  /* Draw two handles that select a range of a number, below its histogram. */
  function range(key) {
    const { list, state } = view;
    const { name, value, format, bounds: boundsOf } = RANGES[key];
    const bounds = boundsOf(list);
    const bins = new Array(48).fill(0);
    for (let i = 0; i < list.size; i++) if (!list.dead(i)) bins[Math.min(47, Math.floor(scale(value(list, i), bounds) * 48))]++;
    const most = Math.max(1, ...bins);
    const bars = bins.map((count, i) => svg("rect", { x: i, y: 20 - (count / most) * 20, width: 0.8, height: (count / most) * 20 }));
    const output = el("output", {});
    const update = () => {
      const [low, high] = state[key];
      output.textContent = `${low > 0 ? format(unscale(low, bounds)) : format(0)} – ${format(unscale(high, bounds))}`;
      bars.forEach((bar, i) => { bar.classList.toggle("out", (i + 0.5) / 48 < low || (i + 0.5) / 48 > high); });
    };
    const handle = (end, which, sign) => el("input", {
      type: "range", min: 0, max: 1, step: 0.005, value: state[key][end], "aria-label": `${name}, ${which}`, id: `${key}-${end ? "high" : "low"}`,
      on: { input: (event) => {
        const other = state[key][1 - end];
        state[key][end] = sign * Math.max(sign * Number(event.target.value), sign * other); // the handles do not pass each other
        event.target.value = state[key][end];
        update();
        set({});
      } },
    });
    update();
    return el("div", { class: "range" }, el("div", { class: "field" }, el("span", {}, name), output),
      svg("svg", { viewBox: "0 0 48 20", preserveAspectRatio: "none", "aria-hidden": "true" }, bars),
      el("div", { class: "handles" }, handle(0, "at least", -1), handle(1, "at most", 1)));
  }

  /* ---- rows ---- */

  /* Draw the rows in view and some beyond. Rows that were drawn keep their elements, and a row with the keyboard's
     focus is kept with its neighbours even out of view: an element that is replaced loses the focus. */
  function draw() {
    if (!view.list) return;
    view.top = parts.rows.scrollTop;
    const first = Math.max(0, Math.floor(view.top / ROW) - AROUND);
    const places = new Set(Array.from({ length: Math.ceil(parts.rows.clientHeight / ROW) + 2 * AROUND + 1 }, (_, i) => first + i));
    const focused = [...drawn.keys()].find((at) => drawn.get(at).contains(document.activeElement));
    if (focused !== undefined) for (const at of [focused - 1, focused, focused + 1]) places.add(at);
    for (const [at, slot] of drawn) {
      if (places.has(at)) continue;
      slot.remove();
      drawn.delete(at);
    }
    let after = null; // in the order of the list, which Tab follows
    for (const at of [...places].filter((place) => place >= 0 && place < view.order.length).sort((a, b) => b - a)) {
      if (!drawn.has(at)) {
        drawn.set(at, row(view.order[at], at));
        parts.inner.insertBefore(drawn.get(at), after);
      }
      after = drawn.get(at);
    }
  }

  /* Draw all rows again after a change of order or content; the focus moves to the new row of its latent. */
  function redraw() {
    if (!view.list) return;
    const focused = parts.inner.contains(document.activeElement) && document.activeElement.dataset.latent;
    drawn.clear();
    parts.inner.replaceChildren(...(view.order.length ? [] : [el("p", { class: "quiet pad" }, "No latents match.")]));
    draw();
    if (focused) parts.inner.querySelector(`[data-latent="${focused}"]`)?.focus({ preventScroll: true });
  }

  /* Draw the rows after the one that gets the focus, so that Tab continues. From outside of the list, Tab moves to the
     open latent, or to the first row in view, but not to a row beyond the edge. */
  function follow(event) {
    const { target, relatedTarget } = event;
    if (!relatedTarget) return; // a click, or a row that was drawn again
    const seen = (at) => at * ROW >= view.top && (at + 1) * ROW <= view.top + parts.rows.clientHeight;
    if (!parts.inner.contains(relatedTarget) && !seen(view.order.indexOf(Number(target.dataset.latent)))) {
      parts.rows.scrollTop = view.top; // the browser has scrolled to the row already
      const chosen = view.order.indexOf(view.chosen);
      const next = drawn.get(seen(chosen) ? chosen : Math.ceil(view.top / ROW));
      if (next) {
        next.querySelector(".row").focus();
        return;
      }
    }
    target.scrollIntoView({ block: "nearest" });
    draw();
  }

  function row(latent, at) {
    const { list } = view;
    const { ids, peak } = list.snippet(latent);
    const spans = list.spelled(latent).map((token, i) => jsae.tokens.span(token, { heat: i === peak ? 1 : 0, peak: i === peak }));
    const label = list.labels[latent];
    const link = el("a", {
      class: `row${latent === view.chosen ? " chosen" : ""}`, href: jsae.link(latent), "data-latent": latent,
      "aria-current": latent === view.chosen ? "true" : null,
    },
    el("span", { class: "head" }, el("span", { class: "id" }, `#${latent}`),
      el("span", { class: label ? "label" : "label none" }, jsae.tokens.shown(list.title(latent))),
      list.byPerson.has(latent) && el("span", { class: "mine", title: "named by a person" }, "✎"),
      view.matches.has(latent) && jsae.search.reason(view.matches.get(latent)), jsae.stages.badge(list, latent), seeds(list, latent), badge(list, latent)),
    ids.length ? el("span", { class: "kwic" }, el("span", { class: "left" }, el("span", {}, spans.slice(0, peak))),
      el("span", { class: "right" }, spans.slice(peak))) : el("span", { class: "kwic" }),
    el("span", { class: "foot" }, el("span", {}, percent(list.density(latent))), el("span", {}, `max ${number(list.max[latent])}`)));
    const place = { role: "listitem", "aria-posinset": at + 1, "aria-setsize": view.order.length, vars: { top: `${at * ROW}px` } };
    return el("div", { class: "slot", ...place }, link);
  }

  /* Return a badge with the F1 of an automatic label. */
  function badge(list, latent) {
    const f1 = list.f1[latent];
    if (Number.isNaN(f1)) return null;
    const kind = f1 >= 0.8 ? "good" : f1 >= 0.5 ? "fair" : "poor";
    return el("span", { class: `badge ${kind}`, title: `F1 of the label: ${f1.toFixed(2)}` }, f1.toFixed(2));
  }

  /* Return a badge with the number of other seeds in which a latent recurs. */
  function seeds(list, latent) {
    const share = list.recurrence(latent);
    if (Number.isNaN(share)) return null;
    const others = list.info.other_seeds;
    const count = Math.round(share * others);
    const kind = share >= 0.8 ? "good" : share >= 0.5 ? "fair" : "poor";
    return el("span", { class: `badge seeds ${kind}`, title: `recurs in ${count} of ${others} other seeds` }, `${count}/${others}`);
  }

  /* Mark a latent as open and scroll its row into view. */
  function choose(latent) {
    view.chosen = latent;
    const at = view.order.indexOf(latent);
    if (at >= 0) {
      const top = at * ROW;
      if (top < parts.rows.scrollTop || top + ROW > parts.rows.scrollTop + parts.rows.clientHeight) {
        parts.rows.scrollTop = Math.max(0, top - parts.rows.clientHeight / 3);
      }
    }
    redraw();
  }

  /* Return the latent that is `by` rows further down the list. */
  function step(latent, by) {
    const at = view.order.indexOf(latent);
    if (at < 0) return view.order[0];
    return view.order[Math.max(0, Math.min(view.order.length - 1, at + by))];
  }

  /* Return a random latent of the list, one that fires if there is one. */
  function any() {
    const alive = view.order.filter((i) => !view.list.dead(i));
    const some = alive.length ? alive : view.order.length ? view.order : [0];
    return some[Math.floor(Math.random() * some.length)];
  }

  function enter(event) {
    if (event.key === "Enter" && view.list) {
      set({ query: parts.search.value });
      if (view.order.length) location.hash = jsae.link(view.order[0]);
    }
    if (event.key === "Escape") {
      parts.search.value = "";
      parts.search.blur();
      set({ query: "" });
    }
  }

  jsae.list = {
    build, show, choose, step, any, set, badge, seeds, find, fresh, keep, restore,
    redraw,
    focus() {
      parts.search.focus();
      parts.search.select();
    },
    get current() { return view.list; },
  };
})();
