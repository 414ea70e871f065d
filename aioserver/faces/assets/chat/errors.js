// What a person can do about an error, by its code. The server's message says what happened.

const REPEAT = "Ask again; if the error persists, choose another model above.";
const LATER = "Wait {}, then ask again, or choose another model above.";
const OPERATOR = "The operator of this server has to correct this; another model above may work.";

// What is said while the page waits to ask again, by the code of the error.
const BUSY = "The provider has too much to do.";
const AWAY = "The provider cannot be reached.";
const PASSING = new Map([
  ["server_at_capacity", "The server is at capacity."],
  ["provider_queue_full", BUSY],
  ["provider_queue_timeout", BUSY],
  ["pool_timeout", BUSY],
  ["circuit_open", "The provider fails, and is left alone for a moment."],
  ["no_provider", "No provider can be asked at the moment."],
  ["provider_rate_limited", "The provider limits how often it is asked."],
  ["rate_limit_exceeded", "You have sent too many requests in a short time."],
  ["concurrency_exceeded", "Too many of your answers run at once."],
  ["request_timeout", "The request took too long to arrive."],
  ["connect_error", AWAY],
  ["connect_timeout", AWAY],
  ["server_shutdown", "The server restarts."],
]);

const ADVICE = {
  server_at_capacity: "The server is at capacity. Wait {}, then ask again.",
  server_shutdown: "The server was stopped during the answer. Ask again when it is back.",
  rate_limit_exceeded: "You have sent too many requests in a short time. Wait {}, then ask again.",
  concurrency_exceeded: "Too many of your answers run at once. Stop one, or wait until one ends.",
  invalid_api_key: "Your key was withdrawn. Enter another one, then ask again.",
  provider_rate_limited: LATER,
  provider_queue_full: LATER,
  provider_queue_timeout: LATER,
  pool_timeout: LATER,
  circuit_open: LATER,
  provider_auth_error: OPERATOR,
  no_provider: OPERATOR,
  model_not_found: "Choose another model above.",
  request_conflict: "The server knows this id from another question. Ask again under a new id.",
  slow_client: "This browser could not read as fast as the answer came. Ask again for the whole answer.",
  resume_gap: "A part of the answer is no longer kept. Ask again for the whole answer.",
  stream_not_found: "Ask again for the whole answer.",
  not_sent: "Ask again to send it now.",
  request_too_large: "Shorten the message.",
  invalid_request: "Reload the page; if the error persists, change the message.",
  internal_error: "The server's log has the reason. Ask again.",
};

export function waitingFor(code) {
  return PASSING.get(code) ?? "The server does not answer.";
}

export function advice(fault) {
  // A provider's own 4xx: the same question would get the same answer.
  if (fault.code === "provider_error" && !fault.retryable)
    return "The provider does not accept this question. Change it, or choose another model above.";
  const wait = fault.retry_after ? `${Math.ceil(fault.retry_after)} s` : "a moment";
  return (ADVICE[fault.code] ?? REPEAT).replace("{}", wait);
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
