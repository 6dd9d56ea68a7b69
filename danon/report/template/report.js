"use strict";
(() => {
  const data = JSON.parse(document.getElementById("payload").textContent);
  const MARKS = ["circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "pentagon", "x"];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const shown = new Set(data.attentions.map((a) => a.name));
  const others = []; // draw what stands in other files
  let view = 0;

  const colour = (a) => (dark.matches ? a.dark : a.light);
  const theme = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // Plotly reads a few tags in labels; names come from outside.
  const plain = (text) => text.replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
  const tokens = (n) => (n % 1048576 === 0 ? `${n / 1048576}M` : n % 1024 === 0 ? `${n / 1024}k` : `${n}`);
  const curves = (metric) => data.views[view].curves[metric] ?? {};

  const digits = (x) => (x === 0 ? "0" : Number(x.toPrecision(3)).toString());
  const seconds = (x) => {
    const [size, unit] = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]].find(([least]) => x >= least * 0.9995) ?? [1e-9, "ns"];
    return `${digits(x / size)} ${unit}`;
  };

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

  function line(a, points, chart, dash, symbol, bars, skipped = 0) {
    const y = points.map((p) => Math.max(p.value * chart.scale, chart.floor ?? 0));
    const strong = a.role !== "baseline";
    const trace = {
      type: "scatter", mode: "lines+markers", name: plain(a.name), x: points.map((p) => p.n), y,
      line: { color: colour(a), width: a.width, dash },
      marker: { color: colour(a), symbol, opacity: 1, size: points.map((_, i) => (i < skipped ? 0 : strong ? 8 : 6)), line: { width: 1.5, color: colour(a) } },
      opacity: strong ? 1 : 0.85,
      text: points.map((p) => (chart.hover ?? hover)(a, p, chart)), hovertemplate: "%{text}<extra></extra>",
    };
    if (bars && points.some((p) => p.low !== null)) {
      trace.error_y = {
        type: "data", symmetric: false, thickness: 1, width: 3, color: colour(a),
        array: points.map((p, i) => (p.high === null ? 0 : p.high * chart.scale - y[i])),
        arrayminus: points.map((p, i) => (p.low === null ? 0 : y[i] - p.low * chart.scale)),
      };
    }
    return trace;
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

  const tokenAxis = () => axis("tokens N", data.views[view].lengths, tokens, data.views[view].lengths);

  const base = () => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: theme("--soft") },
    margin: { l: 8, r: 16, t: 26, b: 8 }, hovermode: "closest",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: theme("--soft"), activecolor: theme("--ink") },
    hoverlabel: { bgcolor: theme("--card"), bordercolor: theme("--line"), font: { color: theme("--ink") }, align: "left" },
  });

  const turns = {};

  // Draw a chart, then its names: not those of a drawing that another has replaced meanwhile.
  function draw(id, traces, layout, missing, name) {
    const place = document.getElementById(id);
    const turn = turns[id] = (turns[id] ?? 0) + 1;
    if (!traces.length) {
      Plotly.purge(place);
      const note = document.createElement("p");
      note.className = "empty";
      note.textContent = missing;
      place.replaceChildren(note);
      return;
    }
    place.querySelector(".empty")?.remove();
    const buttons = [["toImage"], ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]];
    const settings = { displaylogo: false, responsive: true, displayModeBar: "hover", modeBarButtons: buttons };
    Plotly.react(place, traces, { ...base(), ...layout }, settings).then(() => {
      if (turn === turns[id]) name();
    });
  }

  function level(y, text) {
    return {
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: theme("--soft"), width: 1, dash: "dot" } }],
      annotations: text ? [{ xref: "paper", x: 0, y: Math.log10(y), text, showarrow: false, xanchor: "left", yanchor: "bottom", font: { size: 11 } }] : [],
    };
  }

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

  // Curves of one quantity against length, with the names at their ends; zero has no place on a logarithmic axis.
  function drawCurves(id, title, lengths, pointsOf, write) {
    const hover = (a, p) => `<b>${plain(a.name)}</b> at ${tokens(p.n)}<br>${plain(title)} ${write(p.value)}`;
    const chart = { scale: 1, write, hover };
    const points = (a) => pointsOf(a).filter((p) => p.value > 0);
    const drawn = data.attentions.filter((a) => shown.has(a.name) && points(a).length);
    const traces = drawn.map((a) => line(a, points(a), chart, "solid", MARKS[a.mark], true));
    traces.sort((s, t) => s.line.width - t.line.width);
    const ends = Object.fromEntries(drawn.map((a) => {
      const last = points(a).pop();
      return [a.name, { x: last.n, y: last.value }];
    }));
    const layout = {
      xaxis: axis("tokens N", lengths, tokens, lengths), yaxis: axis(title, traces.flatMap((t) => t.y), digits),
      margin: { ...base().margin, r: 100 },
    };
    draw(id, traces, layout, "No figures for what is selected.", () => nameEnds(id, ends));
  }

  // A value as its axis places it.
  const on = (axis, value) => (axis.type === "log" ? Math.log10(value) : value);

  // The names of ours and of dense where their curves end, moved apart where they would collide.
  function nameEnds(id, places) {
    const { xaxis, yaxis } = document.getElementById(id)._fullLayout;
    const ends = data.attentions
      .filter((a) => a.role !== "baseline" && shown.has(a.name) && places[a.name])
      .map((a) => ({ a, x: on(xaxis, places[a.name].x), y: on(yaxis, places[a.name].y) }))
      .map((end) => ({ ...end, px: xaxis.l2p(end.x), at: yaxis.l2p(end.y), moved: yaxis.l2p(end.y) }))
      .sort((s, t) => s.at - t.at);
    const gap = 16;
    const near = (s, t) => Math.abs(s.px - t.px) < 90;
    ends.forEach((end, i) => {
      for (const above of ends.slice(0, i)) if (near(above, end)) end.moved = Math.max(end.moved, above.moved + gap);
    });
    let floor = yaxis._length; // none below the chart
    for (const end of [...ends].reverse()) {
      for (const below of ends.slice(ends.indexOf(end) + 1)) if (near(below, end)) floor = Math.min(floor, below.moved - gap);
      end.moved = Math.min(end.moved, floor);
    }
    Plotly.relayout(id, {
      annotations: ends.map(({ a, x, y, at, moved }) => ({
        x, y, xref: "x", yref: "y", xanchor: "left", yanchor: "middle", xshift: 9, yshift: at - moved, showarrow: false,
        text: `<b>${plain(a.name.length > 14 ? `${a.name.slice(0, 13)}…` : a.name)}</b>`, font: { color: colour(a), size: 12 }, bgcolor: `${theme("--card")}c0`, borderpad: 1,
      })),
    });
  }

  const LEAST_ERROR = 1e-8; // zero has no place on a logarithmic axis

  function drawCost() {
    const select = document.getElementById("length");
    const lengths = data.views[view].lengths.filter((n) =>
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

  // Names beside the points, where there is room; ours choose first. The rest keep their hover text.
  // A point may tell where its bars end, around.x and around.y, and that its name better stands left.
  function label(id, points, fixed = []) {
    const { xaxis, yaxis } = document.getElementById(id)._fullLayout;
    const spots = points.map((p) => ({ ...p, px: xaxis.l2p(on(xaxis, p.x)), py: yaxis.l2p(on(yaxis, p.y)) }));
    const ends = (axis, at, values) => [...(values ?? []).map((v) => axis.l2p(on(axis, v))), at - 8, at + 8];
    for (const s of spots) [s.ex, s.ey] = [ends(xaxis, s.px, s.around?.x), ends(yaxis, s.py, s.around?.y)];
    const taken = spots.flatMap((s) => [
      { l: Math.min(...s.ex), r: Math.max(...s.ex), t: s.py - 8, b: s.py + 8 },
      { l: s.px - 8, r: s.px + 8, t: Math.min(...s.ey), b: Math.max(...s.ey) },
    ]);
    const clear = (box) => box.l >= 0 && box.r <= xaxis._length && box.t >= 0 && box.b <= yaxis._length
      && taken.every((o) => box.r < o.l || box.l > o.r || box.b < o.t || box.t > o.b);
    const labels = [];
    for (const s of [...spots].sort((x, y) => (x.a.role === "baseline") - (y.a.role === "baseline"))) {
      const w = 7.2 * s.a.name.length + 4, h = 16;
      const [l, r] = [Math.min(...s.ex) - s.px - 4, Math.max(...s.ex) - s.px + 4];
      const [t, b] = [Math.min(...s.ey) - s.py - 1, Math.max(...s.ey) - s.py + 1];
      const sides = [[r, -h / 2], [l - w, -h / 2]];
      const options = [...(s.left ? sides.reverse() : sides), [-w / 2, t - h], [-w / 2, b], [10, -h - 9], [10, 9], [-w - 10, -h - 9], [-w - 10, 9]];
      for (const [dx, dy] of options) {
        const box = { l: s.px + dx, r: s.px + dx + w, t: s.py + dy, b: s.py + dy + h };
        if (!clear(box)) continue;
        taken.push(box);
        labels.push({
          x: on(xaxis, s.x), y: on(yaxis, s.y), xref: "x", yref: "y", showarrow: false,
          xanchor: "left", yanchor: "top", xshift: dx, yshift: -dy, borderpad: 0,
          text: s.a.role === "baseline" ? plain(s.a.name) : `<b>${plain(s.a.name)}</b>`,
          font: { color: s.a.role === "baseline" ? theme("--soft") : colour(s.a), size: 12 }, bgcolor: `${theme("--card")}c0`,
        });
        break;
      }
    }
    Plotly.relayout(id, { annotations: [...fixed, ...labels] });
  }

  function drawAll() {
    if (data.views.length) {
      Object.keys(CHARTS).forEach(drawLines);
      drawCost();
    }
    others.forEach((draw) => draw());
  }

  function legend() {
    const place = document.querySelector(".legend");
    const buttons = data.attentions.map((a) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = a.role;
      button.setAttribute("aria-pressed", String(shown.has(a.name)));
      const sample = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      sample.setAttribute("width", 18);
      sample.setAttribute("height", 8);
      sample.setAttribute("aria-hidden", "true");
      const stroke = document.createElementNS("http://www.w3.org/2000/svg", "line");
      Object.entries({ x1: 0, x2: 18, y1: 4, y2: 4, stroke: colour(a), "stroke-width": a.width + 1 })
        .forEach(([key, value]) => stroke.setAttribute(key, value));
      sample.append(stroke);
      button.append(sample, a.name);
      button.addEventListener("click", () => {
        if (!shown.delete(a.name)) shown.add(a.name);
        legend();
        drawAll();
      });
      return button;
    });
    const only = (text, keep) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "all";
      button.textContent = text;
      button.addEventListener("click", () => {
        shown.clear();
        data.attentions.filter(keep).forEach((a) => shown.add(a.name));
        legend();
        drawAll();
      });
      return button;
    };
    place.replaceChildren(...buttons, only("all", () => true), only("no baselines", (a) => a.role !== "baseline"));
    for (const marked of document.querySelectorAll("[data-attention]")) {
      const a = data.attentions.find((b) => b.name === marked.dataset.attention);
      if (a) marked.style.setProperty("--tint", colour(a));
    }
  }

  function show(index) {
    view = index;
    for (const section of document.querySelectorAll("[data-view]")) section.hidden = Number(section.dataset.view) !== view;
    for (const button of document.querySelectorAll("[data-show]")) {
      button.setAttribute("aria-checked", String(Number(button.dataset.show) === view));
    }
    drawAll();
  }

  for (const button of document.querySelectorAll("[data-show]")) {
    button.addEventListener("click", () => show(Number(button.dataset.show)));
  }
  document.getElementById("length")?.addEventListener("change", drawCost);
  dark.addEventListener("change", () => {
    legend();
    drawAll();
  });
  legend();
  show(0);
  window.danon = { data, shown, others, MARKS, colour, theme, plain, tokens, digits, seconds, line, axis, base, draw, drawCurves, nameEnds, label };
})();
