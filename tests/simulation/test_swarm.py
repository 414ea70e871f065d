"""The whole server in virtual time: some seeds with all faults, and proof that a broken promise is
noticed.

Each run is a process of its own, since it replaces the clock before anything is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.simulation.breakages import BREAKAGES

if TYPE_CHECKING:
    from collections.abc import Iterable

# On a machine that does much else, processes take their time.
pytestmark = pytest.mark.timeout(600)
# As many as take some seconds. More: `python -m tests.simulation --seeds 0-999 --jobs 2`.
SEEDS, CLIENTS = "0-7", "40"
# With three instances that share a server.
SHARED_SEEDS = "0,2"
# The last seeds that have failed, by the numbers of clients and instances. What is drawn for a seed
# changes with the simulation: an old one shows no more than any other, and makes room for a new one.
FAILED = {("60", "1"): "37", ("60", "3"): "7100194"}
# The broken servers whose faults some server had; and of all others every eighth, `stress` has all.
HAPPENED = {
    *("a full house with keys", "whose answer it is", "that an answer has failed"),
    *("the order of a fair queue", "a permit"),
}
# What looks broken at first sight, each in a run that has much of it.
SCENES = """
from tests.simulation import clock
clock.install()
import json, random
from dataclasses import replace
from tests.simulation.swarm import prepare
prepare()
from tests.simulation import agents, deadlines
from tests.simulation.configuration import GATE, HTTP, HTTP_SERVER, Key
from tests.simulation.plan import DEPLOY, FACES, Shared, draw
from tests.simulation.world import play
def played(name, plan):
    outcome = play(plan)
    print(json.dumps([name, outcome.violations, dict(outcome.ends), outcome.most_inside]))
def scene(name, seed, changes, clients=60, **fields):
    plan = draw(seed, clients, groups=False)
    calm = {
        "faults": {}, "habits": {}, "operations": {}, "provider_links": {}, "silent": 0.0, "large": 0.0, "verdicts": 0.0,
        "calls": 0.0, "messages": 0.0, "background": 0.0, "uploads": 0.0, "hurried": 0.0, "continued": False,
        "provider_fault_share": 0.0, "spare": False, "preambles": 0.0, "keys": (), "refuses": (), "grouped": "",
    }
    for changed in ("auth.keys", "auth.jwt", "llm.providers.sim.continuation"):
        plan.changes.pop(changed, None)
    changes = {**plan.changes, f"{HTTP}.queue_size": 1000, f"{HTTP}.queue_timeout": 30.0, **changes}
    played(name, replace(plan, **{**calm, **fields, "changes": changes}))
def limited(*limits):
    keys = [Key(f"key{number}", 1 / len(limits), 1) for number in range(len(limits))]
    open = {"max_concurrent": 1000, "max_connections": 0, "requests_per_minute": 100_000, "tokens_per_minute": 0}
    open |= {"tokens_per_day": 0, "queue_size": 0}
    entries = [{**key.entry(random.Random(0)), **open, **own} for key, own in zip(keys, limits)]
    return tuple(keys), {"auth.keys": entries}
room = {f"{GATE}.max_connections": 100, f"{GATE}.connection_queue_size": 100, f"{GATE}.queue_timeout": 5.0}
scene(
    "failing providers", 217, {**room, "llm.providers.sim.messages": True}, messages=1.0, provider_fault_share=0.7,
    message_kinds=("speaks", "speaks"), provider_faults=("status-500", "error-chunk-<n>", "early-done-<n>"),
)
keys, changes = limited({"tokens_per_day": 3000})
scene("a day's tokens", 0, {**room, **changes}, keys=keys, faces=("stream",))
keys, changes = limited({"requests_per_minute": 20, "queue_size": 200}, {})
few = {f"{GATE}.max_connections": 10, f"{GATE}.connection_queue_size": 60, f"{GATE}.queue_timeout": 0.5}
few |= {f"{HTTP}.{name}": 2 for name in ("concurrent_requests", "max_connections", "max_keepalive")}
for name, longest in (("a return", deadlines.RETURN_WAIT), ("a return that may not wait", 0.5)):
    deadlines.RETURN_WAIT = longest
    scene(name, 8, {**few, **changes}, 30, keys=keys, faces=("stream", "response lanes"), spread=10.0)
