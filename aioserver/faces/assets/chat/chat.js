// The chat page. One client, that of /client.js, serves all conversations; one of them is shown.

import { Client } from "/client.js";
import { closeReason } from "./errors.js";
import { ConversationList, personal, ServerHistory } from "./history.js";
import { Models } from "./models.js";
import { Requests, runningTurn } from "./requests.js";
import { newConversation, Store } from "./store.js";
import { ended } from "./turn.js";
import { position, seconds, TurnView } from "./turn_view.js";
import { Login } from "../login.js";

const NEAR_END = 80; // pixels: a reader so near to the end wants to see the text that comes
const TOLD_FOR = 3000; // milliseconds that a remark stands in the place of the keys
const MAX_ANNOUNCED = 2000; // characters of an answer that a screen reader reads
const STATES = {
  connecting: "Connecting",
  queued: "Waiting",
  open: "Connected",
  lost: "Not connected",
  closed: "Not connected",
};
const NEXT_STEPS = {
  connecting: () => "Connecting now.",
  queued: (state) => `In the connection queue: ${position(state)}.`,
  lost: ({ until }) => `The next attempt is in ${seconds(until)}.`,
};

const byId = (id) => document.getElementById(id);
const SHORTCUTS = byId("shortcuts").textContent;
const conversationBox = byId("conversation");
const message = byId("message");
const views = new Map(); // turn → TurnView, for each turn of the conversation that is shown
const changedTurns = new Set(); // turns to draw in the next frame
let frameRequest = 0;
let countdown = 0;
let told = 0;
let atEnd = true; // whether the end of the conversation is kept in sight

const busy = (conversation) => runningTurn(conversation) !== undefined;
const store = new Store({ busy, changed: changedElsewhere, warn: showNotice });
const models = new Models(byId("model"), { store, changed: drawModel });
const login = new Login({ changed: changeOwner });
const client = new Client(location.origin, { before, onstate });
const requests = new Requests(client, store, { changed: drawTurn, started, finished });
const kept = new ServerHistory(client, store, {
  personal: () => personal(login.session, location.hostname),
  changed: drawList,
});
let lastLoss = null; // the state in which the connection was lost, until it is open again
const list = new ConversationList(byId("conversations"), { open: choose, remove });
// What this browser has not begun: programs and other browsers with the same key. It is told apart, since programs begin many.
const elsewhere = new ConversationList(byId("elsewhere").querySelector("ul"), { open: choose, remove });
let current = newConversation();
const reopened = history.state?.open; // what this window showed before it was reloaded

// Before each connection: is a key needed, and where are the faces?
async function before() {
  await login.ensure();
  const { endpoints } = await models.load();
  Object.assign(client.endpoints, endpoints);
}

function onstate(state) {
  if (state.name === "open") {
    lastLoss = null;
    kept.load();
  }
  if (state.name === "lost" || state.name === "closed") lastLoss = state;
  drawConnection();
  if (state.name === "closed" && state.fault?.code === "invalid_api_key") client.connect(); // the login asks for another key
}

// A computer that wakes up need not wait for the next attempt; a server at capacity must not be asked sooner.
function retryNow() {
  if (client.state.name === "lost" && client.state.code !== 1013) client.connect();
}

// The conversation that is shown.

function show(conversation) {
  current.draft = message.value;
  if (current !== conversation) store.saveSoon(current);
  current = conversation;
  message.value = conversation.draft;
  history.replaceState({ open: conversation.id }, ""); // a reload of this window shows it again
  drawAll();
}

async function choose(conversation) {
  if (conversation.turns.length || !kept.summaries.has(conversation.id)) show(conversation);
  closeSidebar();
  message.focus();
  if (kept.ahead(conversation) && !busy(conversation)) await catchUp(conversation);
}

// The server has more of this conversation: it was continued elsewhere, or this browser has lost it.
async function catchUp(conversation) {
  const { owner } = store;
  const turns = await kept.turns(conversation.id);
  if (owner !== store.owner) return; // another person is there meanwhile
  if (turns === null) showNotice("The server cannot show this conversation now.");
  if (!turns?.length || busy(conversation)) return;
  const known = store.conversations.get(conversation.id) ?? conversation;
  known.turns = turns;
  store.keep(known);
  show(known);
}

