"""The whole server in virtual time: some seeds with all faults, and proof that a broken promise is
noticed.

Each run is a process of its own, since it replaces the clock before anything is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.simulation.breakages import BREAKAGES

if TYPE_CHECKING:
    from collections.abc import Iterable

# On a machine that does much else, processes take their time.
pytestmark = pytest.mark.timeout(600)
# As many as take some seconds. More: `python -m tests.simulation --seeds 0-999 --jobs 2`.
SEEDS, CLIENTS = "0-11", "40"
# With three instances that share a server.
SHARED_SEEDS = "0-3"
# The last seeds that have failed, by the numbers of clients and instances. What is drawn for a seed
# changes with the simulation: an old one shows no more than any other, and makes room for a new one.
FAILED = {("100", "1"): "6200031,7200783,46200166", ("60", "3"): "7100083,7100194"}
TWO_INSTANCES = """
from tests.simulation import clock
clock.install()
from dataclasses import replace
from tests.simulation.swarm import prepare
prepare()
from tests.simulation.configuration import GATE, HTTP
from tests.simulation.plan import Shared, draw
from tests.simulation.world import play
plan = draw(0, 60, 2)
changes = dict(plan.changes)
changes.pop("auth.keys", None)
changes.pop("auth.jwt", None)
changes |= {
    f"{GATE}.max_connections": 5,
    f"{GATE}.connection_queue_size": 100,
    f"{GATE}.queue_timeout": 30.0,
    f"{HTTP}.queue_size": 1000,
    f"{HTTP}.queue_timeout": 30.0,
    "chat.streams.resume_window": 30.0,
}
for balancer, shared in (("sticky", None), ("random", None), ("random", Shared())):
    outcome = play(
        replace(
            plan, balancer=balancer, shared=shared, changes=changes, keys=(), faces=("sse",), faults={"reset": 0.3},
            habits={"return": 1.0}, operations={}, spread=5.0, silent=0.0, provider_links={},
            provider_fault_share=0.0,
        )
    )
    assert not outcome.violations, outcome.violations
    print(balancer, outcome.most_inside, dict(outcome.ends))
"""
# Fifty agents on four places, each of them with the patience that it was seen to have.
AGENTS = """
from tests.simulation import clock
clock.install()
from tests.simulation.swarm import prepare
prepare()
from tests.simulation import agents
from tests.simulation.world import play
outcome = play(agents.plan_of(8))
assert not outcome.violations, outcome.violations
print(dict(outcome.ends))
"""
# Heads that stall longer than the server waits for them, of clients that are still sending their
# bodies then.
SLOW_UPLOADS = """
from tests.simulation import clock
clock.install()
from dataclasses import replace
from tests.simulation.swarm import prepare
prepare()
from tests.simulation.configuration import HTTP_SERVER
from tests.simulation.plan import draw
from tests.simulation.world import play
plan = draw(0, 200)
outcome = play(
    replace(
        plan, faces=("sse", "responses"), faults={"small kernel": 1.0, "stall": 1.0}, operations={},
        habits={"upload slowly": 1.0}, silent=0.0, provider_links={}, provider_fault_share=0.0,
        changes={**plan.changes, f"{HTTP_SERVER}.keepalive_timeout": 2.0},
    )
)
assert not outcome.violations, outcome.violations
print(dict(outcome.ends))
"""
# What looks broken at first sight, each in a run that has much of it.
SCENES = """
from tests.simulation import clock
clock.install()
import json, random
from dataclasses import replace
from tests.simulation.swarm import prepare
prepare()
from tests.simulation import deadlines
from tests.simulation.configuration import GATE, HTTP, Key
from tests.simulation.plan import draw
from tests.simulation.world import play
def scene(name, seed, changes, **fields):
    plan = draw(seed, 60, groups=False)
    calm = {
        "faults": {}, "habits": {}, "operations": {}, "provider_links": {}, "silent": 0.0, "large": 0.0, "verdicts": 0.0,
        "calls": 0.0, "messages": 0.0, "background": 0.0, "uploads": 0.0, "hurried": 0.0, "continued": False,
        "provider_fault_share": 0.0, "spare": False, "preambles": 0.0, "keys": (), "refuses": (), "grouped": "",
    }
    for changed in ("auth.keys", "auth.jwt", "llm.providers.sim.continuation"):
        plan.changes.pop(changed, None)
    changes = {**plan.changes, f"{HTTP}.queue_size": 1000, f"{HTTP}.queue_timeout": 30.0, **changes}
    outcome = play(replace(plan, **{**calm, **fields, "changes": changes}))
    print(json.dumps([name, outcome.violations, dict(outcome.ends)]))
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
    scene(name, 8, {**few, **changes}, keys=keys, faces=("stream", "response lanes"), spread=20.0)
