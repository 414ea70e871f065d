// A card for each provider that was ever asked, or is first in line; the others stand in one sentence. Of very many
// a dozen is shown until all are wanted, those in trouble first.
import { bind, say } from "/assets/dashboard/binding.js";
import { condition } from "/assets/dashboard/pressure.js";
import { sparkline } from "/assets/dashboard/sparkline.js";

const FEW = 6; // so many are seen at once and keep their order; of more, those in trouble come first
const DOZEN = 12;
const HELD = 15; // seconds that one in trouble keeps its place in front

export class Providers {
  #cards = new Map();
  #box = document.getElementById("cards");
  #summary = document.getElementById("providers-summary");
  #asleep = document.getElementById("asleep");
  #more = document.getElementById("more");
  #all = false;
  #repeat = () => {};
  #troubled = new Map(); // name → { rank, until }
  #inSight = new Set();
  #sight = new IntersectionObserver((changes) => {
    for (const { target, isIntersecting } of changes) this.#inSight[isIntersecting ? "add" : "delete"](target);
    this.#draw();
  });
  #sketch = () => {}; // the sparkline of (name, canvas), as of the last update

  constructor() {
    this.#more.addEventListener("click", () => {
      this.#all = !this.#all;
      this.#repeat();
    });
  }

  /** Show them; the answer is a map: provider → its condition. */
  update(stats, recent, history) {
    this.#repeat = () => this.update(stats, recent, history);
    const all = Object.entries(stats.providers);
    const conditions = new Map(all.map(([name, one]) => [name, condition(name, one)]));
    const awake = all.filter(([, one]) => one.active || one.requests || one.in_flight || one.waiting).map(([name]) => name);
    const wanted = this.#choose(awake, conditions, stats.time);
    for (const [name, card] of this.#cards) if (!wanted.includes(name)) this.#remove(name, card);
    wanted.forEach((name, at) => {
      const { element, show } = this.#cards.get(name) ?? this.#make(name);
      show(stats.providers[name], recent.providers?.[name], conditions.get(name));
      if (this.#box.children[at] !== element) this.#box.insertBefore(element, this.#box.children[at]);
    });
    this.#more.hidden = awake.length <= DOZEN;
    this.#more.setAttribute("aria-expanded", this.#all);
    say(this.#more, this.#all ? `Show ${DOZEN}` : `Show all ${awake.length}`);
    say(this.#summary, awake.length > 1 ? summary(awake.map((name) => conditions.get(name))) : "");
    this.#tell(all.filter(([name]) => !awake.includes(name)));
    this.#sketch = (name, canvas) => {
      const columns = history.providers.get(name);
      if (columns) sparkline(canvas, history.times, columns, history.span, stats.providers[name].limit);
    };
    this.#draw();
    return conditions;
  }

  /** The names of those to be shown, in their order. */
  #choose(awake, conditions, now) {
    for (const name of this.#troubled.keys()) if (!awake.includes(name)) this.#troubled.delete(name);
    for (const name of awake) {
      const rank = Math.floor(conditions.get(name).rank);
      if (rank >= 2) this.#troubled.set(name, { rank, until: now + HELD });
      else if (now > this.#troubled.get(name)?.until) this.#troubled.delete(name);
    }
    if (awake.length <= FEW) return awake;
    const rank = (name) => this.#troubled.get(name)?.rank ?? 0;
    const sorted = awake.toSorted((a, b) => rank(b) - rank(a));
    return this.#all ? sorted : sorted.slice(0, DOZEN);
  }

  #draw() {
    for (const [name, { element, canvas }] of this.#cards) if (this.#inSight.has(element)) this.#sketch(name, canvas);
  }

  #make(name) {
    const element = document.getElementById("card").content.firstElementChild.cloneNode(true);
    const mark = element.querySelector(".mark");
    const word = element.querySelector(".condition b");
    const fill = bind(element);
    element.dataset.provider = name;
    const show = (provider, lately, state) => {
      const { pool, pace, silent } = provider;
      fill({
        ...provider,
        name,
        first_asked: provider.active || null,
        pool: pool && { ...pool, busy: pool.open - pool.idle },
        silent: silent?.under_way ? { ...silent, number: silent.stalled + silent.unanswered } : null,
        resting: pace?.cooling || null,
      }, lately);
      element.dataset.tone = mark.dataset.tone = state.tone;
      mark.dataset.shape = state.shape;
      say(word, state.word);
    };
    const card = { element, canvas: element.querySelector("canvas"), show };
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

  #tell(rest) {
    const named = ([name, one]) => (one.usable ? name : `${name} (not usable)`);
    const more = rest.length > 30 ? ` and ${rest.length - 30} more` : "";
    this.#asleep.hidden = rest.length === 0;
    say(this.#asleep, `Not asked so far: ${rest.slice(0, 30).map(named).join(", ")}${more}`);
  }
}

/** "1 failing, 3 queueing, 96 working": how many are how, the worst first. */
function summary(conditions) {
  const words = conditions.toSorted((a, b) => b.rank - a.rank).map(({ word }) => word.toLowerCase());
  return Array.from(new Set(words), (word) => `${words.filter((one) => one === word).length} ${word}`).join(", ");
}
