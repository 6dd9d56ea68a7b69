"use strict";
// Explanations of column headings: when the pointer is on one, after a tap, or with the keyboard focus on it.
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "tooltip");
  tip.hidden = true;
  document.body.append(tip);
  let owner = null, timer = 0;

  function place() {
    const { left, top, bottom } = owner.getBoundingClientRect();
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(left, room))}px`;
    const above = top - tip.offsetHeight - 6;
    tip.style.top = `${above >= 8 ? above : bottom + 6}px`;
  }

  function show(button) {
    clearTimeout(timer);
    owner = button;
    const entry = document.getElementById(button.dataset.column);
    const title = document.createElement("b");
    title.textContent = entry.querySelector("dt").firstChild.textContent;
    const text = document.createElement("p");
    text.textContent = entry.querySelector("dd").textContent;
    tip.replaceChildren(title, text);
    tip.hidden = false;
    place();
  }

  function hide() {
    clearTimeout(timer);
    owner = null;
    tip.hidden = true;
  }

  const hideSoon = () => { timer = setTimeout(hide, 250); }; // time to move the pointer into the text

  for (const head of document.querySelectorAll("thead")) {
    const buttons = [...head.querySelectorAll(".explained")];
    buttons.forEach((button, i) => {
      button.tabIndex = i ? -1 : 0; // one stop of the tab key a table; the arrow keys move within
      button.addEventListener("pointerenter", () => show(button));
      button.addEventListener("pointerleave", hideSoon);
      button.addEventListener("focus", () => show(button));
      button.addEventListener("blur", hideSoon);
      button.addEventListener("click", () => show(button));
      button.addEventListener("keydown", (event) => {
        const to = { ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: buttons.length - 1 }[event.key];
        if (!buttons[to]) return;
        event.preventDefault();
        buttons.forEach((other, j) => { other.tabIndex = j === to ? 0 : -1; });
        buttons[to].focus();
      });
    });
  }
  tip.addEventListener("pointerenter", () => clearTimeout(timer));
  tip.addEventListener("pointerleave", hideSoon);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  document.addEventListener("pointerdown", (event) => {
    if (owner && !owner.contains(event.target) && !tip.contains(event.target)) hide();
  });
  window.addEventListener("scroll", () => { if (owner) place(); }, true);
})();
