// Controls of the text.

const colour = document.getElementById("colour");
const filter = document.getElementById("filter");
const pageSelect = document.getElementById("page");
const FILTERS = [25, 100, 500, 2000];

function redraw() {
  drawPage();
  drawStatus();
}

function drawStatus() {
  const [start, stop] = view.pages[view.page] || [0, 0];
  pageSelect.value = view.page;
  document.getElementById("previous").disabled = pageBeside(-1) < 0;
  document.getElementById("next").disabled = pageBeside(1) < 0;
  let says = `${(stop - start).toLocaleString("en")} of ${columns.count.toLocaleString("en")} tokens`;
  if (view.hits) {
    let here = 0;
    for (const i of view.hits) if (i >= start && i < stop) here++;
    says = `${here} of the ${view.hits.size.toLocaleString("en")} are on this page`;
  }
  document.getElementById("text-status").textContent = says;
}

// The next page in a direction that has something to show.
function pageBeside(step) {
  for (let page = view.page + step; page >= 0 && page < view.pages.length; page += step) {
    const [start, stop] = view.pages[page];
    if (!view.hits || nextHit(start - 1, 1, stop) >= 0) return page;
  }
  return -1;
}

function turnTo(page) {
  if (page < 0) return;
  view.page = page;
  view.current = -1;
  release();
  redraw();
}

function filterName(count) {
  const what = view.mode.diverging ? "most changed" : "highest";
  return `the ${count.toLocaleString("en")} ${what}`;
}

function nameFilters() {
  const chosen = filter.value || "all";
  filter.replaceChildren(element("option", { value: "all" }, "all tokens"));
  for (const count of FILTERS) {
    if (count < columns.count) filter.append(element("option", { value: count }, filterName(count)));
  }
  filter.value = chosen;
}

function setFilter(value) {
  filter.value = value;
  view.hits = null;
  if (value !== "all") {
    const order = ordered(`filter-${view.mode.key}`, view.mode.values(), Math.abs);
    view.hits = new Set(order.slice(0, Number(value)));
    const [start, stop] = view.pages[view.page];
    if (nextHit(start - 1, 1, stop) < 0) {
      const page = pageBeside(1);
      view.page = page >= 0 ? page : Math.max(pageBeside(-1), 0);
      view.current = -1;
    }
  }
  release();
  redraw();
}

function startText() {
  view.modes.forEach((mode, n) => colour.append(element("option", { value: n }, mode.label)));
  view.pages.forEach((_, n) =>
    pageSelect.append(element("option", { value: n }, `${n + 1} of ${view.pages.length}`)));
  nameFilters();
  colour.addEventListener("change", () => {
    view.mode = view.modes[Number(colour.value)];
    nameFilters();
    drawLegend();
    setFilter(filter.value);
  });
  filter.addEventListener("change", () => setFilter(filter.value));
  pageSelect.addEventListener("change", () => turnTo(Number(pageSelect.value)));
  document.getElementById("previous").addEventListener("click", () => turnTo(pageBeside(-1)));
  document.getElementById("next").addEventListener("click", () => turnTo(pageBeside(1)));
  document.getElementById("text-controls").addEventListener("submit", (event) => event.preventDefault());
  const indexOf = (event) => {
    const token = event.target.closest("[data-i]");
    return token ? Number(token.dataset.i) : -1;
  };
  paper.addEventListener("mouseover", (event) => {
    const i = indexOf(event);
    if (i >= 0 && !view.pinned) showDetails(i);
  });
  paper.addEventListener("focusin", (event) => {
    const i = indexOf(event);
    if (i < 0) return;
    setCurrent(i);
    if (!view.pinned) showDetails(i);
    document.getElementById("spoken").textContent = spoken(i);
  });
  paper.addEventListener("click", (event) => {
    const i = indexOf(event);
    if (i < 0) return;
    const same = view.pinned && Number(details.dataset.token) === i;
    setCurrent(i);
    if (same) release(); else pin(i);
  });
  paper.addEventListener("keydown", onKey);
  ["text-controls", "legend", "reading"].forEach((id) => { document.getElementById(id).hidden = false; });
  drawLegend();
  redraw();
  hintDetails();
}
