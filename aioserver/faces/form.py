"""How clients of an API expect this server's own answers: errors, and the list of models."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

from aioserver.limits.budget import MINUTE
from aioserver.providers.request import CHAT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from aiohttp import web

    from aioserver.errors import AioserverError
    from aioserver.gateway.groups import Modalities
    from aioserver.limits.quota import Quota
    from aioserver.providers.request import Api


class Form:
    """OpenAI's form.

    A wing has others, for the clients that it knows by their path or their headers.

    Always: it has no state, so that one object serves every request.
    """

    # The API whose providers' models are listed; other models are not found.
    api: Api = CHAT
    # A further header that carries the id of a request.
    id_header = ""

    def speaks(self, path: str, headers: Mapping[str, str]) -> bool:  # noqa: ARG002
        """Return whether a client that asks for *path* with *headers* expects this form."""
        return True

    def status(self, error: AioserverError) -> int:
        """Return the HTTP status of *error*."""
        return self.api.http_status(error)

    def error(self, error: AioserverError, request_id: str) -> bytes:  # noqa: ARG002
        """Return *error* as the body of a response to the request with this id."""
        return error.body()

    def limits(self, quota: Quota) -> dict[str, str]:
        """Return the headers that report the limits of a key with budgets."""
        limit, left, reset = quota.starts
        headers = _limit_headers("requests", limit, left, reset)
        for number, (setting, budget) in enumerate(quota.budgets().items()):
            # The shortest period is the limit of which SDKs know.
            name = f"tokens-{setting.removeprefix('tokens_per_')}" if number else "tokens"
            headers |= _limit_headers(name, budget.limit, budget.remaining, budget.reset)
        return headers

    def model(
        self,
        name: str,
        owner: str,
        context: int | None,
        modalities: Modalities,
        *,
        simulated: bool,
    ) -> dict[str, Any]:
        """Return the model *name* of *owner*, which leads to a provider that may be *simulated*, and
        takes *context* tokens of prompt; None: their number is not known.
        """
        entry: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": owner}
        # These fields are not OpenAI's. The first two are OpenRouter's, which agents read; by the
        # last one the chat page says that no real model answers.
        if context is not None:
            entry["context_length"] = context
        architecture = {
            f"{way}_modalities": kinds for way, kinds in modalities._asdict().items() if kinds
        }
        if architecture:
            entry["architecture"] = architecture
        if simulated:
            entry["simulated"] = True
        return entry

    def models(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the list of models with these *entries*."""
        return {"object": "list", "data": entries}


OPENAI = Form()


def duration(seconds: float) -> str:
    """Return *seconds* as OpenAI writes them: `12ms`, `1.5s`, `6m0s`; rounded up."""
    if seconds < 1:
        return f"{ceil(1000 * seconds)}ms"
    if seconds < MINUTE:
        return f"{ceil(10 * seconds) / 10:g}s"
    minutes, rest = divmod(ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"


def _limit_headers(name: str, limit: int, remaining: int, reset: float) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{name}": str(limit),
        f"x-ratelimit-remaining-{name}": str(remaining),
        f"x-ratelimit-reset-{name}": duration(reset),
    }


class Forms:
    """All forms: those of the wings, and OpenAI's for all other clients."""

    def __init__(self, forms: Iterable[Form] = ()) -> None:
        self._forms = tuple(forms)

    def of(self, request: web.BaseRequest) -> Form:
        """Return the form that the client of *request* knows."""
        return self.at(request.path, request.headers)

    def at(self, path: str, headers: Mapping[str, str]) -> Form:
        """Return the form that a client expects when it asks for *path* with *headers*."""
        return next((form for form in self._forms if form.speaks(path, headers)), OPENAI)


NO_FORMS = Forms()
