// A client of aioserver for browsers. docs/client-js.md is its guide, client.d.ts has its types, docs/clients.md is the protocol.
//     for await (const piece of new Client("https://chat.example.com").chat("Hello")) document.body.append(piece);
//
// All questions share one WebSocket or, where there is none or a proxy lets none through, have a request of server-sent events each. After a loss
// a question is sent again with its id, or resumed. Always: its caller has got the events 1 to `last` of the answer, each once; and
// after a loss nothing is sent before the time that the loss allows, whoever was reading then.

const PATIENCE = 15_000; // ms in which the server says its first word, and between two pings, each answered before the next
const SSE_SILENCE = 80_000; // ms without a byte: four intervals of the server's heartbeat
const MAX_UNREAD = 1 << 20; // characters of events that wait to be read, for each answer; what comes beyond is asked for again
const MAX_TERM = 86_400; // seconds of a deadline that the server is told
const RESEND_WITHIN = 25_000; // ms: the server knows a request at least so long after it came
const FINAL_CODES = new Set([1002, 1003, 1007, 1008]); // close codes after which another connection would not help
// After these errors a question is asked again, if nothing of its answer has come: up to its deadline, or at most twice.
const BUSY = ["server_at_capacity", "provider_queue_full", "provider_queue_timeout", "pool_timeout", "circuit_open"];
const LATER = new Set([...BUSY, "no_provider", "provider_rate_limited", "rate_limit_exceeded"]);
const ROOM = new Set([...BUSY.slice(0, 4), "concurrency_exceeded"]); // those that say that all places are taken
const TWICE = new Set(["request_timeout", "connect_error", "connect_timeout"]);
const AWAY = new Set([502, 503, 504]); // statuses of a server that is full, or that is not there, behind a proxy
const SHUT = new Set(["server_at_capacity", "server_shutdown", "server_unavailable"]); // codes that refuse all that is asked
const LOST = "the server has lost the rest of this answer: it was started anew, or keeps it no longer";
const ENDS = new Set(["complete", "error", "cancelled", "busy"]); // statuses after which nothing more is sent
// Seconds: *least*, which a server that is there has asked for, and a part by chance of a span that doubles with each failure.
export const backoff = (least, failures, span) => Math.min(3600, least) + Math.random() * Math.min(least > 0 ? 8 : 30, span * 2 ** failures);
// The seconds before connecting again after so many failures and a close code; null: never. After a restart clients come one by one.
export function reconnectDelay(code, failures, retryAfter = 0) {
  if (code === 1012) return Math.min(3600, Math.max(retryAfter, 1 + 9 * Math.random()));
  return FINAL_CODES.has(code) ? null : backoff(Math.max(code === 1013 ? 5 : 0, retryAfter), failures - 1, failures && 0.5);
}
// 128 random bits. Browsers offer crypto.randomUUID only on localhost and over TLS.
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export class AnswerError extends Error {
  constructor({ code = "protocol_error", error, retryable = false, retry_after = null }, { id = "", text = "", shown = false } = {}) {
    super(error);
    Object.assign(this, { name: "AnswerError", code, retryable: retryable && !shown, retryAfter: retry_after, requestId: id, text });
  }
}

export class Client {
  state = { name: "idle" };
  endpoints = { websocket: "/ws/chat", sse: "/sse/chat", conversations: "/conversations" };
  #options;
  #asks; // whether the key is a function, which is asked each time: a token does not live as long as a page
  #key = () => (this.#asks ? this.#options.key() : this.#options.key);
  #sse; // whether answers come by SSE
  #blocked = 0; // WebSockets in succession that did not open while the server answered over HTTP
  #links = new Set(); // what is known of each question whose answer is being read
  #attempt = { timers: [] }; // this connection: { timers, socket, send, heard, silent, fault }
  #failures = 0; // to connect, in succession
  // The last one: when it was, and before which time nothing is sent (performance.now()); *told*: the server has said when.
  #loss = { code: 1000, fault: undefined, told: false, at: 0, notBefore: 0 };
  #firm = 0; // before which time nothing is sent, whatever becomes of a server that was full
  #losses = 0; // so far, of requests for server-sent events
  #down = false; // whether no request since the last of them has had a response; then one is sent, and the others wait for it
  #trial = null; // the question whose request that is
  #keep = false; // whether the connection is wanted without a question
  conversation = (id = newId()) => ({ id, chat: (content, options) => this.chat(content, { ...options, conversationId: id }) });
  conversations = (query) => this.#kept(`?${new URLSearchParams(query)}`);
  turns = (id) => this.#kept(`/${encodeURIComponent(id)}`);
  deleteConversation = (id) => this.#kept(`/${encodeURIComponent(id)}`, { method: "DELETE" });

