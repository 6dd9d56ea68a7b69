"use strict";
// Unpack the chart library, then draw.
(async () => {
  const { redraw, note } = window.danon;
  try {
    if (!window.DecompressionStream) throw new Error("This browser cannot unpack the charts; Chrome 80, Firefox 113, Safari 16.4 and later can.");
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const script = document.createElement("script");
    script.textContent = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    document.head.append(script);
    redraw();
  } catch (error) {
    for (const place of document.querySelectorAll(".chart")) note(place, `${error.message} All figures are in the tables.`);
  }
})();
