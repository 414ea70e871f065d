// The list of conversations in the sidebar.

const MAX_TITLE = 80; // characters of the first question; the style sheet cuts what is too wide

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
