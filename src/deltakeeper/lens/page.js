"use strict";
// Draws the lens of the chosen prompt. Everything a model said is set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const colours = () => (dark.matches ? data.colours.dark : data.colours.light);
const state = { sample: null, layer: -1, place: -1, statistic: 0, minus: -1, shown: new Set(data.variants.keys()) };
for (const number of [...state.shown].slice(4)) state.shown.delete(number);

// Numbers come as letters, see page_numbers.py.
const ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_";
const digit = Object.fromEntries([...ALPHABET].map((letter, i) => [letter, i]));
const whole = (text, letters) => {
  const found = new Array(text.length / letters);
  for (let i = 0; i < found.length; i++) {
    let value = 0;
    for (let j = 0; j < letters; j++) value = value * 64 + digit[text[i * letters + j]];
    found[i] = value;
  }
  return found;
};
const shares = (text) => whole(text, 2).map((q) => (q ? ((q - 1) / 4094) ** 2 : NaN));
const signed = (text, scale) => whole(text, 2).map((q) => {
  const root = (q - 2048) / 2047;
  return q ? Math.sign(root) * root * root * scale : NaN;
});

const unpack = (sample) => {
  if (sample.ready) return sample;
  sample.ready = true;
  sample.followed = sample.followed.map((text) => whole(text, 3));
  for (const trace of sample.traces) {
    trace.ids = whole(trace.ids, 3);
    trace.probs = shares(trace.probs);
    trace.numbers = trace.numbers.map((text, i) => text && signed(text, data.statistics[i].scale));
    trace.curves = trace.curves.map(shares);
  }
  return sample;
};

const make = (tag, parts = {}, ...children) => {
  const { dataset, ...rest } = parts;
  const node = Object.assign(document.createElement(tag), rest);
  Object.assign(node.dataset, dataset);
  node.append(...children);
  return node;
};
const draw = (tag, parts, ...children) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(parts)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const show = (text) => text.replaceAll("\r\n", "⏎").replace(/[ \u00a0\n\t]/g, (c) => ({ " ": "·", "\u00a0": "⍽", "\n": "⏎", "\t": "⇥" })[c]) || "∅";
const short = (value) => {
  if (!Number.isFinite(value)) return "n/a";
  const size = Math.abs(value);
  return size === 0 ? "0" : size < 0.001 ? value.toExponential(0) : size < 10 ? value.toPrecision(2) : value.toFixed(1);
};
const parse = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
const mix = (stops, share) => {
  const at = Math.min(1, Math.max(0, share)) * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(at));
  const [one, other] = [parse(stops[low]), parse(stops[low + 1])];
  return one.map((value, i) => Math.round(value + (other[i] - value) * (at - low)));
};
const inkOn = ([r, g, b]) => {
  const linear = [r, g, b].map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.24 ? "#1b1e22" : "#ffffff";
};

const shownTraces = () => state.sample.traces.filter((trace) => state.shown.has(trace.variant));
const reference = () => state.sample.traces.find((trace) => trace.variant === state.minus);
const cellOf = (layer, place) => layer * state.sample.positions.length + place;
const valuesOf = (trace) => {
  const values = trace.numbers[state.statistic];
  if (state.minus < 0 || !values) return values;
  const other = reference()?.numbers[state.statistic];
  return other && values.map((value, i) => value - other[i]);
};
const tokenAt = (place) => state.sample.text[state.sample.positions[place] - state.sample.start];

// One scale for all maps of a prompt; the few largest values share its end, so that one cell does not hide the rest.
const scaleOf = () => {
  const traces = shownTraces().filter((trace) => state.minus < 0 || trace.variant !== state.minus);
  const known = traces.flatMap((trace) => valuesOf(trace) ?? []).filter(Number.isFinite);
  const sizes = known.map(Math.abs).sort((a, b) => a - b);
  const most = sizes.at(-1) ?? 1;
  const end = sizes[Math.floor(0.98 * (sizes.length - 1))] || most || 1;
  const high = most <= 1.25 * end ? most || 1 : end;
  const low = state.minus >= 0 || known.some((value) => value < 0) ? -high : 0;
  return { low, high, cut: most > high, stops: colours()[low < 0 ? 1 : 0] };
};

