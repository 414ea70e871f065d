"""Paths that are passed on: each of them can be read in one way only."""

from __future__ import annotations

import posixpath
from urllib.parse import unquote, urljoin, urlsplit

from hypothesis import given
from hypothesis import strategies as st

from aioserver.protocol.passable import NEVER, Passage, passage, sound_query

SEGMENTS = st.sampled_from(
    [
        *("files", "audio", "speech", "organization", "Organization", "responses", "compact"),
        *(
            ".",
            "..",
            "...",
            "",
            "%2e",
            "%2e%2e",
            "%2f",
            "a;b",
            "a\\b",
            "é",
            "\uff0e",
            "x?y",
            "x#y",
        ),
        *(
            "ft:gpt-4o:org::id",
            "v1",
            "moderations",
            "images",
            " ",
            "\t",
            "\n",
            "a\r",
            "\0",
            "~",
            "@",
        ),
    ]
)
PATHS = st.one_of(st.lists(SEGMENTS, max_size=5).map("/".join), st.text(max_size=30))


@given(PATHS)
def test_a_path_that_passes_is_read_in_one_way_by_everybody(path: str) -> None:
    if passage(path) is None:
        return

    assert unquote(path) == path
    assert posixpath.normpath(f"/v1/{path}") == f"/v1/{path}"
    assert urljoin("http://host/v1/", f"./{path}") == f"http://host/v1/{path}"
    assert urlsplit(f"http://host/v1/{path}").path == f"/v1/{path}"
    assert path.isascii()
    assert path.isprintable()


@given(PATHS)
def test_what_never_passes_does_so_in_no_case_of_letters(path: str) -> None:
    first = path.partition("/")[0].lower()
    for spelling in (path, path.upper(), path.title()):
        if first in NEVER and spelling not in {"responses/compact", "responses/input_tokens"}:
            kept = passage(spelling) in {Passage.RESPONSE, Passage.CANCEL}
            stored = kept and spelling.startswith("responses/")
            assert stored or passage(spelling) is None


def test_every_key_may_ask_questions_and_nothing_else() -> None:
    assert passage("audio/speech") is Passage.EVERY_KEY
    assert passage("responses/compact") is Passage.EVERY_KEY
    assert passage("responses/resp_1") is Passage.RESPONSE
    assert passage("responses/resp_1/input_items") is Passage.RESPONSE
    assert passage("responses/resp_1/cancel") is Passage.CANCEL
    for path in ("responses", "responses/compact/cancel", "responses/Compact", "responses/a/b/c"):
        assert passage(path) is None
    # Voices are recorded by people, and kept in the account.
    assert passage("audio/voices") is Passage.ADMIN
    assert passage("audio/voice_consents/x") is Passage.ADMIN
    assert passage("anything/else") is Passage.ADMIN


@given(st.text(max_size=20))
def test_a_sound_query_ends_neither_its_line_nor_the_address(query: str) -> None:
    if sound_query(query):
        assert urlsplit(f"http://host/v1/files?{query}").query == query
        assert len(f"GET /v1/files?{query} HTTP/1.1".split()) == 3