deadlines.RETURN_WAIT = deadlines.MAX_WAIT
keys, changes = limited({"requests_per_minute": 60, "queue_size": 200}, {})
few |= {f"{HTTP}.{name}": 100 for name in ("concurrent_requests", "max_connections", "max_keepalive")}
scene("lost sockets", 0, {**few, **changes}, keys=keys, faces=("stream", "response lanes"), habits={"read slowly": 0.3}, spread=5.0)
# Fifty agents on four places, each of them with the patience that it was seen to have.
played("agents", agents.plan_of(8))
# Heads that stall longer than the server waits for them, of clients that are still sending then.
plan = draw(0, 200)
played("slow uploads", replace(
    plan, faces=("sse", "responses"), faults={"small kernel": 1.0, "stall": 1.0}, operations={},
    habits={"upload slowly": 1.0}, silent=0.0, provider_links={}, provider_fault_share=0.0,
    changes={**plan.changes, f"{HTTP_SERVER}.keepalive_timeout": 2.0},
))
# Two instances with places of their own, and two that share a server.
plan = draw(0, 60, 2)
for changed in ("auth.keys", "auth.jwt"):
    plan.changes.pop(changed, None)
few = {f"{GATE}.max_connections": 5, f"{GATE}.connection_queue_size": 100, f"{GATE}.queue_timeout": 30.0}
few |= {f"{HTTP}.queue_size": 1000, f"{HTTP}.queue_timeout": 30.0, "chat.streams.resume_window": 30.0}
for name, balancer, shared in (("sticky", "sticky", None), ("scattered", "random", None), ("together", "random", Shared())):
    played(name, replace(
        plan, balancer=balancer, shared=shared, changes=plan.changes | few, keys=(), faces=("sse",),
        faults={"reset": 0.3}, habits={"return": 1.0}, operations={}, spread=5.0, silent=0.0, provider_links={},
        provider_fault_share=0.0,
    ))
# Two deploys while nothing else goes wrong, nor ends early for want of room.
few |= {f"{HTTP}.{name}": 60 for name in ("concurrent_requests", "max_connections", "max_keepalive")}
few |= {f"{GATE}.max_connections": 60, f"{HTTP}.requests_per_minute": 1_000_000, f"{HTTP}.read_timeout": 60.0}
few |= {"chat.websocket.ping_interval": 20, "chat.websocket.ping_timeout": 10}
few |= {"chat.streams.max_kept_bytes": 1 << 28, "chat.streams.max_stream_bytes": 1 << 22}
scene(
    "deploys", 4, few, 30, instances=2, balancer="random", shared=Shared(events=((1.0, DEPLOY, 0.0), (4.0, DEPLOY, 0.0))),
    sql=False, faces=FACES, habits={"keep alive": 0.5, "return": 1.0}, spread=6.0,
)
"""
# The first run again, when another one was before.
TWICE = """
from tests.simulation import clock
clock.install()
from tests.simulation.swarm import prepare
prepare()
from tests.simulation.plan import draw
from tests.simulation.world import play
for seed in (3, 1200042, 3):
    outcome = play(draw(seed, 10, 3))
    print(outcome.violations, outcome.ends, outcome.counts, outcome.connections, outcome.virtual_seconds)
