"""The one error of an answer."""

from __future__ import annotations

import pickle

from aioserver.client import AnswerError


def test_error_crosses_to_another_process() -> None:
    error = AnswerError(
        "server_at_capacity",
        "full",
        retryable=True,
        retry_after=2.0,
        request_id="r1",
        text="Hel",
    )

    again = pickle.loads(pickle.dumps(error))

    assert vars(again) == vars(error)
    assert str(again) == "full (server_at_capacity)"
