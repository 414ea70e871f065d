// The HTML names the values that it shows, and this file fills them in: data-show="path" with data-as="format",
// data-bar="path" with data-of="path", data-counters="path" for a table of counters, data-list="path" for counters in
// one line, and data-needs="path" for an element that is hidden while the value is absent.
import * as numbers from "/assets/dashboard/numbers.js";

const get = (data, path) => path.split(".").reduce((value, name) => value?.[name], data);

/** Set the text of *element*; an equal text is not set again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Return a function of (data, recent) that shows both below *root*; *recent* has the counters of the last minute. */
export function bind(root) {
  const updates = [
    ...each(root, "show", value),
    ...each(root, "bar", bar),
    ...each(root, "counters", counterTable),
    ...each(root, "list", list),
    ...each(root, "needs", needs),
  ];
  return (data, recent) => updates.forEach((update) => update(data, recent));
}

function each(root, name, make) {
  return Array.from(root.querySelectorAll(`[data-${name}]`), (element) => make(element, element.dataset[name]));
}

function value(element, path) {
  const format = numbers[element.dataset.as];
  if (!("unit" in element.dataset)) return (data) => setText(element, format(get(data, path)));
  const unit = document.createElement("small"); // "210 ms": the number is larger than its unit
  const number = document.createElement("span");
  element.append(number, unit);
  return (data) => {
    const [first, last] = format(get(data, path)).split("\u00a0");
    setText(number, first);
    setText(unit, last ? `\u00a0${last}` : "");
  };
}

function bar(element, path) {
  element.setAttribute("aria-hidden", "true"); // the numbers are beside it
  const { more, of } = element.dataset;
  const parts = (more ? [more, path] : [path]).map((part) => {
    const fill = element.appendChild(document.createElement("i"));
    return (data, limit) => {
      const share = limit > 0 ? Math.min(1, (get(data, part) ?? 0) / limit) : 0;
      fill.style.transform = `scaleX(${share.toFixed(4)})`;
      return share;
    };
  });
  return (data) => {
    const limit = get(data, of);
    const share = parts.map((part) => part(data, limit)).at(-1);
    element.dataset.level = share >= 1 ? "full" : share >= 0.9 ? "high" : "normal";
  };
}

function counterTable(table, path) {
  const body = table.tBodies[0];
  const head = table.tHead;
  const rows = new Map();
  const empty = body.insertRow().insertCell();
  empty.colSpan = 3;
  empty.className = "none";
  empty.textContent = table.dataset.none;
  return (data, recent) => {
    const counters = get(data, path) ?? {};
    for (const [code, total] of Object.entries(counters)) {
      if (!total) continue;
      if (!rows.has(code)) rows.set(code, counterRow(body, code));
      const lastMinute = get(recent, path)?.[code] ?? 0;
      const [row, recentCell, totalCell] = rows.get(code);
      row.classList.toggle("rising", lastMinute > 0);
      setText(recentCell, lastMinute > 0 ? numbers.count(lastMinute) : "–");
      setText(totalCell, numbers.count(total));
    }
    for (const [code, [row]] of rows) {
      if (counters[code]) continue;
      row.remove();
      rows.delete(code);
    }
    empty.parentElement.hidden = rows.size > 0;
    head.hidden = rows.size === 0;
  };
}

function counterRow(body, code) {
  const row = body.insertRow();
  row.dataset.code = code;
  const name = row.appendChild(document.createElement("th"));
  name.scope = "row";
  name.textContent = numbers.words(code);
  return [row, row.insertCell(), row.insertCell()];
}

function list(element, path) {
  return (data) => {
    const counters = Object.entries(get(data, path) ?? {});
    setText(element, counters.map(([code, total]) => `${numbers.count(total)} ${numbers.words(code)}`).join(", "));
  };
}

function needs(element, path) {
  return (data) => {
    element.hidden = (get(data, path) ?? null) === null;
  };
}