"""


def run(*arguments: str, timeout: float = 500.0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )


def test_nothing_is_lost_whatever_goes_wrong() -> None:
    # A seed that fails is shrunk, and its command is a part of the message.
    result = run("-m", "tests.simulation", "--seeds", SEEDS, "--clients", CLIENTS, "--shrink")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 seeds failed" in result.stdout
    assert "complete" in result.stdout, "some answers are whole"


def test_nothing_is_lost_between_instances() -> None:
    command = ("-m", "tests.simulation", "--instances", "3")
    result = run(*command, "--seeds", SHARED_SEEDS, "--clients", CLIENTS, "--shrink")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "complete" in result.stdout, "some answers are whole"
    assert "kill instance" in result.stdout, "something goes wrong"


@pytest.mark.parametrize(("clients", "instances"), FAILED)
def test_nothing_is_lost_in_a_seed_that_has_failed(clients: str, instances: str) -> None:
    command = ("-m", "tests.simulation", "--clients", clients, "--instances", instances)
    result = run(*command, "--seeds", FAILED[clients, instances], "--shrink")
    assert result.returncode == 0, result.stdout + result.stderr
    # What was killed goes without a word.
    assert not result.stderr


@pytest.mark.stress
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(20_000, 20_500, 50))
def test_nothing_is_lost_between_instances_in_many_seeds(first: int) -> None:
    command = ("-m", "tests.simulation", "--instances", "3", "--clients", "100", "--shrink")
    result = run(*command, "--seeds", f"{first}-{first + 49}", timeout=3500.0)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.stress
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(10_000, 11_000, 50))
def test_nothing_is_lost_in_a_thousand_seeds(first: int) -> None:
    seeds = f"{first}-{first + 49}"
    result = run("-m", "tests.simulation", "--seeds", seeds, "--shrink", timeout=3500.0)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_same_seed_gives_the_same_run_whatever_has_run_before() -> None:
    result = run("-c", TWICE)
    assert result.returncode == 0, result.stderr
    first, other, again = result.stdout.splitlines()
    assert first == again != other


class Scene(NamedTuple):
    """What came of a scene: its violations, how its clients have ended, and how many of them had a
    place at once.
    """

    violations: list[str]
    ends: dict[str, int]
    most_inside: int


def test_what_looks_broken_at_first_sight_is_no_violation() -> None:
    # One test, since a process for each scene would spend its time on imports.
    result = run("-c", SCENES)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    scenes = {name: Scene(*came) for name, *came in lines}

    broken = scenes.pop("a return that may not wait").violations
    assert broken
    assert all(" for a place, " in each for each in broken)
    assert not {name: each.violations for name, each in scenes.items() if each.violations}
    ends = {name: each.ends for name, each in scenes.items()}
    assert {"refused: a provider's 500", "stopped early"} <= ends["failing providers"].keys()
    assert ends["a day's tokens"]["refused: rate_limit_exceeded"]
    assert ends["lost sockets"]["gone: EOFError"]
    assert any(end.startswith("gone: ") for end in ends["slow uploads"])
    assert ends["agents"] == {"complete": 50}
    assert ends["deploys"].keys() == {"complete"}
    # Each instance alone has places of its own, and knows the answers that it has begun.
    assert scenes["sticky"].most_inside == 10
    lost = {end for end in ends["scattered"] if "stream_not_found" in end}
    assert lost
    assert not lost & (ends["sticky"].keys() | ends["together"].keys())


def noticed(names: Iterable[str]) -> tuple[set[str], str]:
    """Return those of the broken servers that are noticed, and all that was printed."""
    # One process for all: each of its own would spend its time on imports.
    result = run("-m", "tests.simulation.breakages", *names, timeout=600.0)
    lines = (line.partition("\t") for line in result.stdout.splitlines())
    return {
        name for name, _, violation in lines if " s: " in violation
    }, result.stdout + result.stderr


def test_servers_that_forget_something_are_noticed() -> None:
    some = HAPPENED | set(list(BREAKAGES)[::8])

    names, printed = noticed(sorted(some))

    assert names == some, printed


@pytest.mark.stress
@pytest.mark.timeout(700)
def test_each_server_that_forgets_something_is_noticed() -> None:
    names, printed = noticed(BREAKAGES)

    assert names == BREAKAGES.keys(), printed
