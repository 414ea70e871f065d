// The chat page over the WebSocket face: one socket for all conversations, one of them shown.

import { Asking, running } from "./asking.js";
import { closure } from "./faults.js";
import { Link } from "./link.js";
import { List } from "./list.js";
import { Models } from "./models.js";
import { newConversation, Store } from "./store.js";
import { ended } from "./turn.js";
import { position, seconds, TurnView } from "./view.js";
import { Door } from "../door.js";

const NEAR = 80; // pixels from the end: who reads there wants to see what comes
const READ_OUT = 2000; // characters of an answer
const STATES = {
  connecting: "Connecting",
  waiting: "Waiting",
  inside: "Connected",
  lost: "Not connected",
  closed: "Not connected",
};
const WHEN = {
  connecting: () => "Trying now.",
  waiting: (state) => `You are ${position(state)}.`,
  lost: ({ until }) => `Next try in ${seconds(until)}.`,
};

const at = (id) => document.getElementById(id);
const room = at("room");
const text = at("text");
const views = new Map(); // turn → its TurnView, of the conversation that is shown
const dirty = new Set(); // turns to draw
let drawing = 0;
let ticking = 0;
let following = true; // the person reads at the end, so what comes is kept in sight

const busy = (conversation) => running(conversation) !== undefined;
const store = new Store({ busy, changed: changedElsewhere, full: notice });
const models = new Models(at("model"), store);
const door = new Door({ changed: drawDoor });
const asking = new Asking(store, { changed: drawTurn, begun, over });
const link = new Link(locate, {
  changed: drawLink,
  entered: () => asking.joinAll(),
  frame: (frame) => asking.receive(frame),
  tooLarge: () => asking.tooLarge(),
  wanted: () => asking.turns.length > 0,
});
asking.link = link;
const list = new List(at("list"), { open: choose, remove });
let current = newConversation();

async function locate() {
  await door.pass();
  const { endpoints } = await models.load();
  return location.origin.replace(/^http/, "ws") + endpoints.websocket;
}

// The conversation that is shown.

function show(conversation) {
  current.draft = text.value;
  if (current !== conversation) store.saveSoon(current);
  current = conversation;
  text.value = conversation.draft;
  history.replaceState({ open: conversation.id }, ""); // a reload of this window shows the same
  drawAll();
}

function choose(conversation) {
  show(conversation);
  closeSide();
  text.focus();
}

function send() {
  const question = text.value.trim();
  if (!question) return;
  if (busy(current)) {
    announce("An answer is still coming. Escape stops it.");
    return;
  }
  text.value = "";
  asking.ask(current, question, models.choice);
  drawAll();
}

function remove(conversation) {
  asking.stop(conversation);
  asking.forget(conversation);
  store.remove(conversation);
  if (conversation === current) show(newConversation());
  drawList();
  (at("list").querySelector("button") ?? at("new")).focus();
}

function changedElsewhere(id, before) {
  if (before) asking.forget(before);
  const now = store.conversations.get(id);
  if (now) asking.goOn(now);
  if (current.id === id) {
    const next = now ?? newConversation();
    next.draft = text.value; // what is being written here stays
    show(next);
  }
  drawList();
}

// What is told of answers. Read out is that one begins, and the whole of it: not each token.

function begun(conversation) {
  if (conversation === current) announce("The answer begins.");
}

function over(conversation, turn) {
  drawList();
  if (conversation !== current) return;
  const said = { failed: turn.fault?.error, stopped: "Stopped." }[turn.state] ?? turn.text;
  announce(said.slice(0, READ_OUT));
}

function announce(said) {
  at("voice").textContent = said;
}

function notice(said) {
  at("notice").textContent = said;
  at("notice").hidden = false;
}

// Drawing. An answer's pieces come faster than a screen shows them: all of a frame at once.

function drawAll() {
  const conversation = current;
  views.clear();
  at("empty").hidden = conversation.turns.length > 0;
  for (const turn of conversation.turns) {
    const again = () => asking.again(conversation, turn, models.choice);
    views.set(turn, new TurnView(turn, again));
    dirty.add(turn);
  }
  at("log").replaceChildren(...[...views.values()].map((view) => view.element));
  following = true;
  draw();
  drawList();
  drawComposer();
}

