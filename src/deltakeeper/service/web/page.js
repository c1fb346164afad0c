// Begins, asks for a key where one is needed, and keeps what is shown up to date.

import { byId } from "./elements.js";
import { showDecisions, showTenants, showThroughput } from "./overview.js";
import { beginPlayground, offerFidelities, offerModels } from "./playground.js";
import { hasKey, read, useKey } from "./service.js";

const EVERY = 2000; // milliseconds
const DECISIONS = 50;

let turn = 0; // what an earlier turn asked, perhaps with another key, is not shown any more
let timer = 0;

const tell = (text) => {
  if (byId("notice").textContent !== text) byId("notice").textContent = text;
};

const reveal = (asks, manages) => {
  const focused = document.activeElement;
  byId("key-form").hidden = asks && (hasKey() || manages);
  byId("forget").hidden = !asks || !hasKey();
  byId("playground").hidden = byId("contents").hidden = !asks;
  for (const part of document.querySelectorAll(".managed")) part.hidden = !manages;
  if (focused?.closest("[hidden]")) byId(asks ? "prompt" : "key").focus(); // where one was is gone
};

const showAll = (status, deltas, decisions) => {
  byId("about").textContent = `${status.base}, version ${status.version}`;
  offerFidelities(status.fidelities);
  showThroughput(status);
  showTenants(deltas);
  showDecisions(decisions, status.policy);
  if (!status.ready) tell("The service is stopping.");
  else tell(status.open ? "No key was made yet: everybody on this machine may ask and manage." : "This key asks and manages.");
};

const refresh = async (isCurrent) => {
  const models = await read("v1/models");
  if (!isCurrent()) return;
  offerModels(models.data);
  try {
    const found = await Promise.all(["admin/status", "admin/deltas", `admin/decisions?limit=${DECISIONS}`].map(read));
    if (!isCurrent()) return;
    showAll(...found);
    reveal(true, true);
  } catch (error) {
    if (error.status !== 403 || !isCurrent()) throw error;
    offerFidelities([]);
    reveal(true, false);
    tell("This key asks models; throughput, tenants and admission are for admin keys.");
  }
};

const keepFresh = async () => {
  clearTimeout(timer);
  const mine = ++turn;
  const isCurrent = () => mine === turn;
  try {
    if (!document.hidden) await refresh(isCurrent);
  } catch (error) {
    if (!isCurrent()) return;
    tell(error.status === 401 && !hasKey() ? "This service asks for a key." : error.message);
    if (error.status === 401) {
      reveal(false, false);
      return; // nothing changes before another key is given
    }
  }
  if (isCurrent()) timer = setTimeout(keepFresh, EVERY);
};

const begin = (key) => {
  useKey(key);
  byId("key").value = "";
  tell("Asking the service …");
  keepFresh();
};

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  begin(byId("key").value);
});
byId("forget").addEventListener("click", () => begin(""));
document.addEventListener("visibilitychange", () => { if (!document.hidden && !byId("playground").hidden) keepFresh(); });
beginPlayground();
keepFresh();
