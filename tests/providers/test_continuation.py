"""What a provider's refusal says about whether it keeps responses, and what it does not."""

from __future__ import annotations

import json

import pytest

from aioserver.providers.continuation import learn


class Keeper:
    """A provider that keeps responses, as far as is known."""

    name = "demo"
    keeps_responses = True


def refusal(message: str, param: str | None = None) -> bytes:
    return json.dumps({"error": {"message": message, "param": param}}).encode()


@pytest.mark.parametrize(
    ("message", "previous_id"),
    [
        # The words are those of a client.
        ("Previous response with id 'resp_unsupported' not found.", "resp_unsupported"),
        ("Unknown parameter: 'no_previous_response_id'.", "resp_1"),
        ("previous_response_id is not supported", None),
        # About this one alone.
        ("Previous response with id 'resp_1' not found.", "resp_1"),
    ],
)
def test_a_refusal_that_a_client_has_worded_says_nothing_of_the_provider(
    message: str, previous_id: str | None
) -> None:
    keeper = Keeper()

    assert not learn(keeper, 400, refusal(message), previous_id=previous_id, by_id=False)
    assert keeper.keeps_responses


@pytest.mark.parametrize("by_id", [True, False])
def test_a_provider_that_supports_no_continuation_is_known_by_its_first_refusal(
    by_id: bool,
) -> None:
    keeper = Keeper()
    body = refusal("Unknown parameter: 'previous_response_id'.")

    assert learn(keeper, 400, body, previous_id="resp_1", by_id=by_id) == by_id
    assert not keeper.keeps_responses
