// The login of both pages: it asks the server whether a key is required, shows the dialog that asks for one, and logs out.
// The key goes into the body of POST /session and nowhere else. What remains of it is a cookie that no script can read.

const REQUEST_TIMEOUT = 10_000; // milliseconds that the server has for an answer about the session
const TEXTS = {
  title: "This server requires a key",
  hint: "The operator of the server issues keys. A login lasts 12 hours.",
  unknown: "The server does not know this key.",
  notAdmin: "This key may chat, but this page requires an admin key.",
  unreachable: "The server does not answer. Try again.",
};

export class Login {
  #admin;
  #changed;
  #pending = null; // the promise of `ensure` while the login is not finished
  #dialog = null;

  // If *admin* is true, only the key of an admin is enough. *changed()* is called when the session has changed.
  constructor({ admin = false, changed = () => {} } = {}) {
    this.#admin = admin;
    this.#changed = changed;
    this.session = { key_required: false, name: null, admin: false };
    document.addEventListener("visibilitychange", () => document.hidden || this.#refresh());
  }

  // Whether the dialog is open.
  get asking() {
    return this.#dialog !== null;
  }

  // Resolves when this page may use the server; that is at once if it may already. Rejects if the server does not answer,
  // or answers with an error; the `reason` of that error is the server's message.
  ensure() {
    this.#pending ??= this.#ensure().finally(() => (this.#pending = null));
    return this.#pending;
  }

  // Ends the session: the next `ensure` asks for a key.
  async logOut() {
    await requestSession("DELETE");
    this.#setSession({ ...this.session, name: null, admin: false });
  }

  async #ensure() {
    this.#setSession(await requestSession("GET"));
    if (!this.#sufficient()) await this.#ask();
  }

  #setSession(session) {
    const before = JSON.stringify(this.session);
    this.session = session;
    if (JSON.stringify(session) !== before) this.#changed();
  }

  #sufficient() {
    const { key_required: required, name, admin } = this.session;
    return !required || (name !== null && (admin || !this.#admin));
  }

  #ask() {
    return new Promise((resolve) => {
      this.#dialog = new LoginDialog(this.session.name === null ? "" : TEXTS.notAdmin, (key) => this.#submit(key));
      this.#dialog.closed = () => {
        this.#dialog = null;
        resolve();
        this.#changed();
      };
      this.#changed();
    });
  }

  async #submit(key) {
    try {
      this.#setSession(await requestSession("POST", { key }));
    } catch (error) {
      this.#dialog?.showError(error.status === 401 ? TEXTS.unknown : (error.reason ?? TEXTS.unreachable));
      return;
    }
    if (this.#sufficient()) this.#dialog?.close();
    else this.#dialog?.showError(TEXTS.notAdmin);
  }

  // Another window of this browser may have logged in meanwhile.
  async #refresh() {
    if (!this.asking) return;
    this.#setSession(await requestSession("GET").catch(() => this.session));
    if (this.#sufficient()) this.#dialog?.close();
  }
}

async function requestSession(method, body) {
  const options = { method, cache: "no-store", signal: AbortSignal.timeout(REQUEST_TIMEOUT) };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers = { "Content-Type": "application/json" };
  }
  const response = await fetch("/session", options);
  if (response.status === 204) return null;
  const session = await response.json().catch(() => null);
  if (response.ok && session !== null) return session;
  const reason = session?.error?.message ?? `HTTP ${response.status}`;
  throw Object.assign(new Error(reason), { reason, status: response.status });
}

// A modal dialog that covers the page. It cannot be closed without a key.
class LoginDialog {
  constructor(error, submit) {
    this.closed = () => {};
    this.submit = submit;
    this.key = newElement("input", { id: "login-key", type: "password", autocomplete: "current-password" });
    this.key.required = true;
    this.error = newElement("p", { id: "login-error", role: "alert" });
    this.button = newElement("button", { type: "submit" }, "Log in");
    const form = newElement("form", { method: "dialog" }); // without a script this form sends the key nowhere
    form.append(
      newElement("h2", { id: "login-title" }, TEXTS.title),
      newElement("p", { id: "login-hint" }, TEXTS.hint),
      newElement("label", { for: "login-key" }, "Key"),
      this.key,
      this.error,
      this.button,
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submitKey();
    });
    this.element = newElement("dialog", { id: "login", "aria-labelledby": "login-title", "aria-describedby": "login-hint" });
    this.element.append(form);
    this.element.addEventListener("cancel", (event) => event.preventDefault());
    this.element.addEventListener("close", () => this.done || this.element.showModal());
    document.body.append(this.element);
    this.element.showModal();
    this.showError(error);
  }

  async submitKey() {
    this.button.disabled = true;
    this.error.textContent = "";
    await this.submit(this.key.value.trim());
    this.button.disabled = false;
  }

  showError(text) {
    this.error.textContent = text;
    this.key.select();
    this.key.focus();
  }

  close() {
    this.done = true;
    this.key.value = "";
    this.element.close();
    this.element.remove();
    this.closed();
  }
}

function newElement(name, attributes, text = "") {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}
