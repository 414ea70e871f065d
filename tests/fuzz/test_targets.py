"""Each target over its corpus and over mutants of it; with Atheris for an hour in all, by the mark
`stress`.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from aioserver.client import answer
from aioserver.config import configuration
from aioserver.faces.client_messages import ClientMessages
from aioserver.protocol import eventstream, sound
from aioserver.protocol.model_body import Member, Place
from aioserver.providers.exchange import Exchange
from aioserver.streams import fast_path
from aioserver.wings.anthropic import sink as message_sink
from aioserver.wings.anthropic.bridge.events import MessageWriter
from aioserver.wings.responses import sinks
from aioserver.wings.responses.bridge.events import ResponseWriter
from tests.fuzz.inputs import CORPUS, kept
from tests.fuzz.mutation import mutants
from tests.fuzz.targets import TARGETS, load, words

# Mutants of each target; the long run has as many as an hour allows.
MUTANTS = 100
# Seconds of the long run, for all targets together.
LONG = 3600


def run_all(name: str, count: int) -> None:
    """Run the target *name* over its corpus and *count* mutants."""
    run, inputs = load(name), kept(name)
    for data in (*inputs, *mutants(inputs, words(name), count)):
        try:
            run(data)
        except Exception as exc:
            exc.add_note(f"the input: {data!r}")
            raise


@pytest.mark.parametrize("name", TARGETS)
def test_no_kept_input_and_no_mutant_of_one_finds_a_fault(name: str) -> None:
    run_all(name, MUTANTS)


# What is broken, by the target that must notice it: an object, the name of its attribute, and
# another value.
BREAKAGES: dict[str, tuple[object, str, object]] = {
    "event_stream": (eventstream, "_BLANK", re.compile(rb"\n\n")),
    "fast_path": (fast_path, "PLAIN", re.compile(rb"[^\n]+")),
    "provider_answer": (Exchange, "_settle", lambda _exchange: None),
    "responses": (
        sinks,
        "up_to_end",
        lambda block: (block, b"response.completed" in block),
    ),
    "bridge": (ResponseWriter, "_part_ending", lambda _writer: []),
    "messages": (message_sink, "_up_to_end", lambda block: (block, b"message_stop" in block, b"")),
    "message_bridge": (MessageWriter, "_complete", lambda _writer, _events: None),
    "client_frames": (ClientMessages, "_count", lambda _messages, _size: True),
    "server_frames": (answer, "_text", lambda metadata, name: metadata.get(name)),
    "chat_bodies": (
        Member,
        "find",
        lambda _self, data, value: Place(0, data.find(value), data.find(value) + len(value)),
    ),
    "whole_answers": (sound, "_HIGH", re.compile(rb"(?!)")),
    "configuration": (configuration, "_lines", lambda _faults: ["a line without a place"]),
}


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_broken_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BREAKAGES[name])

    with pytest.raises(Exception, match="the input: "):
        run_all(name, 0)


def test_mutants_are_always_the_same() -> None:
    inputs = [b"one", b"two"]

    once, again = (list(mutants(inputs, [b"!"], 20)) for _ in range(2))

    assert once == again
    assert len({*once}) > 10


def test_every_corpus_is_that_of_a_target_and_small() -> None:
    assert {path.name for path in CORPUS.iterdir()} == {*TARGETS}
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < 200_000


@pytest.mark.stress
@pytest.mark.timeout(LONG)
@pytest.mark.parametrize("name", TARGETS)
def test_no_input_that_atheris_finds_is_a_fault(name: str) -> None:
    pytest.importorskip("atheris")
    program = (sys.executable, "-m", "tests.fuzz", name, "--seconds", str(LONG // len(TARGETS)))

    done = subprocess.run(program, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr[-5000:]
