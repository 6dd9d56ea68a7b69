"use strict";
// The attentions in their colours; a click hides one in all charts.
(() => {
  const { data, shown, colour, legends, redraw } = window.danon;

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
      Object.entries({ x1: 0, x2: 18, y1: 4, y2: 4, stroke: colour(a), "stroke-width": a.width + 1, "stroke-dasharray": a.dash === "solid" ? "none" : "5 3" })
        .forEach(([key, value]) => stroke.setAttribute(key, value));
      sample.append(stroke);
      button.append(sample, a.name);
      button.addEventListener("click", () => {
        if (!shown.delete(a.name)) shown.add(a.name);
        redraw();
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
        redraw();
      });
      return button;
    };
    place.replaceChildren(...buttons, only("all", () => true), only("no baselines", (a) => a.role !== "baseline"));
    for (const marked of document.querySelectorAll("[data-attention]")) {
      const a = data.attentions.find((b) => b.name === marked.dataset.attention);
      if (a) marked.style.setProperty("--tint", colour(a));
    }
  }

  legends.push(legend);
  legend();
})();
