"use strict";
// Numbers and axes of the charts.
(() => {
  const { theme } = window.danon;

  // Plotly reads a few tags in labels; names come from outside.
  const plain = (text) => text.replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
  const tokens = (n) => (n % 1048576 === 0 ? `${n / 1048576}M` : n % 1024 === 0 ? `${n / 1024}k` : `${n}`);

  const digits = (x) => (x === 0 ? "0" : Number(x.toPrecision(3)).toString());
  const seconds = (x) => {
    const [size, unit] = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]].find(([least]) => x >= least * 0.9995) ?? [1e-9, "ns"];
    return `${digits(x / size)} ${unit}`;
  };

  const TENTHS = Array.from({ length: 90 }, (_, i) => 1 + i / 10);
  const STEPS = [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9], TENTHS];

  // The coarsest round numbers of which at least three lie between two powers of ten.
  function ticks(low, high) {
    const decades = Array.from({ length: Math.floor(high) - Math.floor(low) + 1 }, (_, i) => Math.floor(low) + i);
    const within = (steps) => decades.flatMap((d) => steps.map((m) => m * 10 ** d))
      .filter((v) => Math.log10(v) >= low && Math.log10(v) <= high);
    return STEPS.map(within).find((found) => found.length >= 3) ?? within(TENTHS);
  }

  // A logarithmic axis over the values.
  function axis(title, values, write, tickvals) {
    const logs = values.filter((v) => v > 0).map(Math.log10);
    const room = 0.06 * (Math.max(...logs) - Math.min(...logs)) + 0.04;
    const range = [Math.min(...logs) - room, Math.max(...logs) + room];
    const at = tickvals ?? ticks(...range);
    return {
      type: "log", title: { text: title, standoff: 8 }, range, tickmode: "array", tickvals: at, ticktext: at.map(write),
      gridcolor: theme("--grid"), linecolor: theme("--line"), zeroline: false, automargin: true, tickangle: 0,
    };
  }

  function linear(text, more) {
    return { title: { text, standoff: 8 }, gridcolor: theme("--grid"), linecolor: theme("--line"), zeroline: false, automargin: true, ...more };
  }

  const TENS = [0, 20, 40, 60, 80, 100];
  const share = (text) => linear(text, { range: [-4, 104], tickvals: TENS, ticktext: TENS.map(percent) });

  // A value as its axis places it.
  const on = (axis, value) => (axis.type === "log" ? Math.log10(value) : value);

  const round = (value) => (value > 0 && Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-9 ? 0 : 1);

  // An axis without the ticks whose labels would overlap others; ends and powers of ten stay first.
  function spread(axis, pixels, across) {
    if (!axis?.tickvals || !axis.range || axis.type === "category") return axis;
    const [from, to] = axis.range;
    const places = axis.tickvals.map((value, i) => ({
      value, text: axis.ticktext[i], rank: i && i < axis.tickvals.length - 1 ? 1 + round(value) : axis.tokens ? 0 : 1 + round(value),
      at: (pixels * (on(axis, value) - from)) / (to - from), half: across ? 4 + 3.6 * axis.ticktext[i].length : 9,
    }));
    const kept = [];
    for (const place of [...places].sort((s, t) => s.rank - t.rank || t.value - s.value)) {
      if (kept.every((other) => Math.abs(other.at - place.at) >= other.half + place.half)) kept.push(place);
    }
    kept.sort((s, t) => s.value - t.value);
    const { tokens: _, ...rest } = axis;
    return { ...rest, tickvals: kept.map((k) => k.value), ticktext: kept.map((k) => k.text) };
  }

  // A title in lines that fit beside its axis.
  function wrapped(axis, pixels) {
    const text = axis?.title?.text;
    if (!text || text.length * 6.8 <= pixels) return axis;
    const lines = [""];
    for (const word of text.split(/ +/)) {
      if (lines.at(-1) && (lines.at(-1).length + word.length + 1) * 6.8 > pixels) lines.push("");
      lines[lines.length - 1] += `${lines.at(-1) ? " " : ""}${word}`;
    }
    return { ...axis, title: { ...axis.title, text: lines.join("<br>") } };
  }

  Object.assign(window.danon, { plain, tokens, digits, seconds, axis, linear, on, spread, wrapped });
})();
