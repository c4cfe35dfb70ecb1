// The list of the tokens that changed most (with one run: that cost most), filtered and clickable.

const LIST_STEP = 25, LIST_LONGEST = 1000, CONTEXT_BEFORE = 72, CONTEXT_AFTER = 40;
const list = { run: Math.min(1, runs.length - 1), direction: "both", search: "", length: LIST_STEP };

function listOrder() {
  if (runs.length === 1) return ordered("nll", runs[0].nll, (v) => v);
  const change = changeOf(list.run);
  if (list.direction === "worse") return ordered(`worse-${list.run}`, change, (v) => v);
  if (list.direction === "better") return ordered(`better-${list.run}`, change, (v) => -v);
  return ordered(`both-${list.run}`, change, Math.abs);
}

function listed() {
  const values = runs.length === 1 ? runs[0].nll : changeOf(list.run);
  const wanted = list.search.toLowerCase();
  const found = [];
  for (const i of listOrder()) {
    if (found.length >= LIST_LONGEST) break;
    const value = values[i];
    if (value === 0 || (list.direction === "worse" && value < 0) || (list.direction === "better" && value > 0)) break;
    if (!wanted || textOf(i).toLowerCase().includes(wanted)) found.push(i);
  }
  return found;
}

function contextOf(i) {
  const same = (j) => j >= 0 && j < columns.count && columns.document[j] === columns.document[i];
  let first = i, last = i;
  const start = columns.start;
  while (start[i] - start[first] < CONTEXT_BEFORE && same(first - 1)) first--;
  while (start[last + 1] - start[i + 1] < CONTEXT_AFTER && same(last + 1)) last++;
  const join = (a, b) => { let text = ""; for (let j = a; j < b; j++) text += textOf(j); return text.replace(/\s+/g, " "); };
  const text = (value) => value.replace(INVISIBLE, "");
  const link = element("a", { href: `#token-${i}`, "data-token": i, title: "Show it in the text" },
    element("mark", {}, visibleToken(i)));
  return element("td", { class: "context" }, element("bdi", {},
    element("span", { class: "before" }, text(join(first, i))), link,
    element("span", { class: "after" }, text(join(i + 1, last + 1)))));
}

function listRow(i) {
  const cells = [];
  if (runs.length > 1) {
    const change = changeOf(list.run)[i];
    cells.push(element("td", { class: `n ${change > 0 ? "worse" : "better"}` }, `${change > 0 ? "▲" : "▼"} ${signed(change)}`));
    for (const run of [runs[0], runs[list.run]]) {
      cells.push(element("td", { class: "n", "data-label": run.label }, plain(run.nll[i])));
    }
  } else {
    cells.push(element("td", { class: "n" }, plain(runs[0].nll[i])));
  }
  return element("tr", {}, ...cells, contextOf(i));
}

function drawList() {
  const found = listed();
  const shown = found.slice(0, list.length);
  const body = document.querySelector("#list tbody");
  body.replaceChildren(...shown.map(listRow));
  if (shown.length === 0) {
    const wide = runs.length > 1 ? 4 : 2;
    body.append(element("tr", {}, element("td", { colspan: wide, class: "hint" }, "No token is like that.")));
  }
  const more = document.getElementById("list-more");
  more.parentElement.hidden = found.length <= list.length;
  const all = found.length >= LIST_LONGEST ? `${LIST_LONGEST.toLocaleString("en")} or more` : found.length.toLocaleString("en");
  document.getElementById("list-count").textContent = `${shown.length.toLocaleString("en")} of ${all}`;
  const head = document.getElementById("list-candidate");
  if (head) head.textContent = runs[list.run].label;
}

function startList() {
  const run = document.getElementById("list-run");
  if (runs.length > 2) {
    runs.slice(1).forEach((r, n) => run.append(element("option", { value: n + 1 }, r.label)));
  } else {
    run.parentElement.hidden = true;
  }
  const direction = document.getElementById("list-direction");
  direction.parentElement.hidden = runs.length === 1;
  const search = document.getElementById("list-search");
  const changed = () => {
    list.run = runs.length > 2 ? Number(run.value) : list.run;
    list.direction = direction.value;
    list.search = search.value;
    list.length = LIST_STEP;
    drawList();
  };
  [run, direction].forEach((control) => control.addEventListener("change", changed));
  search.addEventListener("input", changed);
  document.getElementById("list-more").addEventListener("click", () => { list.length += 4 * LIST_STEP; drawList(); });
  document.getElementById("list-controls").addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("list-controls").hidden = false;
  document.getElementById("list").addEventListener("click", (event) => {
    const link = event.target.closest("[data-token]");
    if (!link) return;
    event.preventDefault();
    const i = Number(link.dataset.token);
    setFilter("all");
    goTo(i);
    const token = tokenAt(i);
    if (token) token.scrollIntoView({ block: "center" });
    pin(i);
  });
  drawList();
}
