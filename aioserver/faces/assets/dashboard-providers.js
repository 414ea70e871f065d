// A card for each provider that was ever asked, or is first in line; the others stand in one sentence.
import { bind, say } from "/assets/dashboard-binding.js";
import { SPAN } from "/assets/dashboard-history.js";
import { condition } from "/assets/dashboard-pressure.js";
import { sparkline } from "/assets/dashboard-sparkline.js";

const FEW = 6; // so many are seen at once and keep their order; of more, those in trouble come first
const HELD = 15; // seconds that one in trouble keeps its place in front

export class Providers {
  #cards = new Map();
  #box = document.getElementById("cards");
  #summary = document.getElementById("providers-summary");
  #asleep = document.getElementById("asleep");
  #inSight = new Set();
  #sight = new IntersectionObserver((changes) => {
    for (const { target, isIntersecting } of changes) this.#inSight[isIntersecting ? "add" : "delete"](target);
  });

  /** Show them; the answer is a map: provider → its condition. */
  update(stats, recent, history) {
    const all = Object.entries(stats.providers);
    const conditions = new Map(all.map(([name, one]) => [name, condition(one, recent.providers?.[name])]));
    const awake = all.filter(([, one]) => one.active || one.requests || one.in_flight || one.waiting);
    for (const [name, card] of this.#cards) if (!awake.some(([one]) => one === name)) this.#remove(name, card);
    for (const [name, provider] of awake) {
      const card = this.#cards.get(name) ?? this.#make(name);
      const state = conditions.get(name);
      card.troubled = state.rank >= 2 ? { rank: state.rank, until: stats.time + HELD } : card.troubled;
      if (stats.time > card.troubled.until) card.troubled = { rank: 0, until: 0 };
      card.show(provider, recent.providers?.[name], state);
    }
    this.#order(awake);
    this.#tell(all, awake, conditions);
    for (const [name, card] of this.#cards) {
      const columns = history.providers.get(name);
      if (columns && this.#inSight.has(card.element)) {
        sparkline(card.canvas, history.times, columns, SPAN, stats.providers[name].limit);
      }
    }
    return conditions;
  }

  #make(name) {
    const element = document.getElementById("card").content.firstElementChild.cloneNode(true);
    const mark = element.querySelector(".mark");
    const word = element.querySelector(".condition b");
    const fill = bind(element);
    element.dataset.provider = name;
    const show = (provider, lately, state) => {
      const { pool, pace } = provider;
      fill({
        ...provider,
        name,
        first_asked: provider.active || null,
        pool: pool && { ...pool, busy: pool.open - pool.idle },
        pace: pace && { ...pace, used: pace.per_minute - pace.left },
      }, lately);
      element.dataset.tone = mark.dataset.tone = state.tone;
      mark.dataset.shape = state.shape;
      say(word, state.word);
    };
    const card = { element, canvas: element.querySelector("canvas"), show, troubled: { rank: 0, until: 0 } };
    this.#cards.set(name, card);
    this.#box.append(element);
    this.#sight.observe(element);
    return card;
  }

  #remove(name, { element }) {
    this.#sight.unobserve(element);
    this.#inSight.delete(element);
    element.remove();
    this.#cards.delete(name);
  }

  #order(awake) {
    const cards = awake.map(([name]) => this.#cards.get(name));
    if (awake.length > FEW) cards.sort((a, b) => Math.floor(b.troubled.rank) - Math.floor(a.troubled.rank));
    cards.forEach(({ element }, at) => {
      if (this.#box.children[at] !== element) this.#box.insertBefore(element, this.#box.children[at]);
    });
  }

  #tell(all, awake, conditions) {
    const words = new Map();
    for (const [name] of awake) words.set(conditions.get(name).word, (words.get(conditions.get(name).word) ?? 0) + 1);
    const told = [...words].map(([word, number]) => `${number} ${word.toLowerCase()}`).join(", ");
    say(this.#summary, awake.length > 1 ? told : "");
    const rest = all.filter(([name]) => !this.#cards.has(name));
    const named = ([name, one]) => (one.usable ? name : `${name} (not usable)`);
    this.#asleep.hidden = rest.length === 0;
    say(this.#asleep, `Not asked so far: ${rest.slice(0, 30).map(named).join(", ")}${rest.length > 30 ? ` and ${rest.length - 30} more` : ""}`);
  }
}