function drawTurn(conversation, turn) {
  dirty.add(turn);
  drawing ||= requestAnimationFrame(draw);
  if (conversation === current) drawComposer();
}

function draw() {
  cancelAnimationFrame(drawing);
  drawing = 0;
  for (const turn of dirty) views.get(turn)?.draw(link.state);
  dirty.clear();
  if (following) room.scrollTop = room.scrollHeight;
}

function drawList() {
  list.draw(store.list, current, busy);
}

function drawComposer() {
  const turn = running(current);
  at("send").hidden = turn !== undefined;
  at("stop").hidden = turn === undefined;
  at("stop").disabled = Boolean(turn?.stopping);
}

function drawLink() {
  const { state } = link;
  at("state").dataset.state = state.name;
  setText("state", STATES[state.name]);
  const why = trouble(state);
  if (why === "" && at("trouble").contains(document.activeElement)) text.focus();
  at("trouble").hidden = why === "";
  setText("why", why);
  setText("when", WHEN[state.name]?.(state) ?? "");
  at("connect").hidden = state.name === "waiting";
  setText("connect", state.name === "closed" ? "Connect" : "Try now");
  tick();
}

function trouble(state) {
  if (state.name === "connecting") return state.after ? trouble(state.after) : "";
  if (state.name === "waiting") return "The server is full, and lets you in as soon as it can.";
  if (state.name === "closed") return closure(state);
  if (state.name !== "lost") return "";
  if (state.code === 1013)
    return `The server is full${detail(state.fault)}. This page tries again by itself.`;
  if (state.code === 1012) return "The server restarts. This page connects again by itself.";
  return "The connection to the server is lost. What you write is sent when it is back.";
}

function detail(fault) {
  return fault ? ` (${fault.error})` : "";
}

function drawDoor() {
  const { name } = door.session;
  at("leave").hidden = name === null;
  at("leave").title = name === null ? "" : `You are in with the key “${name}”`;
}

// Only where it differs: what is read out is read out once.
function setText(id, said) {
  if (at(id).textContent !== said) at(id).textContent = said;
}

// The answers wait with the connection, and time is counted down while there is something to count.
function tick() {
  const waiting = asking.turns.filter((turn) => !ended(turn));
  for (const turn of waiting) dirty.add(turn);
  drawing ||= requestAnimationFrame(draw);
  clearTimeout(ticking);
  if (link.state.name === "lost" || waiting.some((turn) => turn.notBefore > Date.now()))
    ticking = setTimeout(drawLink, 1000);
}

// What the person does.

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});

text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || event.target === at("model")) return;
  if (document.body.classList.contains("side-open")) {
    closeSide();
    at("menu").focus();
  } else {
    asking.stop(current);
  }
});

room.addEventListener("scroll", () => {
  following = room.scrollHeight - room.scrollTop - room.clientHeight < NEAR;
});
new ResizeObserver(() => {
  if (following) room.scrollTop = room.scrollHeight; // the message grew, or a trouble is told
}).observe(room);

at("stop").addEventListener("click", () => {
  asking.stop(current);
  text.focus(); // the button goes away
});
at("connect").addEventListener("click", () => link.connect());
at("leave").addEventListener("click", async () => {
  await door.leave().catch(() => notice("The server does not answer: you are still logged in."));
  if (door.session.name === null) link.connect(); // which asks for a key first
});
at("new").addEventListener("click", () => choose(newConversation()));
at("menu").addEventListener("click", () => {
  const open = document.body.classList.toggle("side-open");
  at("menu").setAttribute("aria-expanded", String(open));
  if (open) at("new").focus();
});
at("shade").addEventListener("click", closeSide);

function closeSide() {
  document.body.classList.remove("side-open");
  at("menu").setAttribute("aria-expanded", "false");
}

// The start.

for (const conversation of store.list) asking.goOn(conversation);
show(store.conversations.get(history.state?.open) ?? current);
link.connect();
