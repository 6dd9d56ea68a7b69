"use strict";
(() => {
  const { data, drawings, MARKS, theme, plain, digits, draw } = window.danon;
  const planted = [...new Set(data.alarms.flat().flatMap(({ shares }) => shares.map((s) => 100 * s.slowdown)))];
  const TINTS = ["#c9792b", "#b3261e", "#8a4a14", "#4c9a5b", "#7a5cc0"];

  function drawPanel(rows, index) {
    const traces = rows.map(({ method, shares }, i) => {
      const color = i ? TINTS[(i - 1) % TINTS.length] : theme("--accent");
      const percent = shares.map((s) => (100 * s.alarms) / s.runs);
      const range = (s) => `${digits(100 * s.low)} to ${digits(100 * s.high)} %`;
      return {
        type: "scatter", mode: "lines+markers", name: i ? plain(method) : `<b>${plain(method)}</b>`,
        x: shares.map((s) => 100 * s.slowdown), y: percent,
        line: { color, width: i ? 1.5 : 3 }, marker: { color, symbol: MARKS[i % MARKS.length], size: i ? 6 : 9 },
        error_y: {
          type: "data", symmetric: false, thickness: 1, width: 3, color,
          array: shares.map((s, j) => 100 * s.high - percent[j]), arrayminus: shares.map((s, j) => percent[j] - 100 * s.low),
        },
        text: shares.map((s) => `<b>${plain(method)}</b> at +${digits(100 * s.slowdown)} %<br>${s.alarms} of ${s.runs} runs [${range(s)}]`),
        hovertemplate: "%{text}<extra></extra>", legendrank: i,
      };
    });
    const plot = (title) => ({
      title: { text: title, standoff: 8 }, gridcolor: theme("--grid"), linecolor: theme("--line"), zeroline: false, automargin: true,
    });
    const layout = {
      showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
      xaxis: { ...plot("slowdown injected into one attention, %"), tickmode: "array", tickvals: planted, ticktext: planted.map((x) => (x ? `+${digits(x)}` : "0")), range: [-1, Math.max(...planted) + 1] },
      yaxis: { ...plot("runs with an alarm, %"), range: [-4, 104] },
    };
    draw(`alarms-${index}`, traces.reverse(), layout, "", () => {}); // the gate's own line on top
  }

  const drawAll = () => data.alarms.forEach(drawPanel);
  drawings.push(drawAll);
})();
