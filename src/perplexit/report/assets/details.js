// The panel beside the text: one token, what each run made of it, and what they had expected.

const details = document.getElementById("details");

function chance(nll) {
  if (!Number.isFinite(nll)) return "–";
  const p = Math.exp(-nll);
  if (p >= 0.01) return `${(100 * p).toFixed(p >= 0.995 || p < 0.1 ? 1 : 0)} %`;
  return `1 in ${Math.round(Math.exp(nll)).toLocaleString("en")}`;
}

function rowOf(label, r, i) {
  const run = runs[r], rank = run.rank(), entropy = run.entropy();
  const cells = [plain(run.nll[i]), chance(run.nll[i]),
    rank && rank[i] ? rank[i].toLocaleString("en") : "–", entropy ? plain(entropy[i], 2) : "–"];
  const head = element("th", { scope: "row" },
    element("span", { class: `swatch run${r}`, "aria-hidden": "true" }), label);
  head.title = label;
  return element("tr", {}, head, ...cells.map((cell) => element("td", { class: "n" }, cell)));
}

function alternativesOf(r, i) {
  const run = runs[r];
  const list = element("ol", { class: "alternatives" });
  const ids = run.topId(), losses = run.topNll();
  for (let k = 0; k < run.topCount; k++) {
    const at = i * run.topCount + k;
    if (!Number.isFinite(losses[at])) continue;
    const p = Math.exp(-losses[at]);
    const came = ids[at] === columns.id[i];
    const bar = element("span", { class: "bar", "aria-hidden": "true" }, element("span"));
    bar.firstChild.style.width = `${100 * p}%`;
    list.append(element("li", came ? { class: "came" } : {},
      element("span", { class: "alternative" }, spelled(ids[at]), ...(came ? [element("span", { class: "sr" }, " (came)")] : [])),
      bar, element("span", { class: "n" }, p >= 0.001 ? `${(100 * p).toFixed(1)} %` : "<0.1 %")));
  }
  return list;
}

function headOf(i) {
  const place = columns.kind[i] === GAP
    ? "text that was not scored"
    : `token ${columns.tokenIndex[i].toLocaleString("en")}` +
      (severalDocuments ? ` of document ${columns.document[i]}` : "") +
      (columns.position[i] >= 0 ? `, position ${columns.position[i].toLocaleString("en")} in its window` : "") +
      `, id ${columns.id[i]}`;
  return [element("p", { class: "token-shown" }, element("bdi", {}, visibleToken(i))), element("p", { class: "place" }, place)];
}

function changesOf(i) {
  const list = element("ul", { class: "changes" });
  for (let r = 1; r < runs.length; r++) {
    const change = changeOf(r)[i];
    if (!Number.isFinite(change)) continue;
    const kind = change > 0 ? "worse" : change < 0 ? "better" : "same";
    const sign = { worse: "▲", better: "▼", same: "=" }[kind];
    const kl = runs[r].kl();
    list.append(element("li", { class: kind },
      `${sign} ${runs[r].label}: ${signed(change)} nats` + (kl ? `, KL ${plain(kl[i], 4)}` : "")));
  }
  return list;
}

function showDetails(i) {
  const children = headOf(i);
  const scored = Number.isFinite(runs[0].nll[i]) || runs.some((run) => Number.isFinite(run.nll[i]));
  if (!scored) {
    children.push(element("p", { class: "hint" }, "Not scored: context only, or without a finite loss."));
    details.replaceChildren(...children);
    return;
  }
  const header = ["", "nats", "chance", "rank", "entropy"].map((name) => element("th", { scope: "col", class: "n" }, name));
  children.push(changesOf(i), element("table", {},
    element("thead", {}, element("tr", {}, ...header)),
    element("tbody", {}, ...runs.map((run, r) => rowOf(run.label, r, i)))));
  runs.forEach((run, r) => {
    if (run.topCount === 0) return;
    children.push(element("h4", {}, element("span", { class: `swatch run${r}`, "aria-hidden": "true" }),
      `${run.label} expected`), alternativesOf(r, i));
  });
  if (runs.every((run) => run.topCount === 0)) {
    children.push(element("p", { class: "hint" }, "Alternatives were not recorded (eval --top-k)."));
  }
  details.replaceChildren(...children);
  details.classList.toggle("pinned", view.pinned);
  details.dataset.token = i;
}

// One sentence for screen readers, when a token is reached with the keyboard.
function spoken(i) {
  const losses = runs.map((run) => `${run.label} ${plain(run.nll[i], 2)}`).join(", ");
  const changes = runs.slice(1).map((run, n) => `, change ${signed(changeOf(n + 1)[i], 2)}`).join("");
  return Number.isFinite(runs[0].nll[i])
    ? `${visibleToken(i)}: loss in nats: ${losses}${changes}` : `${visibleToken(i)}: not scored`;
}

function hintDetails() {
  details.replaceChildren(element("p", { class: "hint" },
    "Point at a token, or move with the arrow keys, to see what each model made of it. Click or press Enter to keep it here."));
}
