// The cards of the providers. A provider without a request has no card, unless it is the active one: a sentence below the
// cards names it. If there are many, twelve are shown until the button is pressed, and those in trouble come first.
import { bind, setText } from "/assets/dashboard/binding.js";
import { conditionOf } from "/assets/dashboard/condition.js";
import { sparkline } from "/assets/dashboard/sparkline.js";

const MAX_UNSORTED = 6; // up to so many cards keep their order; of more, those in trouble come first
const MAX_CARDS = 12;
const HOLD = 15; // seconds for which a provider that was in trouble keeps its place in front

export class Providers {
  #cards = new Map();
  #box = document.getElementById("cards");
  #summary = document.getElementById("providers-summary");
  #unused = document.getElementById("unused");
  #more = document.getElementById("more");
  #all = false;
  #repeat = () => {};
  #troubled = new Map(); // name → { rank, until }
  #visible = new Set();
  #observer = new IntersectionObserver((changes) => {
    for (const { target, isIntersecting } of changes) this.#visible[isIntersecting ? "add" : "delete"](target);
    this.#draw();
  });
  #drawSparkline = () => {}; // draws the sparkline of (name, canvas) from the last snapshot

  constructor() {
    this.#more.addEventListener("click", () => {
      this.#all = !this.#all;
      this.#repeat();
    });
  }

  /** Show the providers. */
  update(stats, recent, history) {
    this.#repeat = () => this.update(stats, recent, history);
    const all = Object.entries(stats.providers);
    const conditions = new Map(all.map(([name, provider]) => [name, conditionOf(provider)]));
    const grouped = withOthers(stats.groups);
    const used = all.filter(([, provider]) => provider.active || provider.requests || provider.in_flight || provider.waiting).map(([name]) => name);
    const shown = this.#choose(used, conditions, stats.time);
    for (const [name, card] of this.#cards) if (!shown.includes(name)) this.#remove(name, card);
    shown.forEach((name, at) => {
      const { element, show } = this.#cards.get(name) ?? this.#make(name);
      const others = stats.fallbacks?.some((other) => other !== name) || grouped.has(name);
      show(stats.providers[name], recent.providers?.[name], conditions.get(name), others);
      if (this.#box.children[at] !== element) this.#box.insertBefore(element, this.#box.children[at]);
    });
    this.#more.hidden = used.length <= MAX_CARDS;
    this.#more.setAttribute("aria-expanded", this.#all);
    setText(this.#more, this.#all ? `Show ${MAX_CARDS}` : `Show all ${used.length}`);
    setText(this.#summary, used.length > 1 ? summary(used.map((name) => conditions.get(name))) : "");
    this.#showUnused(all.filter(([name]) => !used.includes(name)));
    this.#drawSparkline = (name, canvas) => {
      const columns = history.providers.get(name);
      if (columns) sparkline(canvas, history.times, columns, history.span, stats.providers[name].limit);
    };
    this.#draw();
  }

  /** Return the names of the providers with a card, in their order. */
  #choose(used, conditions, now) {
    for (const name of this.#troubled.keys()) if (!used.includes(name)) this.#troubled.delete(name);
    for (const name of used) {
      const rank = Math.floor(conditions.get(name).rank);
      if (rank >= 2) this.#troubled.set(name, { rank, until: now + HOLD });
      else if (now > this.#troubled.get(name)?.until) this.#troubled.delete(name);
    }
    if (used.length <= MAX_UNSORTED) return used;
    const rank = (name) => this.#troubled.get(name)?.rank ?? 0;
    const sorted = used.toSorted((a, b) => rank(b) - rank(a));
    return this.#all ? sorted : sorted.slice(0, MAX_CARDS);
  }

  #draw() {
    for (const [name, { element, canvas }] of this.#cards) if (this.#visible.has(element)) this.#drawSparkline(name, canvas);
  }

  #make(name) {
    const element = document.getElementById("card").content.firstElementChild.cloneNode(true);
    const mark = element.querySelector(".mark");
    const word = element.querySelector(".condition b");
    const fill = bind(element);
    element.dataset.provider = name;
    const show = (provider, lastMinute, state, others) => {
      const { pool, pace, silent } = provider;
      fill({
        ...provider,
        name,
        is_active: provider.active || null,
        messages: provider.learned?.messages === "no" ? null : provider.learned?.messages,
        batch: provider.waiting_by_class?.batch || null,
        pool: pool && { ...pool, busy: pool.open - pool.idle },
        silent: silent?.under_way ? { ...silent, number: silent.stalled + silent.unanswered } : null,
        cooling: pace?.cooling || null,
        continued: provider.continued?.last_minute ? provider.continued : null,
        rescued: provider.rescued || null,
        asked: asked(provider, others),
        trial: others ? provider.trial : null, // nobody else is asked: it has none
      }, lastMinute);
      element.dataset.tone = mark.dataset.tone = state.tone;
      mark.dataset.shape = state.shape;
      setText(word, state.word);
    };
    const card = { element, canvas: element.querySelector("canvas"), show };
    this.#cards.set(name, card);
    this.#box.append(element);
    this.#observer.observe(element);
    return card;
  }

  #remove(name, { element }) {
    this.#observer.unobserve(element);
    this.#visible.delete(element);
    element.remove();
    this.#cards.delete(name);
  }

  #showUnused(rest) {
    const label = ([name, provider]) => (provider.usable ? name : `${name} (not usable)`);
    const more = rest.length > 30 ? ` and ${rest.length - 30} more` : "";
    this.#unused.hidden = rest.length === 0;
    setText(this.#unused, `Without a request so far: ${rest.slice(0, 30).map(label).join(", ")}${more}`);
  }
}

/** Return the names of the providers that are in a group with others. */
function withOthers(groups = {}) {
  const several = Object.values(groups).map(({ members }) => new Set(members.map(({ provider }) => provider)));
  return new Set(several.filter(({ size }) => size > 1).flatMap((names) => [...names]));
}

/** Return when a provider is asked, which its breaker decides; *others* is whether another one can be asked instead. */
function asked({ state }, others) {
  if (state === "dead") return "for trials only";
  if (state === "sick" && others) return "after the others";
  return state && "as usual";
}

/** Return how many providers are in which condition, the worst first: "1 failing, 3 queueing, 96 working". */
function summary(conditions) {
  const words = conditions.toSorted((a, b) => b.rank - a.rank).map(({ word }) => word.toLowerCase());
  return Array.from(new Set(words), (word) => `${words.filter((other) => other === word).length} ${word}`).join(", ");
}
