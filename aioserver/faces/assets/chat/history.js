// The conversations that the server keeps for this caller: those of other browsers, and those that this one has lost.

import { newTurn } from "./turn.js";

const MAX_LISTED = 50;
const MAX_REMOVED = 500; // ids

export class ServerHistory {
  // *client* knows the address, and `changed()` is called when the list has changed.
  constructor(client, store, { changed }) {
    this.client = client;
    this.store = store;
    this.changed = changed;
    this.summaries = new Map(); // id → { id, title, updated, messages }
  }

  // Ids that were deleted here. The server is told when its list has one: it may be away now, and a running answer is kept
  // after it was stopped.
  get removed() {
    return this.store.getSetting("removed", []);
  }

  // Read the list from the server. If it does not answer, the former list stays.
  async load() {
    const answer = await this.get(`?limit=${MAX_LISTED}`);
    if (answer === null) return;
    const removed = new Set(this.removed);
    for (const { id } of answer.conversations) if (removed.has(id)) await this.fetch(this.path(id), { method: "DELETE" });
    const kept = answer.conversations.filter(({ id }) => !removed.has(id));
    this.summaries = new Map(kept.map((summary) => [summary.id, summary]));
    this.changed();
  }

  // Those that this browser has not, as conversations without turns.
  get missing() {
    const removed = new Set(this.removed);
    return [...this.summaries.values()]
      .filter(({ id }) => !this.store.conversations.has(id) && !removed.has(id))
      .map(({ id, title, updated }) => ({ id, title, used: updated * 1000, draft: "", turns: [] }));
  }

  // Whether the server has more of *conversation* than this browser.
  ahead({ id, turns }) {
    const answered = turns.filter(({ state, text }) => state === "complete" || text);
    return (this.summaries.get(id)?.messages ?? 0) > 2 * answered.length;
  }

  // The turns of a conversation; null if they cannot be read.
  async turns(id) {
    const answer = await this.get(this.path(id));
    if (answer === null) return null;
    const turns = [];
    for (const { role, text, time } of answer.messages) {
      if (role === "user") {
        turns.push({ ...newTurn(text, { provider: null, model: null }), asked: time * 1000, state: "complete" });
      } else if (turns.length) {
        turns.at(-1).text = text;
      }
    }
    return turns;
  }

  remove(id) {
    this.store.setSetting("removed", [...this.removed, id].slice(-MAX_REMOVED));
    return this.load();
  }

  path(id) {
    return `/${encodeURIComponent(id)}`;
  }

  async get(path) {
    const response = await this.fetch(path);
    return response?.ok ? response.json() : null;
  }

  // null: the server does not answer, or keeps no conversations.
  async fetch(path, options) {
    const { endpoints } = this.client;
    if (endpoints.conversations === undefined) return null;
    return fetch(endpoints.conversations + path, { ...options, cache: "no-store" }).catch(() => null);
  }
}
