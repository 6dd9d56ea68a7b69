"use strict";
// Quality against speed at the length that is chosen.
(() => {
  const { data, shown, drawings, plain, digits, tokens, axis, linear, drawFront } = window.danon;
  const { metric, higher, points, title } = data.tradeoff;
  const radios = [...document.querySelectorAll("input[name=tradeoff-length]")];
  const percent = (x) => `${digits(x)} %`;
  const times = (x) => `${digits(x)}×`;
  const QUALITIES = {
    accuracy: { scale: 100, write: percent },
    bits_per_byte: { scale: 1, write: (x) => x.toFixed(3) },
    perplexity: { scale: 1, write: (x) => (x < 100 ? x.toFixed(2) : digits(x)) },
  };
  const quality = QUALITIES[metric] ?? { scale: 1, write: digits };

  function yAxis(values) {
    const name = `${title.split(" (")[0]}  (up is better)`;
    if (metric === "accuracy") {
      const tens = [0, 20, 40, 60, 80, 100];
      return linear(name, { range: [-5, 106], tickvals: tens, ticktext: tens.map(percent) });
    }
    const up = axis(name, values, quality.write);
    return higher ? up : { ...up, range: [...up.range].reverse() };
  }

  function point(p) {
    const a = data.attentions.find((b) => b.name === p.name);
    const x = p.speedup.value, y = p.quality.value * quality.scale;
    const ends = (figure, scale, at) => (figure.low === null ? [at, at] : [figure.low * scale, figure.high * scale]);
    const around = { x: ends(p.speedup, 1, x), y: ends(p.quality, quality.scale, y) };
    const range = p.speedup.low === null ? "" : ` [${times(around.x[0])} to ${times(around.x[1])}]`;
    const text = `<b>${plain(p.name)}</b>${p.best ? ", on the front" : ""}<br>${quality.write(y)}<br>${p.speedup.extrapolated ? "~" : ""}${times(x)} as fast as dense${range}`;
    return { a, x, y, around, text, best: p.best };
  }

  function drawTradeoff() {
    const n = radios.find((radio) => radio.checked).value;
    const found = points[n].map(point).filter((s) => s.a && shown.has(s.a.name)).sort((s, t) => s.x - t.x);
    const xs = [1, ...found.flatMap((s) => s.around.x)];
    const xaxis = axis(`times as fast as dense at ${tokens(Number(n))}  (right is faster)`, xs, times);
    const line = { type: "line", yref: "paper", y0: 0, y1: 1, x0: 1, x1: 1, line: { color: window.danon.theme("--soft"), width: 1, dash: "dot" } };
    drawFront("tradeoff", found, {
      xaxis, yaxis: yAxis(found.flatMap((s) => s.around.y)), step: "vh", extra: { shapes: [line] }, missing: "Every attention is hidden.",
    });
  }

  for (const radio of radios) radio.addEventListener("change", drawTradeoff);
  drawings.push(drawTradeoff);
})();
