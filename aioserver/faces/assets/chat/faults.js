// What a person can do about a fault, by its code. What happened, the server says.

const AGAIN = "Ask again; if it stays like this, choose another model above.";
const LATER = "Wait {}, then ask again, or choose another model above.";
const OPERATOR = "Whoever runs this server has to see to it; another model above may work.";

const ADVICE = {
  server_at_capacity: "Too many people are here just now. Wait {}, then ask again.",
  server_shutdown: "The server was stopped while it answered. Ask again when it is back.",
  rate_limit_exceeded: "You have sent too much in a short time. Wait {}, then ask again.",
  concurrency_exceeded: "Too many of your answers run at once. Stop one or wait for its end.",
  invalid_api_key: "Your key was withdrawn. Enter another one, then ask again.",
  provider_rate_limited: LATER,
  provider_queue_full: LATER,
  provider_queue_timeout: LATER,
  pool_timeout: LATER,
  circuit_open: LATER,
  provider_auth_error: OPERATOR,
  no_provider: OPERATOR,
  model_not_found: "Choose another model above.",
  request_conflict: "The server knows this number of another question. Ask again under a new one.",
  resume_gap: "To go on here would leave a hole in the answer. Ask again for the whole.",
  stream_not_found: "An answer is kept for a short time, and not over a restart. Ask again for it.",
  not_sent: "Ask again to send it now.",
  request_too_large: "Shorten the message.",
  invalid_request: "Reload the page; if it stays like this, change the message.",
  internal_error: "The reason is in the server's log. Ask again.",
};

export function advice(fault) {
  // The provider's own 4xx: it would say the same again.
  if (fault.code === "provider_error" && !fault.retryable)
    return "The provider does not take this question so. Change it, or choose another model above.";
  const wait = fault.retry_after ? `${Math.ceil(fault.retry_after)} s` : "a moment";
  return (ADVICE[fault.code] ?? AGAIN).replace("{}", wait);
}

// Whether asking the very same again can help.
export function hopeful(fault) {
  return fault.code !== "request_too_large";
}

// Why the socket was closed for good.
export function closure({ code, fault }) {
  if (fault) return `The server closed the connection: ${sentence(fault.error)}`;
  if (code === 1000) return "The server closed the connection, since it was not used.";
  return `The server closed the connection (${code}).`;
}

export function sentence(text) {
  return /[.!?…]$/.test(text) ? text : `${text}.`;
}
