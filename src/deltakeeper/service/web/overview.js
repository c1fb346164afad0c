// What an administrator sees: throughput, tenants and where they are, decisions of admission.

import { byId, bytes, count, draw, drawOnce, make, seconds, seen, share } from "./elements.js";

const MOST_ROWS = 200;
const MOST_READINGS = 61; // two minutes, one every two seconds
const ORDER = ["resident", "loading", "draining", "failed", "cold"];

let readings = [];

const take = (tokens) => {
  if (tokens < (readings.at(-1)?.tokens ?? 0)) readings = []; // the service was started anew
  readings.push({ at: performance.now() / 1000, tokens });
  readings = readings.slice(-MOST_READINGS);
  return readings.slice(1).map((now, i) => (now.tokens - readings[i].tokens) / (now.at - readings[i].at));
};

const drawCurve = (rates) => {
  const most = Math.max(...rates, 0);
  const points = rates.map((rate, i) => {
    const x = 240 - (rates.length - 1 - i) * (240 / (MOST_READINGS - 2));
    return `${x.toFixed(1)} ${(46 - (rate / (most || 1)) * 42).toFixed(1)}`;
  });
  const curve = byId("curve");
  curve.replaceChildren(draw("path", { class: "axis", d: "M0 47H240" }));
  if (points.length > 1) curve.append(draw("path", { class: "rate", d: `M${points.join("L")}` }));
  byId("most").textContent = most.toFixed(1);
};

const fact = (name, value, note, portion) => make(
  "div", {}, make("dt", {}, name), make("dd", {}, make("b", {}, value), " ", make("small", {}, note)),
  ...(portion === undefined ? [] : [make("dd", {}, make("meter", { value: portion, min: 0, max: 1, ariaLabel: name }))]),
);

export const showThroughput = ({ engine, deltas }) => {
  const rates = take(engine.answer_tokens);
  byId("rate").textContent = rates.length ? rates.at(-1).toFixed(1) : "…";
  drawCurve(rates);
  const ended = Object.entries(engine.finished).map(([how, number]) => `${count(number)} ${how}`).join(", ");
  const answers = Object.values(engine.finished).reduce((sum, number) => sum + number, 0);
  const gone = Object.entries(deltas.evictions).map(([why, number]) => `${count(number)} ${why}`).join(", ");
  const used = engine.kv_blocks_used / engine.kv_blocks;
  drawOnce("facts", [
    ["Answers under way", count(engine.running), engine.waiting ? `and ${count(engine.waiting)} waiting` : "none waiting"],
    ["Answers so far", count(answers), ended || "none yet"],
    ["Tokens of answers", count(engine.answer_tokens), `to ${count(engine.prompt_tokens)} of prompts`],
    ["Prompts found in the cache", share(engine.prefix_hits, engine.prefix_queries), "of their tokens"],
    ["Keys and values", share(used, 1), `of ${bytes(engine.kv_bytes)}`, used],
    ["Deltas in memory", bytes(deltas.resident_bytes), `of ${bytes(deltas.byte_budget)}`, deltas.resident_bytes / deltas.byte_budget],
    ["Loads", count(deltas.loads), deltas.waiting ? `${count(deltas.waiting)} wait for room` : "none waits for room"],
    ["Deltas that left memory", count(Object.values(deltas.evictions).reduce((sum, n) => sum + n, 0)), gone],
  ], (facts) => facts.map((one) => fact(...one)));
};

const mark = (word) => make("span", { className: `mark is-${word}` }, word);
const cell = (value, note = "") => make("td", {}, value, ...(note ? [make("small", {}, note)] : []));
const rowOf = (name, ...cells) => make("tr", {}, make("th", { scope: "row" }, make("bdi", {}, seen(name))), ...cells);
const planes = (number) => (number === null ? "" : `at most ${number} ${number === 1 ? "plane" : "planes"}`);

const tenantRow = (one) => rowOf(
  one.id,
  cell(mark(one.state), one.pins ? `answers ${count(one.pins)}` : seen(one.reason)),
  cell(one.resident_bytes ? bytes(one.resident_bytes) : "none", one.reserved_bytes ? `${bytes(one.reserved_bytes)} coming` : ""),
  cell(one.disk_bytes ? bytes(one.disk_bytes) : "not read yet", one.read_ahead && !one.resident_bytes ? "in the page cache" : ""),
  cell(count(one.loads), one.loads ? `the last in ${seconds(one.load_seconds)}` : ""),
  cell(count(one.gone)),
  one.decision ? cell(mark(one.decision.verdict), planes(one.decision.planes)) : cell("none"),
);

export const showTenants = ({ data }) => {
  const shown = data.map((one) => ({
    ...one, retry_seconds: 0, gone: Object.values(one.evictions).reduce((sum, number) => sum + number, 0),
  }));
  shown.sort((a, b) => ORDER.indexOf(a.state) - ORDER.indexOf(b.state) || (a.id < b.id ? -1 : 1));
  drawOnce("tenant-rows", shown.slice(0, MOST_ROWS), (rows) => rows.map(tenantRow));
  const inMemory = data.filter((one) => one.resident_bytes).length;
  const rest = data.length > MOST_ROWS ? `; the first ${MOST_ROWS} are shown` : "";
  byId("tenant-count").textContent = `${count(data.length)} known, ${count(inMemory)} in memory${rest}`;
};

const percent = (value) => `${Math.round(100 * value)} %`;
const probed = ({ prompts, refused, complied, broken, base_refused: base }) => [
  `${percent(refused)} of ${count(prompts)} refused`,
  `${percent(complied)} complied, ${percent(broken)} broken${base === undefined ? "" : `; the base refuses ${percent(base)}`}`,
];

const decisionRow = (one) => rowOf(
  one.name,
  cell(mark(one.verdict), planes(one.planes)),
  make("td", { className: "reasons" }, make("bdi", {}, seen(one.reasons.join(" ")) || "Nothing speaks against it.")),
  cell(...(one.canary ? probed(one.canary) : ["not run"])),
  make("td", {}, make("time", { dateTime: one.at }, new Date(one.at).toLocaleString([], { dateStyle: "medium", timeStyle: "medium" }))),
);

export const showDecisions = ({ data }, hasPolicy) => {
  byId("decision-table").hidden = !data.length;
  byId("no-decisions").hidden = data.length > 0;
  byId("no-decisions").textContent = hasPolicy
    ? "Nothing was decided yet: that comes with a delta's first load."
    : "This service has no policy: whatever fits the base is served.";
  drawOnce("decision-rows", data, (rows) => rows.map(decisionRow));
};
