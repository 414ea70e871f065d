// Conversations and settings in the browser's storage, with bounds. Each conversation has its own
// entry, so that two windows do not overwrite each other's conversations. The entries of each key are
// apart from those of the others: who logs in next in the same browser sees nothing of them.

import { ended, newId, newTurn } from "./turn.js";

const PREFIX = "aioserver.chat.";
const MAX_CONVERSATIONS = 50;
const MAX_TURNS = 100; // of one conversation: 200 messages
const MAX_STORED = 1 << 20; // characters of one conversation, so that it leaves room for others
const MAX_PART = 1 << 18; // characters of one question or one answer
const SAVE_EVERY = 500; // milliseconds, while an answer comes

export function newConversation() {
  return { id: newId(), used: Date.now(), draft: "", turns: [] };
}

// How the names of the entries of *owner* begin: the name of a key; null: the server wants no key. No prefix is the beginning of
// another.
function prefixOf(owner) {
  return owner === null ? PREFIX : `aioserver.chat/${encodeURIComponent(owner)}/`;
}

export class Store {
  // `busy(conversation)` returns whether an answer runs in it; such a conversation is never
  // removed. `changed(id, before)` is called when another window changed it, and `warn(text)` when
  // something could not be stored.
  constructor({ busy, changed, warn }) {
    this.conversations = new Map();
    this.busy = busy;
    this.warn = warn;
    this.unsaved = new Set();
    this.timer = null;
    this.owner = null; // whose entries are shown; undefined: nobody has logged in, and nothing is stored
    try {
      this.storage = window.localStorage;
      this.load();
    } catch {
      this.storage = null; // the storage is switched off in this browser
      warn("This browser stores nothing for this page: a reload loses the conversations.");
    }
    window.addEventListener("storage", (event) => {
      if (event.key === null || (this.stores && event.key.startsWith(this.conversation))) this.reload(event, changed);
    });
    window.addEventListener("pagehide", () => this.flush());
    document.addEventListener("visibilitychange", () => this.flush());
  }

  // The conversations; the one that was used last comes first.
  get list() {
    return [...this.conversations.values()].sort((a, b) => b.used - a.used);
  }

  // Show what is stored of *owner*, and nothing of the former one.
  open(owner) {
    this.flush();
    this.unsaved.clear();
    this.conversations = new Map();
    this.owner = owner;
    if (this.stores) this.load();
  }

  // Remove all that is stored of *owner*, who is not shown any more.
  forget(owner) {
    for (const key of Object.keys(this.storage ?? {})) if (key.startsWith(prefixOf(owner))) this.storage.removeItem(key);
  }

  get stores() {
    return this.storage !== null && this.owner !== undefined;
  }

  get conversation() {
    return `${prefixOf(this.owner)}conversation.`;
  }

  load() {
    for (const key of Object.keys(this.storage)) {
      if (!key.startsWith(this.conversation)) continue;
      const conversation = parse(this.storage.getItem(key));
      if (conversation) this.conversations.set(conversation.id, conversation);
    }
  }

  add(conversation, turn) {
    conversation.turns.push(turn);
    conversation.used = Date.now();
    this.keep(conversation);
  }

  // Store *conversation*, which may be new here.
  keep(conversation) {
    conversation.turns.splice(0, conversation.turns.length - MAX_TURNS);
    this.conversations.set(conversation.id, conversation);
    while (this.conversations.size > MAX_CONVERSATIONS && this.removeOldest(conversation));
    this.save(conversation);
  }

  save(conversation) {
    this.unsaved.delete(conversation);
    if (!this.stores || this.conversations.get(conversation.id) !== conversation) return;
    const entry = serialize(conversation);
    while (!this.write(this.conversation + conversation.id, entry)) {
      if (!this.removeOldest(conversation)) {
        this.warn("The browser's storage is full: a reload loses the new messages.");
        return;
      }
      this.warn("The browser's storage is full: the oldest conversation was removed.");
    }
  }

  // Save within SAVE_EVERY: an answer has many events, and each save writes the conversation whole.
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
    if (this.stores) this.storage.removeItem(this.conversation + conversation.id);
  }

  // A setting of the owner's *own*, or of this browser.
  getSetting(name, fallback, { own = false } = {}) {
    if (own && !this.stores) return fallback;
    try {
      return JSON.parse(this.storage.getItem((own ? prefixOf(this.owner) : PREFIX) + name)) ?? fallback;
    } catch {
      return fallback;
    }
  }

  setSetting(name, value, { own = false } = {}) {
    if (own ? this.stores : this.storage !== null) this.write((own ? prefixOf(this.owner) : PREFIX) + name, JSON.stringify(value));
  }

  write(key, value) {
    try {
      this.storage.setItem(key, value);
      return true;
    } catch {
      return false;
    }
  }

  // Remove the oldest conversation that is not *kept* and has no running answer; return whether
  // there was one.
  removeOldest(kept) {
    const removable = this.list.filter((other) => other !== kept && !this.busy(other));
    if (removable.length) this.remove(removable.at(-1));
    return removable.length > 0;
  }

  // Another window has written. A conversation in which an answer runs is followed in this window
  // as well, and its state here is as new.
  reload({ key, newValue }, changed) {
    if (key === null) return; // all was cleared: a conversation is stored again when it changes
    const id = key.slice(this.conversation.length);
    const before = this.conversations.get(id);
    if (before && this.busy(before) && newValue !== null) return;
    const after = parse(newValue);
    if (after) this.conversations.set(id, after);
    else this.conversations.delete(id);
    changed(id, before);
  }
}

// The entry of a conversation: its newest turns, within the bounds.
function serialize(conversation) {
  const turns = [];
  let size = 0;
  for (const turn of conversation.turns.toReversed()) {
    const pending = turn.state === "unsent" || turn.state === "sent";
    if (pending && turn.question.length > MAX_PART) continue; // a part is another question
    const stored = bounded(turn);
    size += JSON.stringify(stored).length;
    if (size > MAX_STORED) break;
    turns.unshift(stored);
  }
  return JSON.stringify({ ...conversation, turns });
}

// The turn with at most MAX_PART of its question and its answer. A long answer that still runs is
// stored empty: after a reload it is read again from its start. Of a long answer that has ended
// the beginning is stored.
function bounded(turn) {
  const question = turn.question.slice(0, MAX_PART);
  const size = turn.text.length + turn.reasoning.length + JSON.stringify(turn.tools).length;
  if (size <= MAX_PART) return { ...turn, question };
  const short = { ...turn, question, reasoning: "", tools: [] };
  if (!ended(turn)) return { ...short, text: "", last: 0 };
  return { ...short, text: turn.text.slice(0, MAX_PART), cut: true };
}

// The conversation of an entry; null if the entry is not valid.
function parse(entry) {
  try {
    const stored = JSON.parse(entry);
    if (typeof stored.id !== "string" || !stored.turns.length) return null;
    const blank = newTurn("", { provider: null, model: null });
    const turns = stored.turns.map((turn) => ({ ...blank, ...turn, place: null }));
    return { ...newConversation(), ...stored, turns };
  } catch {
    return null;
  }
}
