"use strict";
// Time, memory and useful work against length, of the pass and number format that is selected.
(() => {
  const page = window.danon;
  const { data, shown, drawings, MARKS, colour, plain, tokens, digits, seconds, line, axis, base, level, draw, nameEnds, label } = page;
  const curves = (metric) => data.views[page.view].curves[metric] ?? {};

  const CHARTS = {
    speedup: { scale: 1, write: (x) => `${digits(x)}×`, title: "times faster than dense" },
    time_s: { scale: 1, write: seconds, title: "time per call" },
    peak_bytes: { scale: 1 / 2 ** 20, write: (x) => `${digits(x)} MiB`, title: "peak memory", floor: 1 / 1024 },
    useful_flops_per_s: { scale: 1e-9, write: (x) => `${digits(x)} GFLOP/s`, tick: digits, title: "useful GFLOP/s" },
  };

  function lines(id) {
    const chart = CHARTS[id];
    const traces = [];
    for (const a of data.attentions) {
      const points = curves(id)[a.name];
      if (!points || !shown.has(a.name)) continue;
      const sure = points.filter((p) => !p.extrapolated);
      const guessed = points.filter((p) => p.extrapolated);
      if (sure.length) traces.push(line(a, sure, chart, "solid", MARKS[a.mark], true));
      if (guessed.length) {
        traces.push(line(a, [...sure.slice(-1), ...guessed], chart, "dot", `${MARKS[a.mark]}-open`, false, sure.length ? 1 : 0));
      }
    }
    // ours on top of the baselines, whatever the order of the legend
    return traces.sort((x, y) => x.line.width - y.line.width);
  }

  function hover(a, p, chart) {
    const range = p.low === null ? "" : ` [${chart.write(p.low * chart.scale)} to ${chart.write(p.high * chart.scale)}]`;
    const notes = [p.extrapolated ? "dense extrapolated" : "", p.conclusive ? "" : "interval still wide"];
    if (chart === CHARTS.useful_flops_per_s) {
      const share = (curves("roofline_fraction")[a.name] ?? []).find((q) => q.n === p.n);
      notes.push(share ? `${Math.round(100 * share.value)} % of the matmul rate` : "");
    }
    const rest = notes.filter(Boolean).map((note) => `<br>${note}`).join("");
    return `<b>${plain(a.name)}</b> at ${tokens(p.n)}<br>${chart.write(p.value * chart.scale)}${range}${rest}`;
  }

  const tokenAxis = () => ({ ...axis("tokens N", data.views[page.view].lengths, tokens, data.views[page.view].lengths), tokens: true });

  function drawLines(id) {
    const chart = CHARTS[id];
    const traces = lines(id);
    const values = traces.flatMap((t) => t.y);
    let extra = {};
    if (id === "speedup") {
      values.push(1);
      extra = level(1, "");
    }
    const rates = Object.values(curves("matmul_flops_per_s")).flat().map((p) => p.value * 1e-9);
    if (id === "useful_flops_per_s") {
      const rate = rates.sort((x, y) => x - y)[rates.length >> 1];
      document.getElementById("rate").textContent = rate ? `; dotted: matrix products, ${digits(rate)} GFLOP/s` : "";
      if (rate) {
        values.push(rate);
        extra = level(rate, "");
      }
    }
    const layout = { xaxis: tokenAxis(), yaxis: axis(chart.title, values, chart.tick ?? chart.write), ...extra };
    layout.margin = { ...base().margin, r: 100 };
    const suite = id === "peak_bytes" ? "memory" : "speed";
    const ends = Object.fromEntries(Object.entries(curves(id)).map(([name, points]) => {
      const last = points[points.length - 1];
      return [name, { x: last.n, y: Math.max(last.value * chart.scale, chart.floor ?? 0) }];
    }));
    draw(id, traces, layout, `No figures of the ${suite} suite for what is selected above.`, () => nameEnds(id, ends));
  }

  const LEAST_ERROR = 1e-8; // zero has no place on a logarithmic axis

  function drawCost() {
    const select = document.getElementById("length");
    const lengths = data.views[page.view].lengths.filter((n) =>
      Object.values(curves("error_vs_dense")).some((line) => line.some((p) => p.n === n)));
    const wanted = lengths.includes(Number(select.value)) ? Number(select.value) : defaultLength(lengths);
    select.replaceChildren(...lengths.map((n) => new Option(tokens(n), n, false, n === wanted)));
    const at = (metric, name) => (curves(metric)[name] ?? []).find((p) => p.n === wanted);
    const points = data.attentions
      .filter((a) => shown.has(a.name) && a.role !== "reference")
      .map((a) => ({ a, error: at("error_vs_dense", a.name), speed: at("speedup", a.name) }))
      .filter((p) => p.error && p.speed)
      .map((p) => ({ ...p, x: Math.max(p.error.value, LEAST_ERROR), y: p.speed.value }));
    const traces = points.length ? [{
      type: "scatter", mode: "markers", x: points.map((p) => p.x), y: points.map((p) => p.y),
      marker: {
        color: points.map((p) => colour(p.a)), symbol: points.map((p) => MARKS[p.a.mark]),
        opacity: 1, size: points.map((p) => (p.a.role === "baseline" ? 9 : 14)),
      },
      text: points.map((p) => `<b>${plain(p.a.name)}</b><br>error ${digits(p.error.value)}<br>${p.speed.extrapolated ? "~" : ""}${digits(p.y)}×`),
      hovertemplate: "%{text}<extra></extra>",
    }] : [];
    const layout = {
      xaxis: axis("relative error against dense  (left is closer)", points.map((p) => p.x), (x) => (x <= LEAST_ERROR ? "0" : digits(x))),
      yaxis: axis("times faster than dense", [1, ...points.map((p) => p.y)], CHARTS.speedup.write),
      ...level(1, "dense"),
    };
    draw("cost", traces, layout, "No errors against dense for what is selected above.",
      () => label("cost", points, level(1, "dense").annotations));
  }

  // The headline: the longest length at which dense itself was measured.
  function defaultLength(lengths) {
    const dense = new Set(data.attentions.filter((a) => a.role === "reference")
      .flatMap((a) => (curves("speedup")[a.name] ?? []).map((p) => p.n)));
    return lengths.filter((n) => dense.has(n)).pop() ?? lengths[lengths.length - 1];
  }

  for (const chart of Object.values(CHARTS)) chart.hover = hover;
  document.getElementById("length").addEventListener("change", drawCost);
  drawings.push(() => Object.keys(CHARTS).forEach(drawLines), drawCost);
})();
