"""The body that a hook has put in place of a client's: what stays as it was, and which model each
provider is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from aioserver.errors import AioserverError
from aioserver.faces.openai import body_maker
from aioserver.protocol import model_body
from aioserver.protocol.json_body import Member
from aioserver.wings.doors.decisions import HookFault

if TYPE_CHECKING:
    from aioserver.config import settings
    from aioserver.gateway.request import Route
    from aioserver.protocol.model_body import ModelBody
    from aioserver.providers.request import BodyMaker

STREAM = Member("stream")


class ChangedBody(NamedTuple):
    """The *body* that a hook has returned, where it was shown one that has the *shown* model."""

    body: ModelBody
    shown: str | None

    @property
    def size(self) -> int:
        """Its bytes."""
        return len(self.body.data)

    def maker(self, route: Route) -> BodyMaker:
        """Return a function that makes it for a provider and a model, as the one before it has,
        which has made the shown one for the first provider of *route*.

        A model that the hook has chosen stands for the one that it was shown, and for no other.
        """
        body, first = self.body, route.model or route.provider.settings.model
        if self.shown != first:
            # A body that is passed on as it is, whatever its model means.
            return lambda _provider, _model: body.data
        renamed = body_maker(body)

        def body_for(provider: settings.Provider, model: str | None) -> bytes:
            if (model or provider.model) == first and body.model is not None:
                return body.data
            return renamed(provider, model)

        return body_for


async def changed_body(said: bytes, shown: bytes, max_bytes: int) -> ChangedBody:
    """Return the body that a hook has *said* in place of the *shown* one, whose `stream` it has, in
    steps.

    Raises:
        HookFault: it is none that could be sent, or has more than *max_bytes*.
    """
    if len(said) > max_bytes:
        raise HookFault("its body is too large")
    before = await model_body.reading(shown)
    try:
        body = await model_body.reading(said)
        if body.streamed != before.streamed:
            data = _with_stream(body.data, streamed=before.streamed)
            body = await model_body.reading(data)
    except AioserverError as exc:
        raise HookFault("its body is none of a request") from exc
    return ChangedBody(body, before.model)


def _with_stream(body: bytes, *, streamed: bool) -> bytes:
    """Return *body* with that value of `stream`."""
    word, value = b"true" if streamed else b"false", STREAM.value(body)
    if not value:
        return STREAM.insert(body, (word,))
    place, view = STREAM.find(body, value), memoryview(body)
    return b"".join((view[: place.value], word, view[place.end :]))
