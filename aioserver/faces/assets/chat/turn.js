// A turn of a conversation: a question and the answer so far. This file has no I/O.
//
//     unsent → sent → running → complete | failed | stopped
//
// Always: the answer consists of its events 1 to `last`. The two are stored together, and a resume
// asks for the events after `last`, so that no text is lost and none is doubled.

const MAX_CALLS = 128; // tool calls of one answer; OpenAI allows as many tools

const ENDS = { complete: "complete", error: "failed", cancelled: "stopped" };

export function newId() {
  // not crypto.randomUUID: browsers offer it only on localhost and over TLS
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newTurn(question, choice) {
  return {
    id: newId(),
    question,
    provider: choice.provider, // null: the server's default
    model: choice.model,
    asked: Date.now(),
    state: "unsent",
    notBefore: 0, // earliest time to send it, after an error that passes by itself
    waitingFor: "", // what it waits for until then
    tries: 0, // how often it was asked again for such an error
    stopping: false, // the stop button was pressed
    last: 0,
    by: "", // the provider and the model that answer
    text: "",
    reasoning: "",
    tools: [], // { index, name, arguments }
    usage: null,
    reason: "", // the finish reason
    fault: null, // { code, error, retryable, retry_after }
    cut: false, // only the beginning of a long answer was stored
    place: null, // in the provider's queue: { position, eta }
  };
}

// Turn it into a new request with the same question.
export function resetTurn(turn, choice) {
  Object.assign(turn, newTurn(turn.question, choice));
}

export function ended(turn) {
  return turn.state === "complete" || turn.state === "failed" || turn.state === "stopped";
}

// The frame that asks. It is the same for the same turn: the server answers it once.
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

// Apply a frame of this turn's answer. Returns false if the event was applied before.
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
  if (turn.stopping && status === "error") turn.state = "stopped"; // the error does not matter any more
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

// OpenAI sends a call in pieces: the first has its name, the others have its arguments. The value
// of `index` may be anything: it is only compared, and never used as the name of a property.
function addCall(calls, index, piece) {
  if (!Number.isInteger(index) || typeof piece !== "object" || piece === null) return;
  let call = calls.find((other) => other.index === index);
  if (call === undefined) {
    if (calls.length === MAX_CALLS) return;
    call = { index, name: "", arguments: "" };
    calls.push(call);
    calls.sort((a, b) => a.index - b.index);
  }
  if (typeof piece.name === "string") call.name += piece.name;
  if (typeof piece.arguments === "string") call.arguments += piece.arguments;
}
