// The callers: a row for each key, those first that have spent most today; hidden where there are no keys.
import { setText } from "/assets/dashboard/binding.js";
import * as numbers from "/assets/dashboard/numbers.js";

const MAX_ROWS = 50;

export class Callers {
  #section = document.getElementById("callers");
  #summary = document.getElementById("callers-summary");
  #body = this.#section.querySelector("tbody");

  /** Show the keys of the snapshot *stats*. */
  update({ keys = {} }) {
    const entries = Object.entries(keys).sort(([, one], [, other]) => other.tokens_today - one.tokens_today);
    this.#section.hidden = !entries.length;
    setText(this.#summary, entries.length > MAX_ROWS ? `the first ${MAX_ROWS} of ${numbers.count(entries.length)}` : "");
    const shown = entries.slice(0, MAX_ROWS);
    while (this.#body.rows.length > shown.length) this.#body.deleteRow(-1);
    shown.forEach(([name, key], at) => show(this.#body.rows[at] ?? this.#make(), name, key));
  }

  #make() {
    const row = this.#body.insertRow();
    row.appendChild(document.createElement("th")).scope = "row";
    for (let cell = 0; cell < 5; cell += 1) row.insertCell();
    return row;
  }
}

function show(row, name, { running, limit, waiting, tokens_today: tokens, budgets }) {
  const { tokens_per_day: day, tokens_per_minute: minute } = budgets;
  const used = day && (day.used + day.reserved) / day.limit;
  const texts = [
    name,
    numbers.count(tokens),
    day ? `${numbers.share(used)} of ${numbers.count(day.limit)}` : numbers.text(),
    numbers.count(minute?.remaining),
    `${numbers.count(running)} of ${numbers.count(limit)}`,
    numbers.count(waiting),
  ];
  row.classList.toggle("rising", waiting > 0 || used >= 1);
  texts.forEach((text, at) => setText(row.cells[at], text));
}
