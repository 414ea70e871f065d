"use strict";
// The chat over the WebSocket face: one socket, answers streamed, resumed after a cut.
const log = document.getElementById("log");
const state = document.getElementById("state");
const form = document.getElementById("form");
const text = document.getElementById("text");
const stop = document.getElementById("stop");
const send = document.getElementById("send");
const running = new Map(); // request id → { box, last }
const conversation = newId();
let socket;
let failures = 0;

function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");
}

function add(kind, content) {
  const box = document.createElement("p");
  box.className = kind;
  box.textContent = content;
  log.append(box);
  box.scrollIntoView({ block: "end" });
  return box;
}

function show() {
  stop.hidden = running.size === 0;
}

async function connect() {
  const endpoint = (await (await fetch("/", { headers: { Accept: "application/json" } })).json()).endpoints.websocket;
  socket = new WebSocket(location.origin.replace(/^http/, "ws") + endpoint);
  socket.onopen = () => {
    state.textContent = "connected";
    failures = 0;
    for (const [id, answer] of running) {
      socket.send(JSON.stringify({ action: "resume", request_id: id, payload: { last_event_id: answer.last } }));
    }
  };
  socket.onmessage = (message) => receive(JSON.parse(message.data));
  socket.onclose = again;
}

function again(event) {
  const wait = Math.random() * Math.min(30, 0.5 * 2 ** failures++) + (event && event.code === 1013 ? 5 : 0.2);
  state.textContent = `not connected, next try in ${Math.ceil(wait)} s`;
  setTimeout(() => connect().catch(again), wait * 1000);
}

function receive(frame) {
  const answer = running.get(frame.request_id);
  if (!answer) {
    if (frame.status === "queued") state.textContent = `waiting for a place, position ${frame.chunk.position}`;
    if (frame.status === "error") add("bad", frame.chunk.error);
    return;
  }
  if (frame.event_id) answer.last = frame.event_id;
  if (frame.status === "queued") {
    state.textContent = `waiting for the provider, position ${frame.chunk.position}`;
  } else if (frame.status === "processing") {
    state.textContent = `${frame.chunk.metadata.provider}, ${frame.chunk.metadata.model}`;
  } else if (frame.status === "chunk" && frame.chunk.type === "text") {
    answer.box.append(frame.chunk.data);
    answer.box.scrollIntoView({ block: "end" });
  } else if (frame.status === "error") {
    answer.box.classList.add("bad");
    answer.box.append(answer.box.textContent ? `\n\n${frame.chunk.error}` : frame.chunk.error);
  } else if (frame.status === "cancelled") {
    answer.box.append(" (stopped)");
  }
  if (["complete", "error", "cancelled"].includes(frame.status)) {
    running.delete(frame.request_id);
    show();
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const question = text.value.trim();
  if (!question || !socket || socket.readyState !== WebSocket.OPEN) return;
  text.value = "";
  add("mine", question);
  const id = newId();
  running.set(id, { box: add("answer", ""), last: 0 });
  show();
  socket.send(JSON.stringify({ action: "chat", request_id: id, payload: { text: question, conversation_id: conversation } }));
});

text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send.click();
  }
});

stop.addEventListener("click", () => {
  for (const id of running.keys()) socket.send(JSON.stringify({ action: "cancel", request_id: id }));
});

connect().catch(again);
