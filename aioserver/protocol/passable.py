"""The paths below `/v1` that are passed on to a provider as they are, and for whom.

    audio, images, moderations, …     a question by itself: passes for every key, as a POST
    files, batches, vector_stores, …  objects of the account of the provider's key. It is not the
                                      caller's, so that they pass for admins only, and only where
                                      the provider has `account_paths`; so does every other path
    responses/ID, …/input_items       the same, but only to read and to delete what this server
                                      does not keep itself
    responses/ID/cancel               the same, to cancel it
    organization, messages,           never pass: the account's administration, and what this
    other responses                   server answers itself

A path is compared as it stands on the wire, and only a path that can be read in one way is a path
at all: with an escape (`%2e`, `%2f`), an empty segment, a dot segment, a backslash or a semicolon,
a provider or a proxy in front of it may read another path than was allowed here (CWE-22, CWE-436).
None of OpenAI's paths has any.
"""

from __future__ import annotations

import re
from enum import Enum

# Segments of letters, digits and what ids are made of, none of which is `.` or `..`.
_PATH = re.compile(r"(?!.*\.\.)(?:(?!\.(?:/|$))[A-Za-z0-9._~:@+=,-]+(?:/|$))+(?<!/)")
_QUERY = re.compile(r"[\x21\x22\x24-\x7e]*")

# A response that a provider keeps, and its input.
_RESPONSE = re.compile(r"responses/(?!(?i:compact|input_tokens)(?:/|$))[^/]+(?:/input_items)?")
_CANCEL = re.compile(r"responses/(?!(?i:compact|input_tokens)/)[^/]+/cancel")

# Below these every path is a question by itself, but for those of OBJECTS.
QUESTIONS = ("audio/", "images/")
# And these are, too.
QUESTION_PATHS = frozenset(
    {"moderations", "rerank", "responses/compact", "responses/input_tokens"}
)
# The voices that somebody has recorded, and their consent to it, are kept in the account.
OBJECTS = ("audio/voice",)
# First segments of paths that never pass, in lower case: some providers read a path in any case. A
# second `v1` is that of a wrong base URL.
NEVER = frozenset({"organization", "organizations", "responses", "messages", "v1"})
# First segments of OpenAI's paths that name objects of an account; any other path is taken for
# one, too.
ACCOUNT = frozenset(
    {
        *("assistants", "batches", "containers", "conversations", "evals", "files", "fine_tuning"),
        *("threads", "uploads", "vector_stores", "videos"),
    }
)
# The methods that OpenAI's API has.
METHODS = ("GET", "POST", "DELETE")


class Passage(Enum):
    """The callers for whom a path passes, and by which methods."""

    EVERY_KEY = "question", ("POST",)
    ADMIN = "account", METHODS
    RESPONSE = "response", ("GET", "DELETE")
    CANCEL = "cancellation", ("POST",)

    def __init__(self, _subject: str, methods: tuple[str, ...]) -> None:
        self.methods = methods


def passage(path: str) -> Passage | None:
    """Return for whom *path*, below `/v1/` and as it stands on the wire, passes.

    None for nobody.
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


def sound_query(query: str) -> bool:
    """Return whether *query* can stand in a request line, and ends the path there in one way
    only.
    """
    return _QUERY.fullmatch(query) is not None
