// The text: pages of tokens, coloured by a mode, filtered, walked through with the keyboard.

const PAGE_TOKENS = 1200;

function modesOf() {
  const modes = [];
  for (let run = 1; run < runs.length; run++) {
    modes.push({ key: `change-${run}`, label: `Change, ${runs[run].label} − ${runs[0].label}`,
      values: () => changeOf(run), diverging: true });
    if (runs[run].kl()) {
      modes.push({ key: `kl-${run}`, label: `KL from the reference, ${runs[run].label}`,
        values: runs[run].kl, diverging: false });
    }
  }
  runs.forEach((run, r) => modes.push({ key: `nll-${r}`, label: `Surprise, ${run.label}`,
    values: () => run.nll, diverging: false, edges: [0.7, 1.6, 2.8, 4.2, 6, 8, 11] }));
  runs.forEach((run, r) => {
    if (run.entropy()) {
      modes.push({ key: `entropy-${r}`, label: `Uncertainty (entropy), ${run.label}`,
        values: run.entropy, diverging: false, edges: [0.5, 1, 1.7, 2.5, 3.5, 4.5, 6] });
    }
  });
  return modes;
}

// Edges that put about the same few tokens into the strongest colours, whatever the scale.
function edgesOf(mode) {
  if (mode.edges) return mode.edges;
  const sizes = Array.from(mode.values()).filter(Number.isFinite).map(Math.abs).sort((a, b) => a - b);
  const shares = mode.diverging ? [0.7, 0.9, 0.975, 0.995] : [0.4, 0.6, 0.75, 0.87, 0.94, 0.98, 0.995];
  const at = (share) => sizes[Math.min(sizes.length - 1, Math.floor(share * sizes.length))] || 0;
  mode.edges = shares.map((share) => Number(at(share).toPrecision(2)));
  return mode.edges;
}

function classOf(mode, value) {
  if (!Number.isFinite(value)) return "unscored";
  const size = Math.abs(value), edges = edgesOf(mode);
  let level = 0;
  while (level < edges.length && size >= edges[level] && edges[level] > 0) level++;
  if (!mode.diverging) return `s${level}`;
  return level === 0 ? "s0" : `${value > 0 ? "w" : "b"}${level}`;
}

function pagesOf() {
  const pages = [];
  let start = 0;
  while (start < columns.count) {
    let stop = Math.min(start + PAGE_TOKENS, columns.count);
    if (stop < columns.count) {
      for (let i = stop; i > start + PAGE_TOKENS * 0.7; i--) {
        if (columns.document[i] !== columns.document[i - 1] || textOf(i - 1).includes("\n")) {
          stop = i;
          break;
        }
      }
    }
    pages.push([start, stop]);
    start = stop;
  }
  return pages;
}

const view = {
  modes: modesOf(), mode: null, pages: pagesOf(), page: 0,
  hits: null, current: -1, pinned: false,
};
view.mode = view.modes[0];
const severalDocuments = columns.count > 0 && columns.document[columns.count - 1] !== columns.document[0];
const paper = document.getElementById("paper");

function pageWith(i) {
  let low = 0, high = view.pages.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (view.pages[middle][0] <= i) low = middle; else high = middle - 1;
  }
  return low;
}

function tokenElement(i, values) {
  const kind = columns.kind[i];
  const span = document.createElement("span");
  const dim = view.hits && !view.hits.has(i);
  span.className = `t ${kind === GAP ? "gap" : dim ? "dim" : classOf(view.mode, values[i])}`;
  span.dataset.i = i;
  span.tabIndex = -1;
  if (kind === GAP) { span.textContent = "⋯"; span.title = "text that was not scored"; return span; }
  if (kind === CONTINUATION) { span.textContent = "·"; span.classList.add("rest"); return span; }
  const parts = textOf(i).split("\n");
  parts.forEach((part, n) => {
    if (n > 0) {
      span.append(element("span", { class: "newline", "aria-hidden": "true" }, "⏎"), "\n");
    }
    if (part) span.append(part);
  });
  if (kind === NUMBER) span.append(" ");
  return span;
}

function drawPage() {
  const [start, stop] = view.pages[view.page] || [0, 0];
  const values = view.mode.values();
  const parts = document.createDocumentFragment();
  let block = null, shown = -1;
  for (let i = start; i < stop; i++) {
    if (columns.document[i] !== shown) {
      shown = columns.document[i];
      if (severalDocuments) {
        const domain = data.domain && data.domain[shown] ? ` · ${data.domain[shown]}` : "";
        const goesOn = columns.tokenIndex[i] > 0 ? " (continued)" : "";
        parts.append(element("h3", { class: "document" }, `Document ${shown}${domain}${goesOn}`));
      }
      block = element("div", { class: "document-text", dir: "auto" });
      parts.append(block);
    }
    block.append(tokenElement(i, values));
  }
  paper.replaceChildren(parts);
  const first = view.current >= start && view.current < stop ? view.current : nextHit(start - 1, 1, stop);
  setCurrent(first >= 0 ? first : start);
}

