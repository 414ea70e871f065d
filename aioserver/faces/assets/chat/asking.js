// Every turn whose answer is not over yet, of whatever conversation, over one connection.
//
// Whenever the server lets the socket in, each of them is asked, or read on behind the last event
// it has. What is kept of a turn in the store is enough for that: a reload is a lost connection.

import { askAgain, ended, newTurn, take } from "./turn.js";
import { cancelFrame, chatFrame, resumeFrame } from "./turn.js";

const ASK_AGAIN_WITHIN = 25_000; // ms: so long the server surely knows a request that it has got
const SEND_WITHIN = 600_000; // ms: what was not sent then is not sent by itself after a reload

export function running(conversation) {
  return conversation.turns.find((turn) => !ended(turn));
}

export class Asking {
  // `told` has changed(conversation, turn), begun(conversation), over(conversation, turn).
  constructor(store, told) {
    this.store = store;
    this.told = told;
    this.link = null; // set before the first question
    this.following = new Map(); // request id → { conversation, turn, joined, later }
  }

  get turns() {
    return [...this.following.values()].map(({ turn }) => turn);
  }

  ask(conversation, question, choice) {
    const turn = newTurn(question, choice);
    this.store.add(conversation, turn);
    this.follow(conversation, turn);
    return turn;
  }

  again(conversation, turn, choice) {
    if (running(conversation)) return;
    askAgain(turn, choice);
    this.store.save(conversation);
    this.follow(conversation, turn);
  }

  // Go on with what ran when this page, or another window of it, wrote the conversation down.
  goOn(conversation) {
    const turn = running(conversation);
    if (turn === undefined) return;
    if (turn.state === "unsent" && Date.now() - turn.asked > SEND_WITHIN) {
      turn.state = "failed";
      turn.fault = { code: "not_sent", error: "the page was closed before this could be sent" };
      return;
    }
    this.follow(conversation, turn);
  }

  follow(conversation, turn) {
    const one = { conversation, turn, joined: false, later: 0 };
    this.following.set(turn.id, one);
    if (this.link.inside) this.join(one);
    else if (this.link.state.name === "closed") this.link.connect();
    this.changed(one);
  }

  forget(conversation) {
    for (const [id, one] of this.following) {
      if (one.conversation === conversation) this.following.delete(id);
    }
  }

  // The server has let the socket in.
  joinAll() {
    for (const one of this.following.values()) this.join(one);
  }

  // Ask, or read on. A question that was sent, and of which nothing was heard, is asked once more
  // in the same words: the server answers it once. Not later: it forgets what it was asked.
  join(one) {
    const { conversation, turn } = one;
    clearTimeout(one.later);
    if (turn.notBefore > Date.now()) {
      const due = () => this.link.inside && this.following.get(turn.id) === one && this.join(one);
      one.later = setTimeout(due, turn.notBefore - Date.now());
      return;
    }
    const fresh = Date.now() - turn.asked < ASK_AGAIN_WITHIN;
    if (turn.state === "unsent" || (turn.state === "sent" && fresh && !turn.stopping)) {
      one.joined = turn.state !== "unsent";
      turn.state = "sent";
      turn.asked = Date.now();
      this.link.send(chatFrame(turn, conversation.id));
    } else {
      one.joined = true;
      this.link.send(resumeFrame(turn));
      if (turn.stopping) this.link.send(cancelFrame(turn));
    }
    this.changed(one);
  }

  stop(conversation) {
    const turn = running(conversation);
    if (turn === undefined || turn.stopping) return;
    const one = this.following.get(turn.id);
    turn.stopping = true;
    if (turn.state === "unsent") {
      turn.state = "stopped";
      this.finish(one);
    } else if (this.link.inside) {
      this.link.send(cancelFrame(turn));
    } // else as soon as it is inside
    this.changed(one);
  }

  receive(frame) {
    const one = this.following.get(frame.request_id);
    if (one === undefined) return;
    const { conversation, turn } = one;
    if (this.refused(one, frame)) return;
    if (frame.status === "cancelled" && turn.last === 0 && one.joined && !turn.stopping) {
      // It ended in the provider's line when the connection was lost: nothing was asked yet.
      this.following.delete(turn.id);
      askAgain(turn, turn);
      this.store.save(conversation);
      this.follow(conversation, turn);
      return;
    }
    one.joined = false;
    const begins = turn.last === 0;
    if (!take(turn, frame)) return;
    if (begins && turn.last > 0) this.told.begun(conversation);
    if (ended(turn)) this.finish(one);
    this.changed(one);
  }

  // The server took nothing of a question, since it is full or stops: it is sent again later.
  refused(one, { status, event_id: number, chunk }) {
    const { turn } = one;
    if (status !== "error" || number !== undefined || turn.last > 0 || turn.stopping) return false;
    const full = chunk.code === "server_at_capacity";
    if (!full && chunk.code !== "server_shutdown") return false;
    turn.state = "unsent";
    turn.notBefore = full ? Date.now() + 1000 * (chunk.retry_after ?? 1) : 0;
    if (full) this.join(one);
    this.changed(one);
    return true;
  }

  // A message over the limit has ended the socket, and is not named: it was the longest of those
  // not heard of. Whether there is one; without it the others may come back at once.
  tooLarge() {
    const sent = [...this.following.values()].filter(({ turn }) => turn.state === "sent");
    sent.sort((a, b) => b.turn.question.length - a.turn.question.length);
    if (sent.length === 0) return false;
    sent[0].turn.state = "failed";
    sent[0].turn.fault = { code: "request_too_large", error: "this is too long for the server" };
    this.finish(sent[0]);
    this.changed(sent[0]);
    return true;
  }

  finish({ conversation, turn }) {
    this.following.delete(turn.id);
    this.store.save(conversation);
    this.told.over(conversation, turn);
  }

  changed({ conversation, turn }) {
    if (!ended(turn)) this.store.saveSoon(conversation);
    this.told.changed(conversation, turn);
  }
}
