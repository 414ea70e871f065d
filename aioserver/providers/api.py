"""An API: the meaning of a path below a provider's base URL, as it differs from chat completions.

The face that makes a request passes its `Api` along. The attempt, its sink, the head of the
request and the log of the answer use it, and nothing looks it up. Chat completions are `CHAT`; the
wings have the other APIs.
"""

from __future__ import annotations

import time
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from aioserver.protocol.model_body import MAX_CHOICES
from aioserver.protocol.openai import bounded, is_content, usage_of
from aioserver.protocol.parts import CHAT_PARTS, Parts
from aioserver.protocol.transcript import ChatTranscript
from aioserver.providers import error_mapping
from aioserver.providers.sinks import EventSink
from aioserver.streams.contracts import PLAIN_EVENTS
from aioserver.streams.fast_path import ForwardedApi
from aioserver.streams.formats import MESSAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from aioserver.config import settings
    from aioserver.errors import AioserverError
    from aioserver.protocol.model_body import ModelBody
    from aioserver.protocol.transcript import PassedTranscript
    from aioserver.providers.sinks import StreamSink
    from aioserver.streams.contracts import AnswerEvents
    from aioserver.streams.formats import Format
    from aioserver.streams.stream import Stream


class Capabilities:
    """The capabilities that an API has learned about one provider: made at the first use, and anew
    after a change of the settings. Verdicts of single answers expire by *clock* (verdicts.py).
    """

    def __init__(
        self, settings: settings.Provider, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin with nothing but *settings*."""

    @property
    def refused_words(self) -> Collection[str]:
        """The parameters that the provider has refused."""
        return ()

    @property
    def context_limits(self) -> Mapping[str, int]:
        """The context lengths of models in tokens, by name."""
        return MappingProxyType({})

    @property
    def messages(self) -> str | None:
        """The word in `/stats` for the way in which messages are asked for; None if it is not
        about messages.
        """
        return None


class Api(ForwardedApi):
    """The API at *path*, below the base URL of a provider: chat completions, and every API that is
    asked and answered like them.

    Always: it has no state, so that one object serves every request for its path.
    """

    # Its name in a sentence, and the setting by which a provider speaks it.
    name: ClassVar[str] = "OpenAI's API"
    setting: ClassVar[str] = ""
    # Headers that are added unless the client or the settings have them; the names in lower case.
    headers: ClassVar[Mapping[str, str]] = {}
    # The members of a body that bound an answer in tokens, those that ask for several answers, and
    # whether each of several prompts gets its own answer.
    bounds: ClassVar[Sequence[str]] = ()
    choices: ClassVar[Sequence[str]] = ()
    many_prompts: ClassVar[bool] = False
    # Whether an answer costs tokens; and whether the cached tokens of a prompt count for the
    # provider's pace.
    costs: ClassVar[bool] = True
    paces_cached: ClassVar[bool] = True
    # The transcript of an answer that can be continued; None: no answer of this API can be.
    continues: ClassVar[type[PassedTranscript] | None] = None
    # How its events are told apart, of which some are held.
    parts: ClassVar[Parts] = CHAT_PARTS

    def __init__(self, path: str) -> None:
        self.path = path

    def speaks(self, provider: settings.Provider) -> bool:  # noqa: ARG002 - all speak this one
        """Return whether a provider with these settings speaks this API."""
        return True

    def allowed(self, body: ModelBody) -> tuple[int | None, int]:
        """Return the most tokens of an answer that *body* allows, None if it sets no bound, and
        the number of answers that it asks for. Members that this API does not have mean nothing.

        Of several bounds the largest counts: engines differ in which of them they obey.
        """
        choices = 1
        if body.several and (wanted := body.largest(self.choices)) is not None:
            choices = min(wanted, MAX_CHOICES)
        if self.many_prompts:
            choices *= body.prompts
        return body.largest(self.bounds), choices

    def key_headers(self, host: str, key: str) -> dict[str, str]:  # noqa: ARG002
        """Return the headers that present *key* to a provider at *host*."""
        return {"Authorization": f"Bearer {key}"}

    def sink(self, stream: Stream) -> StreamSink:
        """Return the sink that fills *stream* with the events of an answer as they come."""
        return EventSink(stream, self.content)

    def content(self, event: bytes) -> bool:
        """Return whether *event*, the data of a streamed event, is content that a person or a
        program waits for. Other events are a preamble.
        """
        return is_content(event)

    def events(self) -> AnswerEvents:
        """Return the memory for the events of an answer to come, and the form of its errors."""
        return PLAIN_EVENTS

    def messages(self, lane: str | None) -> Format:  # noqa: ARG002 - only responses have lanes
        """Return the format of its answers on a WebSocket, on the *lane* of that name."""
        return MESSAGES

    def check_status(
        self, provider: str, status: int, headers: Mapping[str, str], body: bytes
    ) -> None:
        """Raise the fault that the *status* of an answer of *provider* means.

        Raises:
            ProviderFault: it is not between 200 and 299.
        """
        error_mapping.check_status(provider, status, headers, body)

    def usage(self, content: object) -> Mapping[str, Any] | None:
        """Return the tokens that *content*, a whole answer, reports; None if it reports none."""
        usage = usage_of(content)
        return usage and bounded(usage)

    def http_status(self, error: AioserverError) -> int:
        """Return the HTTP status of *error* for a client of this API."""
        return error.http_status


class ChatApi(Api):
    """Chat completions, whose answers can be continued."""

    bounds = ("max_tokens", "max_completion_tokens")
    choices = ("n", "best_of")
    continues = ChatTranscript


class CompletionsApi(Api):
    """Completions, with an answer to each prompt."""

    bounds = ("max_tokens",)
    choices = ("n", "best_of")
    many_prompts = True


class WordlessApi(Api):
    """A path whose answers have no tokens, such as that of embeddings."""

    def allowed(self, body: ModelBody) -> tuple[int | None, int]:  # noqa: ARG002 - nothing is
        """Return that an answer has no tokens."""
        return 0, 1


CHAT = ChatApi("chat/completions")
