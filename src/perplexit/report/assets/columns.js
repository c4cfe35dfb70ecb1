"use strict";
// The token data of the page as typed columns. NaN stands for "not scored".

const data = JSON.parse(document.getElementById("data").textContent);

const KINDS = {
  u1: Uint8Array, u2: Uint16Array, u4: Uint32Array,
  i2: Int16Array, i4: Int32Array, f4: Float32Array, f8: Float64Array,
};

function unpack(column) {
  const text = atob(column.data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const values = new KINDS[column.type](bytes.buffer);
  if (!column.scale) return values;
  const missing = column.type === "u2" ? 0xffff : 0xffffffff;
  return Float32Array.from(values, (v) => (v === missing ? NaN : v / column.scale));
}

// A column that is unpacked when it is first asked for: alternatives are large and often unread.
function lazily(make) {
  let made;
  return () => (made === undefined ? (made = make()) : made);
}

const PLAIN = 0, CONTINUATION = 1, GAP = 2, NUMBER = 3;

const columns = {
  count: data.numShown,
  kind: unpack(data.kind),
  document: unpack(data.document),
  tokenIndex: unpack(data.tokenIndex),
  position: unpack(data.position),
  id: unpack(data.id),
  start: (() => {
    const units = unpack(data.units);
    const start = new Uint32Array(units.length + 1);
    for (let i = 0; i < units.length; i++) start[i + 1] = start[i] + units[i];
    return start;
  })(),
};

const runs = data.runs.map((run) => ({
  label: run.label,
  nll: unpack(run.nll),
  entropy: lazily(() => run.entropy && unpack(run.entropy)),
  rank: lazily(() => run.rank && unpack(run.rank)),
  kl: lazily(() => run.kl && unpack(run.kl)),
  topCount: run.top ? run.top.count : 0,
  topId: lazily(() => unpack(run.top.id)),
  topNll: lazily(() => unpack(run.top.nll)),
}));

function textOf(i) {
  if (columns.kind[i] === NUMBER) return `⟨${columns.id[i]}⟩`;
  return data.text.slice(columns.start[i], columns.start[i + 1]);
}

const INVISIBLE = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu;

// Text with white space and control characters made visible, for lists and headings.
function visible(text) {
  return text
    .replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣")
    .replace(INVISIBLE, (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

function visibleToken(i) {
  if (columns.kind[i] === CONTINUATION) return "⟨rest of a character⟩";
  if (columns.kind[i] === GAP) return "⟨not at hand⟩";
  return visible(textOf(i));
}

function spelled(id) {
  const text = data.vocabulary[id];
  return text === undefined ? `⟨${id}⟩` : visible(text);
}

const differences = new Map();

// Candidate minus reference, in nats.
function changeOf(run) {
  if (!differences.has(run)) {
    const reference = runs[0].nll, candidate = runs[run].nll;
    differences.set(run, candidate.map((value, i) => value - reference[i]));
  }
  return differences.get(run);
}

const orders = new Map();

// Indices of the finite values, largest first by `score`; kept by name.
function ordered(name, values, score) {
  if (!orders.has(name)) {
    const found = [];
    for (let i = 0; i < values.length; i++) if (Number.isFinite(values[i])) found.push(i);
    orders.set(name, Uint32Array.from(found).sort((a, b) => score(values[b]) - score(values[a])));
  }
  return orders.get(name);
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function signed(value, places = 3) {
  return Number.isFinite(value) ? (value < 0 ? "−" : "+") + Math.abs(value).toFixed(places) : "–";
}

function plain(value, places = 3) {
  return Number.isFinite(value) ? value.toFixed(places) : "–";
}
