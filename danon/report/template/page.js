"use strict";
// What the page does besides charts: the switch between passes, printing, and boxes that scroll.
window.danon = (() => {
  const root = document.documentElement;
  root.classList.add("scripted");
  const data = JSON.parse(document.getElementById("payload").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const page = { data, shown: new Set(data.attentions.map((a) => a.name)), view: 0, drawings: [], legends: [], printing: false };

  page.colour = (a) => (dark.matches && !page.printing ? a.dark : a.light);
  page.theme = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  page.redraw = () => {
    page.legends.forEach((draw) => draw());
    if (window.Plotly) page.drawings.forEach((draw) => draw());
  };

  function show(index) {
    page.view = index;
    for (const board of document.querySelectorAll("[data-view]")) board.hidden = Number(board.dataset.view) !== index;
    scrollable();
  }

  for (const radio of document.querySelectorAll("input[name=view]")) {
    radio.addEventListener("change", () => {
      show(Number(radio.value));
      page.redraw();
    });
  }

  // Only a box that scrolls is a stop of the tab key.
  function scrollable() {
    for (const box of document.querySelectorAll(".scroll")) {
      if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  }

  let opened = [];
  window.addEventListener("beforeprint", () => {
    page.printing = true;
    root.classList.add("printing");
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
    page.redraw();
  });
  window.addEventListener("afterprint", () => {
    page.printing = false;
    root.classList.remove("printing");
    for (const details of opened) details.open = false;
    page.redraw();
  });

  let width = window.innerWidth, timer = 0;
  window.addEventListener("resize", () => {
    if (page.printing || window.innerWidth === width) return; // a phone's bars change the height alone
    width = window.innerWidth;
    clearTimeout(timer);
    timer = setTimeout(() => {
      scrollable();
      page.redraw();
    }, 150);
  });
  dark.addEventListener("change", page.redraw);
  document.addEventListener("toggle", scrollable, true);
  // A browser restores what was chosen before a reload.
  show(Number(document.querySelector("input[name=view]:checked")?.value ?? 0));
  return page;
})();
