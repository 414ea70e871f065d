// A turn of a conversation: a question and the answer so far. This file has no I/O.
//
//     unsent → sent → running → complete | failed | stopped
//
// Always: the answer consists of its events 1 to `last`. The two are stored together, and a resume
// asks for the events after `last`, so that no text is lost and none is doubled.

const MAX_CALLS = 128; // tool calls of one answer; OpenAI allows as many tools

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
    stopping: false, // it was stopped in this window
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

// Apply an event of this turn's answer, whose request has the id *id* now.
export function take(turn, event, id) {
  const { type, number } = event;
  if (id !== turn.id) Object.assign(turn, { id, last: 0 }); // it is asked again under another id
  if (number !== undefined) turn.last = number;
  turn.place = type === "queued" ? event : null;
  turn.notBefore = 0;
  if (type === "sent") turn.asked = Date.now();
  if (type === "processing") turn.by = byline(event);
  if (type === "text") turn.text += event.text;
  if (type === "reasoning") turn.reasoning += event.text;
  if (type === "toolCalls") addCalls(turn.tools, event.deltas);
  if (type === "complete") {
    turn.by = byline(event) || turn.by;
    turn.usage = event.usage;
    turn.reason = event.finishReason ?? "";
  }
  const before = { waiting: "unsent", sent: "sent" }[type] ?? turn.state; // before the first event
  turn.state = type === "complete" ? "complete" : turn.last > 0 ? "running" : before;
}

function byline({ provider, model }) {
  return [provider, model].filter(Boolean).join(" · ");
}

function addCalls(calls, deltas) {
  if (!Array.isArray(deltas)) return;
  for (const delta of deltas) addCall(calls, delta?.index ?? 0, delta?.function);
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