  constructor(url, options = {}) {
    if (typeof options.key === "string" && /[^\w!#$%&'*+.^`|~-]/.test(options.key)) throw new TypeError("the key has characters that no key has");
    this.url = new URL(url, globalThis.location?.href).href.replace(/\/+$/, "");
    this.#asks = typeof options.key === "function";
    this.#options = { deadline: 300, before() {}, onstate() {}, ...options };
    if (options.transport === "websocket" && !globalThis.WebSocket) throw new TypeError("there is no WebSocket here: Node.js 22 has one");
    this.#sse = options.transport === "sse" || !globalThis.WebSocket;
  }

  chat(content, options = {}) {
    if (typeof content !== "string" && !Array.isArray(content)) throw new TypeError("a question is a text, or a list of messages");
    const { requestId: id = newId(), lastEventId: last = 0, deadline = this.#options.deadline } = options;
    // The same question under the same id has the same bytes.
    const { conversationId = options.requestId === undefined ? newId() : `request:${id}`.slice(-256) } = options;
    const { provider, model, metadata, streaming, tools, signal } = options;
    const question = typeof content === "string" ? { text: content, conversation_id: conversationId } : { messages: content };
    const fields = tools ? { ...options.options, tools } : options.options;
    const terms = { start_within: options.startWithin, class: options.batch ? "batch" : undefined };
    if (options.deadline <= MAX_TERM) terms.deadline = options.deadline;
    const body = JSON.stringify({ ...question, provider, model, metadata, streaming, options: fields, ...terms }); // the same at each sending
    const link = { id, last, body, deadline, stop: new AbortController(), wake() {}, unread: [], size: 0, text: "", complete: null };
    Object.assign(link, { attached: false, notBefore: 0, sent: 0, tries: 0, losses: 0, shown: last > 1 }); // event 1 is `processing`
    // Whether events were dropped and asked for again, and whether it surely was asked.
    Object.assign(link, { behind: false, resuming: false, asked: options.lastEventId !== undefined });
    const events = () => this.#events(link, AbortSignal.any([link.stop.signal, signal ?? link.stop.signal]));
    const pieces = async function* () { for await (const event of events()) if (event.type === "text") yield event.text; };
    const text = async (whole = "") => { for await (const piece of pieces()) whole += piece; return whole; };
    const answer = { events, text, cancel: () => link.stop.abort(link), [Symbol.asyncIterator]: pieces };
    return Object.defineProperties(answer, { requestId: { get: () => link.id }, complete: { get: () => link.complete } });
  }

  // Without the wait by chance, but not before a server wants it, and not within a second after a loss.
  connect() {
    this.#keep = true;
    if (["connecting", "queued", "open"].includes(this.state.name)) return;
    if (!this.#loss.told) this.#loss.notBefore = Math.min(this.#loss.notBefore, this.#loss.at + 1000);
    this.#connect();
  }

  close() {
    this.#keep = false;
    for (const link of this.#links) link.stop.abort(new AnswerError({ code: "cancelled", error: "the client was closed" }, link));
    this.#discard();
    this.#setState({ name: "closed", code: 1000 });
  }

  async *#events(link, stop) {
    if (link.alarm) throw new TypeError("an answer is read once: ask again for another one");
    const why = () => (this.state.name !== "open" && this.#loss.fault?.error ? `: ${this.#loss.fault.error}` : "");
    const error = () => `no whole answer within ${link.deadline} s, and the connection is ${this.state.name}${why()}`;
    const late = () => link.stop.abort(new AnswerError({ code: "deadline_exceeded", error: error(), retryable: true }, link));
    link.alarm = setTimeout(late, Math.min(2 ** 31 - 1, link.deadline * 1000));
    stop.addEventListener("abort", () => this.#leave(link)); // at once, and not when the caller reads on
    try {
      for (stop.aborted || this.#links.add(link); !stop.aborted && !link.complete; ) {
        const wait = Math.max(link.notBefore - Date.now(), this.#sse ? this.#rest : 0);
        if (link.unread.length) {
          const [frame, size] = link.unread.shift();
          link.size -= size;
          const event = this.#take(link, frame);
          if (event) yield event;
        } else if (link.fault) {
          throw new AnswerError(link.fault, link);
        } else if (["idle", "closed"].includes(this.state.name)) {
          this.#connect();
        } else if (link.behind && link.attached && !link.resuming) {
          link.resuming = true;
          this.#resume(link);
        } else if (link.attached || wait > 0 || this.#trial || this.state.name !== "open") {
          link.drained?.();
          await new Promise((wake) => ((link.wake = wake), wait > 0 && setTimeout(wake, wait)));
        } else {
          this.#attach(link);
          yield { type: "sent" };
        }
      }
      if (!link.complete && stop.reason !== link) throw stop.reason;
    } finally {
      this.#leave(link); // the caller may have left its loop
    }
  }

  // Apply a frame. Returns the event that it is for the caller, if it is one; throws an AnswerError at the end by an error.
  #take(link, { status, event_id: number, chunk }) {
    if (number === undefined && status === "queued") return { type: status, position: chunk.position, eta: chunk.eta };
    if (number <= link.last) return;
    if (number > link.last + 1) throw new AnswerError({ error: `event ${number} came after event ${link.last}` }, link);
    const failed = ENDS.has(status) && status !== "complete";
    const fault = { code: status, error: "somebody has cancelled the answer, or nobody read it", ...chunk };
    // The server, which may be another process now, cannot know that there was an answer.
    if (fault.code === "stream_not_found" && (link.last || link.asked)) fault.error = LOST;
    const seconds = failed ? this.#patience(link, fault, number) : null;
    if (seconds !== null) {
      if (number || fault.code !== "slow_client") link.sent = 0; // nothing has begun
      if (number) Object.assign(link, { id: newId(), last: 0, asked: false }); // the id was that of what has failed
      Object.assign(link, { notBefore: Date.now() + seconds * 1000, dropped: link.last, full: ROOM.has(fault.code) });
      return { type: "waiting", code: fault.code, message: fault.error, seconds };
    }
    Object.assign(link, { settled: ENDS.has(status) && (number || !link.last), last: number ?? link.last });
    if (failed) throw new AnswerError(fault, link);
    const { provider, model, conversation_id: conversationId, finish_reason: finishReason, usage = null } = chunk.metadata ?? {};
    if (status === "processing") return { type: status, number, provider, model, conversationId };
    if (status === "complete") return (link.complete = { type: status, number, finishReason, usage, provider, model });
    const { type, data } = status === "chunk" ? Object.assign(link, { shown: true }) && chunk : {}; // ignore what is of a later version
    if (type === "tool_calls") return { type: "toolCalls", number, deltas: data };
    if (type === "text") link.text += data;
    if (type === "text" || type === "reasoning") return { type, number, text: data };
  }

  // The seconds until a question is asked again after an error; null: never. One without a number refused what was sent last.
  #patience(link, { code, retryable, retry_after: retryAfter = 1 }, number) {
    if (number && link.shown) return null;
    if (code === "slow_client" && !number) return link.dropped === link.last ? null : 0; // null: nothing has come since then
    if (code === "server_shutdown" && (number ?? 1) === 1) return reconnectDelay(1012); // no provider has begun
    const most = TWICE.has(code) ? 2 : LATER.has(code) || (retryable && !number) ? Infinity : 0;
    return link.tries < most ? backoff(Math.max(1, retryAfter), link.tries++, 1) : null;
  }

  #leave(link) {
    clearTimeout(link.alarm);
    link.attached = false;
    link.wake();
    link.drained?.();
    link.request?.abort();
    if (!this.#links.delete(link) || link.settled || !(link.sent || link.asked)) return;
    const path = `${this.endpoints.sse}/${encodeURIComponent(link.id)}`;
    if (this.#sse) this.#fetch(path, { method: "DELETE", keepalive: true }).then(() => this.#giveBack(), () => {});
    else if (this.state.name === "open") this.#attempt.send({ action: "cancel", request_id: link.id }), this.#giveBack();
  }

  // An answer has ended at the server, and its place is free: of the questions for which there was no room the first one asks at once.
  #giveBack() {
    if (this.#sse && ROOM.has(this.#loss.fault?.code)) this.#loss.notBefore = Math.min(this.#loss.notBefore, this.#firm);
    for (const link of this.#links) if (link.full) return Object.assign(link, { full: false, notBefore: 0 }).wake();
  }

  // Send the question, or resume its answer. One that may have arrived is sent again by its id, while the server knows that.
  #attach(link) {
    const { id, last, sent, asked } = link;
    const resumed = last > 0 || asked || (sent > 0 && Date.now() - sent > RESEND_WITHIN);
    const fresh = { behind: false, resuming: false, full: false, ended: false };
    Object.assign(link, fresh, { attached: true, sent: resumed ? sent : Date.now() });
    if (this.#sse) this.#follow(link, resumed);
    else if (resumed) this.#resume(link);
    else this.#attempt.socket.send(`{"action":"chat","request_id":${JSON.stringify(id)},"payload":${link.body}}`);
  }

  #resume({ id, last }) {
    this.#attempt.send({ action: "resume", request_id: id, payload: { last_event_id: last } });
  }

  // A caller that reads slowly delays nobody: of a WebSocket, which others share, events are dropped, and asked for again later.
  #deliver(link, frame, size) {
    const number = frame.event_id;
    if (link && this.#sse && !number && SHUT.has(frame.chunk?.code)) this.#lostSince(link.losses, frame.chunk);
    if (!link?.attached) return;
    if (number) this.#failures = 0;
    link.sent = Date.now();
    if (number && link.behind && !(link.resuming && number === link.last + 1)) return;
    if (number && !this.#sse && link.size > MAX_UNREAD) return void (link.behind = true);
    if (number) Object.assign(link, { behind: false, resuming: false });
    link.attached = !ENDS.has(frame.status);
    this.#push(link, { chunk: {}, ...frame }, size);
    link.ended = number > 1 && !link.attached && !LATER.has(frame.chunk?.code); // it had a place
    if (link.ended && !this.#sse) this.#giveBack();
  }

  // Of the positions in a queue only the newest is of interest.
  #push(link, frame, size) {
    if (frame.status === "queued" && link.unread.at(-1)?.[0].status === "queued") link.size -= link.unread.pop()[1];
    link.unread.push([frame, size]);
    link.size += size;
    link.wake();
  }

  // The milliseconds before which nothing is sent.
  get #rest() {
    return this.#loss.notBefore - performance.now();
  }

  // Note a loss. Returns the seconds after which to come back; null: never, and the next question does not come at once either.
  #hold(code, fault, counted = true) {
    const failures = counted ? this.#failures++ : 0;
    const seconds = counted ? reconnectDelay(code, failures, fault?.retry_after) : (fault?.retry_after ?? 0);
    const until = performance.now() + 1000 * (seconds ?? backoff(0, failures - 1, failures && 0.5));
    if (!ROOM.has(fault?.code)) this.#firm = Math.max(this.#firm, until);
    const told = code === 1013 || fault?.retry_after > 0; // whether the server says when to come back
    // One that allows an earlier return does not take back what the server has asked for.
    if (!(this.#rest > 0 && this.#loss.notBefore > until)) this.#loss = { code, fault, told, at: performance.now(), notBefore: until };
    return seconds;
  }

  // A request for server-sent events was lost that was sent after so many losses: those that are lost together are one.
  #lostSince(losses, fault) {
    const counted = !this.#down || losses === this.#losses;
    this.#losses += counted;
    this.#down = true;
    this.#hold(fault?.code === "server_shutdown" ? 1012 : 1006, fault, counted);
  }

  // The connection is idle, connecting, queued (the server is at capacity), open, lost (it comes back), or closed. Before the
  // server has admitted a WebSocket only a ping is sent; its pong says that it has. So a rejected one loses no question.
  async #connect() {
    const attempt = this.#discard();
    const { code, fault } = this.#loss;
    if (this.#rest > 0) {
      attempt.timers.push(setTimeout(() => this.#connect(), this.#rest));
      return this.#setState({ name: "lost", code, fault, until: Date.now() + this.#rest });
    }
    this.#setState({ name: "connecting" });
    try {
      await this.#options.before(this);
      if (attempt !== this.#attempt) return; // another one has begun meanwhile
      if (this.#sse) return this.#admitted();
      const key = await this.#key();
      if (attempt !== this.#attempt) return;
      const protocols = key ? ["aioserver", `aioserver.key.${key}`] : [];
      const socket = new WebSocket(this.url.replace(/^http/, "ws") + this.endpoints.websocket, protocols);
      Object.assign(attempt, { socket, send: (frame) => socket.send(JSON.stringify(frame)) });
      socket.onopen = () => attempt.send({ action: "ping" });
      socket.onmessage = ({ data }) => this.#receive(data);
      // Where its token has expired, the next one has another token.
      const expired = (code) => code === 1008 && this.#asks && attempt.fault?.code === "invalid_api_key";
      const ended = (code) => (attempt.heard ? this.#lose(code, attempt.fault) : this.#diagnose(code));
      socket.onclose = ({ code }) => (expired(code) ? this.#lose(1006) : ended(code));
      attempt.timers.push(setTimeout(() => attempt.heard || this.#diagnose(1006), PATIENCE));
    } catch (error) {
      if (attempt === this.#attempt) this.#lose(1006, { error: error.message });
    }
  }

  // No WebSocket has opened, and a page is not told why: ask over HTTP. Where that answers, a proxy may let none through.
  async #diagnose(code) {
    const attempt = this.#attempt;
    if (attempt.diagnosed) return;
    attempt.diagnosed = true;
    const response = await this.#fetch(this.endpoints.sse, { signal: AbortSignal.timeout(PATIENCE) }).catch(() => null);
    const fault = response && !response.ok ? await refusal(response) : undefined;
    if (attempt !== this.#attempt) return;
    if (response?.ok && !this.#options.transport) this.#sse = ++this.#blocked > 1; // once may be by chance
    this.#lose(fault?.retryable === false ? 1008 : code, fault);
  }

  #receive(data) {
    try {
      const frame = JSON.parse(data);
      Object.assign(this.#attempt, { heard: true, silent: false });
      if (frame.status === "pong") this.state.name === "open" || this.#admitted();
      else if (frame.request_id !== null) this.#deliver([...this.#links].find(({ id }) => id === frame.request_id), frame, data.length);
      else if (frame.status === "error") this.#attempt.fault = frame.chunk;
      else if (frame.status === "queued") this.#setState({ ...frame.chunk, name: "queued" }, frame);
    } catch (error) {
      this.#lose(1002, { error: `not a frame of aioserver: ${error.message}` });
    }
  }

  // A broken network path is not reported to a page: the server is pinged, and the connection is lost without an answer.
  #admitted() {
    const check = () => {
      for (const link of this.#links) if (link.attached && !link.drained && Date.now() - link.alive > SSE_SILENCE) link.request.abort();
      if (this.#attempt.silent) return this.#lose(1006);
      this.#failures = this.#blocked = 0;
      this.#attempt.silent = !this.#sse;
      this.#attempt.send?.({ action: "ping" });
    };
    const interval = setInterval(check, PATIENCE);
    interval.unref?.(); // of Node.js, whose program it would keep alive
    this.#attempt.timers.push(interval);
    this.#setState({ name: "open" });
  }

  #lose(code, fault) {
    this.#discard();
    // It was idle; or one message was too large.
    const seconds = this.#hold(code === 1000 || code === 1009 ? 1006 : code, fault);
    Object.assign(this.#loss, { code, fault });
    const [longest] = [...this.#links].filter((link) => link.attached && !link.last).sort((a, b) => b.body.length - a.body.length);
    if (code === 1009 && longest) longest.fault = { error: "the question is too large", ...fault, code: "request_too_large" };
    for (const link of this.#links) link.attached = false;
    [this.#down, this.#trial, this.#losses] = [this.#sse, null, this.#losses + 1];
    if (seconds === null) for (const link of this.#links) link.fault ??= fault ?? { error: `the server closed the connection (${code})` };
    const wanted = this.#links.size > 0 || (this.#keep && code !== 1000 && code !== 1009);
    if (seconds === null || !wanted) return this.#setState({ name: "closed", code, fault });
    this.#attempt.timers.push(setTimeout(() => this.#connect(), this.#rest));
    this.#setState({ name: "lost", code, fault, until: Date.now() + this.#rest });
  }

  #discard() {
    const { socket, timers } = this.#attempt;
    timers.forEach((timer) => clearTimeout(timer)); // it ends intervals as well
    if (socket) Object.assign(socket, { onopen: null, onmessage: null, onclose: null }).close();
    return (this.#attempt = { timers: [] });
  }

  #setState(state, ...frames) {
    this.state = state;
    for (const link of this.#links) frames.forEach((frame) => this.#push(link, frame, 0)), link.wake();
    this.#options.onstate(state);
  }

  async #fetch(path, { headers, ask = this.#key, ...init } = {}, again = true) {
    const { session } = this.#options;
    const key = await ask();
    const all = { ...headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(this.url + path, { cache: "no-store", credentials: session ? "include" : "same-origin", ...init, headers: all });
    return response.status === 401 && again && this.#asks ? this.#fetch(path, { headers, ask, ...init }, false) : response;
  }

  async #kept(path, init) {
    const response = await this.#fetch(this.endpoints.conversations + path, init);
    if (!response.ok) throw new AnswerError(await refusal(response));
    return response.status === 204 ? undefined : response.json();
  }

  // Read an answer over SSE, to the end of the response.
  async #follow(link, resumed) {
    link.request?.abort();
    const request = Object.assign(link, { request: new AbortController(), alive: Date.now() }).request;
    const body = `{"request_id":${JSON.stringify(link.id)},${link.body.slice(1)}`;
    const ask = { method: "POST", headers: { "Content-Type": "application/json" }, body };
    link.losses = this.#losses;
    if (this.#down) this.#trial = link;
    const responded = () => {
      if (this.#trial === link) this.#trial = null;
      for (const other of this.#links) other.wake();
    };
    let fault; // what the function for the key has thrown
    const failed = (error) => {
      fault = { error: error.message };
      throw error;
    };
    const key = async () => this.#key();
    let [path, init, response] = resumed ? [`/${encodeURIComponent(link.id)}`, { headers: { "Last-Event-ID": String(link.last) } }] : ["", ask];
    try {
      response = await this.#fetch(this.endpoints.sse + path, { ...init, ask: () => key().catch(failed), signal: request.signal });
      if (!AWAY.has(response.status) && link.losses === this.#losses) this.#down = false;
      const events = /^text\/event-stream/.test(response.headers.get("Content-Type"));
      if (!events) this.#deliver(link, { status: "error", chunk: await refusal(response) }, 0);
      responded();
      const reader = events && response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = "", part; reader && !(part = await reader.read()).done; link.alive = Date.now()) {
        const lines = (rest + part.value).split("\n");
        rest = lines.pop();
        for (const line of lines) if (line.startsWith("data:")) this.#deliver(link, JSON.parse(line.slice(5)), line.length);
        if (link.size > MAX_UNREAD && this.#links.has(link)) await new Promise((drained) => (link.drained = drained)); // the server waits
        link.drained = null;
      }
    } catch (error) {
      if (error instanceof SyntaxError) link.fault = { error: `not an event of aioserver: ${error.message}` };
    }
    if (!response) responded();
    if (link.ended) this.#giveBack(); // the server has the place until the end of the response
    if (link.request !== request) return; // another one has begun
    if (link.attached && !response) return this.#lose(1006, fault);
    if (link.attached) this.#lostSince(link.losses);
    link.attached = false;
    link.wake();
  }
}

// The error of a response without events, as a chunk has it. Another server's, such as a proxy's, has no code of ours.
async function refusal(response) {
  const { status, headers } = response;
  const passes = status === 408 || status === 429 || status >= 500;
  const { error } = await response.json().catch(() => ({}));
  const { code, message } = error ?? { code: passes ? "server_unavailable" : "protocol_error", message: `HTTP ${status}, not by us` };
  return { code, error: message, retryable: passes && headers.get("x-should-retry") !== "false", retry_after: +headers.get("Retry-After") || null };
}
