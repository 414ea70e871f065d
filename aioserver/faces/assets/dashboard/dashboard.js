// The dashboard: what the server says each second goes to the verdict, the numbers, the cards and the charts.
import { bind, say } from "/assets/dashboard/binding.js";
import { Charts } from "/assets/dashboard/charts.js";
import { Feed } from "/assets/dashboard/feed.js";
import { History } from "/assets/dashboard/history.js";
import { Incidents } from "/assets/dashboard/incidents.js";
import { seconds } from "/assets/dashboard/numbers.js";
import { Providers } from "/assets/dashboard/providers.js";
import { Recent } from "/assets/dashboard/recent.js";
import { judge, silence } from "/assets/dashboard/verdict.js";
import { Door } from "/assets/door.js";

const QUIET = 3000; // milliseconds without a word from a connected server, which speaks every second
const BLIP = 1000; // the same once the connection is lost: a change of network is over sooner
const SHAPES = { open: "circle", busy: "triangle", full: "square", refusing: "octagon", trouble: "diamond", closed: "square", lost: "cross" };

const verdict = document.getElementById("verdict");
const board = document.getElementById("board");
const spoken = document.getElementById("spoken");
const seen = document.getElementById("seen");
const clock = new Intl.DateTimeFormat("en", { timeStyle: "medium", hourCycle: "h23" });
const showAll = bind(document.body);
const recent = new Recent();
const history = new History();
const incidents = new Incidents();
const providers = new Providers();
let charts;
let link = { up: false, reason: "", retryAt: 0 };
let heard = Date.now(); // when the server last spoke, or when we began to ask
let woken = 0; // when the page came back into sight: while nobody looks, nothing is asked
let judged; // the last verdict of a server that spoke
let lost = false;

const on = {
  history(data) {
    history.replace(data);
    incidents.add(...data.incidents);
  },
  stats(stats) {
    if (lost && judged) incidents.add(absence(heard));
    lost = false;
    heard = Date.now();
    recent.add(stats);
    history.add(stats);
    const lately = recent.over(60);
    board.hidden = document.getElementById("server").hidden = false;
    charts ??= new Charts(document.getElementById("charts"), history);
    const refused = Object.values(stats.rejections).reduce((sum, number) => sum + number, 0);
    showAll({ ...stats, refused }, lately);
    judged = judge(stats, providers.update(stats, lately, history), recent);
    charts.update(stats);
    say(seen, `as of ${clock.format(stats.time * 1000)}`);
    show();
  },
  incident(incident) {
    incidents.add(incident);
  },
  link(change) {
    link = change;
    if (!link.up) show(); // a connection is no word yet
  },
};

function show() {
  if (document.hidden || door.asking) return;
  const since = Date.now() - Math.max(heard, woken);
  lost ||= judged ? since > (link.up ? QUIET : BLIP) : link.retryAt > 0 || since > QUIET;
  if (lost) tell(silence(link, since, Date.now()));
  else if (judged) tell(judged);
  document.body.classList.toggle("stale", lost);
  if (lost && judged) say(seen, `${seconds(Math.floor(since / 1000))} old`);
}

function tell({ state, word, text, detail, key }) {
  verdict.dataset.state = state;
  verdict.querySelector(".mark").dataset.shape = SHAPES[state];
  say(document.getElementById("verdict-word"), word);
  say(document.getElementById("verdict-text"), text);
  say(document.getElementById("verdict-detail"), detail);
  document.title = `${word} · aioserver dashboard`;
  if (spoken.dataset.key === key) return; // numbers move every second, only another state is spoken
  spoken.dataset.key = key;
  say(spoken, `${word}. ${text}`);
}

function absence(from) {
  const now = Date.now();
  return { time: now / 1000, kind: "page", severity: "warning", provider: null,
    text: `this page heard nothing for ${seconds(Math.round((now - from) / 1000))}` };
}

function drawDoor() {
  woken = Date.now(); // while a key is asked for, nothing else is
  const { name } = door.session;
  const leave = document.getElementById("leave");
  leave.hidden = name === null;
  leave.title = name === null ? "" : `You are in with the key “${name}”`;
  if (door.asking) document.title = "Key wanted · aioserver dashboard";
}

setInterval(show, 1000);
document.getElementById("leave").addEventListener("click", async () => {
  await door.leave().catch(() => {}); // a server that is gone is said already
  if (door.session.name === null) feed.hurry(); // which asks for a key first
});
document.addEventListener("visibilitychange", () => {
  woken = Date.now();
});
const door = new Door({ admin: true, changed: drawDoor });
const feed = new Feed("/events", () => door.pass(), (event, data) => on[event]?.(data));
