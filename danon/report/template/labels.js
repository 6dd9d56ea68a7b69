"use strict";
// Names of attentions in the charts, and points with a Pareto front.
(() => {
  const { data, shown, MARKS, colour, theme, plain, on, draw } = window.danon;

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
    let floor = yaxis._length - 9; // none below the chart
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

  // Points of quality against cost; those on the front are ringed and joined.
  // A point has a, x, y, around (ends of its bars), best and text.
  function drawFront(id, points, { xaxis, yaxis, step, extra = {}, missing }) {
    const best = points.filter((s) => s.best);
    const bars = (low, high) => ({
      type: "data", symmetric: false, thickness: 1, width: 3, color: theme("--soft"),
      arrayminus: points.map(low), array: points.map(high),
    });
    const marks = {
      type: "scatter", mode: "markers", x: points.map((s) => s.x), y: points.map((s) => s.y),
      marker: {
        color: points.map((s) => colour(s.a)), symbol: points.map((s) => MARKS[s.a.mark]), opacity: points.map((s) => (s.best ? 1 : 0.75)),
        size: points.map((s) => (s.a.role === "baseline" ? 9 : 13) + (s.best ? 3 : 0)),
        line: { color: theme("--ink"), width: points.map((s) => (s.best ? 2 : 0)) },
      },
      error_x: bars((s) => s.x - s.around.x[0], (s) => s.around.x[1] - s.x),
      error_y: bars((s) => s.y - s.around.y[0], (s) => s.around.y[1] - s.y),
      text: points.map((s) => s.text), hovertemplate: "%{text}<extra></extra>",
    };
    const joined = { type: "scatter", mode: "lines", x: best.map((s) => s.x), y: best.map((s) => s.y), hoverinfo: "skip", line: { color: theme("--soft"), width: 1.5, shape: step } };
    draw(id, points.length ? [joined, marks] : [], { xaxis, yaxis, ...extra }, missing, () => label(id, points, extra.annotations ?? []));
  }

  Object.assign(window.danon, { nameEnds, label, drawFront });
})();
