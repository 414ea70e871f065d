// Conversations and choices in the browser's storage, bounded. One entry for each conversation, so
// that two windows do not write over each other's.

import { ended, newId, newTurn } from "./turn.js";

const PREFIX = "aioserver.chat.";
const CONVERSATION = `${PREFIX}conversation.`;
const MAX_CONVERSATIONS = 50;
const MAX_TURNS = 100; // of one conversation: 200 messages
const MAX_STORED = 1 << 20; // characters of one conversation: it shall not drive out the others
const MAX_PART = 1 << 18; // of one question, or one answer
const SAVE_EVERY = 500; // milliseconds, while an answer comes

export function newConversation() {
  return { id: newId(), used: Date.now(), draft: "", turns: [] };
}

export class Store {
  // `busy(conversation)`: whether an answer runs in it; such a one is never given up.
  // `changed(id)`: another window changed it. `full(text)`: something could not be kept.
  constructor({ busy, changed, full }) {
    this.conversations = new Map();
    this.busy = busy;
    this.full = full;
    this.unsaved = new Set();
    this.timer = null;
    try {
      this.storage = window.localStorage;
      this.load();
    } catch {
      this.storage = null; // the person has switched it off
      full("This browser keeps nothing for this page: a reload loses the conversations.");
    }
    window.addEventListener("storage", (event) => {
      if (event.key === null || event.key.startsWith(CONVERSATION)) this.reread(event, changed);
    });
    window.addEventListener("pagehide", () => this.flush());
    document.addEventListener("visibilitychange", () => this.flush());
  }

  // The last used first.
  get list() {
    return [...this.conversations.values()].sort((a, b) => b.used - a.used);
  }

  load() {
    for (const key of Object.keys(this.storage)) {
      if (!key.startsWith(CONVERSATION)) continue;
      const found = read(this.storage.getItem(key));
      if (found) this.conversations.set(found.id, found);
    }
  }

  add(conversation, turn) {
    conversation.turns.push(turn);
    conversation.turns.splice(0, conversation.turns.length - MAX_TURNS);
    conversation.used = Date.now();
    this.conversations.set(conversation.id, conversation);
    while (this.conversations.size > MAX_CONVERSATIONS && this.giveUpOldest(conversation));
    this.save(conversation);
  }

  save(conversation) {
    this.unsaved.delete(conversation);
    if (this.storage === null || !this.conversations.has(conversation.id)) return;
    const written = entry(conversation);
    while (!this.write(CONVERSATION + conversation.id, written)) {
      if (!this.giveUpOldest(conversation)) {
        this.full("The browser's storage is full: a reload loses what is new here.");
        return;
      }
      this.full("The browser's storage is full: the oldest conversation was removed.");
    }
  }

  // Within SAVE_EVERY: an answer has many events, and each writing writes the whole conversation.
  saveSoon(conversation) {
    this.unsaved.add(conversation);
    this.timer ??= setTimeout(() => this.flush(), SAVE_EVERY);
  }

  flush() {
    clearTimeout(this.timer);
    this.timer = null;
    for (const conversation of this.unsaved) this.save(conversation);
  }

  remove(conversation) {
    this.conversations.delete(conversation.id);
    this.unsaved.delete(conversation);
    this.storage?.removeItem(CONVERSATION + conversation.id);
  }

  setting(name, otherwise) {
    try {
      return JSON.parse(this.storage.getItem(PREFIX + name)) ?? otherwise;
    } catch {
      return otherwise;
    }
  }

  set(name, value) {
    if (this.storage !== null) this.write(PREFIX + name, JSON.stringify(value));
  }

  write(key, value) {
    try {
      this.storage.setItem(key, value);
      return true;
    } catch {
      return false;
    }
  }

  giveUpOldest(but) {
    const free = this.list.filter((one) => one !== but && !this.busy(one));
    if (free.length) this.remove(free.at(-1));
    return free.length > 0;
  }

  // Another window wrote. A conversation in which an answer runs is followed here as well, and
  // what is known here is as new.
  reread({ key, newValue }, changed) {
    if (key === null) return; // all was cleared: what is here is written again when it changes
    const id = key.slice(CONVERSATION.length);
    const mine = this.conversations.get(id);
    if (mine && this.busy(mine) && newValue !== null) return;
    const theirs = read(newValue);
    if (theirs) this.conversations.set(id, theirs);
    else this.conversations.delete(id);
    changed(id, mine);
  }
}

// What is stored of a conversation: its newest turns, within the bounds.
function entry(conversation) {
  const turns = [];
  let size = 0;
  for (const turn of conversation.turns.toReversed()) {
    const unheard = turn.state === "unsent" || turn.state === "sent";
    if (unheard && turn.question.length > MAX_PART) continue; // cut, it would be another question
    const stored = bounded(turn);
    size += JSON.stringify(stored).length;
    if (size > MAX_STORED) break;
    turns.unshift(stored);
  }
  return JSON.stringify({ ...conversation, turns });
}

// A long answer that comes is read again from its start after a reload; of one that is over, the
// beginning is kept.
function bounded(turn) {
  const question = turn.question.slice(0, MAX_PART);
  const size = turn.text.length + turn.reasoning.length + JSON.stringify(turn.tools).length;
  if (size <= MAX_PART) return { ...turn, question };
  const short = { ...turn, question, reasoning: "", tools: [] };
  if (!ended(turn)) return { ...short, text: "", last: 0 };
  return { ...short, text: turn.text.slice(0, MAX_PART), cut: true };
}

// A conversation out of its entry; null: it is none.
function read(entry) {
  try {
    const found = JSON.parse(entry);
    if (typeof found.id !== "string" || !found.turns.length) return null;
    const blank = newTurn("", { provider: null, model: null });
    const turns = found.turns.map((turn) => ({ ...blank, ...turn, place: null }));
    return { ...newConversation(), ...found, turns };
  } catch {
    return null;
  }
}
