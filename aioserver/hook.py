"""The module that a hook in Python imports: the call that it is shown, and its refusal.

A hook is a class of somebody else's, named by `hooks: - python: "package.module:Class"`. This file
stands alone, so that such a class can be imported where nothing runs that would ask it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request, or its answer, as a hook sees it.

    *id* is the id of the request in our log, and *hook* the name of the hook. *caller* is the name
    of the client's key, *path* the path of the face, and *model* the model that the request names.
    *stream* says whether the answer comes as events. *body* is the JSON of a request, as a
    provider would get it; empty for an answer, which has the name of its *provider*.
    """

    id: str
    hook: str
    caller: str
    path: str
    model: str
    stream: bool
    provider: str = ""
    body: bytes = b""


@dataclass(frozen=True)
class Refuse:
    """A refusal, with a *message* for the client, and the HTTP *status* 403, 400 or 429.

    *retry_after* are the seconds after which another try may fare better.
    """

    message: str
    status: int = 403
    retry_after: float | None = None