deadlines.RETURN_WAIT = deadlines.MAX_WAIT
keys, changes = limited({"requests_per_minute": 60, "queue_size": 200}, {})
few |= {f"{HTTP}.{name}": 100 for name in ("concurrent_requests", "max_connections", "max_keepalive")}
scene("lost sockets", 0, {**few, **changes}, keys=keys, faces=("stream", "response lanes"), habits={"read slowly": 0.3}, spread=5.0)
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
    several = ("--clients", "10", "--instances", "3", "--json")
    first, second = (
        json.loads(run("-m", "tests.simulation", "--seeds", seeds, *several).stdout)
        for seeds in ("3,1200042", "1200042,3")
    )
    del first["seconds"], second["seconds"]
    assert first == second


def test_two_instances_lead_to_all_answers_only_if_they_share_a_server() -> None:
    result = run("-c", TWO_INSTANCES)
    assert result.returncode == 0, result.stderr
    sticky, scattered, together = result.stdout.splitlines()
    # Each has places of its own, and knows the answers that it has begun.
    assert sticky.startswith("sticky 10 ")
    assert "stream_not_found" not in sticky
    assert "stream_not_found" in scattered
    assert "stream_not_found" not in together


def test_a_connection_that_is_lost_at_the_end_of_an_upload_is_no_violation() -> None:
    result = run("-c", SLOW_UPLOADS)
    assert result.returncode == 0, result.stderr
    assert "gone: " in result.stdout, "some connections are lost"


def test_fifty_agents_on_four_places_are_answered_and_told() -> None:
    result = run("-c", AGENTS)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "{'complete': 50}\n"


@pytest.fixture(scope="module")
def scenes() -> dict[str, tuple[list[str], dict[str, int]]]:
    """The violations of each scene, and how its clients have ended."""
    result = run("-c", SCENES)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {name: (violations, ends) for name, violations, ends in lines}


Scenes = dict[str, tuple[list[str], dict[str, int]]]


def test_what_a_provider_has_ended_its_own_way_is_no_fault_of_the_server(scenes: Scenes) -> None:
    violations, ends = scenes["failing providers"]

    assert not violations
    assert {"refused: a provider's 500", "stopped early"} <= ends.keys()


def test_tokens_of_the_next_day_are_worth_a_long_wait(scenes: Scenes) -> None:
    violations, ends = scenes["a day's tokens"]

    assert not violations
    assert ends["refused: rate_limit_exceeded"]


def test_a_request_that_returns_from_its_key_may_wait_at_the_door(scenes: Scenes) -> None:
    assert not scenes["a return"][0]
    assert all(" for a place, " in each for each in scenes["a return that may not wait"][0])
    assert scenes["a return that may not wait"][0]


def test_what_waits_on_a_socket_that_closes_is_not_begun(scenes: Scenes) -> None:
    violations, ends = scenes["lost sockets"]

    assert not violations
    assert ends["gone: EOFError"]


def noticed(names: Iterable[str]) -> tuple[set[str], str]:
    """Return those of the broken servers that are noticed, and all that was printed."""
    # One process for all: each of its own would spend its time on imports.
    result = run("-m", "tests.simulation.breakages", *names, timeout=600.0)
    lines = (line.partition("\t") for line in result.stdout.splitlines())
    return {
        name for name, _, violation in lines if " s: " in violation
    }, result.stdout + result.stderr


def test_servers_that_forget_something_are_noticed() -> None:
    # Every sixth; `stress` has all.
    some = list(BREAKAGES)[::6]

    names, printed = noticed(some)

    assert names == set(some), printed


@pytest.mark.stress
@pytest.mark.timeout(700)
def test_each_server_that_forgets_something_is_noticed() -> None:
    names, printed = noticed(BREAKAGES)

    assert names == BREAKAGES.keys(), printed
