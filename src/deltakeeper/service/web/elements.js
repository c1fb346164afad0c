// Elements of the page. Every text is set as text: nothing here, or anywhere in the page, makes markup of it.

export const byId = (id) => document.getElementById(id);

export const make = (tag, parts = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), parts);
  node.append(...children);
  return node;
};

export const draw = (tag, parts) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(parts)) node.setAttribute(name, value);
  return node;
};

// Controls but tab and newline, direction overrides and isolates, zero-width marks, lone surrogates: as in the reports.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]/gu;
export const seen = (text) => text.replace(UNSEEN, "\ufffd");

const whole = new Intl.NumberFormat("en");
export const count = (value) => whole.format(value);
export const share = (part, all) => (all > 0 ? `${Math.round((100 * part) / all)} %` : "none yet");
export const bytes = (value) => {
  const unit = Math.min(4, Math.floor(Math.log2(Math.max(1, value)) / 10));
  const size = value / 1024 ** unit;
  return `${unit && size < 10 ? size.toFixed(1) : Math.round(size)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
};
export const seconds = (value) => (value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(value < 10 ? 1 : 0)} s`);

// What was drawn stays as long as what it shows does: a selection and a reader's place in it survive.
const drawn = new Map();
export const drawOnce = (id, data, build) => {
  const text = JSON.stringify(data);
  if (drawn.get(id) === text) return;
  drawn.set(id, text);
  byId(id).replaceChildren(...build(data));
};