function send() {
  const question = message.value.trim();
  if (!question) return;
  if (busy(current)) {
    tell("An answer is still running. Escape stops it.");
    return;
  }
  message.value = "";
  ask(question);
}

function ask(question) {
  requests.ask(current, question, models.choice);
  drawAll();
}

function remove(conversation) {
  requests.forget(conversation);
  store.remove(conversation);
  kept.remove(conversation.id);
  if (conversation === current) show(newConversation());
  drawList();
  (byId("conversations").querySelector("button") ?? byId("new")).focus();
}

// What is shown and stored belongs to a key, and to nobody else in front of this browser.
function changeOwner() {
  drawLogin();
  const { key_required: required, name } = login.session;
  const owner = required ? (name ?? undefined) : null;
  if (owner === store.owner) return;
  current.draft = message.value;
  store.saveSoon(current);
  for (const conversation of store.list) requests.forget(conversation);
  store.open(owner);
  kept.clear();
  message.value = "";
  for (const conversation of store.list) requests.restore(conversation);
  show(store.conversations.get(reopened) ?? newConversation());
}

async function logOut(remove) {
  const { owner } = store;
  await login.logOut().catch(() => showNotice("The server does not answer: you are still logged in."));
  if (login.session.name !== null) return;
  if (remove) store.forget(owner);
  client.close();
  client.connect(); // the login asks for a key first
}

function changedElsewhere(id, before) {
  if (before) requests.forget(before);
  const now = store.conversations.get(id);
  if (now) requests.restore(now);
  if (current.id === id) {
    const next = now ?? newConversation();
    next.draft = message.value; // the draft of this window stays
    show(next);
  }
  drawList();
}

// Announcements for screen readers: the start of an answer, and its whole text, but not each token.

function started(conversation) {
  if (conversation === current) announce("The answer starts.");
}

function finished(conversation, turn) {
  drawList();
  if (conversation !== current) return;
  const text = { failed: turn.fault?.error, stopped: "Stopped." }[turn.state];
  announce((text ?? views.get(turn).readableText()).slice(0, MAX_ANNOUNCED));
}

// Say something to everybody: it stands for a moment where the keys are explained.
function tell(text) {
  announce(text);
  byId("shortcuts").classList.add("told");
  setText("shortcuts", text);
  clearTimeout(told);
  told = setTimeout(() => {
    byId("shortcuts").classList.remove("told");
    setText("shortcuts", SHORTCUTS);
  }, TOLD_FOR);
}

function announce(text) {
  byId("announcer").textContent = text;
}

function showNotice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = false;
}

// Drawing. Events come faster than a screen shows frames, so those of one frame are drawn together.

function drawAll() {
  const conversation = current;
  views.clear();
  byId("empty").hidden = conversation.turns.length > 0;
  for (const turn of conversation.turns) {
    const repeat = () => requests.repeat(conversation, turn, models.choice);
    views.set(turn, new TurnView(turn, repeat));
    changedTurns.add(turn);
  }
  byId("turns").replaceChildren(...[...views.values()].map((view) => view.element));
  atEnd = true;
  draw();
  drawList();
  drawComposer();
}

function drawTurn(conversation, turn) {
  changedTurns.add(turn);
  frameRequest ||= requestAnimationFrame(draw);
  if (conversation === current) drawComposer();
  if (turn.notBefore > Date.now()) drawWaiting();
}

function draw() {
  cancelAnimationFrame(frameRequest);
  frameRequest = 0;
  for (const turn of changedTurns) views.get(turn)?.draw(client.state);
  changedTurns.clear();
  if (atEnd) conversationBox.scrollTop = conversationBox.scrollHeight;
}

function drawList() {
  const { missing } = kept;
  list.draw(store.list, current, busy);
  elsewhere.draw(missing.sort((a, b) => b.used - a.used), current, busy);
  byId("elsewhere").hidden = missing.length === 0;
}

