"""When `/client.js` connects, whatever its server does to it: one handshake at a time, after the
wait that the server asks for, and never without a pause for long.

The page has a network and a clock of its own, so that hours take a second.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.client_page import page_elsewhere, run

if TYPE_CHECKING:
    from playwright.async_api import Page

    from tests.support.server import RunningServer

FULL = {"error": "full", "code": "server_at_capacity", "retryable": True}
# What becomes of a WebSocket: its close code, the seconds that the remark before it asks for, and
# whether it comes before the socket has its place. Code 0: it is cut in the handshake.
SOCKETS = [
    (code, wait, early)
    for code, wait in (
        *((code, None) for code in (0, 1000, 1001, 1009, 1011, 1012, 1013, 4000)),
        *((code, wait) for code in (1012, 1013) for wait in (3.0, 20.0)),
    )
    for early in (False, True)
]
# What becomes of a request: its status, 0 without a response; and the seconds that it asks for.
# Status 200 begins an answer, and is cut.
REQUESTS = [(0, None), (200, None), *((code, wait) for code in (502, 503) for wait in (None, 9.0))]

WORLD = """
  const real = { setTimeout: window.setTimeout, fetch: window.fetch };
  const timers = new Map();
  window.world = { now: 1000, next: 1, fates: [], seen: [], open: 0, faults: [] };
  const later = (call, delay = 0, every = false) => {
    timers.set(world.next, { at: world.now + Math.max(every ? 1 : 0, delay), call, every: every && delay });
    return world.next++;
  };
  window.setTimeout = (call, delay) => later(call, delay);
  window.setInterval = (call, delay) => later(call, delay, true);
  window.clearTimeout = window.clearInterval = (id) => timers.delete(id);
  performance.now = () => world.now;
  Date.now = () => 1.7e12 + world.now;
  AbortSignal.timeout = () => new AbortController().signal;
  const idle = () => new Promise((done) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = done;
    port2.postMessage(0);
  });
  // Let time pass until `over()`.
  world.run = async (over) => {
    for (let steps = 0; !over(); steps += 1) {
      if (steps > 50_000) throw new Error(`it does not end: ${JSON.stringify([world, client.state, timers.size])}`);
      for (let turn = 0; turn < 3; turn += 1) await idle();
      if (over()) return;
      const [id, timer] = [...timers].reduce((a, b) => (b[1].at < a[1].at ? b : a), [0, { at: Infinity }]);
      if (timer.at === Infinity) throw new Error("nothing is left to happen");
      if (timer.every) timer.at += timer.every; else timers.delete(id);
      world.now = Math.max(world.now, timer.every ? timer.at - timer.every : timer.at);
      timer.call();
    }
  };
  // A handshake takes 50 ms. Returns what becomes of it.
  world.begin = (alone) => {
    const fate = world.fates[world.seen.length] ?? null;
    if (alone && world.open) world.faults.push(`not the only handshake: ${world.seen.length}`);
    const early = world.earliest - world.now;
    if (early > 0.5) world.faults.push(`${early} ms too early: ${world.seen.length}`);
    world.seen.push(world.now);
    world.open += 1;
    return fate;
  };
  world.lose = (seconds) => (world.earliest = Math.max(world.earliest ?? 0, world.now + 1000 * seconds));
  const say = (frame) => ({ data: JSON.stringify({ request_id: null, chunk: {}, ...frame }) });
  window.WebSocket = class {
    constructor() {
      const fate = world.begin(true);
      setTimeout(() => {
        world.open -= 1;
        if (fate?.[0] === 0) return this.end(1006, 0);
        this.fate = fate;
        this.onopen?.();
      }, 50);
    }
    end(code, seconds) { world.lose(seconds); this.onclose?.({ code }); }
    send(text) {
      const frame = JSON.parse(text), [code, wait, early] = this.fate ?? [null, null, false];
      const reply = () => {
        if (code !== null && (early || frame.action !== "ping")) {
          if (wait !== null) this.onmessage?.(say({ status: "error", chunk: { ...b, retry_after: wait } }));
          const least = code === 1012 ? 1 : code === 1013 ? 5 : 0;
          if (!this.ended) this.end(code, Math.max(least, wait ?? 0));
          this.ended = true;
        } else if (frame.action === "ping") {
          this.onmessage?.(say({ status: "pong" }));
        } else if (frame.action === "chat" || frame.action === "resume") {
          this.onmessage?.(say({ request_id: frame.request_id, event_id: 1, status: "complete" }));
        }
      };
      setTimeout(reply, 1);
    }
    close() { this.ended = true; }
  };
  window.fetch = (url, { method = "GET", signal } = {}) => new Promise((resolve, reject) => {
    const asked = method === "POST" || !String(url).endsWith("/sse/chat");
    // The client asks by GET why no WebSocket has opened.
    const fate = asked && method !== "DELETE" ? world.begin(world.down) : [503, null];
    const respond = () => {
      if (asked && method !== "DELETE") world.open -= 1;
      const [status, wait] = fate ?? [200, null];
      const headers = { "Content-Type": status === 200 ? "text/event-stream" : "application/json" };
      if (wait !== null) headers["Retry-After"] = String(wait);
      if (fate !== null) world.lose(wait ?? 0);
      if (asked && method !== "DELETE") world.down = fate !== null && status !== 200;
      if (status === 0) return reject(new TypeError("cut"));
      const whole = 'data: {"event_id":1,"status":"complete","chunk":{}}\\n\\n';
      const body = status !== 200 ? JSON.stringify({ error: { message: "full", code: b.code } }) : fate ? "" : whole;
      resolve(new Response(body, { status, headers }));
    };
    const timer = setTimeout(respond, 50);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
"""
# Questions are asked one after the other, and read; all must be answered in the end.
READS = """
  const asking = async () => {
    while (world.seen.length <= world.fates.length) {
      const { error } = await read(client.chat("Hello"));
      // Close code 1009 says so.
      if (error && error.code !== "request_too_large") world.faults.push(error.code);
    }
    world.over = (world.over ?? 0) + 1;
  };
  for (let count = 0; count < c; count += 1) asking();
  await world.run(() => world.over === c);
"""
# Questions are left before their connection has opened, and a person presses a button.
LEAVES = """
  setInterval(() => {
    const answer = client.chat("Hello");
    read(answer);
    setTimeout(() => answer.cancel(), 10);
    client.connect();
  }, 150);
  await world.run(() => world.seen.length > world.fates.length);
"""
PROGRAMS = {
    "websocket one": ("websocket", READS, 1),
    "websocket many": ("websocket", READS, 5),
    "websocket leaves": ("websocket", LEAVES, 0),
    "sse one": ("sse", READS, 1),
    "sse many": ("sse", READS, 5),
}
# How a server lets nobody in: without an answer, or by the code of a close or a status.
CODES = {"websocket": [0, 1000, 1009, 1011], "sse": [0, 503]}


async def play(
    server: RunningServer,
    page: Page,
    transport: str,
    program: str,
    questions: int,
    fates: list[Any],
) -> list[float]:
    """Let *program* run until all *fates* have come; return when the handshakes came, in ms."""
    async with page_elsewhere(page, server.base):
        await run(page, WORLD, None, FULL)
        seen, faults = await run(
            page,
            "world.fates = b[1]; window.client = new aio.Client(a, { transport: b[0], deadline: 1e6 });"
            + program
            + "client.close(); return [world.seen, world.faults]",
            server.base,
            [transport, fates],
            questions,
        )
    assert faults == []
    return list(seen)


@pytest.mark.parametrize(
    ("transport", "program", "questions"), PROGRAMS.values(), ids=list(PROGRAMS)
)
async def test_handshakes_come_one_by_one_and_not_before_they_may(
    server: RunningServer, page: Page, transport: str, program: str, questions: int
) -> None:
    dice = random.Random(f"{transport} {questions}")
    fates: list[Any] = dice.choices(SOCKETS if transport == "websocket" else REQUESTS, k=60)
    if program == LEAVES:
        fates = [(code, wait, True) for code, wait, _early in fates]

    await play(server, page, transport, program, questions, fates)


@pytest.mark.parametrize("name", ["websocket many", "websocket leaves", "sse many"])
async def test_a_server_that_lets_nobody_in_is_asked_ever_less(
    server: RunningServer, page: Page, name: str
) -> None:
    """Full jitter doubles: ten handshakes that bring nothing take 40 s on average."""
    transport, program, questions = PROGRAMS[name]
    # The first ones over HTTP come together: the page does not know yet.
    together = questions if transport == "sse" else 1
    for code in CODES[transport]:
        fate = (code, None, True) if transport == "websocket" else (code, None)

        seen = await play(server, page, transport, program, questions, [fate] * (9 + together))

        assert seen[-1] - seen[0] > 5000, code


# A server with `b` places, where each answer takes `c` ms; it has no room for more.
PLACES = """
  let active = 0;
  const refused = { ...a, retry_after: 2 };
  const serve = (say, over) => {
    if (active >= b) return over(refused);
    active += 1;
    say({ event_id: 1, status: "processing" });
    setTimeout(() => {
      active -= 1;
      say({ event_id: 2, status: "complete" });
      over();
    }, c);
  };
  window.WebSocket = class {
    constructor() { setTimeout(() => this.onopen?.(), 1); }
    send(text) {
      const { action, request_id } = JSON.parse(text);
      const say = (frame) => this.onmessage?.({ data: JSON.stringify({ request_id, chunk: {}, ...frame }) });
      const over = (chunk) => chunk && say({ event_id: 1, status: "error", chunk });
      setTimeout(() => (action === "ping" ? say({ request_id: null, status: "pong" }) : serve(say, over)), 1);
    }
    close() {}
  };
  window.fetch = () => new Promise((resolve) => {
    setTimeout(() => {
      const error = { code: a.code, message: a.error };
      const headers = { "Content-Type": "text/event-stream" };
      let events;
      const body = new ReadableStream({ start: (controller) => (events = controller) });
      const say = (frame) => events.enqueue(new TextEncoder().encode(`data: ${JSON.stringify({ chunk: {}, ...frame })}\\n\\n`));
      const over = (chunk) => {
        if (chunk) resolve(new Response(JSON.stringify({ error }), { status: 503, headers: { "Retry-After": "2" } }));
        else events.close();
      };
      serve(say, over);
      resolve(new Response(body, { headers }));
    }, 1);
  });
"""


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_questions_of_one_page_keep_the_places_of_a_full_server_taken(
    server: RunningServer, page: Page, transport: str
) -> None:
    seconds, places, questions = 4.8, 4, 40
    code = "provider_queue_full" if transport == "websocket" else "server_at_capacity"
    async with page_elsewhere(page, server.base):
        await run(page, WORLD, None, FULL)
        await run(page, PLACES, {**FULL, "code": code}, places, 1000 * seconds)
        took, ended = await run(
            page,
            """
            window.client = new aio.Client(a, { transport: b, deadline: 1e6 });
            const began = world.now, ended = [];
            for (let number = 0; number < c; number += 1) read(client.chat("Hello")).then(({ error }) => ended.push(error));
            await world.run(() => ended.length === c);
            client.close();
            return [(world.now - began) / 1000, ended];
            """,
            server.base,
            transport,
            questions,
        )

    assert ended == [None] * questions
    # It is the time of the page's own clock.
    assert took < 1.1 * seconds * questions / places
