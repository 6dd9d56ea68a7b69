"use strict";
(() => {
  const { data, drawings, digits, drawCurves } = window.danon;

  const drawAll = () => data.suites.forEach((table, i) => {
    if (table.lengths.length < 2) return;
    for (const metric of table.metrics) {
      const write = (x) => `${digits(x)}${metric.unit ? ` ${metric.unit}` : ""}`;
      drawCurves(`suite-${i}-${metric.name}`, metric.heading, table.lengths, (a) => metric.lines[a.name] ?? [], write);
    }
  });
  drawings.push(drawAll);
})();
