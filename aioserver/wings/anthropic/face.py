"""Anthropic's Messages API, for providers that speak it: its SDKs and Claude Code work unchanged.

A provider that speaks the API gets the body as it came, apart from the replacements of the OpenAI
face (faces/openai.py), and the client's `anthropic-*` headers. The provider's events and errors
come back byte for byte. If a provider has chat completions only, the attempt translates
(wings/anthropic/attempt.py), and a count of tokens is an estimate. The difference from
the OpenAI face is the form of this server's own messages (wings/anthropic/wire.py): errors, in a
body or as an event, and heartbeats. These are `ping` events, since Claude Code counts events and
no comments. While a request waits, a comment in front of them has its position, as on the OpenAI
face.

A model that names no provider goes to the first provider, among the active one and the fallbacks,
that speaks the API (gateway/router.py).
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

from aiohttp import web

from aioserver.auth.callers import CALLER
from aioserver.faces import http, openai
from aioserver.faces.admission import CountedHandler
from aioserver.faces.form import Form
from aioserver.faces.intake import client_headers, idempotency_key, read_model_body, session_of
from aioserver.faces.openai import Dialect
from aioserver.gateway.request import Request
from aioserver.providers.request import ProviderRequest
from aioserver.wings.anthropic import wire
from aioserver.wings.anthropic.api import COUNT_TOKENS, MESSAGES
from aioserver.wings.anthropic.attempt import (
    ESTIMATED,
    CountAttempt,
    CountingCapabilities,
    MessageAttempt,
    estimated,
)
from aioserver.wings.anthropic.wire import PING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from aioserver.errors import AioserverError
    from aioserver.faces.admission import BodyHold
    from aioserver.faces.context import Context
    from aioserver.gateway.groups import Modalities
    from aioserver.limits.quota import Quota
    from aioserver.providers.request import Api

ANTHROPIC = Dialect(
    "anthropic", PING, "request-id", render_wait=lambda queued: queued.comment + PING
)
# The one query parameter that belongs to the API and is passed on with the path: its beta version.
BETA = "beta"


def routes(context: Context) -> list[web.RouteDef]:
    """Return the routes of this face; `GET /v1/models` is in faces/openai.py, for both."""
    serving = partial(openai.serve, context, dialect=ANTHROPIC)
    return [
        web.post(
            f"/v1/{api.path}",
            CountedHandler(
                context.admission,
                ANTHROPIC.face,
                prepare_for(context, api),
                serve,
                broken=partial(openai.broken, api),
            ).handle,
        )
        for api, serve in ((MESSAGES, serving), (COUNT_TOKENS, partial(count, context)))
    ]


def prepare_for(
    context: Context, api: Api
) -> Callable[[web.Request, BodyHold], Awaitable[Request]]:
    """Return the function that prepares a POST to the path of *api*, below `/v1`."""

    async def prepare(request: web.Request, hold: BodyHold) -> Request:
        limit = context.settings.chat.websocket.max_message_size
        body, data = await read_model_body(request, hold, limit)
        if (key := idempotency_key(request)) is not None:
            await context.gateway.claim(request, key, data)
        caller = request[CALLER]
        route = context.router.route(body.model, caller=caller, api=api, body=body.data)
        if api is COUNT_TOKENS:
            # Another model counts other tokens.
            route.pinned = True
        session = session_of(request) or wire.user_of(body.metadata)
        provider_request = ProviderRequest(
            api,
            partial(openai.body_for, body),
            query=f"{BETA}=true" if request.query.get(BETA) == "true" else "",
            streamed=body.streamed and api is MESSAGES,
            caller=caller.on_behalf_of(session),
            model=route.model,
            hold=hold,
            client_headers=client_headers(context, request, wire.HEADERS),
            size=len(body.data),
            allowed=api.allowed(body),
        )
        digest = openai.digest_of(provider_request.path, data) if key else b""
        return Request(
            route,
            provider_request,
            ANTHROPIC.face,
            http.request_id(request),
            key,
            digest,
            make_attempt=MessageAttempt if api is MESSAGES else CountAttempt,
        )

    return prepare


async def count(context: Context, request: web.Request, prepared: Request) -> web.StreamResponse:
    """Answer with the tokens of a request, counted by its provider, or estimated without asking a
    provider if that one does not count them.

    Raises:
        AioserverError: as `openai.serve`.
    """
    provider = prepared.route.provider
    if not provider.capabilities(CountingCapabilities).bridged:
        return await openai.serve(context, request, prepared, dialect=ANTHROPIC)
    try:
        model = prepared.route.model or provider.settings.model
        body = prepared.provider_request.body(provider.settings, prepared.route.model)
        per_byte = provider.costs.tokens_per_byte(model, prepared.caller)
        counted_tokens = await estimated(body, per_byte)
    finally:
        prepared.release()
    log_id = http.request_id(request)
    headers = {ANTHROPIC.id_header: log_id, **ESTIMATED, "Content-Type": "application/json"}
    return web.Response(body=counted_tokens, headers=headers)


class MessagesForm(Form):
    """Anthropic's form of errors and of the list of models, for the clients that speak its API."""

    api = MESSAGES
    id_header = "request-id"

    def speaks(self, path: str, headers: Mapping[str, str]) -> bool:
        """Return whether a client that asks for *path* with *headers* expects this form."""
        return wire.speaks(path, headers)

    def error(self, error: AioserverError, request_id: str) -> bytes:
        """Return *error* as the body of a response to the request with this id."""
        return wire.error_body(error, request_id)

    def limits(self, quota: Quota) -> dict[str, str]:
        """Return the headers that report the budget of a key: that of the minute, if it has both."""
        budget = next(iter(quota.budgets().values()), None)
        if budget is None:
            return {}
        back = datetime.fromtimestamp(ceil(time.time() + budget.reset), UTC)
        return {
            "anthropic-ratelimit-tokens-limit": str(budget.limit),
            "anthropic-ratelimit-tokens-remaining": str(budget.remaining),
            "anthropic-ratelimit-tokens-reset": back.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    def model(
        self,
        name: str,
        owner: str,  # noqa: ARG002
        context: int | None,
        modalities: Modalities,  # noqa: ARG002
        *,
        simulated: bool,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Return the model *name*, which takes *context* tokens of prompt. Its date, its longest
        answer and its abilities are not known.
        """
        return {
            "type": "model",
            "id": name,
            "display_name": name,
            "created_at": "1970-01-01T00:00:00Z",
            "lifecycle": "active",
            "max_input_tokens": context,
            "max_tokens": None,
            "capabilities": None,
        }

    def models(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the list of models with these *entries*, all on one page."""
        return {
            "data": entries,
            "has_more": False,
            "first_id": entries[0]["id"] if entries else None,
            "last_id": entries[-1]["id"] if entries else None,
        }
