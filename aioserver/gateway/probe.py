"""A test question in an API of a wing, as an agent might ask it, with a tool to be called. An
operator asks it to find out whether agents can work with a provider (tools/doctor/).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from aioserver.gateway.bridging import BridgedAttempt
from aioserver.providers.request import ProviderRequest

# The name of the tool and its one argument, which is required, and the user's request to call it.
TOOL, ARGUMENT = "note", "word"
DESCRIPTION = "Notes a word."
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {ARGUMENT: {"type": "string"}},
    "required": [ARGUMENT],
}
QUESTION = f"Call the tool `{TOOL}` once, with the {ARGUMENT} ready. Say nothing else."
# The bound of its answer in tokens: some models think first.
MAX_TOKENS = 512


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """*request* is the question, for a streamed answer, with every parameter that an engine may
    not know. *make_attempt* makes its attempt. *calls* returns the arguments of each tool call in
    the events of an answer that a bridge has made.
    """

    request: ProviderRequest
    make_attempt: type[BridgedAttempt]
    calls: Callable[[bytes], Sequence[str]]
