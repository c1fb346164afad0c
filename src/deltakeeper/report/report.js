"use strict";
// Everything is readable without this script: it only filters samples and opens what a link or the printer needs.
const filter = document.querySelector(".filter");
filter.hidden = false;
filter.addEventListener("click", (event) => {
  const wanted = event.target.dataset.show;
  if (!wanted) return;
  for (const button of filter.children) button.setAttribute("aria-pressed", String(button === event.target));
  for (const sample of document.querySelectorAll(".sample")) {
    sample.hidden = wanted !== "all" && sample.dataset.direction !== wanted;
  }
});
const openTarget = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  target?.closest("details")?.setAttribute("open", "");
};
addEventListener("hashchange", openTarget);
openTarget();
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
