"""The parts of an input, and the inputs that are kept."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

CORPUS = Path(__file__).with_name("corpus")
CONTROL_BYTES = 4


class Input(NamedTuple):
    """An input: what to do, and what with."""

    control: bytes
    content: bytes

    @property
    def choice(self) -> int:
        """A number that chooses between the variants of a target."""
        return self.control[0]

    def reads(self) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """Return the content as reads, none of which is empty: one, a few, and one for each byte.

        The few are cut at the places that the control says.
        """
        content = self.content
        places = {byte * len(content) >> 8 for byte in self.control[1:]}
        few = [content[a:b] for a, b in pairwise(sorted({0, len(content), *places}))]
        single = [content[at : at + 1] for at in range(len(content))]
        return [content] if content else [], few, single


def parts(data: bytes) -> Input:
    """Return the parts of *data*, any bytes."""
    return Input(data[:CONTROL_BYTES].ljust(CONTROL_BYTES, b"0"), data[CONTROL_BYTES:])


def kept(target: str) -> list[bytes]:
    """Return the inputs in the corpus of *target*."""
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
