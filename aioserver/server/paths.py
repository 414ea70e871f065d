"""Paths that do not exist, and the path that a client probably meant.

OpenAI's SDKs put a path such as `chat/completions` behind a base URL. If that URL lacks its `/v1`,
has it twice, or has a part of another server's, every request of the program gets a 404: the
message names the path that exists. Anthropic's SDKs add the `/v1` themselves, so their base URL
must not have it; other programs for that API do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from aioserver.errors import NotFound
from aioserver.faces.form import OPENAI
from aioserver.faces.passthrough import API, ROUTE_NAME
from aioserver.protocol.passable import Passage, passage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aioserver.faces.form import Forms

# The most characters of a path in a message.
MAX_SHOWN = 200
# The most segments that a wrong base URL may have in front of a path of ours, as
# `openai/deployments/x`. A longer path is no such mistake, and would cost a comparison for each
# segment.
MAX_EXTRA = 4


def methods(request: web.Request) -> set[str]:
    """Return the methods that the path of *request*, below `/v1`, allows, so that the answer is
    405.

    A path that matches only as an id allows none but HEAD: `responses/compact` is OpenAI's, and no
    response is named `compact`.
    """
    path = request.rel_url.raw_path
    found = {
        route.method
        for resource in _resources(request)
        if resource.canonical == path or (request.method == "HEAD" and _matches(resource, path))
        for route in resource
    }
    if passage(path.removeprefix(API)) is Passage.EVERY_KEY:
        found.update(Passage.EVERY_KEY.methods)
    return found


def not_found(request: web.Request, forms: Forms) -> NotFound:
    """Return the error for a path that does not exist, with the path that was probably meant."""
    path = request.rel_url.raw_path
    message = f"no such path for {request.method}: {path[:MAX_SHOWN]}"
    meant = next((candidate for candidate in _candidates(path) if _exists(request, candidate)), "")
    if meant:
        twice = path.startswith(API) and forms.at(meant, {}) is not OPENAI
        rule = "must not end" if twice else "must end"
        message += f"; the base URL {rule} in /v1, so that the path is {meant[:MAX_SHOWN]}"
    return NotFound(message)


def _candidates(path: str) -> Iterator[str]:
    """Yield the paths below `/v1` that *path* ends with, the longest first."""
    segments = [segment for segment in path.split("/") if segment]
    for extra in range(min(len(segments), MAX_EXTRA + 1)):
        candidate = API + "/".join(segments[extra:])
        if candidate != path:
            yield candidate


def _exists(request: web.Request, path: str) -> bool:
    """Return whether a request like *request* for *path* would have a handler of OpenAI's API."""
    return any(
        any(route.method == request.method for route in resource) and _matches(resource, path)
        for resource in _resources(request)
    )


def _resources(request: web.Request) -> Iterator[web.Resource]:
    """Yield the paths of OpenAI's API that have a handler of their own."""
    for resource in request.app.router.resources():
        if (
            isinstance(resource, web.Resource)
            and resource.canonical.startswith(API)
            and resource.name != ROUTE_NAME
        ):
            yield resource


def _matches(resource: web.Resource, path: str) -> bool:
    pattern = resource.get_info().get("pattern")
    return path == resource.canonical or (pattern is not None and bool(pattern.fullmatch(path)))
