// What happened, newest first: the server's incidents, and this page's own losses of the server.
const KEPT = 100;
const SHAPES = { info: "ring", warning: "triangle", error: "diamond" };
const TONES = { info: "gone", warning: "wait", error: "bad" };
const time = new Intl.DateTimeFormat("en", { timeStyle: "medium", hourCycle: "h23" });
const day = new Intl.DateTimeFormat("en", { month: "short", day: "numeric" });

export class Incidents {
  #list = document.getElementById("incident-list");
  #known = new Map(); // one that comes again with the history of a new connection is the same one

  constructor() {
    this.#show();
  }

  add(...incidents) {
    for (const one of incidents) this.#known.set(`${one.time} ${one.kind} ${one.text}`, one);
    const newest = [...this.#known].sort(([, a], [, b]) => b.time - a.time).slice(0, KEPT);
    this.#known = new Map(newest);
    this.#show();
  }

  #show() {
    const items = Array.from(this.#known.values(), item);
    if (!items.length) {
      const none = document.createElement("li");
      none.className = "none";
      none.textContent = "Nothing happened in the last ten minutes.";
      items.push(none);
    }
    this.#list.replaceChildren(...items);
  }
}

function item({ time: at, severity, text, provider }) {
  const row = document.createElement("li");
  row.dataset.severity = severity;
  const mark = row.appendChild(document.createElement("span"));
  mark.className = "mark";
  mark.dataset.shape = SHAPES[severity] ?? "ring";
  mark.dataset.tone = TONES[severity] ?? "gone";
  row.appendChild(document.createElement("b")).textContent = severity;
  const when = row.appendChild(document.createElement("time"));
  const date = new Date(at * 1000);
  when.dateTime = date.toISOString();
  when.textContent = (Date.now() - date > 43200000 ? `${day.format(date)} ` : "") + time.format(date);
  const what = row.appendChild(document.createElement("p"));
  what.textContent = provider && !text.includes(provider) ? `${provider}: ${text}` : text;
  return row;
}
