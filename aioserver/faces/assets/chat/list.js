// The list of conversations.

const TITLE = 80; // characters of a first question; what is too wide is cut by the style

export class List {
  // `open(conversation)`, `remove(conversation)`: what the person wants.
  constructor(element, { open, remove }) {
    this.element = element;
    this.open = open;
    this.remove = remove;
    this.items = new Map(); // id → <li>
  }

  draw(conversations, current, busy) {
    const wanted = conversations.map((one) => this.item(one));
    conversations.forEach((one, index) => this.drawItem(wanted[index], one, current, busy));
    const ids = new Set(conversations.map((one) => one.id));
    for (const id of this.items.keys()) if (!ids.has(id)) this.items.delete(id);
    const shown = this.element.children;
    const same = wanted.every((item, index) => item === shown[index]);
    if (same && shown.length === wanted.length) return;
    const focused = document.activeElement;
    this.element.replaceChildren(...wanted);
    if (this.element.contains(focused)) focused.focus(); // moving it has taken its focus
  }

  item({ id }) {
    if (!this.items.has(id)) {
      const template = document.getElementById("item");
      this.items.set(id, template.content.firstElementChild.cloneNode(true));
    }
    return this.items.get(id);
  }

  drawItem(item, conversation, current, busy) {
    const title = conversation.turns[0].question.trim().slice(0, TITLE);
    const [open, remove] = item.querySelectorAll("button");
    open.querySelector(".title").textContent = title;
    open.querySelector(".busy").hidden = !busy(conversation);
    if (conversation === current) open.setAttribute("aria-current", "true");
    else open.removeAttribute("aria-current");
    open.onclick = () => this.open(conversation);
    // To be pressed twice, since it cannot be undone; going elsewhere takes the first press back.
    const mean = (sure) => {
      remove.toggleAttribute("data-sure", sure);
      remove.setAttribute("aria-label", `${sure ? "Really delete" : "Delete"}: ${title}`);
    };
    mean(remove.hasAttribute("data-sure"));
    remove.onblur = () => mean(false);
    remove.onclick = () => {
      if (remove.hasAttribute("data-sure")) this.remove(conversation);
      else mean(true);
    };
  }
}
