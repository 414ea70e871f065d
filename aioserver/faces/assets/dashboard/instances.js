// The instances of a cluster, each with its share of the numbers above; hidden where there is one process.
import { setText } from "/assets/dashboard/binding.js";
import * as numbers from "/assets/dashboard/numbers.js";

const NOT_HEARD = "does not answer";

export class Instances {
  #section = document.getElementById("instances");
  #summary = document.getElementById("instances-summary");
  #body = this.#section.querySelector("tbody");
  #rows = new Map(); // name → row

  /** Show the instances of the snapshot *stats*. */
  update({ instances }) {
    this.#section.hidden = !instances;
    if (!instances) return;
    const entries = Object.entries(instances);
    const silent = entries.filter(([, instance]) => !instance).length;
    setText(this.#summary, `${entries.length} together${silent ? `, of which ${silent} ${silent > 1 ? "do" : "does"} not answer` : ""}`);
    for (const [name, row] of this.#rows) if (!(name in instances)) this.#remove(name, row);
    for (const [name, instance] of entries) show(this.#rows.get(name) ?? this.#make(name), instance);
  }

  #make(name) {
    const row = this.#body.insertRow();
    row.dataset.instance = name;
    const head = row.appendChild(document.createElement("th"));
    head.scope = "row";
    head.textContent = name;
    for (let cell = 0; cell < 7; cell += 1) row.insertCell();
    this.#rows.set(name, row);
    return row;
  }

  #remove(name, row) {
    row.remove();
    this.#rows.delete(name);
  }
}

function show(row, instance) {
  const texts = instance
    ? [
        `${numbers.count(instance.connections)} of ${numbers.count(instance.connections_limit)}`,
        numbers.count(instance.running),
        numbers.count(instance.tokens_per_second),
        numbers.seconds(instance.lag_max),
        numbers.share(instance.cpu),
        numbers.bytes(instance.rss_bytes),
        numbers.seconds(instance.uptime),
      ]
    : [NOT_HEARD, "", "", "", "", "", ""];
  row.classList.toggle("rising", !instance);
  Array.from(row.cells).slice(1).forEach((cell, at) => setText(cell, texts[at]));
}
