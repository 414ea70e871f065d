// The tables of callers, groups, instances and lost caches: a row for each of them. A table is hidden where there is none.
import { setText } from "/assets/dashboard/binding.js";
import * as numbers from "/assets/dashboard/numbers.js";

const MAX_ROWS = 50; // of a table whose rows the configuration names: it may name very many
const NOT_HEARD = "does not answer";
// The state of a member as a word, a tone and a shape; a well one that is full, works or is idle has no word.
const STATES = {
  sick: ["sick", "warning", "diamond"],
  cooling: ["cools down", "warning", "diamond"],
  key_refused: ["key refused", "bad", "cross"],
  dead: ["dead", "bad", "diamond"],
  off: ["off", "neutral", "cross"],
};
const OUT = ["cooling", "key_refused", "dead", "off"]; // these start nothing now

class Table {
  #section;
  #summary;
  #body;
  #cells;
  #rows = new Map(); // name → row

  /** The section with this *id* has the table; a row has a head and so many *cells*. */
  constructor(id, cells) {
    this.#section = document.getElementById(id);
    this.#summary = document.getElementById(`${id}-summary`);
    this.#body = this.#section.querySelector("tbody");
    this.#cells = cells;
  }

  /** Show (name, value) of the *entries* by fill(row, value), at most so many, and the *notes* that are not "" above them. */
  show(entries, notes, fill, most = MAX_ROWS) {
    this.#section.hidden = !entries.length;
    const more = entries.length > most && `the first ${most} of ${numbers.count(entries.length)}`;
    setText(this.#summary, [more, ...notes].filter(Boolean).join(", "));
    const shown = new Map(entries.slice(0, most));
    for (const [name, row] of this.#rows) if (!shown.has(name)) this.#remove(name, row);
    [...shown].forEach(([name, value], at) => {
      const row = this.#rows.get(name) ?? this.#make(name);
      if (this.#body.rows[at] !== row) this.#body.insertBefore(row, this.#body.rows[at]);
      fill(row, value);
    });
  }

  #make(name) {
    const row = this.#body.insertRow();
    row.dataset.name = name;
    const head = row.appendChild(document.createElement("th"));
    head.scope = "row";
    head.append(name);
    for (let cell = 0; cell < this.#cells; cell += 1) row.insertCell();
    this.#rows.set(name, row);
    return row;
  }

  #remove(name, row) {
    row.remove();
    this.#rows.delete(name);
  }
}

const callers = new Table("callers", 5);
const groups = new Table("groups", 3);
const instances = new Table("instances", 7);
const losses = new Table("losses", 1);
const WORST = 3; // regions that are named

/** Show what the snapshot *stats* has of the four. The callers that have spent most today come first. */
export function showTables(stats) {
  const keys = Object.entries(stats.keys ?? {}).sort(([, one], [, other]) => other.tokens_today - one.tokens_today);
  callers.show(keys, [], showCaller);
  const all = Object.entries(stats.groups ?? {});
  const out = all.filter(([, { members }]) => members.every(({ state }) => OUT.includes(state))).length;
  const note = out && `${numbers.count(out)} without a member that can start anything`;
  groups.show(all, [note], (row, group) => showGroup(row, group, stats));
  const { last_hour: lost, regions } = stats.cache_losses ?? {};
  const worst = byNumber(regions).slice(0, WORST);
  const named = worst.map(([region, tokens]) => `${region} ${numbers.count(tokens)}`).join(", ");
  losses.show(byNumber(lost), [named && `first difference: ${named}`], (row, tokens) => setCells(row, [numbers.count(tokens)]));
  const each = Object.entries(stats.instances ?? {});
  const silent = each.filter(([, instance]) => !instance).length;
  const together = `${each.length} together`;
  const notes = [together, silent && `of which ${silent} ${silent > 1 ? "do" : "does"} not answer`, showFormer(stats.former ?? [])];
  instances.show(each, notes, showInstance, Infinity);
}

/** The entries of *counts*, the largest first. */
function byNumber(counts) {
  return Object.entries(counts ?? {}).sort(([, one], [, other]) => other - one);
}

function setCells(row, texts) {
  texts.forEach((text, at) => setText(row.cells[at + 1], text));
}

function showCaller(row, { running, limit, waiting, tokens_today: tokens, budgets }) {
  const minute = budgets.tokens_per_minute;
  const [period, most, used] = fullest(budgets);
  row.classList.toggle("rising", waiting > 0 || used >= 1);
  setCells(row, [
    numbers.count(tokens),
    period ? `${numbers.share(used)} of ${numbers.count(most)} a ${period}` : numbers.text(),
    numbers.count(minute?.remaining),
    `${numbers.count(running)} of ${numbers.count(limit)}`,
    numbers.count(waiting),
  ]);
}

/** The period of a day or longer of whose budget the largest share is used, its limit and that share. */
function fullest(budgets) {
  const shares = ["day", "week", "month"].flatMap((period) => {
    const budget = budgets[`tokens_per_${period}`];
    return budget ? [[period, budget.limit, (budget.used + budget.reserved) / budget.limit]] : [];
  });
  return shares.reduce((most, next) => (next[2] > most[2] ? next : most), shares[0] ?? []);
}

/** Say what runs in processes that were replaced. */
function showFormer(former) {
  if (!former.length) return "";
  const answers = former.reduce((sum, each) => sum + each.answers, 0);
  const [longest, until] = ["longest", "until"].map((key) => Math.max(...former.map((each) => each[key])));
  const at = new Date(until * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const where = numbers.some(former.length, "former process", "former processes");
  return `${numbers.some(answers, "answer still runs", "answers still run")} in ${where}, longest ${numbers.seconds(longest)}, until ${at}`;
}

function showInstance(row, instance) {
  row.classList.toggle("rising", !instance);
  const texts = instance && [
    `${numbers.count(instance.connections)} of ${numbers.count(instance.connections_limit)}`,
    numbers.count(instance.running),
    numbers.count(instance.tokens_per_second),
    numbers.seconds(instance.lag_max),
    numbers.share(instance.cpu),
    numbers.bytes(instance.rss_bytes),
    numbers.seconds(instance.uptime),
  ];
  setCells(row, texts ?? [NOT_HEARD, "", "", "", "", "", ""]);
}

function showGroup(row, { members, waiting, oldest_wait: oldest, cached_share: cached }, { providers, active_group: active }) {
  const [head, cell] = row.cells;
  const small = head.querySelector("small") ?? head.appendChild(document.createElement("small"));
  setText(small, row.dataset.name === active ? " active" : "");
  const list = cell.firstElementChild ?? cell.appendChild(document.createElement("ul"));
  while (list.children.length > members.length) list.lastElementChild.remove();
  members.forEach((member, at) => showMember(list.children[at] ?? newMember(list), member, providers[member.provider]?.trouble));
  setText(row.cells[2], waiting ? `${numbers.count(waiting)}, oldest ${numbers.seconds(oldest)}` : "0");
  setText(row.cells[3], numbers.share(cached));
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
