"use strict";
(() => {
  const { data, shown, others, MARKS, plain, tokens, digits, line, axis, base, draw, nameEnds } = window.danon;

  function drawMetric(id, metric, lengths) {
    const write = (x) => `${digits(x)}${metric.unit ? ` ${metric.unit}` : ""}`;
    const hover = (a, p) => `<b>${plain(a.name)}</b> at ${tokens(p.n)}<br>${plain(metric.heading)} ${write(p.value)}`;
    const chart = { scale: 1, write, hover };
    // zero has no place on a logarithmic axis
    const points = (a) => (metric.lines[a.name] ?? []).filter((p) => p.value > 0);
    const drawn = data.attentions.filter((a) => shown.has(a.name) && points(a).length);
    const traces = drawn.map((a) => line(a, points(a), chart, "solid", MARKS[a.mark], true));
    traces.sort((s, t) => s.line.width - t.line.width);
    const ends = Object.fromEntries(drawn.map((a) => {
      const last = points(a).pop();
      return [a.name, { x: last.n, y: last.value }];
    }));
    const layout = {
      xaxis: axis("tokens N", lengths, tokens, lengths), yaxis: axis(metric.heading, traces.flatMap((t) => t.y), digits),
      margin: { ...base().margin, r: 100 },
    };
    draw(id, traces, layout, "No figures for what is selected.", () => nameEnds(id, ends));
  }

  const drawAll = () => data.suites.forEach((table, i) => {
    if (table.lengths.length < 2) return;
    table.metrics.forEach((metric) => drawMetric(`suite-${i}-${metric.name}`, metric, table.lengths));
  });
  others.push(drawAll);
  drawAll();
})();
