"""The parts of an input, and the inputs that are kept."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from aioserver.protocol import client_frames, json_body, sound, steps
from aioserver.protocol.bridging import reading, whole
from aioserver.provider_errors import ProviderFault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from aioserver.providers.sinks import StreamSink
    from aioserver.streams.stream import Stream

CORPUS = Path(__file__).with_name("corpus")
CONTROL_BYTES = 4
# Bytes at least of a window that may end anywhere but within an escaped pair of surrogates.
LEAST_PIECE = 18


class Input(NamedTuple):
    """An input: what to do, and what with."""

    control: bytes
    content: bytes

    @property
    def choice(self) -> int:
        """A number that chooses between the variants of a target."""
        return self.control[0]

    @property
    def window(self) -> int:
        """A number of bytes for `windows`, from 16 to 64."""
        return 16 + self.control[1] % 49

    def reads(self) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """Return the content as reads, none of which is empty: one, a few, and one for each byte.

        The few are cut at the places that the control says.
        """
        content = self.content
        places = {byte * len(content) >> 8 for byte in self.control[1:]}
        few = [content[a:b] for a, b in pairwise(sorted({0, len(content), *places}))]
        single = [content[at : at + 1] for at in range(len(content))]
        return [content] if content else [], few, single


@contextmanager
def windows(size: int) -> Iterator[None]:
    """Within it, what is read in steps is read *size* bytes at a time, and every body is large."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (client_frames, json_body, sound, steps, reading):
            patch.setattr(module, "LARGE_BYTES", size)
        patch.setattr(steps, "STEP_VALUE_BYTES", size)
        patch.setattr(whole, "STEP_BYTES", size)
        patch.setattr(sound, "PIECE_BYTES", max(size, LEAST_PIECE))
        yield


def alike(case: Input, play: Callable[[Iterable[bytes]], object]) -> None:
    """Assert that *play* has one result for the content in pieces, at once, and byte for byte."""
    whole, *others = map(play, case.reads())
    for other in others:
        assert other == whole, f"what is read depends on the reads: {other} {whole}"


def of_bridge(
    data: bytes, check: Callable[[bytes], None], play: Callable[[Iterable[bytes]], object]
) -> None:
    """Take the content for the body of a request, which *check* checks, or for an answer."""
    case = parts(data)
    if case.choice % 2:
        check(case.content)
        with windows(case.window):
            check(case.content)
    else:
        alike(case, play)


def fed(sink: StreamSink, stream: Stream, reads: Iterable[bytes]) -> str:
    """Feed *sink* with *reads*, and end *stream*; return the fault, empty if there is none."""
    try:
        for read in reads:
            if not sink.feed(read):
                break
        else:
            sink.end()
    except ProviderFault as error:
        if not stream.ended:
            stream.fail(error)
        return f"{type(error).__name__}: {error.message}"
    return ""


def parts(data: bytes) -> Input:
    """Return the parts of *data*, any bytes."""
    return Input(data[:CONTROL_BYTES].ljust(CONTROL_BYTES, b"0"), data[CONTROL_BYTES:])


def kept(target: str) -> list[bytes]:
    """Return the inputs in the corpus of *target*."""
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
