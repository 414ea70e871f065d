// The lists of conversations: the one in the sidebar, and the one that the server keeps for this caller.

import { newTurn } from "./turn.js";

const MAX_LISTED = 50;
const MAX_REMOVED = 500; // ids
const MAX_TITLE = 80; // characters of the first question; the style sheet cuts what is too wide
const THIS_MACHINE = /^(localhost|127\.\d+\.\d+\.\d+|\[::1\])$/;

// Whether the list is that of one person. Without a key the server tells callers apart by their addresses only, which the
// people behind a proxy share.
export function personal({ name }, host) {
  return name !== null || THIS_MACHINE.test(host);
}

// The conversations of other browsers, and those that this one has lost.
export class ServerHistory {
  // `personal()` returns whether the list may be shown, and `changed()` is called when it has changed.
  constructor(client, store, { personal, changed }) {
    this.client = client;
    this.store = store;
    this.personal = personal;
    this.changed = changed;
    this.summaries = new Map(); // id → { id, title, updated, messages }
  }

  // Ids that were deleted here. The server is told when its list has one: it may be away now, and a running answer is kept
  // after it was stopped.
  get removed() {
    return this.store.getSetting("removed", [], { own: true });
  }

  // Read the list from the server. If it does not answer, the former list stays.
  async load() {
    if (!this.personal()) return;
    const { owner } = this.store;
    const list = await this.client.conversations({ limit: MAX_LISTED }).catch(() => null);
    if (list === null || owner !== this.store.owner) return; // another person is there meanwhile
    const removed = new Set(this.removed);
    for (const { id } of list.conversations) if (removed.has(id)) await this.client.deleteConversation(id).catch(() => {});
    const kept = list.conversations.filter(({ id }) => !removed.has(id));
    if (owner !== this.store.owner) return;
    this.summaries = new Map(kept.map((summary) => [summary.id, summary]));
    this.changed();
  }

  // Another person is there: forget the list.
  clear() {
    this.summaries = new Map();
  }

  // Conversations that this browser has not, without their turns.
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
    const kept = await this.client.turns(id).catch(() => null);
    if (kept === null) return null;
    const turns = [];
    for (const { role, text, time } of kept.messages) {
      if (role === "user") {
        turns.push({ ...newTurn(text, { provider: null, model: null }), asked: time * 1000, state: "complete" });
      } else if (turns.length) {
        turns.at(-1).text = text;
      }
    }
    return turns;
  }

  remove(id) {
    if (!this.personal()) return this.client.deleteConversation(id).catch(() => {});
    this.store.setSetting("removed", [...this.removed, id].slice(-MAX_REMOVED), { own: true });
    return this.load();
  }
}

// A list in the sidebar.
export class ConversationList {
  // `open(conversation)` and `remove(conversation)` are called when the buttons are pressed.
  constructor(element, { open, remove }) {
    this.element = element;
    this.open = open;
    this.remove = remove;
    this.items = new Map(); // id → <li>
  }

  draw(conversations, current, busy) {
    const items = conversations.map((conversation) => this.item(conversation));
    conversations.forEach((conversation, index) =>
      this.drawItem(items[index], conversation, current, busy),
    );
    const ids = new Set(conversations.map(({ id }) => id));
    for (const id of this.items.keys()) if (!ids.has(id)) this.items.delete(id);
    const shown = this.element.children;
    const same = items.every((item, index) => item === shown[index]);
    if (same && shown.length === items.length) return;
    const focused = document.activeElement;
    this.element.replaceChildren(...items);
    if (this.element.contains(focused)) focused.focus(); // an element that is moved loses its focus
  }

  item({ id }) {
    if (!this.items.has(id)) {
      const template = document.getElementById("conversation-item");
      this.items.set(id, template.content.firstElementChild.cloneNode(true));
    }
    return this.items.get(id);
  }

  drawItem(item, conversation, current, busy) {
    const question = conversation.turns[0]?.question ?? conversation.title;
    const title = question.trim().slice(0, MAX_TITLE) || "Untitled";
    const [open, remove] = item.querySelectorAll("button");
    open.querySelector(".title").textContent = title;
    open.querySelector(".busy").hidden = !busy(conversation);
    if (conversation === current) open.setAttribute("aria-current", "true");
    else open.removeAttribute("aria-current");
    open.onclick = () => this.open(conversation);
    // The button has to be pressed twice, since a deletion cannot be undone. The first press is
    // taken back when the button loses the focus.
    const setConfirming = (confirming) => {
      remove.toggleAttribute("data-confirming", confirming);
      remove.setAttribute("aria-label", `${confirming ? "Really delete" : "Delete"}: ${title}`);
    };
    setConfirming(remove.hasAttribute("data-confirming"));
    remove.onblur = () => setConfirming(false);
    remove.onclick = () => {
      if (remove.hasAttribute("data-confirming")) this.remove(conversation);
      else setConfirming(true);
    };
  }
}
