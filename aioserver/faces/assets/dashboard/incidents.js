// The list of incidents, newest first: the server's, and the times for which this page had no connection.
const KEPT = 100;
const SHAPES = { info: "ring", warning: "triangle", error: "diamond" };
const TONES = { info: "neutral", warning: "warning", error: "bad" };
const time = new Intl.DateTimeFormat("en", { timeStyle: "medium", hourCycle: "h23" });
const day = new Intl.DateTimeFormat("en", { month: "short", day: "numeric" });

export class Incidents {
  #list = document.getElementById("incident-list");
  #known = new Map(); // by identity: a new connection brings the incidents of the last minutes again

  constructor() {
    this.#show();
  }

  add(...incidents) {
    for (const incident of incidents) this.#known.set(`${incident.time} ${incident.kind} ${incident.text}`, incident);
    const newest = [...this.#known].sort(([, a], [, b]) => b.time - a.time).slice(0, KEPT);
    this.#known = new Map(newest);
    this.#show();
  }

  #show() {
    const items = Array.from(this.#known.values(), newItem);
    if (!items.length) {
      const none = document.createElement("li");
      none.className = "none";
      none.textContent = "There was no incident in the last ten minutes.";
      items.push(none);
    }
    this.#list.replaceChildren(...items);
  }
}

function newItem({ time: at, severity, text, provider, instance }) {
  const item = document.createElement("li");
  item.dataset.severity = severity;
  const mark = item.appendChild(document.createElement("span"));
  mark.className = "mark";
  mark.dataset.shape = SHAPES[severity] ?? "ring";
  mark.dataset.tone = TONES[severity] ?? "neutral";
  item.appendChild(document.createElement("b")).textContent = severity;
  const when = item.appendChild(document.createElement("time"));
  const date = new Date(at * 1000);
  when.dateTime = date.toISOString();
  when.textContent = (Date.now() - date > 43200000 ? `${day.format(date)} ` : "") + time.format(date);
  const what = item.appendChild(document.createElement("p"));
  const whole = provider && !text.includes(provider) ? `${provider}: ${text}` : text;
  what.textContent = instance ? `${whole} (at ${instance})` : whole;
  return item;
}
