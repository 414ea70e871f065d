// The server's events over fetch and not EventSource, which tells neither a status nor a reason and never comes back
// from a 503. Silence is a loss, too: the server speaks every second.
const SILENCE = 5000;
const LONGEST = 10; // seconds between tries: short, because a wall has nobody to press reload
const GOOD = 60000; // after so long a connection the next tries are quick again

export class Feed {
  #url;
  #pass;
  #on;
  #tries = 0;
  #timer;
  #abort;

  /** *pass()* is awaited before each try: whether this page may ask. *on* takes (event, data) for each event, and ("link", {up, reason, retryAt}) for each change. */
  constructor(url, pass, on) {
    this.#url = url;
    this.#pass = pass;
    this.#on = on;
    addEventListener("online", () => this.#again(0));
    // A page nobody sees takes no place among the watchers and none of the browser's six connections to this server.
    document.addEventListener("visibilitychange", () => (document.hidden ? this.#stop() : this.#again(0)));
    if (!document.hidden) this.#connect();
  }

  /** Leave, and come back at once. */
  hurry() {
    this.#again(0);
  }

  #stop() {
    clearTimeout(this.#timer);
    this.#abort?.abort();
    this.#abort = undefined;
  }

  #again(wait) {
    this.#stop();
    this.#timer = setTimeout(() => this.#connect(), wait * 1000);
  }

  async #connect() {
    const abort = new AbortController();
    this.#abort = abort;
    const started = performance.now();
    const failure = await this.#pass()
      .then(() => this.#listen(abort))
      .catch((error) => ({ reason: error.said ?? "" }));
    if (this.#abort !== abort) return; // stopped, or another one listens already
    if (performance.now() - started > GOOD) this.#tries = 0;
    const jitter = Math.random() * Math.min(LONGEST, 0.5 * 2 ** this.#tries++);
    const wait = Math.max(0.3 + jitter, failure.after ?? 0);
    this.#again(wait);
    this.#on("link", { up: false, reason: failure.reason, retryAt: Date.now() + wait * 1000 });
  }

  /** Listen until it ends; the answer is why, where the server said it, and how long it wants to be left alone. */
  async #listen(abort) {
    let dog;
    const heard = () => {
      clearTimeout(dog);
      dog = setTimeout(() => abort.abort(), SILENCE);
    };
    try {
      heard();
      const response = await fetch(this.#url, { signal: abort.signal, cache: "no-store" });
      if (!response.ok) return await refusal(response);
      this.#on("link", { up: true });
      const parse = parser(this.#on);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (;;) {
        heard();
        const { done, value } = await reader.read();
        if (done) return { reason: "" };
        parse(value);
      }
    } finally {
      clearTimeout(dog);
    }
  }
}

async function refusal(response) {
  const after = Math.min(60, Number(response.headers.get("Retry-After")) || 0);
  const body = await response.json().catch(() => null);
  return { reason: body?.error?.message ?? `HTTP ${response.status}`, after };
}

/** text/event-stream as the server writes it: lines end with LF or CRLF, data is JSON on one line or more. */
function parser(on) {
  let rest = "";
  let event = "";
  let data = [];
  return (chunk) => {
    const lines = (rest + chunk).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("event:")) event = line.slice(6).trim();
      else if (line.startsWith("data:")) data.push(line.slice(5));
      else if (line === "") {
        if (data.length) deliver(on, event, data.join("\n"));
        event = "";
        data = [];
      }
    }
  };
}

/** What cannot be shown is an error of this page and no reason to leave the server. */
function deliver(on, event, data) {
  try {
    on(event, JSON.parse(data));
  } catch (error) {
    reportError(error);
  }
}
