"use strict";
// Drawing of a chart, and the curve of one attention.
(() => {
  const { data, shown, colour, theme, plain, tokens, digits, axis, spread, wrapped } = window.danon;
  const MARKS = ["circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "pentagon", "x"];
  const named = (id, ends) => window.danon.nameEnds(id, ends);

  function line(a, points, chart, dash, symbol, bars, skipped = 0) {
    const y = points.map((p) => Math.max(p.value * chart.scale, chart.floor ?? 0));
    const strong = a.role !== "baseline";
    const trace = {
      type: "scatter", mode: "lines+markers", name: plain(a.name), x: points.map((p) => p.n), y,
      line: { color: colour(a), width: a.width, dash: dash === "solid" ? a.dash : dash },
      marker: { color: colour(a), symbol, opacity: 1, size: points.map((_, i) => (i < skipped ? 0 : strong ? 8 : 6)), line: { width: 1.5, color: colour(a) } },
      opacity: strong ? 1 : 0.85,
      text: points.map((p) => (chart.hover)(a, p, chart)), hovertemplate: "%{text}<extra></extra>",
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

  const base = () => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: theme("--soft") },
    margin: { l: 8, r: 16, t: 26, b: 8 }, hovermode: "closest",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: theme("--soft"), activecolor: theme("--ink") },
    hoverlabel: { bgcolor: theme("--card"), bordercolor: theme("--line"), font: { color: theme("--ink") }, align: "left" },
  });

  const turns = {};

  function note(place, text) {
    const paragraph = document.createElement("p");
    paragraph.className = "empty";
    paragraph.textContent = text;
    place.replaceChildren(paragraph);
  }

  // The buttons that appear over a chart have names, and the tab key passes them over.
  function quiet(place) {
    for (const button of place.querySelectorAll(".modebar-btn, .modebar button, .modebar a")) {
      button.tabIndex = -1;
      button.setAttribute("aria-label", button.dataset.title ?? button.dataset.attr ?? "chart");
    }
  }

  // Draw a chart, then its names: not those of a drawing that another has replaced meanwhile.
  function draw(id, traces, layout, missing, name) {
    const place = document.getElementById(id);
    if (!window.Plotly) return;
    const turn = turns[id] = (turns[id] ?? 0) + 1;
    if (!traces.length) {
      Plotly.purge(place);
      note(place, missing);
      return;
    }
    place.querySelector(":scope > .empty")?.remove();
    const size = { width: place.clientWidth, height: place.clientHeight };
    const room = { x: size.width - 62 - (layout.margin?.r ?? 16), y: size.height - 84 };
    const fitted = {
      xaxis: wrapped(spread(layout.xaxis, room.x, true), room.x), yaxis: wrapped(spread(layout.yaxis, room.y, false), room.y),
    };
    const buttons = [["toImage"], ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]];
    const settings = { displaylogo: false, displayModeBar: window.danon.printing ? false : "hover", modeBarButtons: buttons };
    Plotly.react(place, traces, { ...base(), ...size, ...layout, ...fitted }, settings).then(() => {
      if (turn === turns[id]) name();
      quiet(place);
    });
  }

  function level(y, text) {
    return {
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: theme("--soft"), width: 1, dash: "dot" } }],
      annotations: text ? [{ xref: "paper", x: 0, y: Math.log10(y), text, showarrow: false, xanchor: "left", yanchor: "bottom", font: { size: 11 } }] : [],
    };
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
      xaxis: { ...axis("tokens N", lengths, tokens, lengths), tokens: true }, yaxis: axis(title, traces.flatMap((t) => t.y), digits),
      margin: { ...base().margin, r: 100 },
    };
    draw(id, traces, layout, "No figures for what is selected.", () => named(id, ends));
  }

  Object.assign(window.danon, { MARKS, line, base, note, draw, level, drawCurves });
})();
