// Numbers as short texts, with the unit behind a no-break space. An unknown number is a dash.
const DASH = "–";
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", minimumSignificantDigits: 3, maximumSignificantDigits: 3 });
const FACES = { websocket: "WebSocket", sse: "SSE", openai: "OpenAI", responses_ws: "Responses WebSocket", anthropic: "Anthropic", other: "Other" };
const STEPS = [[172800, 86400, "d"], [7200, 3600, "h"], [120, 60, "min"]];

const known = (value) => typeof value === "number" && Number.isFinite(value);

export function count(value) {
  if (!known(value)) return DASH;
  return Math.abs(value) < 99999.5 ? whole.format(value) : short.format(value);
}

export function rate(value) {
  if (!known(value)) return DASH;
  if (value > 0 && value < 0.05) return "<0.1";
  return value < 9.95 && !Number.isInteger(value) ? value.toFixed(1) : count(value);
}

export function seconds(value) {
  if (!known(value)) return DASH;
  if (value <= 0) return "0\u00a0s";
  if (value < 0.0005) return "<1\u00a0ms";
  if (value < 0.9995) return `${Math.round(value * 1000)}\u00a0ms`;
  if (value < 9.95 && !Number.isInteger(value)) return `${value.toFixed(1)}\u00a0s`;
  for (const [from, unit, name] of STEPS) {
    if (value >= from) return `${count(Math.floor(value / unit))}\u00a0${name}`;
  }
  return `${Math.round(value)}\u00a0s`;
}

export function bytes(value) {
  if (!known(value)) return DASH;
  let rest = value;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (rest < 1000) return `${rest < 10 && unit !== "B" ? rest.toFixed(1) : Math.round(rest)}\u00a0${unit}`;
    rest /= 1024;
  }
  return `${rest < 10 ? rest.toFixed(1) : count(rest)}\u00a0TiB`;
}

export const share = (value) => (known(value) ? `${Math.round(value * 100)}\u00a0%` : DASH);

export const text = (value) => (value === null || value === undefined || value === "" ? DASH : String(value));

/** Return a code of the server as words: `server_at_capacity` is "server at capacity". */
export const words = (code) => FACES[code] ?? code.replaceAll("_", " ");

/** Return "1 waits" or "2 wait". */
export const some = (value, singular, plural) => `${count(value)}\u00a0${value === 1 ? singular : plural}`;
