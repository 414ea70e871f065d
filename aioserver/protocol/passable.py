"""The paths below `/v1` that are passed on to a provider as they are, and the callers that may use
them.

    audio, images, moderations, …     a question by itself: passes for every key, as a POST
    files, batches, vector_stores, …  objects of the account of the provider's key. It is not the
                                      caller's, so they pass for admins only, and only where
                                      the provider has `account_paths`; so does every other path
    responses/ID, …/input_items       the same, but only to read and to delete responses that
                                      this server does not store itself
    responses/ID/cancel               the same, to cancel it
    organization, messages,           never pass: the account's administration, and paths that
    other responses                   this server answers itself

A provider may open further paths to every key, by their names in its `pass_paths`: such as
`decisions`, which is a question by itself, or `videos`, whose objects all keys share then.

A path is compared as it stands on the wire, and only a path that can be read in one way is
allowed. With an escape (`%2e`, `%2f`), an empty segment, a dot segment, a backslash or a
semicolon, a provider or a proxy in front of it may read another path than was allowed here
(CWE-22, CWE-436). None of OpenAI's paths has any.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Segments of letters, digits and the characters of ids; none is `.` or `..`.
_PATH = re.compile(r"(?!.*\.\.)(?:(?!\.(?:/|$))[A-Za-z0-9._~:@+=,-]+(?:/|$))+(?<!/)")
_QUERY = re.compile(r"[\x21\x22\x24-\x7e]*")

# A response that a provider stores, and its input.
_RESPONSE = re.compile(r"responses/(?!(?i:compact|input_tokens)(?:/|$))[^/]+(?:/input_items)?")
_CANCEL = re.compile(r"responses/(?!(?i:compact|input_tokens)/)[^/]+/cancel")

# Below these every path is a question by itself, except those of OBJECTS.
QUESTIONS = ("audio/", "images/")
# These paths are questions, too.
QUESTION_PATHS = frozenset(
    {"moderations", "rerank", "responses/compact", "responses/input_tokens"}
)
# Voice recordings, and the consent to them, are stored in the account.
OBJECTS = ("audio/voice",)
# First segments of paths that never pass, in lower case: some providers ignore the case of a path.
# A second `v1` comes from a wrong base URL.
NEVER = frozenset({"organization", "organizations", "responses", "messages", "v1"})
# First segments of OpenAI's paths that name objects of an account; any other path is treated as
# one, too.
ACCOUNT = frozenset(
    {
        *("assistants", "batches", "containers", "conversations", "evals", "files", "fine_tuning"),
        *("threads", "uploads", "vector_stores", "videos"),
    }
)
# First segments of paths that cannot be opened: they never pass, or this server has them.
SERVED = NEVER | {"chat", "completions", "embeddings", "models"}
# A path that a setting may open, with all paths below it.
OPENED = rf"(?!(?:{'|'.join(sorted(SERVED))})(?:/|$))[a-z0-9_-]+(?:/[a-z0-9_-]+)*"
# The methods of OpenAI's API.
METHODS = ("GET", "POST", "DELETE")


class Passage(Enum):
    """The callers for which a path passes, and the methods."""

    EVERY_KEY = "question", ("POST",)
    ADMIN = "account", METHODS
    RESPONSE = "response", ("GET", "DELETE")
    CANCEL = "cancellation", ("POST",)

    def __init__(self, _subject: str, methods: tuple[str, ...]) -> None:
        self.methods = methods


def passage(path: str) -> Passage | None:
    """Return the passage for *path*, below `/v1/` and as it stands on the wire.

    None if it passes for no caller.
    """
    if not _PATH.fullmatch(path):
        return None
    if path in QUESTION_PATHS or (path.startswith(QUESTIONS) and not path.startswith(OBJECTS)):
        return Passage.EVERY_KEY
    if _RESPONSE.fullmatch(path):
        return Passage.RESPONSE
    if _CANCEL.fullmatch(path):
        return Passage.CANCEL
    return None if path.partition("/")[0].lower() in NEVER else Passage.ADMIN


def names_account(path: str) -> bool:
    """Return whether *path* is one of OpenAI's that name objects of an account."""
    return path.partition("/")[0] in ACCOUNT


def below(path: str, opened: Sequence[str]) -> bool:
    """Return whether *path* is one of those that are *opened*, or below one."""
    return any(path == name or path.startswith(f"{name}/") for name in opened)


def sound_query(query: str) -> bool:
    """Return whether *query* can stand in a request line, and ends the path there in one way only."""
    return _QUERY.fullmatch(query) is not None
