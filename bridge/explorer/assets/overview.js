/* The overview of all latents, shown before one is chosen. */
"use strict";

(() => {
  const { el, number, percent, whole, short } = jsae;

  /* Return what an SAE is, up to the name of its hook. */
  function kindOf(info) {
    const name = info.architecture.replace(/_?(skip_)?transcoder$/, "") || "relu";
    const kind = jsae.data.isTranscoder(info) ? `${info.architecture.includes("skip_") ? "skip " : ""}transcoder that reads` : "SAE on";
    return `${KINDS[name] ?? name} ${kind} `;
  }

  const KINDS = { topk: "TopK", batchtopk: "BatchTopK", standard: "ReLU", relu: "ReLU", jumprelu: "JumpReLU", gated: "Gated", matryoshka: "Matryoshka" };

  function show(main, list) {
    const { manifest } = jsae.data;
    const { info } = list;
    const all = Array.from({ length: list.size }, (_, i) => i);
    const alive = all.filter((i) => !list.dead(i));
    const densities = alive.map((i) => list.density(i)).sort((a, b) => a - b);
    const fitting = all.filter((i) => list.f1[i] >= 0.5).length;
    const labelled = all.filter((i) => list.labels[i]).length;
    main.replaceChildren(
      el("div", { class: "page overview" },
        el("header", {}, el("h1", {}, `What ${whole(list.size)} latents fire on`),
          el("p", { class: "quiet" }, kindOf(info), el("code", {}, info.name), ` of ${manifest.model}, read over ${short(info.tokens)} tokens of ${info.dataset}`,
            info.split === "all" ? "" : ` (${info.split})`, ".")),
        el("div", { class: "tiles" },
          tile(whole(alive.length), "alive", alive.length === list.size ? "all of them" : `${whole(list.size - alive.length)} never ${list.size - alive.length === 1 ? "fires" : "fire"}`),
          tile(densities.length ? percent(densities[densities.length >> 1]) : "–", "median density", "share of tokens on which a latent fires"),
          tile(whole(all.filter((i) => list.dense(i)).length), "dense", "fire on more than a tenth of the tokens"),
          tile(whole(labelled), "labelled", fitting ? `${whole(fitting)} with F1 of 0.5 or more` : "by people and by the evaluation"),
          info.across && tile(whole(info.across.alike), `alike in ${manifest.hooks[info.across.hook].run ?? manifest.run}`, "have a latent there with a decoder cosine of 0.7 or more")),
        mapCard(list, alive),
        el("div", { class: "three" },
          picks(list, "Best explained", all.filter((i) => !Number.isNaN(list.f1[i])), (i) => list.f1[i], (i) => `F1 ${list.f1[i].toFixed(2)}`),
          picks(list, "Strongest", alive, (i) => list.max[i], (i) => number(list.max[i])),
          picks(list, "Most frequent", alive, (i) => list.count[i], (i) => percent(list.density(i)))),
        el("p", { class: "quiet small" }, `SAE ${info.sae.slice(0, 12)} · checkpoint ${manifest.fingerprint.slice(0, 12)} · ${whole(manifest.rows)} texts of ${whole(manifest.row_length)} tokens. Nothing on this page is loaded from a network.`)));
  }

  const tile = (value, name, note) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, name), el("small", {}, note));

  function picks(list, title, from, key, format) {
    const best = from.map((i) => [key(i), i]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).slice(0, 8);
    return el("section", { class: "card" }, el("h2", {}, title),
      best.length ? el("ol", { class: "picks" }, best.map(([, i]) => el("li", {}, jsae.latentLink(list, i), el("span", { class: "number" }, format(i)))))
        : el("p", { class: "quiet" }, "None."));
  }

  const MAPS = {
    density: ["Density and maximum", "How often a latent fires, and its largest activation; brighter if its label fits well. Click on a latent to open it."],
    directions: ["Directions", "Latents with similar decoder directions are close together (t-SNE of cosines); distances between groups mean nothing. Brighter if the label fits well."],
  };

  /* Return the card with the map that is chosen. */
  function mapCard(list, alive) {
    const about = el("p", { class: "quiet" });
    const place = el("div", {});
    const draw = (kind) => {
      about.textContent = MAPS[kind][1];
      place.replaceChildren(map(list, alive, kind));
    };
    const chosen = list.places && jsae.remembered.get("map") === "directions" ? "directions" : "density";
    draw(chosen);
    return el("section", { class: "card" }, el("div", { class: "line" }, el("h2", {}, "Map"), el("span", { class: "grow" }),
      list.places && jsae.segmented("Map of latents", Object.entries(MAPS).map(([kind, [name]]) => [kind, name]), chosen, (kind) => {
        jsae.remembered.set("map", kind);
        draw(kind);
      })), about, place);
  }

  /* Draw every latent as a dot: density to the right and largest activation upwards, both on a logarithmic scale, or
     at the place of its direction. */
  function map(list, alive, kind) {
    const canvas = el("canvas", { role: "img", "aria-label": kind === "density" ? "Latents by density and largest activation" : "Latents by decoder direction", tip: () => content() });
    const dots = [];
    let near = null;
    const content = () => (near === null ? [["", "one dot per latent"]] : [["", `#${near} ${jsae.tokens.shown(list.title(near))}`],
      ["density", percent(list.density(near))], ["max", number(list.max[near])]]);
    const draw = () => paint(canvas, list, alive, dots, kind);
    canvas.addEventListener("pointermove", (event) => {
      near = nearest(dots, event.offsetX, event.offsetY);
      canvas.style.cursor = near === null ? "default" : "pointer";
      canvas.dispatchEvent(new PointerEvent("pointerover", { bubbles: true, clientX: event.clientX, clientY: event.clientY }));
    });
    canvas.addEventListener("click", () => { if (near !== null) location.hash = jsae.link(near); });
    new ResizeObserver(draw).observe(canvas);
    new MutationObserver(draw).observe(document.documentElement, { attributes: true });
    return el("div", { class: "map" }, canvas);
  }

  function paint(canvas, list, alive, dots, kind) {
    const [wide, high] = [canvas.clientWidth, canvas.clientHeight];
    if (!wide || !alive.length) return;
    const pen = jsae.charts.pen(canvas, wide, high);
    const style = getComputedStyle(canvas);
    const logs = (value) => alive.map((i) => Math.log10(value(i)));
    const flat = kind === "directions";
    const [xs, ys] = flat ? [0, 1].map((k) => alive.map((i) => list.places[2 * i + k])) : [logs((i) => list.density(i)), logs((i) => list.max[i])];
    const [x, y] = flat ? [axis(xs, 12, wide - 12), axis(ys, high - 12, 12)] : [axis(xs, 44, wide - 14), axis(ys, high - 26, 12)];
    if (!flat) grid(pen, style, x, y, wide, high);
    dots.length = 0;
    alive.forEach((latent, n) => {
      const dot = { latent, x: x.at(xs[n]), y: y.at(ys[n]) };
      dots.push(dot);
      const fit = Number.isNaN(list.f1[latent]) ? 0.15 : list.f1[latent];
      pen.globalAlpha = 0.22 + 0.68 * fit;
      pen.fillStyle = style.getPropertyValue(fit > 0.5 ? "--accent" : "--dot");
      pen.beginPath();
      pen.arc(dot.x, dot.y, alive.length > 5000 ? 1.6 : 2.8, 0, 7);
      pen.fill();
    });
  }

  /* Return the map from logarithms to pixels, and the marks of the axis. */
  function axis(logs, start, end) {
    let [low, high] = [Infinity, -Infinity];
    for (const value of logs) [low, high] = [Math.min(low, value), Math.max(high, value)];
    if (high - low < 0.2) [low, high] = [low - 0.1, high + 0.1];
    const marks = [];
    const fine = high - low < 2.2 ? [0, Math.log10(2), Math.log10(5)] : [0];
    for (let power = Math.floor(low); power <= high; power++) {
      for (const part of fine) if (power + part >= low && power + part <= high) marks.push(power + part);
    }
    return { at: (value) => start + ((value - low) / (high - low)) * (end - start), marks };
  }

  function grid(pen, style, x, y, wide, high, format = number) {
    pen.strokeStyle = style.getPropertyValue("--line");
    pen.fillStyle = style.getPropertyValue("--soft");
    pen.font = `11px ${style.fontFamily}`;
    pen.lineWidth = 1;
    pen.beginPath();
    for (const mark of x.marks) {
      pen.moveTo(x.at(mark), 6);
      pen.lineTo(x.at(mark), high - 22);
      pen.textAlign = "center";
      pen.fillText(percent(10 ** mark), Math.min(x.at(mark), wide - 20), high - 6);
    }
    for (const mark of y.marks) {
      pen.moveTo(40, y.at(mark));
      pen.lineTo(wide - 6, y.at(mark));
      pen.textAlign = "right";
      pen.fillText(format(10 ** mark), 34, y.at(mark) + 4);
    }
    pen.stroke();
  }

  function nearest(dots, x, y) {
    let [latent, least] = [null, 144];
    for (const dot of dots) {
      const away = (dot.x - x) ** 2 + (dot.y - y) ** 2;
      if (away < least) [latent, least] = [dot.latent, away];
    }
    return latent;
  }

  jsae.overview = { show, picks, tile, axis, grid, nearest };
})();
