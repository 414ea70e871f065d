// The dashboard: each snapshot that the server sends goes to the verdict, the numbers, the cards and the charts.
import { bind, setText } from "/assets/dashboard/binding.js";
import { Charts } from "/assets/dashboard/charts.js";
import { Feed } from "/assets/dashboard/feed.js";
import { History } from "/assets/dashboard/history.js";
import { Incidents } from "/assets/dashboard/incidents.js";
import { seconds } from "/assets/dashboard/numbers.js";
import { Providers } from "/assets/dashboard/providers.js";
import { Recent } from "/assets/dashboard/recent.js";
import { showTables } from "/assets/dashboard/tables.js";
import { disconnected } from "/assets/dashboard/verdict.js";
import { Login } from "/assets/login.js";

const MAX_SILENCE = 3000; // milliseconds without data from a connected server, which sends a snapshot each second
const MAX_GAP = 1000; // the same after the connection was lost: a change of the network takes less
const STALE = 10; // seconds after which the first tokens of the last minute are no news
const SHAPES = { open: "circle", busy: "triangle", full: "square", rejecting: "octagon", trouble: "diamond", closed: "square", lost: "cross" };

const verdictBox = document.getElementById("verdict");
const board = document.getElementById("board");
const announcer = document.getElementById("announcer");
const updated = document.getElementById("updated");
const clock = new Intl.DateTimeFormat("en", { timeStyle: "medium", hourCycle: "h23" });
const showNumbers = bind(document.body);
const recent = new Recent();
const history = new History();
const incidents = new Incidents();
const providers = new Providers();
let charts;
let link = { up: false, reason: "", retryAt: 0 };
let lastData = Date.now(); // the time of the last snapshot, or of the first attempt
let resumed = 0; // the time when the page was shown again: a hidden page does not connect
let verdict; // the verdict on the last snapshot
let lost = false;

const handlers = {
  history(data) {
    history.replace(data);
    incidents.add(...data.incidents);
  },
  stats(stats) {
    if (lost && verdict) incidents.add(gap(lastData));
    lost = false;
    lastData = Date.now();
    recent.add(stats);
    history.add(stats);
    const lastMinute = recent.growth(60);
    board.hidden = document.getElementById("server").hidden = false;
    charts ??= new Charts(document.getElementById("charts"), history);
    const rejected = Object.values(stats.rejections).reduce((sum, number) => sum + number, 0);
    const age = stats.first_token?.age;
    showNumbers({ ...stats, active: stats.active_group ?? stats.active_provider, rejected, stale: age > STALE ? age : null }, lastMinute);
    providers.update(stats, lastMinute, history);
    showTables(stats);
    verdict = stats.verdict;
    charts.update(stats);
    setText(updated, `as of ${clock.format(stats.time * 1000)}`);
    show();
  },
  incident(incident) {
    incidents.add(incident);
  },
  link(change) {
    link = change;
    if (!link.up) show(); // an open connection alone is no data
  },
};

function show() {
  if (document.hidden || login.asking) return;
  const silence = Date.now() - Math.max(lastData, resumed);
  lost ||= verdict ? silence > (link.up ? MAX_SILENCE : MAX_GAP) : link.retryAt > 0 || silence > MAX_SILENCE;
  if (lost) showVerdict(disconnected(link, silence, Date.now()));
  else if (verdict) showVerdict(verdict);
  document.body.classList.toggle("stale", lost);
  if (lost && verdict) setText(updated, `${seconds(Math.floor(silence / 1000))} old`);
}

function showVerdict({ level, state, word, text, detail, advice, about }) {
  verdictBox.dataset.state = state;
  verdictBox.dataset.level = level;
  verdictBox.querySelector(".mark").dataset.shape = SHAPES[state] ?? "diamond";
  setText(document.getElementById("verdict-word"), word);
  setText(document.getElementById("verdict-text"), text);
  setText(document.getElementById("verdict-detail"), detail);
  setText(document.querySelector("#verdict-advice span"), advice);
  document.getElementById("verdict-advice").hidden = !advice;
  document.title = `${word} · aioserver dashboard`;
  const key = `${word} ${about}`;
  if (announcer.dataset.key === key) return; // a screen reader reads a new state, but not each new number
  announcer.dataset.key = key;
  setText(announcer, `${word}. ${text}`);
}

/** The incident that this page had no data *since* then. */
function gap(since) {
  const now = Date.now();
  return { time: now / 1000, kind: "page", severity: "warning", provider: null,
    text: `this page received no data for ${seconds(Math.round((now - since) / 1000))}` };
}

function showLogin() {
  resumed = Date.now(); // while the login is open, the page does not connect
  const { name } = login.session;
  const logout = document.getElementById("logout");
  logout.hidden = name === null;
  logout.title = name === null ? "" : `Logged in with the key “${name}”`;
  if (login.asking) document.title = "Key required · aioserver dashboard";
}

setInterval(show, 1000);
document.getElementById("logout").addEventListener("click", async () => {
  await login.logOut().catch(() => {}); // the verdict shows that the server is unreachable
  if (login.session.name === null) feed.reconnect(); // the login asks for a key first
});
document.addEventListener("visibilitychange", () => {
  resumed = Date.now();
});
const login = new Login({ admin: true, changed: showLogin });
const feed = new Feed("/events", () => login.ensure(), (event, data) => handlers[event]?.(data));
