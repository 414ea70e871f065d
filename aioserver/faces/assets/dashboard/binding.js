// The HTML says what it shows, this puts it there: data-show="path" data-as="format", data-bar="path" data-of="path",
// data-tally="path" for a table of counters, data-list="path" for them in one line, data-needs="path" for what may be absent.
import * as numbers from "/assets/dashboard/numbers.js";

const get = (data, path) => path.split(".").reduce((at, step) => at?.[step], data);

export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A function of (data, recent) that shows both below *root*; *recent* are the same counters over the last minute. */
export function bind(root) {
  const shown = [
    ...each(root, "show", value),
    ...each(root, "bar", bar),
    ...each(root, "tally", tally),
    ...each(root, "list", list),
    ...each(root, "needs", needs),
  ];
  return (data, recent) => shown.forEach((show) => show(data, recent));
}

function each(root, name, make) {
  return Array.from(root.querySelectorAll(`[data-${name}]`), (element) => make(element, element.dataset[name]));
}

function value(element, path) {
  const format = numbers[element.dataset.as];
  if (!("unit" in element.dataset)) return (data) => say(element, format(get(data, path)));
  const unit = document.createElement("small"); // "210 ms": the number is what is read from afar
  const number = document.createElement("span");
  element.append(number, unit);
  return (data) => {
    const [first, last] = format(get(data, path)).split("\u00a0");
    say(number, first);
    say(unit, last ? `\u00a0${last}` : "");
  };
}

function bar(element, path) {
  element.setAttribute("aria-hidden", "true"); // the numbers stand beside it
  const { more, of } = element.dataset;
  const parts = (more ? [more, path] : [path]).map((part) => {
    const fill = element.appendChild(document.createElement("i"));
    return (data, limit) => {
      const full = limit > 0 ? Math.min(1, (get(data, part) ?? 0) / limit) : 0;
      fill.style.transform = `scaleX(${full.toFixed(4)})`;
      return full;
    };
  });
  return (data) => {
    const limit = get(data, of);
    const full = parts.map((part) => part(data, limit)).at(-1);
    element.dataset.level = full >= 1 ? "full" : full >= 0.9 ? "high" : "fine";
  };
}

function tally(table, path) {
  const body = table.tBodies[0];
  const head = table.tHead;
  const rows = new Map();
  const none = body.insertRow().insertCell();
  none.colSpan = 3;
  none.className = "none";
  none.textContent = table.dataset.none;
  return (data, recent) => {
    const counters = get(data, path) ?? {};
    for (const [code, total] of Object.entries(counters)) {
      if (!total) continue;
      if (!rows.has(code)) rows.set(code, line(body, code));
      const lately = get(recent, path)?.[code] ?? 0;
      const [row, latest, all] = rows.get(code);
      row.classList.toggle("moving", lately > 0);
      say(latest, lately > 0 ? numbers.count(lately) : "–");
      say(all, numbers.count(total));
    }
    for (const [code, [row]] of rows) {
      if (counters[code]) continue;
      row.remove();
      rows.delete(code);
    }
    none.parentElement.hidden = rows.size > 0;
    head.hidden = rows.size === 0;
  };
}

function line(body, code) {
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
    say(element, counters.map(([code, total]) => `${numbers.count(total)} ${numbers.words(code)}`).join(", "));
  };
}

function needs(element, path) {
  return (data) => {
    element.hidden = (get(data, path) ?? null) === null;
  };
}
