/* Draw histograms and bars as SVG. */
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

  /* Return a value as a bar within a cell; `share` is from 0 to 1. */
  const bar = (share, kind = "") => el("span", { class: `meter ${kind}`, vars: { "--w": `${Math.max(0, Math.min(1, share)) * 100}%` } });

  jsae.charts = { histogram, bar };
})();
