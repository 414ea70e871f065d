"""A question that an agent might ask in an API of a wing, for one call of a tool: an operator asks
it to learn whether agents can work with a provider (tools/doctor/).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from aioserver.gateway.bridging import BridgedAttempt
from aioserver.providers.request import ProviderRequest

# The tool, with the one argument that it must have, and who is to call it.
TOOL, ARGUMENT = "note", "word"
DESCRIPTION = "Notes a word."
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {ARGUMENT: {"type": "string"}},
    "required": [ARGUMENT],
}
QUESTION = f"Call the tool `{TOOL}` once, with the {ARGUMENT} ready. Say nothing else."
# Tokens that its answer may have: some models think first.
MAX_TOKENS = 512


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """The *request* that has the question, for a streamed answer, with every word that an engine
    may not know. *make_attempt* makes its attempt, and *calls* returns the arguments of each call
    in the events of an answer that a bridge has made.
    """

    request: ProviderRequest
    make_attempt: type[BridgedAttempt]
    calls: Callable[[bytes], Sequence[str]]
