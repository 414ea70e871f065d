// The groups: a row for each, in which each member has a cell with its places and its state; hidden where there is none.
import { setText } from "/assets/dashboard/binding.js";
import * as numbers from "/assets/dashboard/numbers.js";

const MAX_ROWS = 50;
// The state of a member as a word, a tone and a shape; a well one that is full, works or is idle has no word.
const STATES = {
  sick: ["sick", "warning", "diamond"],
  cooling: ["cools down", "warning", "diamond"],
  key_refused: ["key refused", "bad", "cross"],
  dead: ["dead", "bad", "diamond"],
  off: ["off", "neutral", "cross"],
};
const OUT = ["cooling", "key_refused", "dead", "off"]; // these start nothing now

export class Groups {
  #section = document.getElementById("groups");
  #summary = document.getElementById("groups-summary");
  #body = this.#section.querySelector("tbody");
  #rows = new Map(); // name → row

  /** Show the groups of the snapshot *stats*. */
  update({ groups = {}, providers, active_group: active }) {
    const entries = Object.entries(groups);
    this.#section.hidden = !entries.length;
    const out = entries.filter(([, { members }]) => members.every(({ state }) => OUT.includes(state))).length;
    const more = entries.length > MAX_ROWS ? `the first ${MAX_ROWS} of ${numbers.count(entries.length)}` : "";
    setText(this.#summary, [more, out ? `${numbers.count(out)} without a member that can start anything` : ""].filter(Boolean).join(", "));
    const shown = entries.slice(0, MAX_ROWS);
    for (const [name, row] of this.#rows) if (!shown.some(([other]) => other === name)) this.#remove(name, row);
    shown.forEach(([name, group], at) => {
      const row = this.#rows.get(name) ?? this.#make(name);
      if (this.#body.rows[at] !== row) this.#body.insertBefore(row, this.#body.rows[at]);
      show(row, group, providers, name === active);
    });
  }

  #make(name) {
    const row = this.#body.insertRow();
    row.dataset.group = name;
    const head = row.appendChild(document.createElement("th"));
    head.scope = "row";
    head.append(name, document.createElement("small"));
    row.insertCell().append(document.createElement("ul"));
    for (let cell = 0; cell < 2; cell += 1) row.insertCell();
    this.#rows.set(name, row);
    return row;
  }

  #remove(name, row) {
    row.remove();
    this.#rows.delete(name);
  }
}

function show(row, { members, waiting, oldest_wait: oldest, cached_share: cached }, providers, active) {
  const [head, cells, queue, share] = row.cells;
  setText(head.lastElementChild, active ? " active" : "");
  const list = cells.firstElementChild;
  while (list.children.length > members.length) list.lastElementChild.remove();
  members.forEach((member, at) => showMember(list.children[at] ?? newMember(list), member, providers[member.provider]?.trouble));
  setText(queue, waiting ? `${numbers.count(waiting)}, oldest ${numbers.seconds(oldest)}` : "0");
  setText(share, numbers.share(cached));
}

function newMember(list) {
  const item = document.createElement("li");
  const mark = document.createElement("span");
  mark.className = "mark";
  item.append(mark, document.createElement("b"), document.createElement("span"));
  return list.appendChild(item);
}

function showMember(item, { provider, model, state, in_flight: taken, limit }, trouble) {
  const [mark, name, text] = item.children;
  const well = taken >= limit ? ["full", "warning", "square"] : ["", "good", taken ? "circle" : "ring"];
  const [word, tone, shape] = STATES[state] ?? (trouble ? [trouble.word.toLowerCase(), "warning", "diamond"] : well);
  item.title = model;
  item.dataset.tone = mark.dataset.tone = tone;
  mark.dataset.shape = shape;
  setText(name, provider);
  setText(text, `${numbers.count(taken)} of ${numbers.count(limit)}${word && `, ${word}`}`);
}