function tokenAt(i) {
  return paper.querySelector(`[data-i="${i}"]`);
}

function setCurrent(i) {
  const before = paper.querySelector('[tabindex="0"]');
  if (before) before.tabIndex = -1;
  const token = tokenAt(i);
  if (token) token.tabIndex = 0;
  view.current = i;
}

// The next token to stop at from i, in a direction: any, or the next that the filter keeps.
function nextHit(i, step, limit = step > 0 ? columns.count : -1) {
  for (let j = i + step; j !== limit && j >= 0 && j < columns.count; j += step) {
    if (!view.hits || view.hits.has(j)) return j;
  }
  return -1;
}

function goTo(i, { focus = true } = {}) {
  if (i < 0) return;
  const page = pageWith(i);
  view.current = i;
  if (page !== view.page || !tokenAt(i)) { view.page = page; redraw(); }
  setCurrent(i);
  const token = tokenAt(i);
  if (token && focus) token.focus({ preventScroll: false });
}

// The token on the line above (-1) or below (+1) that is nearest to where the current one stands.
function onNextLine(direction) {
  const all = Array.from(paper.querySelectorAll(".t"));
  const from = all.findIndex((t) => Number(t.dataset.i) === view.current);
  if (from < 0) return -1;
  const here = all[from].getBoundingClientRect();
  let line = null, best = -1, distance = Infinity;
  for (let n = from + direction; n >= 0 && n < all.length; n += direction) {
    const box = all[n].getClientRects()[0];
    if (!box || Math.abs(box.top - here.top) < here.height / 2) continue;
    if (line === null) line = box.top;
    if (Math.abs(box.top - line) > here.height / 2) break;
    const away = Math.abs(box.left - here.left);
    if (away < distance) { distance = away; best = Number(all[n].dataset.i); }
  }
  return best;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const [start, stop] = view.pages[view.page];
  const moves = {
    ArrowRight: () => nextHit(view.current, 1),
    ArrowLeft: () => nextHit(view.current, -1),
    ArrowDown: () => (view.hits ? nextHit(view.current, 1) : onNextLine(1)),
    ArrowUp: () => (view.hits ? nextHit(view.current, -1) : onNextLine(-1)),
    Home: () => nextHit(start - 1, 1, stop),
    End: () => nextHit(stop, -1, start - 1),
    PageDown: () => (view.page + 1 < view.pages.length ? view.pages[view.page + 1][0] : -1),
    PageUp: () => (view.page > 0 ? view.pages[view.page - 1][0] : -1),
  };
  if (moves[event.key]) {
    event.preventDefault();
    release();
    goTo(moves[event.key]());
  } else if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    pin(view.current);
  } else if (event.key === "Escape") {
    release();
  }
}

function pin(i) {
  release();
  view.pinned = true;
  const token = tokenAt(i);
  if (token) token.classList.add("pinned");
  showDetails(i);
}

function release() {
  view.pinned = false;
  paper.querySelectorAll(".pinned").forEach((t) => t.classList.remove("pinned"));
  details.classList.remove("pinned");
}

function drawLegend() {
  const mode = view.mode, edges = edgesOf(mode);
  const legend = document.getElementById("legend");
  const swatch = (name, text) =>
    element("span", { class: "step" }, element("span", { class: `t ${name}`, "aria-hidden": "true" }, "abc"), text);
  const form = (value) => (value >= 0.01 || value === 0 ? String(value) : value.toExponential(0));
  const steps = [];
  if (mode.diverging) {
    for (let n = edges.length; n > 0; n--) steps.push(swatch(`b${n}`, `−${form(edges[n - 1])}`));
    steps.push(swatch("s0", "0"));
    for (let n = 1; n <= edges.length; n++) steps.push(swatch(`w${n}`, `+${form(edges[n - 1])}`));
  } else {
    steps.push(swatch("s0", `below ${form(edges[0])}`));
    for (let n = 1; n <= edges.length; n++) steps.push(swatch(`s${n}`, `${form(edges[n - 1])}${n === edges.length ? "+" : ""}`));
  }
  const says = mode.diverging
    ? "nats; blue and dotted: better than the reference, orange and underlined: worse"
    : "nats; the stronger the colour, the larger";
  legend.replaceChildren(...steps, element("span", { class: "says" }, says));
}
