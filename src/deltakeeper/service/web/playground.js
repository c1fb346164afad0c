// Asks two models the same and writes both answers as they come.

import { byId, count, drawOnce, make, seconds, seen } from "./elements.js";
import { readStream } from "./service.js";

const SIDES = ["first", "second"];

let fidelities = [];
let asking = new AbortController();

const isGroupOf = (name) => (group) => group.some((one) => one.id === name);
const planesOf = ({ planes }) => (planes === null ? "all planes" : `${planes} ${planes === 1 ? "plane" : "planes"}`);

export const offerModels = (cards) => {
  const names = cards.map((card) => card.id);
  const parent = cards.findIndex((card) => card.parent === null);
  SIDES.forEach((side, at) => {
    const select = byId(`${side}-model`);
    const chosen = select.value;
    drawOnce(select.id, names, (all) => all.map((name) => make("option", { value: name }, seen(name))));
    if (names.includes(chosen)) select.value = chosen;
    else select.selectedIndex = at ? names.findIndex((_, i) => i !== parent) : Math.max(0, parent);
    if (select.selectedIndex < 0) select.selectedIndex = names.length - 1; // there is the base alone
  });
  showFidelity();
};

// The same artifact may stand under several names at different numbers of planes; the slider goes through those.
export const offerFidelities = (groups) => {
  fidelities = groups;
  showFidelity();
};

const showFidelity = () => {
  const name = byId("second-model").value;
  const group = fidelities.find(isGroupOf(name));
  byId("fidelity").hidden = !group;
  if (!group) return;
  const at = group.findIndex((one) => one.id === name);
  byId("planes").max = group.length - 1;
  byId("planes").value = at;
  byId("planes").setAttribute("aria-valuetext", planesOf(group[at]));
  byId("planes-said").value = planesOf(group[at]);
};

const bodyOf = (model) => {
  const prompt = byId("prompt").value;
  const chat = byId("way").value === "chat";
  return [chat ? "v1/chat/completions" : "v1/completions", {
    model,
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    max_tokens: byId("longest").valueAsNumber,
    temperature: byId("temperature").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
  }];
};

const ENDS = { stop: "it ended by itself", length: "the longest answer was reached" };

const write = async (side, signal) => {
  const [answer, facts, model] = [byId(`${side}-answer`), byId(`${side}-facts`), byId(`${side}-model`).value];
  const began = performance.now();
  let [first, tokens, reason] = [0, 0, null];
  answer.replaceChildren();
  answer.setAttribute("aria-busy", "true");
  facts.textContent = "waits …";
  try {
    for await (const chunk of readStream(...bodyOf(model), signal)) {
      const choice = chunk.choices[0];
      const text = choice?.delta?.content ?? choice?.text ?? "";
      if (text) {
        first ||= performance.now();
        facts.textContent = "answers …";
        answer.append(seen(text));
      }
      reason = choice?.finish_reason ?? reason;
      tokens = chunk.usage?.completion_tokens ?? tokens;
    }
    if (!answer.textContent) answer.append(make("i", {}, "nothing but an end"));
    const took = (performance.now() - (first || began)) / 1000;
    const speed = tokens > 1 && took > 0 ? `, ${((tokens - 1) / took).toFixed(1)} tokens a second after it` : "";
    const wait = first ? `, the first after ${seconds((first - began) / 1000)}${speed}` : "";
    facts.textContent = `${count(tokens)} ${tokens === 1 ? "token" : "tokens"}${wait}; ${ENDS[reason] ?? reason}.`;
    return `${model} has answered.`;
  } catch (error) {
    if (signal.aborted) {
      facts.textContent = "stopped";
      return `${model} was stopped.`;
    }
    answer.append(make("p", { className: "failed" }, seen(error.message)));
    facts.textContent = "";
    return `${model} did not answer: ${error.message}`;
  } finally {
    answer.setAttribute("aria-busy", "false");
  }
};

const askBoth = async () => {
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  byId("said").textContent = "Both are asked.";
  await Promise.all(SIDES.map(async (side) => {
    const said = await write(side, signal);
    byId("said").textContent = said;
  }));
};

export const beginPlayground = () => {
  byId("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    askBoth();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask-form").requestSubmit();
  });
  byId("stop").addEventListener("click", () => asking.abort());
  byId("second-model").addEventListener("change", showFidelity);
  byId("planes").addEventListener("input", () => {
    const group = fidelities.find(isGroupOf(byId("second-model").value));
    byId("second-model").value = group[byId("planes").valueAsNumber].id;
    showFidelity();
  });
};