const drawScale = (scale) => {
  const bar = make("canvas", { width: 100, height: 1 });
  const pen = bar.getContext("2d");
  for (let i = 0; i < 100; i++) {
    pen.fillStyle = `rgb(${mix(scale.stops, i / 99).join(",")})`;
    pen.fillRect(i, 0, 1, 1);
  }
  const unit = data.statistics[state.statistic].unit;
  const first = data.variants[state.minus >= 0 ? state.minus : shownTraces()[0]?.variant ?? 0];
  byId("scale").replaceChildren(
    `${scale.cut && scale.low < 0 ? "≤ " : ""}${short(scale.low)}`, bar, `${scale.cut ? "≥ " : ""}${short(scale.high)} ${unit}`,
    make("span", {}, make("i", { className: "box" }), `likeliest token differs from ${first}`),
    ...(state.sample.traces.some((trace) => trace.right) ? [make("span", {}, "★ last likeliest token is what comes next in the text")] : []),
  );
};

const drawMap = (trace, first, scale) => {
  const { layers, positions, top } = state.sample;
  const values = valuesOf(trace);
  const unit = data.statistics[state.statistic].unit;
  const body = make("tbody");
  for (let layer = layers.length - 1; layer >= 0; layer--) {
    const row = make("tr", {}, make("th", { scope: "row" }, String(layers[layer])));
    for (let place = 0; place < positions.length; place++) {
      const cell = cellOf(layer, place);
      const value = values ? values[cell] : NaN;
      const word = show(data.words[trace.ids[cell * top]]);
      const changed = trace.ids[cell * top] !== first.ids[cell * top];
      const button = make("button", { type: "button", title: `${word}\n${short(value)} ${unit}`, dataset: { layer, place } }, word);
      button.setAttribute("aria-label", `layer ${layers[layer]}, position ${positions[place]}: ${word}, ${short(value)} ${unit}${changed ? ", changed" : ""}`);
      button.tabIndex = -1;
      if (Number.isFinite(value)) {
        const colour = mix(scale.stops, (value - scale.low) / (scale.high - scale.low));
        button.style.backgroundColor = `rgb(${colour.join(",")})`;
        button.style.color = inkOn(colour);
      }
      if (changed) button.classList.add("changed");
      row.append(make("td", {}, button));
    }
    body.append(row);
  }
  const stars = positions.map((_, place) => make("th", {}, trace.right?.[place] ? "★" : ""));
  const words = positions.map((number, place) => make("th", { scope: "col", title: `position ${number}` }, show(tokenAt(place))));
  return make(
    "table", { className: positions.length > 12 ? "map tight" : "map" },
    make("caption", {}, data.variants[trace.variant] + (state.minus >= 0 ? ` − ${data.variants[state.minus]}` : ""), make("small", {}, trace.verdict)),
    make("thead", {}, make("tr", {}, make("td"), ...stars)), body, make("tfoot", {}, make("tr", {}, make("td"), ...words)),
  );
};

const drawMaps = () => {
  const scale = scaleOf();
  const traces = shownTraces();
  const first = reference() ?? traces[0];
  drawScale(scale);
  const maps = traces.filter((trace) => trace.variant !== state.minus);
  byId("maps").replaceChildren(...maps.map((trace) => drawMap(trace, first, scale)));
  choose(state.layer, state.place, false);
};

// Of a token without a whole curve only the layers are known where it is among the likeliest.
const curveOf = (trace, place, word) => {
  const { layers, top, followed } = state.sample;
  const at = followed[place].indexOf(word);
  const whole = at < 0 ? [] : trace.curves[place].slice(at * layers.length, (at + 1) * layers.length);
  return layers.map((_, layer) => {
    if (Number.isFinite(whole[layer])) return whole[layer];
    const start = cellOf(layer, place) * top;
    const rank = trace.ids.slice(start, start + top).indexOf(word);
    return rank < 0 ? NaN : trace.probs[start + rank];
  });
};

const look = (variant) => ({
  stroke: colours()[2][variant % colours()[2].length],
  "stroke-dasharray": data.colours.dashes[variant % data.colours.dashes.length].map((part) => part * 1.5).join(" ") || "none",
});

