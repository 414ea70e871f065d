// How a turn looks: its question, its answer, and one quiet line that says where the answer is.

import { advice, hopeful, sentence } from "./faults.js";
import { grow, showText } from "./text.js";
import { ended } from "./turn.js";

const SHOWN_COPIED = 2000; // milliseconds

const CUT = "this browser keeps only the beginning";
const REASONS = new Map([
  ["length", "cut at its greatest length"],
  ["content_filter", "cut by the provider's content filter"],
]); // not an object: a provider's reason may be the name of what every object has

export class TurnView {
  // `again()`: the person wants it asked once more.
  constructor(turn, again) {
    this.turn = turn;
    this.element = document.getElementById("turn").content.firstElementChild.cloneNode(true);
    for (const name of ["question", "answer", "reasoning", "text", "tools", "fault", "status"])
      this[name] = this.element.querySelector(`.${name}`);
    this.copy = this.element.querySelector(".copy");
    this.again = this.element.querySelector(".again");
    this.copy.addEventListener("click", () => this.copyText());
    this.again.addEventListener("click", again);
    this.question.querySelector("p").textContent = turn.question;
  }

  // `link`: the state of the connection, which may hold up the answer.
  draw(link) {
    const { turn } = this;
    const over = ended(turn);
    this.answer.setAttribute("aria-busy", String(!over));
    this.answer.dataset.state = turn.state;
    showText(this.text, turn.text);
    this.drawHidden(this.reasoning, turn.reasoning);
    const calls = turn.tools.map((call) => `${call.name}(${call.arguments})`);
    this.drawHidden(this.tools, calls.join("\n\n"));
    const fault = turn.state === "failed" ? turn.fault : null;
    this.fault.hidden = fault === null;
    if (fault) this.fault.textContent = `Failed: ${sentence(fault.error)} ${advice(fault)}`;
    const status = over ? outcome(turn) : progress(turn, link);
    if (this.status.textContent !== status) this.status.textContent = status;
    this.copy.hidden = !over || turn.text === "";
    this.again.hidden = !(fault ? hopeful(fault) : turn.state === "stopped" && tellsNothing(turn));
  }

  drawHidden(details, text) {
    details.hidden = text === "";
    if (text) grow(details.lastElementChild, text);
  }

  async copyText() {
    const done = await copied(this.turn.text, this.copy);
    this.copy.textContent = done ? "Copied" : "Not copied: the browser forbids it";
    setTimeout(() => (this.copy.textContent = "Copy"), SHOWN_COPIED);
  }
}

// Cancelled, and not by the person: in another window, or since nobody read for too long.
function leftAlone(turn) {
  return turn.state === "stopped" && !turn.stopping;
}

// Of what the person stopped, the text so far is part of the conversation: it goes on from there.
function tellsNothing(turn) {
  return leftAlone(turn) || turn.text === "";
}

function outcome(turn) {
  if (leftAlone(turn)) return "Stopped in another window, or not read for too long";
  if (turn.state === "stopped") return turn.text ? "Stopped" : "Stopped before it began";
  const tokens = turn.usage?.completion_tokens;
  const parts = [turn.by, tokens && `${tokens} tokens`, REASONS.get(turn.reason), turn.cut && CUT];
  return parts.filter(Boolean).join(" · ");
}

function progress(turn, link) {
  if (turn.stopping) return "Stopping …";
  if (turn.notBefore > Date.now())
    return `The server is full. Asked again by itself in ${seconds(turn.notBefore)}`;
  if (link.name === "waiting") return `Waiting for a place: ${position(link)}`;
  if (turn.state === "unsent") return "Is sent as soon as the server is there";
  if (link.name !== "inside") return "Goes on when the connection is back";
  if (turn.place) return `Waiting for the provider: ${position(turn.place)}`;
  if (turn.last === 0) return "Sent";
  return turn.text || turn.reasoning ? `Answering · ${turn.by}` : `Thinking · ${turn.by}`;
}

export function position({ position: number, eta }) {
  return `number ${number} in line, about ${Math.max(1, Math.round(eta))} s`;
}

// What is left until a moment, for people.
export function seconds(moment) {
  return `${Math.max(1, Math.ceil((moment - Date.now()) / 1000))} s`;
}

async function copied(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // not localhost and no TLS: there is only the old way
    const area = document.createElement("textarea");
    area.className = "hidden";
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    button.focus();
    return done;
  }
}
