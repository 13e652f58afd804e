/* The film of the map: how often every latent fires, how much it writes, and which way, checkpoint by checkpoint. */
"use strict";

(() => {
  const { el, percent, whole } = jsae;
  const SPEED = 1.3; // checkpoints per second
  const PAUSE = 900; // milliseconds per checkpoint where motion is not wanted
  const film = { at: Infinity, target: Infinity, playing: false, last: 0 };

  function show(main, list) {
    const { timeline } = list;
    const end = timeline.size - 1;
    film.at = film.target = Math.min(film.target, end);
    film.playing = false;
    const name = el("output", { id: "stage", "aria-live": "polite" });
    const slider = el("input", {
      type: "range", id: "film", min: 0, max: end, step: 1, value: film.target, "aria-label": "Checkpoint",
      on: { input: () => {
        film.playing = false;
        film.target = Number(slider.value);
        update();
        run();
      } },
    });
    const play = el("button", { type: "button", class: "plain strong", id: "play", on: { click: () => {
      film.playing = !film.playing;
      if (film.playing && film.target === end) film.at = film.target = 0;
      if (film.playing) film.target = Math.min(end, film.target + 1);
      update();
      run();
    } } });
    const side = el("div", {});
    const { node, draw } = map(list);
    const update = () => {
      slider.value = film.target;
      slider.setAttribute("aria-valuetext", timeline.names[film.target]);
      name.textContent = timeline.names[film.target];
      play.textContent = film.playing ? "Pause" : "Play";
      side.replaceChildren(...summary(list, film.target));
    };
    const run = stepper(node, end, draw, update);
    main.replaceChildren(el("div", { class: "page film" },
      el("header", { class: "title" }, el("h1", {}, "How the latents came to be"),
        el("p", { class: "quiet" }, "Every dot is a latent: to the right how often it fires in the checkpoint's own SAE, upwards how much it writes there, in percent of the norm of typical activations. The colour says where it points: ", el("span", { class: "scale" }, "at a right angle"), " to its direction in ", el("b", {}, timeline.names[end]), " up to the same. Latents that have not appeared yet, or have died, are pale. Click on one to open it.")),
      el("section", { class: "card" }, node, el("div", { class: "line reel" }, play, slider, name)), side));
    update();
    run();
  }

  /* Return a function that moves the film towards its target, and on while it plays; it stops when the map is gone. */
  function stepper(node, end, draw, update) {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    let running = false;
    const arrived = () => {
      if (film.playing && film.target < end) film.target++;
      else film.playing = false;
      update();
    };
    const turn = (now) => {
      const passed = Math.min(now - film.last, 100) / 1000;
      film.last = now;
      const left = film.target - film.at;
      const speed = Math.max(SPEED, Math.abs(left) * 3);
      film.at = still || Math.abs(left) <= passed * speed ? film.target : film.at + Math.sign(left) * passed * speed;
      draw(film.at);
      if (film.at === film.target && film.playing) arrived();
      running = node.isConnected && (film.playing || film.at !== film.target);
      if (!running) return;
      if (still) setTimeout(() => requestAnimationFrame(turn), PAUSE);
      else requestAnimationFrame(turn);
    };
    return () => {
      if (running) return;
      running = true;
      film.last = performance.now();
      requestAnimationFrame(turn);
    };
  }

  /* ---- the map ---- */

  function map(list) {
    const { timeline } = list;
    const alive = Array.from({ length: list.size }, (_, i) => i).filter((i) => !timeline.dead(i));
    const canvas = el("canvas", { role: "img", "aria-label": "Latents by density and contribution in the checkpoint", tip: () => content() });
    const bounds = { x: logs(alive, timeline, "density"), y: logs(alive, timeline, "contribution") };
    const dots = [];
    let near = null;
    const content = () => (near === null ? [["", "one dot per latent"]] : [["", `#${near} ${jsae.tokens.shown(list.title(near))}`],
      ["density", percent(timeline.at("density", near, film.target))], ["writes", percent(timeline.at("contribution", near, film.target))],
      ["cosine", timeline.at("final", near, film.target).toFixed(2)]]);
    const draw = (at = film.at) => paint(canvas, timeline, alive, bounds, dots, at);
    canvas.addEventListener("pointermove", (event) => {
      near = jsae.overview.nearest(dots, event.offsetX, event.offsetY);
      canvas.style.cursor = near === null ? "default" : "pointer";
      canvas.dispatchEvent(new PointerEvent("pointerover", { bubbles: true, clientX: event.clientX, clientY: event.clientY }));
    });
    canvas.addEventListener("click", () => { if (near !== null) location.hash = jsae.link(near); });
    new ResizeObserver(() => draw()).observe(canvas);
    new MutationObserver(() => draw()).observe(document.documentElement, { attributes: true });
    return { node: el("div", { class: "map" }, canvas), draw };
  }

  /* Return the logarithms of a measure in all checkpoints, without zeros. */
  const logs = (alive, timeline, name) => alive.flatMap((i) => timeline.course(name, i)).filter((value) => value > 0).map(Math.log10);

  function paint(canvas, timeline, alive, bounds, dots, at) {
    const [wide, high] = [canvas.clientWidth, canvas.clientHeight];
    if (!wide || !bounds.x.length || !bounds.y.length) return;
    const pen = jsae.charts.pen(canvas, wide, high);
    const style = getComputedStyle(canvas);
    const [x, y] = [jsae.overview.axis(bounds.x, 44, wide - 14), jsae.overview.axis(bounds.y, high - 26, 12)];
    jsae.overview.grid(pen, style, x, y, wide, high, percent);
    const colours = ["--far", "--between", "--near"].map((name) => style.getPropertyValue(name).trim().split(/\s+/).map(Number));
    const [before, after] = [Math.floor(at), Math.ceil(at)];
    const mix = (value) => value(before) + (value(after) - value(before)) * (at - before);
    const place = (axis, values, name, latent) => {
      const of = (stage) => timeline.at(name, latent, stage);
      const known = (stage) => Math.log10(of(stage) > 0 ? of(stage) : of(stage === before ? after : before));
      return axis.at(mix(known));
    };
    dots.length = 0;
    for (const latent of alive) {
      const shown = mix((stage) => (timeline.at("density", latent, stage) > 0 ? timeline.there(latent, stage) ? 1 : 0.28 : 0));
      const dot = { latent, x: place(x, bounds.x, "density", latent), y: place(y, bounds.y, "contribution", latent) };
      if (shown === 0 || !Number.isFinite(dot.x) || !Number.isFinite(dot.y)) continue;
      dots.push(dot);
      const near = Math.max(0, Math.min(1, mix((stage) => timeline.at("final", latent, stage))));
      const [from, to] = near < 0.5 ? [0, 1] : [1, 2];
      const [red, green, blue] = colours[from].map((value, i) => value + (colours[to][i] - value) * (2 * near - from));
      pen.globalAlpha = 0.8 * shown;
      pen.fillStyle = `rgb(${red} ${green} ${blue})`;
      pen.beginPath();
      pen.arc(dot.x, dot.y, alive.length > 5000 ? 1.6 : alive.length > 500 ? 3 : 4, 0, 7);
      pen.fill();
    }
  }

  /* ---- what happens in a checkpoint ---- */

  function summary(list, stage) {
    const { timeline } = list;
    const all = Array.from({ length: list.size }, (_, i) => i).filter((i) => !timeline.dead(i));
    const having = (kind) => all.filter((i) => (timeline.events.get(i) ?? []).some((event) => event.stage === stage && event.kind === kind));
    const [appear, rotate, die] = [having("appears"), having("rotates"), having("dies")];
    const loss = timeline.everywhere[stage];
    const { picks, tile } = jsae.overview;
    const name = timeline.names[stage];
    const tiles = el("div", { class: "tiles" },
      tile(whole(all.filter((i) => timeline.there(i, stage)).length), "there", `of ${whole(all.length)} living latents`),
      tile(whole(stage ? appear.length : 0), "appear", stage ? `since ${timeline.names[stage - 1]}` : "in the first checkpoint nothing is new"),
      tile(whole(rotate.length), "rotate", "turn to another direction"),
      tile(Number.isFinite(loss) ? loss.toFixed(2) : "–", "nats of loss", "of the model, everywhere in the text"));
    if (!stage) return [tiles];
    return [tiles, el("div", { class: "three" },
      picks(list, `Appear in ${name}`, appear, (i) => timeline.gained(i, stage), (i) => `+${timeline.gained(i, stage).toFixed(2)}`),
      picks(list, `Change most in ${name}`, all, (i) => timeline.changed(i, stage), (i) => timeline.changed(i, stage).toFixed(2)),
      picks(list, die.length ? `Die in ${name}` : `Lost most in ${name}`, die.length ? die : all.filter((i) => timeline.lost(i, stage) > 0.05), (i) => timeline.lost(i, stage), (i) => `−${timeline.lost(i, stage).toFixed(2)}`))];
  }

  jsae.film = { show };
})();
