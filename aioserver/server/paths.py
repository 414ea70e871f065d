"""Paths that are not there, and what a client that asks for one of them probably means.

OpenAI's SDKs put a path such as `chat/completions` behind a base URL. Where that URL lacks its `/v1`, has
it twice, or has a part of another server's, every request of the program is 404: the message names the
path that is there. Anthropic's SDKs put the `/v1` there themselves, so their base URL must not have it; other programs for that
API do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.errors import NotFound
from aioserver.protocol.anthropic import is_messages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiohttp import web

# The part that all paths of OpenAI's API begin with.
API = "/v1/"
# Characters of a path in a message.
MAX_SHOWN = 200
# Segments in front of a path of ours that a wrong base URL may have, as `openai/deployments/x`. A longer
# path is no such mistake, and would cost a comparison for each segment.
MAX_EXTRA = 4


def known(request: web.Request) -> bool:
    """Return whether the path of *request* is there with another method, so that the answer is 405.

    Below `/v1` a path that only matches as somebody's id is not: `responses/compact` is OpenAI's, and no
    response is named `compact`.
    """
    path = request.rel_url.raw_path
    return (
        not path.startswith(API)
        or request.method == "HEAD"
        or any(resource.canonical == path for resource in request.app.router.resources())
    )


def not_found(request: web.Request) -> NotFound:
    """Return the error of a path that is not there, with the one that was probably meant."""
    path = request.rel_url.raw_path
    message = f"no such path for {request.method}: {path[:MAX_SHOWN]}"
    meant = next((candidate for candidate in _candidates(path) if _exists(request, candidate)), "")
    if meant:
        twice = path.startswith(API) and is_messages(meant.removeprefix(API))
        rule = "must not end" if twice else "must end"
        message += f"; the base URL {rule} in /v1, so that the path is {meant[:MAX_SHOWN]}"
    return NotFound(message)


def _candidates(path: str) -> Iterator[str]:
    """Yield the paths below `/v1` whose end is that of *path*, the longest first."""
    segments = [segment for segment in path.split("/") if segment]
    for extra in range(min(len(segments), MAX_EXTRA + 1)):
        candidate = API + "/".join(segments[extra:])
        if candidate != path:
            yield candidate


def _exists(request: web.Request, path: str) -> bool:
    """Return whether a request like *request* for *path* would have a handler of OpenAI's API."""
    for resource in request.app.router.resources():
        if resource.canonical.startswith(API) and any(
            route.method == request.method for route in resource
        ):
            pattern = resource.get_info().get("pattern")
            if path == resource.canonical or (pattern is not None and pattern.fullmatch(path)):
                return True
    return False
