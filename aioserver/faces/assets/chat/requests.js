// All turns whose answer has not ended, of every conversation, over one connection.
//
// Whenever the server admits the connection, each turn is sent, or resumed behind the last event
// that it has. What the store has of a turn is enough for that, so a reload of the page is handled
// as a lost connection.

import { waitBefore, waitingFor } from "./errors.js";
import { ended, newTurn, resetTurn, take } from "./turn.js";
import { cancelFrame, chatFrame, resumeFrame } from "./turn.js";

const RESEND_WITHIN = 25_000; // ms: the server knows a request at least so long after it came
const SEND_WITHIN = 600_000; // ms: an older unsent message is not sent automatically after a reload

export function runningTurn(conversation) {
  return conversation.turns.find((turn) => !ended(turn));
}

export class Requests {
  // The listener has changed(conversation, turn), started(conversation) and
  // finished(conversation, turn).
  constructor(store, listener) {
    this.store = store;
    this.listener = listener;
    this.connection = null; // it is set before the first question
    this.active = new Map(); // request id → { conversation, turn, resent, timer }
  }

  get turns() {
    return [...this.active.values()].map(({ turn }) => turn);
  }

  ask(conversation, question, choice) {
    const turn = newTurn(question, choice);
    this.store.add(conversation, turn);
    this.follow(conversation, turn);
    return turn;
  }

  repeat(conversation, turn, choice) {
    if (runningTurn(conversation)) return;
    resetTurn(turn, choice);
    this.store.save(conversation);
    this.follow(conversation, turn);
  }

  // Continue the turn that ran when this page, or another window of it, stored the conversation.
  restore(conversation) {
    const turn = runningTurn(conversation);
    if (turn === undefined) return;
    if (turn.state === "unsent" && Date.now() - turn.asked > SEND_WITHIN) {
      turn.state = "failed";
      turn.fault = { code: "not_sent", error: "the page was closed before this could be sent" };
      return;
    }
    this.follow(conversation, turn);
  }

  follow(conversation, turn) {
    const request = { conversation, turn, resent: false, timer: 0 };
    this.active.set(turn.id, request);
    if (this.connection.open) this.attach(request);
    else if (this.connection.state.name === "closed") this.connection.connect();
    this.changed(request);
  }

  forget(conversation) {
    for (const [id, request] of this.active) {
      if (request.conversation === conversation) this.active.delete(id);
    }
  }

  // The server has admitted the connection.
  attachAll() {
    for (const request of this.active.values()) this.attach(request);
  }

  // Send the question, or resume the answer. A question that was sent, and of which no event came,
  // is sent once more with the same id: the server answers it once. After RESEND_WITHIN it is not,
  // since the server forgets old requests.
  attach(request) {
    const { conversation, turn } = request;
    clearTimeout(request.timer);
    if (turn.notBefore > Date.now()) {
      const due = () =>
        this.connection.open && this.active.get(turn.id) === request && this.attach(request);
      request.timer = setTimeout(due, turn.notBefore - Date.now());
      return;
    }
    const fresh = Date.now() - turn.asked < RESEND_WITHIN;
    if (turn.state === "unsent" || (turn.state === "sent" && fresh && !turn.stopping)) {
      request.resent = turn.state !== "unsent";
      turn.state = "sent";
      turn.asked = Date.now();
      this.connection.send(chatFrame(turn, conversation.id));
    } else {
      request.resent = true;
      this.connection.send(resumeFrame(turn));
      if (turn.stopping) this.connection.send(cancelFrame(turn));
    }
    this.changed(request);
  }

  stop(conversation) {
    const turn = runningTurn(conversation);
    if (turn === undefined || turn.stopping) return;
    const request = this.active.get(turn.id);
    turn.stopping = true;
    if (turn.state === "unsent") {
      turn.state = "stopped";
      this.finish(request);
    } else if (this.connection.open) {
      this.connection.send(cancelFrame(turn));
    } // otherwise `attach` sends the frame, once the connection is open
    this.changed(request);
  }

  receive(frame) {
    const request = this.active.get(frame.request_id);
    if (request === undefined) return;
    const { conversation, turn } = request;
    if (this.rejected(request, frame)) return;
    if (frame.status === "cancelled" && turn.last === 0 && request.resent && !turn.stopping) {
      // The request waited in the provider's queue when the connection was lost, which cancelled
      // it: the provider was not asked, so asking again costs nothing.
      this.active.delete(turn.id);
      resetTurn(turn, turn);
      this.store.save(conversation);
      this.follow(conversation, turn);
      return;
    }
    request.resent = false;
    const starts = turn.last === 0;
    if (!take(turn, frame)) return;
    if (starts && turn.last > 0) this.listener.started(conversation);
    if (ended(turn)) this.finish(request);
    this.changed(request);
  }

  // An error before any word of the answer that passes by itself: the question is asked again later, under its id where the
  // server has not taken that (the error has no number), otherwise under a new one. This reader was dropped since it was
  // slow: the answer goes on, and the rest is asked for, unless nothing came since the last time.
  rejected(request, { status, event_id: number, chunk }) {
    const { conversation, turn } = request;
    if (status !== "error" || turn.stopping) return false;
    if (chunk.code === "slow_client" && number === undefined && request.dropped !== turn.last) {
      request.dropped = turn.last;
      this.connection.send(resumeFrame(turn));
      return true;
    }
    if (turn.text || turn.reasoning || turn.tools.length) return false;
    if (chunk.code === "server_shutdown" && number === undefined && turn.last === 0) {
      turn.state = "unsent"; // it is sent over the next connection
      this.changed(request);
      return true;
    }
    const text = waitingFor(chunk, turn.tries);
    if (!text || (number === undefined && turn.last > 0)) return false;
    const tries = turn.tries + 1;
    this.active.delete(turn.id);
    const { id } = turn;
    resetTurn(turn, turn);
    if (number === undefined) turn.id = id;
    const notBefore = Date.now() + waitBefore(chunk, tries - 1);
    Object.assign(turn, { tries, notBefore, waitingFor: text });
    this.store.save(conversation);
    this.follow(conversation, turn);
    return true;
  }

  // A message above the size limit has ended the connection. The server does not say which one: it
  // was the longest of those without an event. Returns whether there is one; then the others may
  // be sent again at once.
  tooLarge() {
    const sent = [...this.active.values()].filter(({ turn }) => turn.state === "sent");
    sent.sort((a, b) => b.turn.question.length - a.turn.question.length);
    if (sent.length === 0) return false;
    sent[0].turn.state = "failed";
    sent[0].turn.fault = { code: "request_too_large", error: "this is too long for the server" };
    this.finish(sent[0]);
    this.changed(sent[0]);
    return true;
  }

  finish({ conversation, turn }) {
    this.active.delete(turn.id);
    this.store.save(conversation);
    this.listener.finished(conversation, turn);
  }

  changed({ conversation, turn }) {
    if (!ended(turn)) this.store.saveSoon(conversation);
    this.listener.changed(conversation, turn);
  }
}
