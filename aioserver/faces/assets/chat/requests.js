// All turns whose answer has not ended, of every conversation, by one client.
//
// What the store has of a turn is enough to go on with it, so a reload of the page is handled as a lost connection.

import { AnswerError } from "/client.js";
import { waitingFor } from "./errors.js";
import { ended, newTurn, resetTurn, take } from "./turn.js";

const RESEND_WITHIN = 25_000; // ms: the server knows a request at least so long after it came
const SEND_WITHIN = 600_000; // ms: an older unsent message is not sent automatically after a reload
const MAX_TRIES = 5; // times that a question is asked again by itself; then a person decides

export function runningTurn(conversation) {
  return conversation.turns.find((turn) => !ended(turn));
}

export class Requests {
  // The listener has changed(conversation, turn), started(conversation) and
  // finished(conversation, turn).
  constructor(client, store, listener) {
    this.client = client;
    this.store = store;
    this.listener = listener;
    this.answers = new Map(); // turn → its answer, while it is read
  }

  get turns() {
    return [...this.answers.keys()];
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

  // Read the answer of *turn* to its end. A question that was sent, and of which no event came, is sent once more with the same
  // id: the server answers it once. After RESEND_WITHIN it is not, since the server forgets old requests.
  async follow(conversation, turn) {
    const fresh = turn.state === "unsent" || (turn.last === 0 && Date.now() - turn.asked < RESEND_WITHIN);
    const { id: requestId, provider, model } = turn;
    const lastEventId = fresh ? undefined : turn.last;
    const options = { requestId, lastEventId, provider, model, conversationId: conversation.id, deadline: Infinity };
    const answer = this.client.chat(turn.question, options);
    this.answers.set(turn, answer);
    this.changed(conversation, turn);
    try {
      for await (const event of answer.events()) {
        const starts = turn.last === 0 && event.number > 0;
        take(turn, event, answer.requestId);
        if (event.type === "waiting") this.wait(turn, event);
        if (starts) this.listener.started(conversation);
        if (!ended(turn)) this.changed(conversation, turn);
      }
      if (!ended(turn)) turn.state = "stopped";
    } catch (error) {
      if (!(error instanceof AnswerError)) throw error; // a fault of this page
      turn.state = error.code === "cancelled" ? "stopped" : "failed";
      turn.fault = { code: error.code, error: error.message, retryable: error.retryable, retry_after: error.retryAfter };
    }
    if (this.answers.get(turn) !== answer) return; // the conversation was removed
    this.answers.delete(turn);
    this.store.save(conversation);
    this.listener.finished(conversation, turn);
    this.changed(conversation, turn);
  }

  // The question is asked again later. Throws the error if it was asked often enough.
  wait(turn, { code, message, seconds }) {
    const counted = seconds > 0 && code !== "server_shutdown";
    if (counted && turn.tries++ >= MAX_TRIES) throw new AnswerError({ code, error: message, retryable: true, retry_after: seconds });
    turn.waitingFor = waitingFor(code);
    turn.notBefore = Date.now() + seconds * 1000;
  }

  stop(conversation) {
    const turn = runningTurn(conversation);
    if (turn === undefined || turn.stopping) return;
    turn.stopping = true;
    this.answers.get(turn)?.cancel();
  }

  // Stop reading the answers of a conversation that was removed.
  forget(conversation) {
    for (const turn of conversation.turns) {
      this.answers.get(turn)?.cancel();
      this.answers.delete(turn);
    }
  }

  changed(conversation, turn) {
    if (!ended(turn)) this.store.saveSoon(conversation);
    this.listener.changed(conversation, turn);
  }
}
