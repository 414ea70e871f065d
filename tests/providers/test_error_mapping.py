"""Faults made of what a provider says."""

from __future__ import annotations

import pytest

from aioserver.providers.error_mapping import error_object_fault


@pytest.mark.parametrize("code", [400, 500])
def test_the_half_of_a_character_in_an_error_can_be_written(code: int) -> None:
    fault = error_object_fault({"code": code, "message": "you said \ud83d"})

    assert b"you said ?" in fault.body()
    assert str(fault.as_chunk()["error"]).encode()
