"use strict";
(() => {
  const { data, shown, drawings, MARKS, tokens, plain, digits, seconds, line, axis, linear, base, draw, nameEnds, drawFront } = window.danon;
  const element = (id) => document.getElementById(id);
  const percent = (x) => `${digits(x)} %`;
  const at = (task, n, name) => (task.lines[name] ?? []).find((p) => p.n === n);
  const dense = data.attentions.find((a) => a.role === "reference")?.name;
  const HIDDEN = "No figures for what is selected.";

  // Quality as a chart writes it, by metric.
  const CHARTS = {
    accuracy: { scale: 100, write: percent, axis: "right answers" },
    bits_per_byte: { scale: 1, write: (x) => x.toFixed(3), axis: "bits per byte", floor: -Infinity },
    perplexity: { scale: 1, write: (x) => (x < 100 ? x.toFixed(2) : digits(x)), axis: "perplexity" },
  };

  const range = (p, chart) => (p.low === null ? "" : ` [${chart.write(p.low * chart.scale)} to ${chart.write(p.high * chart.scale)}]`);

  const TENS = [0, 20, 40, 60, 80, 100];
  const share = (text) => linear(text, { range: [-4, 104], tickvals: TENS, ticktext: TENS.map(percent) });

  // A line for each attention; `points` by its name.
  function drawLines(id, points, chart, xaxis, yaxis) {
    const drawn = data.attentions.filter((a) => shown.has(a.name) && points[a.name]?.length);
    const traces = drawn.map((a) => line(a, points[a.name], chart, "solid", MARKS[a.mark], true));
    traces.sort((s, t) => s.line.width - t.line.width);
    const ends = Object.fromEntries(drawn.map((a) => {
      const last = points[a.name][points[a.name].length - 1];
      return [a.name, { x: last.n, y: last.value * chart.scale }];
    }));
    draw(id, traces, { xaxis, yaxis, margin: { ...base().margin, r: 100 } }, HIDDEN, () => nameEnds(id, ends));
  }

  function drawRecall() {
    const task = data.quality[element("recall-task").value];
    const hover = (a, p, chart) => `<b>${plain(a.name)}</b> at ${tokens(p.n)}, ${p.items} items<br>${chart.write(100 * p.value)}${range(p, chart)}<br>${plain(p.semantics)}`;
    const xaxis = axis("tokens N", task.lengths, tokens, task.lengths);
    drawLines("recall", task.lines, { ...CHARTS.accuracy, hover }, xaxis, share(CHARTS.accuracy.axis));
  }

  // Every task at every length, as "0 1024": index of the task, and tokens.
  const choices = (wanted) => data.quality.flatMap((task, i) => [...task.lengths].reverse()
    .filter((n) => wanted(task, n)).map((n) => new Option(`${task.name} at ${tokens(n)}`, `${i} ${n}`)));

  function chosen(id) {
    const [i, n] = element(id).value.split(" ").map(Number);
    return { task: data.quality[i], n };
  }

  // The points of a curve, by attention.
  function curve(task, n, name) {
    const found = Object.keys(task.lines).map((a) => [a, (at(task, n, a)?.curves[name] ?? []).map(([x, y]) => ({ n: x, value: y, low: null, high: null }))]);
    return Object.fromEntries(found);
  }

  function drawDepth() {
    const { task, n } = chosen("depth-task");
    const hover = (a, p, chart) => `<b>${plain(a.name)}</b><br>${chart.write(100 * p.value)} at a depth of ${percent(100 * p.n)}`;
    const xaxis = linear("depth: 0 % is the first token, 100 % the last before the questions",
      { range: [-0.04, 1.04], tickvals: TENS.map((x) => x / 100), ticktext: TENS.map(percent) });
    drawLines("by-depth", curve(task, n, "accuracy_by_depth"), { ...CHARTS.accuracy, hover }, xaxis, share(CHARTS.accuracy.axis));
  }

  const flat = (points, key) => Object.values(points).flat().map((p) => p[key]);

  const seen = (points) => Object.fromEntries(Object.entries(points).filter(([name]) => shown.has(name)));

  // A little more than the values: an axis that Plotly fits would move when names are added.
  function span(values) {
    const low = Math.min(...values), high = Math.max(...values);
    const room = 0.06 * (high - low) + 0.005;
    return [low - room, high + room];
  }

  // The axes leave out the steep beginning of the curves, beside which the rest would be one line.
  function drawLearning(id, points, text, write, spoken) {
    const late = Object.fromEntries(Object.entries(seen(points)).map(([name, line]) => [name, line.slice(line.length / 3)]));
    drawLines(id, points, spoken, axis(text, flat(late, "n"), write), linear(CHARTS.bits_per_byte.axis, { range: span(flat(late, "value")) }));
  }

  // Less what dense attention needs at the same place.
  function beyond(points) {
    const zero = new Map((points[dense] ?? []).map((p) => [p.n, p.value]));
    return Object.fromEntries(Object.entries(points).map(([name, line]) =>
      [name, line.filter((p) => zero.has(p.n)).map((p) => ({ ...p, value: p.value - zero.get(p.n) }))]));
  }

  const spoken = (unit, where) => ({
    ...CHARTS.bits_per_byte, hover: (a, p, chart) => `<b>${plain(a.name)}</b><br>${chart.write(p.value)} ${unit}<br>${where(p.n)}`,
  });

  function drawText() {
    const { task, n } = chosen("text");
    for (const place of document.querySelectorAll(".text")) place.textContent = `${task.name} at ${tokens(n)}`;
    const million = (x) => digits(x / 1e6);
    const bits = CHARTS.bits_per_byte.axis;
    drawLearning("by-tokens", curve(task, n, "bits_by_tokens"), "million training tokens", million,
      spoken(bits, (x) => `after ${million(x)} million tokens`));
    drawLearning("by-seconds", curve(task, n, "bits_by_seconds"), "seconds of training", digits,
      spoken(bits, (x) => `after ${seconds(x)}`));
    const all = curve(task, n, "bits_by_position");
    const more = element("against").value === "dense";
    const placed = more ? beyond(all) : all;
    const unit = more ? "bits per byte more than dense" : bits;
    const halves = Array.from({ length: 5 }, (_, i) => n / 2 ** i).filter(Number.isInteger).reverse();
    drawLines("by-position", placed, spoken(unit, (x) => `up to position ${x}`),
      axis("position in the context", flat(placed, "n"), tokens, halves), linear(unit, { range: span(flat(seen(placed), "value")) }));
  }

  // Better is up; perplexities may lie far apart.
  function yAxis(task, text, values) {
    if (task.higher) return share(text);
    if (task.metric !== "perplexity") return linear(text, { range: span(values).reverse() });
    const up = axis(text, values, digits);
    return { ...up, range: [...up.range].reverse() };
  }

  function drawShare() {
    const { task, n } = chosen("share-task");
    const points = curve(task, n, "perplexity_by_share"), among = seen(points), chart = CHARTS.perplexity;
    const hover = (a, p) => `<b>${plain(a.name)}</b><br>${chart.write(p.value)}<br>${percent(100 * p.n)} of the pairs`;
    drawLines("by-share", points, { ...chart, hover }, axis("share of dense attention's pairs", flat(among, "n"), (x) => percent(100 * x)),
      axis(chart.axis, flat(among, "value"), digits));
  }

  const LEAST_BYTES = 1024; // zero has no place on a logarithmic axis

  const COSTS = {
    share: { name: "share of pairs seen", title: "share of dense attention's pairs  (left is less)", of: (p) => p.share, scale: 100, write: percent, step: "hv" },
    speedup: { name: "speed-up", title: "times faster than dense  (right is faster)", of: (p) => p.speedup.value, scale: 1, write: (x) => `${digits(x)}×`, step: "vh" },
    peak: { name: "peak memory", title: "peak memory  (left is less)", of: (p) => (p.peak === null ? null : Math.max(p.peak, LEAST_BYTES)), scale: 1 / 2 ** 20, write: (x) => `${digits(x)} MiB`, step: "hv" },
  };

  // Whether a cost is known of more than dense attention.
  const priced = (cost) => data.quality.some((task) => Object.entries(task.lines)
    .some(([name, line]) => name !== dense && line.some((p) => cost.of(p) !== null)));

  function drawPareto() {
    const { task, n } = chosen("pareto-task");
    const key = element("pareto-cost").value, cost = COSTS[key], chart = CHARTS[task.metric];
    const front = new Set(task.fronts[n][key]);
    const points = data.attentions.filter((a) => shown.has(a.name))
      .map((a) => ({ a, p: at(task, n, a.name) }))
      .filter(({ p }) => p && cost.of(p) !== null)
      .map(({ a, p }) => {
        const x = cost.of(p) * cost.scale, y = p.value * chart.scale;
        const fast = key === "speedup" && p.speedup.low !== null;
        const around = {
          x: fast ? [p.speedup.low, p.speedup.high] : [x, x],
          y: p.low === null ? [y, y] : [p.low * chart.scale, p.high * chart.scale],
        };
        const best = front.has(a.name);
        const text = `<b>${plain(a.name)}</b>${best ? ", on the front" : ""}<br>${chart.write(y)}${range(p, chart)}<br>${cost.write(x)}<br>${plain(p.semantics)}`;
        return { a, x, y, around, best, text, left: best && cost.step === "hv" };
      })
      .sort((s, t) => s.x - t.x);
    const up = `${chart.axis}  (up is better)`;
    drawFront("pareto", points, {
      xaxis: axis(cost.title, points.flatMap((s) => s.around.x), cost.write), yaxis: yAxis(task, up, points.flatMap((s) => s.around.y)),
      step: cost.step, missing: HIDDEN,
    });
  }

  const recalls = data.quality.flatMap((task, i) => (task.suite === "recall" ? [new Option(task.name, i)] : []));
  if (recalls.length) {
    drawings.push(drawRecall);
    element("recall-task").replaceChildren(...recalls);
    element("recall-task").addEventListener("change", drawRecall);
  }
  const having = (name) => choices((task, n) => Object.keys(task.lines).some((a) => at(task, n, a)?.curves[name]));
  for (const [id, name, drawing] of [["depth-task", "accuracy_by_depth", drawDepth], ["share-task", "perplexity_by_share", drawShare]]) {
    const found = having(name);
    if (!found.length) continue;
    drawings.push(drawing);
    element(id).replaceChildren(...found);
    element(id).addEventListener("change", drawing);
  }
  const texts = choices((task) => task.suite === "language");
  if (texts.length) {
    drawings.push(drawText);
    element("text").replaceChildren(...texts);
    if (!data.quality.some((t) => t.suite === "language" && t.lines[dense])) element("against").value = "";
    for (const id of ["text", "against"]) element(id).addEventListener("change", drawText);
  }
  const costs = Object.entries(COSTS).filter(([, cost]) => priced(cost));
  if (costs.length) {
    drawings.push(drawPareto);
    element("pareto-task").replaceChildren(...choices(() => true));
    element("pareto-cost").replaceChildren(...costs.map(([key, { name }]) => new Option(name, key, false, key === "speedup")));
    for (const id of ["pareto-task", "pareto-cost"]) element(id).addEventListener("change", drawPareto);
  } else {
    element("pareto").closest("figure").remove();
  }
})();
