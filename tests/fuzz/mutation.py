"""Mutants of kept inputs, always the same: for a run without Atheris."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def mutants(
    inputs: Sequence[bytes], words: Sequence[bytes], count: int, seed: int = 1
) -> Iterator[bytes]:
    """Yield *count* mutants of *inputs*, with *words* in them; equal arguments give equal
    mutants.
    """
    dice = random.Random(seed)
    for _ in range(count):
        data = bytearray(dice.choice(inputs))
        for _ in range(dice.choice((1, 1, 2, 4, 8))):
            _mutate(data, dice, inputs, words)
        yield bytes(data)


def _mutate(
    data: bytearray, dice: random.Random, inputs: Sequence[bytes], words: Sequence[bytes]
) -> None:
    start = dice.randrange(len(data) + 1)
    end = min(len(data), start + dice.choice((0, 1, 2, 4, 16, 64)))
    match dice.randrange(5):
        case 0:
            data[start:end] = b""
        case 1:
            data[start:start] = data[start:end] * dice.randrange(1, 4)
        case 2:
            data[start:end] = dice.randbytes(end - start)
        case 3:
            data[start:end] = dice.choice(words)
        case _:
            other = dice.choice(inputs)
            place = dice.randrange(len(other) + 1)
            data[start:end] = other[place : place + dice.choice((4, 16, 64))]
