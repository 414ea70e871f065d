// What a person can do about an error, by its code. The server's message says what happened.

const REPEAT = "Ask again; if the error persists, choose another model above.";
const WAIT = "Wait {}, then ask again.";
const OTHER = "Wait {}, then ask again, or choose another model above.";
const OPERATOR = "The operator of this server has to correct this; another model above may work.";
const BUSY = "The provider has too much to do.";
const AWAY = "The provider cannot be reached.";

// By the code of an error: what is said while the page *waits* to ask again, and what a person can do at last. A code may be any
// word, so these are no properties of an object.
const ERRORS = new Map([
  ["server_at_capacity", { waits: "The server is at capacity.", advice: WAIT }],
  ["server_shutdown", { waits: "The server restarts.", advice: "The server was stopped during the answer. Ask again when it is back." }],
  ["rate_limit_exceeded", { waits: "You have sent too many requests in a short time.", advice: WAIT }],
  ["concurrency_exceeded", { waits: "Too many of your answers run at once.", advice: "Stop one, or wait until one ends." }],
  ["provider_queue_full", { waits: BUSY, advice: OTHER }],
  ["provider_queue_timeout", { waits: BUSY, advice: OTHER }],
  ["pool_timeout", { waits: BUSY, advice: OTHER }],
  ["circuit_open", { waits: "The provider fails, and is left alone for a moment.", advice: OTHER }],
  ["provider_rate_limited", { waits: "The provider limits how often it is asked.", advice: OTHER }],
  ["no_provider", { waits: "No provider can be asked at the moment.", advice: OPERATOR }],
  ["request_timeout", { waits: "The request took too long to arrive." }],
  ["connect_error", { waits: AWAY }],
  ["connect_timeout", { waits: AWAY }],
  ["invalid_api_key", { advice: "Your key was withdrawn. Enter another one, then ask again." }],
  ["provider_auth_error", { advice: OPERATOR }],
  ["model_not_found", { advice: "Choose another model above." }],
  ["request_conflict", { advice: "The server knows this id from another question. Ask again under a new id." }],
  ["slow_client", { advice: "This browser could not read as fast as the answer came. Ask again for the whole answer." }],
  ["resume_gap", { advice: "A part of the answer is no longer kept. Ask again for the whole answer." }],
  ["stream_not_found", { advice: "Ask again for the whole answer." }],
  ["not_sent", { advice: "Ask again to send it now." }],
  ["request_too_large", { advice: "Shorten the message." }],
  ["invalid_request", { advice: "Reload the page; if the error persists, change the message." }],
  ["internal_error", { advice: "The server's log has the reason. Ask again." }],
]);

export function waitingFor(code) {
  return ERRORS.get(code)?.waits ?? "The server does not answer.";
}

export function advice(fault) {
  // A provider's own 4xx: the same question would get the same answer.
  if (fault.code === "provider_error" && !fault.retryable)
    return "The provider does not accept this question. Change it, or choose another model above.";
  const wait = fault.retry_after ? `${Math.ceil(fault.retry_after)} s` : "a moment";
  return (ERRORS.get(fault.code)?.advice ?? REPEAT).replace("{}", wait);
}

// Whether the same question can succeed when it is asked again.
export function repeatable(fault) {
  return fault.code !== "request_too_large";
}

// The reason why the server closed the connection for good.
export function closeReason({ code, fault }) {
  if (fault) return `The server closed the connection: ${sentence(fault.error)}`;
  if (code === 1000) return "The server closed the connection, since it was not used.";
  return `The server closed the connection (${code}).`;
}

export function sentence(text) {
  return /[.!?…]$/.test(text) ? text : `${text}.`;
}
