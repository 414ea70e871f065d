"""Each target over its corpus and over mutants of it; with Atheris for an hour in all, by the mark `stress`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.fuzz.inputs import CORPUS, kept
from tests.fuzz.mutation import mutants
from tests.fuzz.targets import TARGETS, load, words

# Mutants of each target. Those of a slow one take half a second, all together.
MUTANTS = {"fast_path": 200, "provider_answer": 200, "configuration": 300}
MOST_MUTANTS = 600
# Seconds of the long run, for all targets together.
LONG = 3600


@pytest.mark.parametrize("name", TARGETS)
def test_no_kept_input_and_no_mutant_of_one_finds_a_fault(name: str) -> None:
    run, inputs = load(name), kept(name)

    for data in (*inputs, *mutants(inputs, words(name), MUTANTS.get(name, MOST_MUTANTS))):
        try:
            run(data)
        except BaseException as exc:
            exc.add_note(f"the input: {data!r}")
            raise


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
