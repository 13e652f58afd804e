/* What became of latents over the checkpoints that a crosscoder reads: orders of the list, filters, and timelines. */
"use strict";

(() => {
  const { el, percent } = jsae;
  const COLUMNS = ["norm", "density", "final", "contribution", "change", "gained", "lost", "loss"];
  const EVENTS = { appears: "appears", grows: "grows", rotates: "rotates", shrinks: "shrinks", dies: "dies" };
  const KINDS = {
    exclusive: ["Exclusive", "absent in some checkpoint: new, or removed"],
    weakened: ["Weakened", "at most half as strong in some checkpoint"],
    rotated: ["Rotated", "in all checkpoints, with another direction in one"],
    shared: ["Shared", "alike in all checkpoints"],
  };

  /* Measures of all latents in every checkpoint. */
  class Timeline {
    constructor(file, column) {
      Object.assign(this, { stage: file.stage, names: file.names, kinds: file.kinds, everywhere: file.everywhere });
      this.size = file.names.length;
      this.columns = Object.fromEntries(COLUMNS.map((name) => [name, column(file[name], Float32Array)]));
      this.events = new Map();
      for (const [latent, kind, stage] of file.events) {
        if (!this.events.has(latent)) this.events.set(latent, []);
        this.events.get(latent).push({ kind, stage });
      }
    }

    /* Return a measure of a latent in a checkpoint. */
    at(name, latent, stage) {
      return this.columns[name][latent * this.size + stage];
    }

    /* Return a measure of a latent in all checkpoints. */
    course(name, latent) {
      return Array.from(this.columns[name].subarray(latent * this.size, (latent + 1) * this.size));
    }

    dead(latent) {
      return this.kinds[latent] === "dead";
    }

    /* Return whether a latent has appeared up to a checkpoint, and not died since. */
    there(latent, stage) {
      if (this.appeared(latent) > stage) return false;
      const last = (this.events.get(latent) ?? []).filter((event) => event.stage <= stage && ["appears", "dies"].includes(event.kind)).at(-1);
      return last?.kind !== "dies";
    }

    /* Return the checkpoint in which a latent is there for the first time; Infinity for a dead one. */
    appeared(latent) {
      if (this.dead(latent)) return Infinity;
      return (this.events.get(latent) ?? []).find(({ kind }) => kind === "appears")?.stage ?? 0;
    }

    changed(latent, stage) {
      return this.dead(latent) ? -1 : this.at("change", latent, stage);
    }

    /* Return how much a latent gained since the checkpoint before. */
    gained(latent, stage) {
      return this.dead(latent) ? -1 : this.at("gained", latent, stage);
    }

    /* Return how much of a latent was lost since the checkpoint before. */
    lost(latent, stage) {
      return this.dead(latent) ? -1 : this.at("lost", latent, stage);
    }
  }

  /* Return the further orders of a list: [name, key, direction] by the value of their option. */
  function sorts({ timeline }) {
    if (!timeline) return {};
    const later = timeline.names.map((name, stage) => [name, stage]).slice(1);
    const each = (key, title) => later.map(([name, stage]) => [`${key}-${stage}`, [`${title} in ${name}`, (list, i) => timeline[key](i, stage), -1]]);
    return {
      appeared: ["Appeared at", (list, i) => timeline.appeared(i), 1],
      ...Object.fromEntries([...each("changed", "Changed most"), ...each("gained", "Gained"), ...each("lost", "Lost")]),
    };
  }

  /* Return the further filters of a list. */
  function states({ timeline }) {
    if (!timeline) return {};
    return Object.fromEntries(Object.entries(KINDS).map(([kind, [name, title]]) => [kind, [name, (list, i) => timeline.kinds[i] === kind, title]]));
  }

  /* Return a badge with the checkpoint in which a latent appeared; null for one that was there from the first. */
  function badge({ timeline }, latent) {
    const stage = timeline?.appeared(latent) ?? 0;
    if (stage === 0 || stage === Infinity) return null;
    return el("span", { class: "badge since", title: `appeared at ${timeline.names[stage]}` }, timeline.names[stage]);
  }

  /* Return the card of a latent's page with its course over the checkpoints; null without several checkpoints. */
  function card({ list, latent }) {
    const { timeline } = list;
    if (!timeline) return null;
    const { names } = timeline;
    const chart = (name, note, values, format, more = {}) => el("div", {}, el("h3", {}, name, el("small", {}, note)),
      jsae.charts.course(values, { names, format, label: name, chosen: names.indexOf(timeline.stage), ...more }));
    const loss = timeline.course("loss", latent);
    const norm = timeline.course("norm", latent);
    const longest = Math.max(...norm) || 1;
    return el("section", { class: "card timeline" },
      el("h2", {}, "Over training", el("small", {}, history(timeline, latent))),
      el("div", { class: "courses" },
        chart("Norm", "of its direction, over its largest", norm.map((x) => x / longest), percent, { low: 0, high: 1 }),
        chart("Density", "in each checkpoint's own SAE", timeline.course("density", latent), percent, { low: 0 }),
        chart("Cosine", `to its direction in ${names.at(-1)}`, timeline.course("final", latent), (x) => x.toFixed(2), { low: 0, high: 1 }),
        loss.some(Number.isFinite) && chart("Loss", "where it fires; grey: everywhere", loss, (x) => `${x.toFixed(2)} nats`, { low: 0, other: timeline.everywhere.map((x) => x ?? NaN) })));
  }

  /* Return what happened to a latent, in words. */
  function history(timeline, latent) {
    if (timeline.dead(latent)) return "fires too rarely to say";
    const events = (timeline.events.get(latent) ?? []).map(({ kind, stage }) => `${EVENTS[kind] ?? kind} at ${timeline.names[stage]}`);
    const first = timeline.appeared(latent) === 0 ? [`there from ${timeline.names[0]}`] : [];
    return [...first, ...events].join(" · ");
  }

  jsae.stages = { Timeline, sorts, states, badge, card };
})();
