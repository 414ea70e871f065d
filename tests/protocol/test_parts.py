"""The parts of a turn, and the choices of an answer."""

from __future__ import annotations

import pytest

from aioserver.protocol.parts import Choices


@pytest.mark.parametrize(
    "choices", ["5", "[7]", "[null]", '[{"index": [1]}]', '[{"index": 0, "delta": [1]}]', '"a"']
)
def test_what_is_no_choice_is_passed_over(choices: str) -> None:
    known = Choices()
    known.note(b'{"choices": [{"index": 0, "delta": {"content": "a"}}]}')

    known.note(f'{{"choices": {choices}}}'.encode())

    assert known.open == known.begun == {0}
