// The door: whether the server wants a key, the form that asks for it, and the way out. The key goes into
// the body of POST /session and nowhere else; what stays of it is a cookie that no script can read.

const PATIENCE = 10_000; // milliseconds for an answer about the session
const TEXTS = {
  title: "This server wants a key",
  hint: "Whoever runs it gives you one. You are then in for 12 hours.",
  unknown: "This key is not known here.",
  powerless: "This key may chat, but not watch: this page wants an admin key.",
  lost: "The server does not answer. Try again.",
};

export class Door {
  #admin;
  #changed;
  #passing = null; // what `pass` gives as long as nobody has come through
  #form = null;

  // With *admin* an admin's key alone opens it. *changed()* is called when the session is another.
  constructor({ admin = false, changed = () => {} } = {}) {
    this.#admin = admin;
    this.#changed = changed;
    this.session = { key_required: false, name: null, admin: false };
    document.addEventListener("visibilitychange", () => document.hidden || this.#look());
  }

  // Whether it asks for a key now.
  get asking() {
    return this.#form !== null;
  }

  // Resolves when this page may talk to its server, at once where it may already. Throws where the server is
  // not there, or says something else; `said` of that error is what it says.
  pass() {
    this.#passing ??= this.#pass().finally(() => (this.#passing = null));
    return this.#passing;
  }

  // Forget the key: the next `pass` asks for it.
  async leave() {
    await talk("DELETE");
    this.#know({ ...this.session, name: null, admin: false });
  }

  async #pass() {
    this.#know(await talk("GET"));
    if (!this.#fits()) await this.#ask();
  }

  #know(session) {
    const before = JSON.stringify(this.session);
    this.session = session;
    if (JSON.stringify(session) !== before) this.#changed();
  }

  #fits() {
    const { key_required: required, name, admin } = this.session;
    return !required || (name !== null && (admin || !this.#admin));
  }

  #ask() {
    return new Promise((resolve) => {
      this.#form = new Form(this.session.name === null ? "" : TEXTS.powerless, (key) => this.#try(key));
      this.#form.closed = () => {
        this.#form = null;
        resolve();
        this.#changed();
      };
      this.#changed();
    });
  }

  async #try(key) {
    try {
      this.#know(await talk("POST", { key }));
    } catch (error) {
      this.#form?.complain(error.status === 401 ? TEXTS.unknown : (error.said ?? TEXTS.lost));
      return;
    }
    if (this.#fits()) this.#form?.close();
    else this.#form?.complain(TEXTS.powerless);
  }

  // Another window of this browser may have got the cookie meanwhile.
  async #look() {
    if (!this.asking) return;
    this.#know(await talk("GET").catch(() => this.session));
    if (this.#fits()) this.#form?.close();
  }
}

async function talk(method, body) {
  const options = { method, cache: "no-store", signal: AbortSignal.timeout(PATIENCE) };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers = { "Content-Type": "application/json" };
  }
  const response = await fetch("/session", options);
  if (response.status === 204) return null;
  const told = await response.json().catch(() => null);
  if (response.ok && told !== null) return told;
  const said = told?.error?.message ?? `HTTP ${response.status}`;
  throw Object.assign(new Error(said), { said, status: response.status });
}

// A dialog over the page, which is out of sight behind it: it cannot be left without a key.
class Form {
  constructor(complaint, entered) {
    this.closed = () => {};
    this.entered = entered;
    this.key = element("input", { id: "door-key", type: "password", autocomplete: "current-password" });
    this.key.required = true;
    this.fault = element("p", { id: "door-fault", role: "alert" });
    this.button = element("button", { type: "submit" }, "Enter");
    const form = element("form", { method: "dialog" }); // without script it goes nowhere, and the key neither
    form.append(
      element("h2", { id: "door-title" }, TEXTS.title),
      element("p", { id: "door-hint" }, TEXTS.hint),
      element("label", { for: "door-key" }, "Key"),
      this.key,
      this.fault,
      this.button,
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.enter();
    });
    this.dialog = element("dialog", { id: "door", "aria-labelledby": "door-title", "aria-describedby": "door-hint" });
    this.dialog.append(form);
    this.dialog.addEventListener("cancel", (event) => event.preventDefault());
    this.dialog.addEventListener("close", () => this.done || this.dialog.showModal());
    document.body.append(this.dialog);
    this.dialog.showModal();
    this.complain(complaint);
  }

  async enter() {
    this.button.disabled = true;
    this.fault.textContent = "";
    await this.entered(this.key.value.trim());
    this.button.disabled = false;
  }

  complain(text) {
    this.fault.textContent = text;
    this.key.select();
    this.key.focus();
  }

  close() {
    this.done = true;
    this.key.value = "";
    this.dialog.close();
    this.dialog.remove();
    this.closed();
  }
}

function element(name, attributes, text = "") {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}
