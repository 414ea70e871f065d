// The elements of a turn: its question, its answer, and a line with the state of the answer.

import { advice, repeatable, sentence } from "./errors.js";
import { MarkdownView, patch } from "./markdown.js";
import { ended } from "./turn.js";

const COPIED_FOR = 2000; // milliseconds that the button says so

const CUT = "this browser has stored only the beginning";
const STOPPED_ELSEWHERE = "Stopped in another window, or by the server, since nobody was reading";
const REASONS = new Map([
  ["length", "ended at the maximum length"],
  ["content_filter", "ended by the provider's content filter"],
]); // not an object: a reason such as "constructor" is a property of every object

export class TurnView {
  // `repeat()` is called when the button "Ask again" is pressed.
  constructor(turn, repeat) {
    this.turn = turn;
    this.element = document.getElementById("turn").content.firstElementChild.cloneNode(true);
    for (const name of ["question", "answer", "reasoning", "text", "tools", "fault", "status"])
      this[name] = this.element.querySelector(`.${name}`);
    this.copy = this.element.querySelector(".copy");
    this.repeat = this.element.querySelector(".repeat");
    this.copy.addEventListener("click", () => this.copyText());
    this.repeat.addEventListener("click", repeat);
    this.text.addEventListener("click", ({ target }) => target.matches(".code > button") && copyCode(target));
    this.question.querySelector("p").textContent = turn.question;
    this.markdown = new MarkdownView(this.text);
  }

  // *connection* is the state of the connection.
  draw(connection) {
    const { turn } = this;
    const over = ended(turn);
    this.answer.setAttribute("aria-busy", String(!over));
    this.answer.dataset.state = turn.state;
    this.markdown.update(turn.text);
    this.drawHidden(this.reasoning, turn.reasoning);
    const calls = turn.tools.map((call) => `${call.name}(${call.arguments})`);
    this.drawHidden(this.tools, calls.join("\n\n"));
    const fault = turn.state === "failed" ? turn.fault : null;
    this.fault.hidden = fault === null;
    if (fault) this.fault.textContent = `Failed: ${sentence(fault.error)} ${advice(fault)}`;
    const status = over ? outcome(turn) : progress(turn, connection);
    setText(this.status, status);
    this.copy.hidden = !over || turn.text === "";
    this.repeat.hidden = !(fault
      ? repeatable(fault)
      : turn.state === "stopped" && worthRepeating(turn));
  }

  // The answer without the characters of its markup, for a screen reader.
  readableText() {
    this.markdown.update(this.turn.text);
    return this.text.innerText;
  }

  drawHidden(details, text) {
    details.hidden = text === "";
    setText(details.lastElementChild, text);
  }

  async copyText() {
    const done = await copied(this.turn.text, this.copy);
    this.copy.textContent = done ? "Copied" : "The browser does not allow it";
    setTimeout(() => (this.copy.textContent = "Copy"), COPIED_FOR);
  }
}

// A text that has only grown is extended, so that a selection in it survives.
function setText(element, text) {
  patch(element, 0, text ? [new Text(text)] : []);
}

// Cancelled, but not by the stop button of this window.
function cancelledElsewhere(turn) {
  return turn.state === "stopped" && !turn.stopping;
}

// A text that was stopped in this window stays part of the conversation; such a turn is not repeated.
function worthRepeating(turn) {
  return cancelledElsewhere(turn) || turn.text === "";
}

function outcome(turn) {
  if (cancelledElsewhere(turn)) return STOPPED_ELSEWHERE;
  if (turn.state === "stopped") return turn.text ? "Stopped" : "Stopped before it started";
  const tokens = turn.usage?.completion_tokens;
  const parts = [turn.by, tokens && `${tokens} tokens`, REASONS.get(turn.reason), turn.cut && CUT];
  return parts.filter(Boolean).join(" · ");
}

function progress(turn, connection) {
  if (turn.notBefore > Date.now())
    return `${turn.waitingFor} The next attempt is in ${seconds(turn.notBefore)}`;
  if (connection.name === "queued")
    return `In the connection queue: ${position(connection)}`;
  if (turn.state === "unsent") return "It is sent when the connection is back";
  if (connection.name !== "open") return "It continues when the connection is back";
  if (turn.place) return `In the provider's queue: ${position(turn.place)}`;
  if (turn.last === 0) return "Sent";
  return turn.text || turn.reasoning ? `Answering · ${turn.by}` : `Thinking · ${turn.by}`;
}

export function position({ position: number, eta }) {
  return `position ${number}, about ${Math.max(1, Math.round(eta))} s`;
}

// The time until *moment*, as text.
export function seconds(moment) {
  return `${Math.max(1, Math.ceil((moment - Date.now()) / 1000))} s`;
}

async function copyCode(button) {
  if (!(await copied(button.parentElement.firstChild.textContent, button))) return;
  button.dataset.copied = "";
  setTimeout(() => delete button.dataset.copied, COPIED_FOR);
}

async function copied(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without TLS, and not on localhost, browsers offer only execCommand.
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
