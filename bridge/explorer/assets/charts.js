/* Draw histograms and courses as SVG, bars, and prepare canvases. */
"use strict";

(() => {
  const { el, svg, number, whole } = jsae;
  const WIDE = 320;
  const HIGH = 96;

  /* Return a histogram with its range below; `log` draws the logarithm of the counts. `tone(i)` returns the class and the strength of bar i. */
  function histogram(counts, [from, to], { label, unit, tone, marks = [], log = false }) {
    const most = Math.max(1, ...counts);
    const share = (count) => (log ? Math.log1p(count) / Math.log1p(most) : count / most);
    const step = WIDE / counts.length;
    const bars = Array.from(counts, (count, i) => {
      const high = count ? Math.max(1.5, share(count) * HIGH) : 0;
      const { kind, share: strength } = tone(i);
      return svg("rect", {
        class: kind, x: (i * step + 0.5).toFixed(2), y: (HIGH - high).toFixed(2), width: (step - 1).toFixed(2),
        height: high.toFixed(2), rx: 1, vars: { "--h": strength.toFixed(3) },
      });
    });
    const edge = (i) => from + ((to - from) * i) / counts.length;
    const over = Array.from(counts, (count, i) => svg("rect", {
      class: "over", x: (i * step).toFixed(2), y: 0, width: step.toFixed(2), height: HIGH,
      tip: [["", `${number(edge(i))} to ${number(edge(i + 1))}`], [unit, whole(count)]],
    }));
    const lines = marks.filter((x) => x > from && x < to).map((x) => svg("line", {
      class: "mark", x1: ((x - from) / (to - from)) * WIDE, x2: ((x - from) / (to - from)) * WIDE, y1: 0, y2: HIGH,
    }));
    const zero = from < 0 && to > 0 ? el("span", { class: "zero", vars: { "--x": `${(-from / (to - from)) * 100}%` } }, "0") : null;
    return el("figure", { class: "chart" },
      svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, preserveAspectRatio: "none", role: "img", "aria-label": label }, lines, bars, over),
      el("figcaption", {}, el("span", {}, number(from)), zero, el("span", {}, number(to))));
  }

  /* Return the course of a number over checkpoints as a line, with a second one for comparison. */
  function course(values, { names, format, label, chosen = -1, other = [], low = Infinity, high = -Infinity }) {
    const [wide, tall, edge] = [160, 56, 6];
    const known = [...values, ...other].filter(Number.isFinite);
    const [from, to] = [Math.min(low, ...known), Math.max(high, ...known)];
    const x = (i) => edge + (values.length > 1 ? i / (values.length - 1) : 0.5) * (wide - 2 * edge);
    const y = (value) => tall - edge - ((value - from) / (to - from || 1)) * (tall - 2 * edge);
    const path = (some) => some.map((value, i) => [value, i]).filter(([value]) => Number.isFinite(value)).map(([value, i], n) => `${n ? "L" : "M"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    const step = (wide - 2 * edge) / Math.max(1, values.length - 1);
    const over = values.map((value, i) => svg("rect", {
      class: "over", x: Math.max(0, x(i) - step / 2).toFixed(1), y: 0, height: tall,
      width: (Math.min(wide, x(i) + step / 2) - Math.max(0, x(i) - step / 2)).toFixed(1),
      tip: [["", names[i]], [label.toLowerCase(), Number.isFinite(value) ? format(value) : "–"], ...(Number.isFinite(other[i]) ? [["everywhere", format(other[i])]] : [])],
    }));
    const dots = values.map((value, i) => Number.isFinite(value) && svg("circle", { cx: x(i).toFixed(1), cy: y(value).toFixed(1), r: values.length > 24 ? 1 : 2.4, class: i === chosen && "chosen" }));
    const said = values.map((value, i) => `${names[i]} ${Number.isFinite(value) ? format(value) : "unknown"}`).join(", ");
    return el("figure", { class: "course" },
      svg("svg", { viewBox: `0 0 ${wide} ${tall}`, role: "img", "aria-label": `${label}: ${said}` },
        svg("line", { class: "base", x1: 0, x2: wide, y1: tall - edge, y2: tall - edge }),
        other.length > 0 && svg("path", { class: "other", d: path(other) }), svg("path", { class: "line", d: path(values) }), dots, over),
      el("figcaption", {}, el("span", {}, names[0]), el("span", {}, names.at(-1))));
  }

  /* Return a value as a bar within a cell; `share` is from 0 to 1. */
  const bar = (share, kind = "") => el("span", { class: `meter ${kind}`, vars: { "--w": `${Math.max(0, Math.min(1, share)) * 100}%` } });

  /* Fit a canvas of a size in CSS pixels to the screen, clear it, and return its context. */
  function pen(canvas, wide, high) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = wide * ratio;
    canvas.height = high * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    return context;
  }

  jsae.charts = { histogram, course, bar, pen };
})();