const drawChart = (name, isSet, lines) => {
  const { layers } = state.sample;
  const largest = Math.max(...lines.flatMap((line) => line[1].filter(Number.isFinite)));
  const most = [0.05, 0.1, 0.2, 0.5].find((end) => largest <= end) ?? 1;
  const [left, right, up, down] = [22, 156, 6, 74];
  const x = (layer) => left + (layers.length > 1 ? layer / (layers.length - 1) : 0.5) * (right - left);
  const y = (value) => down - (value / most) * (down - up);
  const parts = [
    draw("path", { class: "axis", d: `M${left} ${up}V${down}H${right}` }),
    draw("path", { class: "here", d: `M${x(state.layer).toFixed(1)} ${up}V${down}` }),
  ];
  for (const [text, tx, ty, anchor] of [[short(most), left - 3, up + 4, "end"], ["0", left - 3, down, "end"],
    [layers[0], left, down + 11, "start"], [layers.at(-1), right, down + 11, "end"]]) {
    parts.push(draw("text", { class: "tick", x: tx, y: ty, "text-anchor": anchor }, String(text)));
  }
  for (const [variant, curve] of lines) {
    let path = "";
    curve.forEach((value, i) => {
      if (!Number.isFinite(value)) return;
      const joined = i > 0 && Number.isFinite(curve[i - 1]);
      path += `${joined ? "L" : "M"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
      if (!joined && !Number.isFinite(curve[i + 1])) {
        parts.push(draw("circle", { cx: x(i).toFixed(1), cy: y(value).toFixed(1), r: 1.8, fill: look(variant).stroke }));
      }
    });
    parts.push(draw("path", { class: "curve", d: path, ...look(variant) }));
  }
  const spoken = lines.map(([variant, curve]) => `${data.variants[variant]} ${short(curve[state.layer])}`).join(", ");
  const svg = draw("svg", { viewBox: "0 0 160 88", role: "img", "aria-label": `${name} by layer; here ${spoken}` }, ...parts);
  return make("figure", {}, make("figcaption", { className: isSet ? "set" : "", title: name }, name), svg);
};

const drawDetail = () => {
  const { layers, positions, top } = state.sample;
  const traces = shownTraces();
  const start = cellOf(state.layer, state.place) * top;
  const tops = traces.map((trace) => make(
    "div", {}, make("h4", {}, data.variants[trace.variant]),
    make("ol", {}, ...trace.ids.slice(start, start + top).map((word, i) => make(
      "li", {}, make("span", { title: data.words[word] }, show(data.words[word])), make("b", {}, short(trace.probs[start + i])),
      make("meter", { min: 0, max: 1, value: trace.probs[start + i] }),
    ))),
  ));
  const best = new Map();
  for (const trace of traces) {
    trace.ids.slice(start, start + top).forEach((word, i) => best.set(word, Math.max(best.get(word) ?? 0, trace.probs[start + i])));
  }
  const words = [...best].sort((a, b) => b[1] - a[1]).slice(0, 8).map(([word]) => word);
  const charts = [];
  data.statistics.forEach((statistic, number) => {
    if (!statistic.name.startsWith("prob:") || statistic.name === "prob:produced") return;
    const lines = traces.filter((trace) => trace.numbers[number]).map((trace) => [
      trace.variant, layers.map((_, layer) => trace.numbers[number][cellOf(layer, state.place)])]);
    if (lines.length) charts.push([`all of ${statistic.name.slice(5)}`, true, lines]);
  });
  for (const word of words) {
    charts.push([show(data.words[word]), false, traces.map((trace) => [trace.variant, curveOf(trace, state.place, word)])]);
  }
  byId("detail").replaceChildren(
    make("h3", {}, `Layer ${layers[state.layer]} at position ${positions[state.place]}, after “${show(tokenAt(state.place))}”`),
    make("div", { className: "tops" }, ...tops),
    make("h3", {}, "Probability by layer"), // each chart on a scale of its own, written at its axis
    make("p", { className: "legend" }, ...traces.map((trace) => make("span", {}, draw("svg", { width: 30, height: 8, "aria-hidden": "true" },
      draw("path", { class: "curve", d: "M1 4H29", ...look(trace.variant) })), data.variants[trace.variant]))),
    make("div", { className: "charts" }, ...charts.map(([name, isSet, lines]) => drawChart(name, isSet, lines))),
  );
};

const choose = (layer, place, reveal) => {
  [state.layer, state.place] = [layer, place];
  for (const button of byId("maps").querySelectorAll("button")) {
    const chosen = Number(button.dataset.layer) === layer && Number(button.dataset.place) === place;
    button.classList.toggle("chosen", chosen);
    button.tabIndex = chosen ? 0 : -1;
  }
  drawDetail();
  if (reveal && byId("detail").getBoundingClientRect().top > innerHeight - 160) byId("detail").scrollIntoView({ block: "end" });
};

const drawControls = () => {
  const present = new Set(state.sample.traces.map((trace) => trace.variant));
  byId("minus").replaceChildren(
    make("option", { value: -1 }, "each variant"),
    ...[...present].map((number) => make("option", { value: number }, `difference from ${data.variants[number]}`)),
  );
  if (!present.has(state.minus)) state.minus = -1;
  byId("minus").value = String(state.minus);
  const boxes = [...present].map((number) => make("label", {}, make("input", { type: "checkbox", value: number, checked: state.shown.has(number) }), data.variants[number]));
  byId("variants").replaceChildren(byId("variants").firstElementChild, ...boxes);
};

const open = (id) => {
  const found = data.samples.find((sample) => sample.id === id);
  if (!found || found === state.sample) return;
  const fresh = !state.sample || state.layer >= found.layers.length || state.place >= found.positions.length;
  state.sample = unpack(found);
  if (fresh) [state.layer, state.place] = [found.layers.length - 1, found.positions.length - 1];
  for (const link of document.querySelectorAll(".samples a")) {
    if (link.hash === `#${id}`) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
  byId("asked").textContent = document.querySelector(`.samples a[aria-current] .asked`).textContent;
  const traced = new Set(found.positions);
  byId("read").replaceChildren(
    found.start ? "… " : "", ...found.text.map((token, i) => (traced.has(i + found.start) ? make("mark", {}, show(token)) : token)), found.more ? " …" : "",
  );
  byId("lens").hidden = false;
  drawControls();
  drawMaps();
};

byId("statistic").append(...data.statistics.map((statistic, i) => make("option", { value: i }, statistic.label + (statistic.unit && `, ${statistic.unit}`))));
state.statistic = Math.max(0, data.statistics.findIndex((statistic) => statistic.name.startsWith("kl:")));
byId("statistic").value = String(state.statistic);
byId("statistic").addEventListener("change", (event) => { state.statistic = Number(event.target.value); drawMaps(); });
byId("minus").addEventListener("change", (event) => { state.minus = Number(event.target.value); drawMaps(); });
byId("variants").addEventListener("change", (event) => {
  const number = Number(event.target.value);
  if (event.target.checked) state.shown.add(number);
  else state.shown.delete(number);
  drawMaps();
});
byId("maps").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) choose(Number(button.dataset.layer), Number(button.dataset.place), true);
});
byId("maps").addEventListener("keydown", (event) => {
  const [up, right] = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key] ?? [0, 0];
  const table = event.target.closest("table");
  if (!table || (!up && !right)) return;
  const [layer, place] = [state.layer + up, state.place + right];
  const next = table.querySelector(`button[data-layer="${layer}"][data-place="${place}"]`);
  event.preventDefault();
  if (!next) return;
  choose(layer, place, false);
  next.focus();
});
const filter = document.querySelector(".filter");
if (filter) {
  filter.hidden = false;
  filter.addEventListener("click", (event) => {
    const wanted = event.target.dataset.show;
    if (!wanted) return;
    for (const button of filter.children) button.setAttribute("aria-pressed", String(button === event.target));
    for (const item of document.querySelectorAll(".samples li")) item.hidden = wanted === "flipped" && !item.classList.contains("flipped");
  });
}
dark.addEventListener("change", () => drawMaps());
const openHash = () => open(decodeURIComponent(location.hash.slice(1)));
addEventListener("hashchange", openHash);
openHash();
if (!state.sample) open(data.samples[0].id);
