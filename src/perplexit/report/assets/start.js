"use strict";
// Theme, charts, and the start. The last script of every page.

function startTheme() {
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); });
  system.addEventListener("change", name);
  button.hidden = false;
  name();
}

// What a mark of a chart stands for, on hover: the label that screen readers get.
function startCharts() {
  document.querySelectorAll("svg.chart [aria-roledescription][aria-label]").forEach((mark) => {
    if (mark.getAttribute("aria-roledescription") === "axis") return;
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = mark.getAttribute("aria-label");
    mark.prepend(title);
  });
}

startTheme();
startCharts();
if (typeof columns !== "undefined" && columns.count > 0) {
  startList();
  startText();
}
document.documentElement.dataset.ready = "true";
