// A turn of a conversation: a question, and what is known of its answer. No page, no socket.
//
//     unsent → sent → running → complete | failed | stopped
//
// Always: the answer is what its events 1 to `last` say. So the two are saved together, and the
// rest is asked for behind `last`: nothing is lost and nothing is doubled.

const MAX_CALLS = 128; // of tools, in one answer: OpenAI's own bound

const ENDS = { complete: "complete", error: "failed", cancelled: "stopped" };

export function newId() {
  // not crypto.randomUUID: it is missing where the page is not served from localhost or by TLS
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newTurn(question, choice) {
  return {
    id: newId(),
    question,
    provider: choice.provider, // null: the server chooses
    model: choice.model,
    asked: Date.now(),
    state: "unsent",
    notBefore: 0, // the server was full: when to send it
    stopping: false, // the person pressed stop
    last: 0,
    by: "", // who answers: provider and model
    text: "",
    reasoning: "",
    tools: [], // { index, name, arguments }
    usage: null,
    reason: "", // of the end
    fault: null, // { code, error, retryable, retry_after }
    cut: false, // of a long answer the beginning was stored
    place: null, // in the provider's line: { position, eta }
  };
}

// Ask the same once more, as a new request.
export function askAgain(turn, choice) {
  Object.assign(turn, newTurn(turn.question, choice));
}

export function ended(turn) {
  return turn.state === "complete" || turn.state === "failed" || turn.state === "stopped";
}

// The frame that asks. The same turn always makes the same one: sent twice it is answered once.
export function chatFrame(turn, conversationId) {
  const payload = { text: turn.question, conversation_id: conversationId };
  if (turn.provider !== null) payload.provider = turn.provider;
  if (turn.model !== null) payload.model = turn.model;
  return { action: "chat", request_id: turn.id, payload };
}

export function resumeFrame(turn) {
  return { action: "resume", request_id: turn.id, payload: { last_event_id: turn.last } };
}

export function cancelFrame(turn) {
  return { action: "cancel", request_id: turn.id };
}

// Take a frame of this turn's answer; false: it was seen before.
export function take(turn, frame) {
  if (frame.event_id !== undefined) {
    if (frame.event_id <= turn.last) return false;
    turn.last = frame.event_id;
  }
  const { status, chunk } = frame;
  turn.place = status === "queued" ? chunk : null;
  if (status === "processing") turn.by = byline(chunk.metadata);
  if (status === "chunk") addPiece(turn, chunk);
  if (status === "complete") {
    turn.by = byline(chunk.metadata) || turn.by;
    turn.usage = chunk.metadata.usage ?? null;
    turn.reason = chunk.metadata.finish_reason ?? "";
  }
  if (status === "error") turn.fault = chunk;
  turn.state = ENDS[status] ?? (turn.last > 0 ? "running" : "sent");
  if (turn.stopping && status === "error") turn.state = "stopped"; // nobody waits for it any more
  return true;
}

function byline({ provider, model }) {
  return [provider, model].filter(Boolean).join(" · ");
}

function addPiece(turn, { type, data }) {
  if (type === "text") turn.text += data;
  if (type === "reasoning") turn.reasoning += data;
  if (type !== "tool_calls" || !Array.isArray(data)) return;
  for (const piece of data) addCall(turn.tools, piece?.index ?? 0, piece?.function);
}

// OpenAI sends a call in pieces: its name in the first, its arguments in the others. Whatever a
// provider says in `index`, it is compared, and never the name of a property.
function addCall(calls, index, piece) {
  if (!Number.isInteger(index) || typeof piece !== "object" || piece === null) return;
  let call = calls.find((one) => one.index === index);
  if (call === undefined) {
    if (calls.length === MAX_CALLS) return;
    call = { index, name: "", arguments: "" };
    calls.push(call);
    calls.sort((one, other) => one.index - other.index);
  }
  if (typeof piece.name === "string") call.name += piece.name;
  if (typeof piece.arguments === "string") call.arguments += piece.arguments;
}
