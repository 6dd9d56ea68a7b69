"use strict";
(() => {
  const { data, shown, drawings, theme, tokens, plain, digits, draw, drawCurves } = window.danon;
  const { lengths, quantities, values, mass } = data.bounds;
  const element = (id) => document.getElementById(id);
  const HIDDEN = "No figures for what is selected.";

  function drawQuantity(id, quantity) {
    const points = (a) => Object.entries(values[a.name]?.[quantity.metric] ?? {})
      .map(([n, value]) => ({ n: Number(n), value, low: null, high: null }));
    drawCurves(id, quantity.symbol, lengths, points, digits);
  }

  // Branches in the order of the bars: what shows tokens as themselves, then summaries. Colours are in report.css.
  const BRANCHES = ["near", "sinks", "memory", "selected", "nodes", "level 1", "level 2", "level 3", "state"];
  const place = (branch) => (BRANCHES.includes(branch) ? BRANCHES.indexOf(branch) : BRANCHES.length);
  const tint = (branch) => theme(`--branch-${BRANCHES.includes(branch) ? branch.replace(" ", "-") : "other"}`);
  const kind = (branch) => branch.split(".").pop();

  function drawMass() {
    const n = element("bounds-length").value;
    const rows = data.attentions.filter((a) => shown.has(a.name) && Object.keys(mass[a.name]?.[n] ?? {}).length).reverse();
    const branches = [...new Set(rows.flatMap((a) => Object.keys(mass[a.name][n]).map(kind)))].sort((x, y) => place(x) - place(y) || x.localeCompare(y));
    const share = (a, branch) => Object.entries(mass[a.name][n]).filter(([name]) => kind(name) === branch)
      .reduce((sum, [, value]) => sum + value, 0);
    const bars = branches.map((branch) => ({
      type: "bar", orientation: "h", name: plain(branch), y: rows.map((a) => plain(a.name)), x: rows.map((a) => 100 * share(a, branch)),
      marker: { color: tint(branch), line: { color: theme("--card"), width: 1.5 } },
      text: rows.map((a) => (share(a, branch) >= 0.06 ? plain(branch) : "")), textposition: "inside", insidetextanchor: "middle", insidetextfont: { color: theme("--on-branch") },
      hovertext: rows.map((a) => `<b>${plain(a.name)}</b><br>${plain(branch)} ${digits(100 * share(a, branch))} %`), hovertemplate: "%{hovertext}<extra></extra>",
    }));
    const covered = rows.map((a) => values[a.name].dense_mass_covered?.[n] ?? null);
    const marks = {
      type: "scatter", mode: "markers", name: "of dense attention's, seen as itself", y: rows.map((a) => plain(a.name)), x: covered.map((x) => (x === null ? null : 100 * x)),
      marker: { symbol: "line-ns-open", size: 44, color: theme("--ink"), line: { color: theme("--ink"), width: 3 } },
      hovertext: rows.map((a, i) => `<b>${plain(a.name)}</b><br>sees ${digits(100 * (covered[i] ?? 0))} % of dense attention's mass`), hovertemplate: "%{hovertext}<extra></extra>",
    };
    const plot = (title, more) => ({ title: { text: title, standoff: 8 }, gridcolor: theme("--grid"), linecolor: theme("--line"), zeroline: false, automargin: true, ...more });
    const layout = {
      barmode: "stack", bargap: 0.35, showlegend: true, legend: { orientation: "h", y: 1.08, traceorder: "normal" }, xaxis: plot("share of softmax mass", { range: [0, 100.5], ticksuffix: " %" }),
      yaxis: plot("", { ticktext: rows.map((a) => `<b>${plain(a.name)}</b>`), tickvals: rows.map((a) => plain(a.name)) }),
    };
    draw("bounds-mass", rows.length ? [...bars, marks] : [], layout, HIDDEN, () => {});
  }

  const drawOther = () => drawQuantity("bounds-other", quantities[element("bounds-quantity").value]);
  const drawAll = () => {
    drawQuantity("bounds-eps", quantities.find((q) => q.metric === "eps"));
    drawOther();
    drawMass();
  };
  element("bounds-quantity").replaceChildren(...quantities.map((q, i) => new Option(q.symbol, i, false, q.metric === "gamma")));
  element("bounds-quantity").addEventListener("change", drawOther);
  element("bounds-length").replaceChildren(...[...lengths].reverse().map((n) => new Option(tokens(n), n)));
  element("bounds-length").addEventListener("change", drawMass);
  drawings.push(drawAll);
})();