function drawComposer() {
  const turn = runningTurn(current);
  byId("send").hidden = turn !== undefined;
  byId("stop").hidden = turn === undefined;
}

function drawConnection() {
  const { state } = client;
  byId("state").dataset.state = state.name;
  setText("state", STATES[state.name]);
  const problem = describe(state);
  if (problem === "" && byId("problem").contains(document.activeElement)) message.focus();
  byId("problem").hidden = problem === "";
  setText("problem-text", problem);
  setText("problem-next", NEXT_STEPS[state.name]?.(state) ?? "");
  byId("connect").hidden = state.name === "queued" || state.code === 1013; // the server says when
  setText("connect", state.name === "closed" ? "Connect" : "Try now");
  drawWaiting();
}

// The problem of the connection in a sentence; "" if there is none.
function describe(state) {
  if (state.name === "connecting") return lastLoss ? describe(lastLoss) : "";
  if (state.name === "queued") return "The server is at capacity.";
  if (state.name === "closed") return closeReason(state);
  if (state.name !== "lost") return "";
  if (state.code === 1013)
    return `The server is at capacity${detail(state.fault)}. This page tries again automatically.`;
  if (state.code === 1012) return "The server restarts. This page reconnects automatically.";
  return "The connection to the server is lost. New messages are sent when it is back.";
}

function detail(fault) {
  return fault ? ` (${fault.error})` : "";
}

function drawModel() {
  byId("simulated").hidden = !models.simulated;
}

function drawLogin() {
  const { name } = login.session;
  byId("logout").hidden = name === null;
  byId("logout").title = name === null ? "" : `Logged in with the key “${name}”`;
}

// An equal text is not set again: a screen reader would read it again.
function setText(id, text) {
  if (byId(id).textContent !== text) byId(id).textContent = text;
}

// Draw the turns that wait for the connection, and each second while a countdown is shown.
function drawWaiting() {
  const waiting = requests.turns.filter((turn) => !ended(turn));
  for (const turn of waiting) changedTurns.add(turn);
  frameRequest ||= requestAnimationFrame(draw);
  clearTimeout(countdown);
  if (client.state.name === "lost" || waiting.some((turn) => turn.notBefore > Date.now()))
    countdown = setTimeout(drawConnection, 1000);
}

// Input.

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});

message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || event.target === byId("model")) return;
  if (document.body.classList.contains("sidebar-open")) {
    closeSidebar();
    byId("menu").focus();
  } else {
    requests.stop(current);
  }
});

conversationBox.addEventListener("scroll", () => {
  const { scrollHeight, scrollTop, clientHeight } = conversationBox;
  atEnd = scrollHeight - scrollTop - clientHeight < NEAR_END;
});
new ResizeObserver(() => {
  if (atEnd) conversationBox.scrollTop = conversationBox.scrollHeight; // the footer has grown
}).observe(conversationBox);

for (const prompt of byId("prompts").children)
  prompt.addEventListener("click", () => {
    ask(prompt.textContent);
    message.focus(); // the prompts are hidden now
  });
byId("stop").addEventListener("click", () => {
  requests.stop(current);
  message.focus(); // the button is hidden now
});
window.addEventListener("online", retryNow);
document.addEventListener("visibilitychange", () => document.hidden || retryNow());
byId("connect").addEventListener("click", () => client.connect());
byId("logout").addEventListener("click", () => (store.list.length ? byId("leaving").showModal() : logOut(true)));
byId("leaving").addEventListener("close", ({ target }) => {
  if (target.returnValue) logOut(target.returnValue === "remove");
  target.returnValue = "";
});
byId("new").addEventListener("click", () => choose(newConversation()));
byId("menu").addEventListener("click", () => {
  const open = document.body.classList.toggle("sidebar-open");
  byId("menu").setAttribute("aria-expanded", String(open));
  if (open) byId("new").focus();
});
byId("backdrop").addEventListener("click", closeSidebar);

function closeSidebar() {
  document.body.classList.remove("sidebar-open");
  byId("menu").setAttribute("aria-expanded", "false");
}

// The start.

for (const conversation of store.list) requests.restore(conversation);
show(store.conversations.get(reopened) ?? current);
client.connect();
