"""What is read of refusals, in the words of engines that exist."""

from __future__ import annotations

import pytest

from aioserver.protocol.bridging.accepted_parameters import OPTIONAL
from aioserver.protocol.bridging.refusals import refusal
from aioserver.provider_errors import ContextTooLong, ProviderRefused
from aioserver.providers.error_mapping import check_status
from tests.support.engine_refusals import EVERY, Refused


@pytest.mark.parametrize("refused", EVERY, ids=lambda refused: refused.engine)
def test_the_words_of_engines_are_understood(refused: Refused) -> None:
    said = refusal(refused.data)

    assert (said.limit, said.asked, said.most) == (refused.limit, refused.asked, refused.most)
    assert said.renames == refused.renames
    assert tuple(word for word in OPTIONAL if said.names(word)) == refused.words


@pytest.mark.parametrize("refused", EVERY, ids=lambda refused: refused.engine)
def test_a_request_that_is_too_long_is_known_as_one(refused: Refused) -> None:
    with pytest.raises(ProviderRefused) as caught:
        check_status("p", refused.status, {}, refused.data)

    assert isinstance(caught.value, ContextTooLong) == refused.too_long
