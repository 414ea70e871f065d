"""The file of keys: what is read of it, and that a change leaves every other byte alone."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioserver.auth.access import Access
from aioserver.config import keys_file
from aioserver.config.faults import ConfigurationError
from aioserver.config.settings import ClientKey
from tests.support.configurations import load, refused, small

if TYPE_CHECKING:
    from pathlib import Path

EMPTY = hashlib.sha256(b"").hexdigest()
WRITTEN = """\
# Ours, für 2024

-   name: "web"        # the page
    sha256: {web}

    # it is quick
    requests_per_minute: 600
# An agent.
- {{name: app, sha256: {app},
   queue_size: 5}}   # for now
-
  name: last
  sha256: "{last}"
# the end
"""


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def entry(name: str) -> str:
    return f'{{name: "{name}", sha256: "{digest(name)}"}}'


def names(content: bytes) -> list[str]:
    return [key.name for key in keys_file.parse(content, "F")]


TEXT = WRITTEN.format(web=digest("web"), app=digest("app"), last=digest("last"))


def test_entries_are_those_of_auth_keys() -> None:
    web, app, last = keys_file.parse(TEXT.encode(), "F")

    assert (web.name, web.sha256, web.requests_per_minute) == ("web", digest("web"), 600)
    assert (app.queue_size, last.queue_size) == (5, 0)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "F:1:1: is empty (without any key it says `[]`)"),
        ("# nothing yet\n", "F:1:1: is empty (without any key it says `[]`)"),
        ("- a\n", "F:1:3 [0]: expected a section of keys, not text"),
        (f"- {{name: a, sha256: {EMPTY}}}", "F:1:3 [0]: the hash of an empty key"),
        ("- {name: a, key_env: KEY}", "F:1:3 [0]: a key in this file has sha256"),
        (
            f"- {{name: a, sha256: {digest('a')}, key_file: b}}",
            "F:1:3 [0]: a key in this file has",
        ),
        (f"- {{name: a:b, sha256: {digest('a')}}}", "F:1:4 [0].name: expected a name"),
        (f"- {entry('a')}\n- {entry('a')}", "F:2:3 [1]: the same key as a"),
        ("auth: {keys: []}", "F:1:1: expected a list of keys (is this a configuration?"),
        ("5", "F:1:1: expected a list, not "),
        ("- {name: a", "F:2:1: not valid YAML"),
        ("- &x {name: a}", "F:1:3 [0]: anchors are refused"),
        ("\ufeff- {name: é}", "F:1:4 [0].name: expected a name"),
        ("- ${KEY}", "F:1:3 [0]: expected a section"),
    ],
)
def test_what_cannot_be_used_is_a_fault_with_its_place(content: str, fault: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        keys_file.parse(content.encode(), "F")

    assert any(line.startswith(fault) for line in caught.value.faults), caught.value.faults


def test_no_fault_shows_a_hash_or_a_key(tmp_path: Path) -> None:
    content = f"- {{name: a, sha256: aio-canary-{digest('a')}}}\n- {{name: b, key: aio-canary}}\n"

    with pytest.raises(ConfigurationError) as caught:
        keys_file.parse(content.encode(), str(tmp_path))

    assert "canary" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_a_fault_of_the_configuration(tmp_path: Path) -> None:
    file, config = tmp_path / "keys.yaml", tmp_path / "config.yaml"
    text = f"{small()}auth: {{keys_file: {file}}}\n"

    assert refused(lambda: load(text, config), config) == [
        "F:18:8 auth.keys_file: no such file here (`aioserver key NAME --add FILE` makes it)"
    ]
    file.mkdir()
    assert refused(lambda: load(text, config)) == [f"{file}: cannot be read: Is a directory"]
    file.rmdir()
    file.write_bytes(b"\xff")
    assert refused(lambda: load(text, config)) == [f"{file}:1:1: not UTF-8"]


def test_its_keys_stand_beside_those_of_the_configuration(tmp_path: Path) -> None:
    file, config = tmp_path / "keys.yaml", tmp_path / "config.yaml"
    file.write_text(f"- {entry('web')}\n")
    text = f"{small()}auth: {{keys_file: {file}, keys: [{entry('app')}]}}\n"

    auth = load(text, config).settings.auth

    assert auth is not None
    access = Access(auth)
    assert access.keys.caller(b"web").name == "web"
    assert access.keys.caller(b"app").name == "app"
    assert load(text, config).effective()["auth"]["keys_file"] == str(file)


def test_no_name_and_no_key_is_in_both(tmp_path: Path) -> None:
    file, config = tmp_path / "keys.yaml", tmp_path / "config.yaml"
    file.write_text(f"- {entry('web')}\n- {{name: app, sha256: {digest('other')}}}\n")
    text = f"{small()}auth: {{keys_file: {file}, keys: [{entry('app')}]}}\n"

    assert refused(lambda: load(text, config), file) == [
        "F:2:4 [1].name: another key in auth.keys is named app as well"
    ]
    file.write_text(f"- {{name: other, sha256: {digest('app').upper()}}}\n")
    assert refused(lambda: load(text, config), file) == ["F:1:3 [0]: the same key as app"]


# Changes.


def test_a_new_entry_comes_last_and_every_other_byte_stays() -> None:
    for text in (TEXT, TEXT.replace("\n", "\r\n"), f"\ufeff{TEXT}", f"---\n{TEXT}"):
        before = text.encode()

        after = keys_file.with_entry(before, entry("new"), "F")

        assert after.startswith(before)
        assert after[len(before) :].decode().strip() == f"- {entry('new')}"
        assert names(after) == ["web", "app", "last", "new"]
    assert b"\r\n- " in keys_file.with_entry(TEXT.replace("\n", "\r\n").encode(), entry("n"), "F")


def test_an_entry_behind_a_file_without_a_last_line_end() -> None:
    content = f"  - {entry('a')}".encode()

    after = keys_file.with_entry(content, entry("b"), "F")

    assert after == content + f"\n  - {entry('b')}\n".encode()


@pytest.mark.parametrize("text", ["[]", "[]\n", "# é\n[]\n# end\n", "[\n] # none\n", "\ufeff[]\n"])
def test_the_first_entry_takes_the_place_of_an_empty_list(text: str) -> None:
    after = keys_file.with_entry(text.encode(), entry("a"), "F")

    assert names(after) == ["a"]
    rest = after.decode().replace(f"- {entry('a')}", "[]")
    assert rest == text.replace("[\n]", "[]")


def test_the_lines_of_an_entry_go_and_comments_between_entries_stay() -> None:
    web = keys_file.without_entry(TEXT.encode(), "web", "F").decode()
    app = keys_file.without_entry(TEXT.encode(), "app", "F").decode()
    last = keys_file.without_entry(TEXT.encode(), "last", "F").decode()

    assert web == TEXT[: TEXT.index("-   name")] + TEXT[TEXT.index("# An agent") :]
    assert app == TEXT[: TEXT.index("- {name: app")] + TEXT[TEXT.index("-\n  name: last") :]
    assert last == TEXT[: TEXT.index("-\n  name: last")] + "# the end\n"


def test_taking_the_last_entry_out_leaves_an_empty_list() -> None:
    content = f"# ours\n- {entry('a')}\n# end\n".encode()

    assert keys_file.without_entry(content, "a", "F") == b"# ours\n[]\n# end\n"


@pytest.mark.parametrize(
    "text",
    [
        f"[{entry('a')}, {entry('b')}]\n",
        f"[{entry('a')},\n {entry('b')}]\n",
        f"- {entry('a')}\n- {entry('b')}\n...\n",
        "--- []\n",
    ],
)
def test_a_layout_that_cannot_be_changed_stays_as_it_is(text: str) -> None:
    with pytest.raises(ConfigurationError, match="write each entry"):
        keys_file.with_entry(text.encode(), entry("c"), "F")


LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "max_concurrent": st.integers(1, 99),
        "queue_size": st.integers(1, 9),
        "priority": st.integers(2, 10),
        "class_": st.just("batch"),
        "admin": st.just(value=True),
    },
)


@given(limits=LIMITS)
def test_an_entry_is_read_back_as_the_key_that_it_was(limits: dict[str, int]) -> None:
    key = ClientKey(name="no", sha256=digest("a"), **limits)  # type: ignore[arg-type]

    content = keys_file.with_entry(b"", keys_file.entry_of(key), "F")

    assert keys_file.parse(content, "F") == (key,)


@given(
    steps=st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=12),
    comments=st.lists(st.sampled_from(["# x\n", "\n", "  # é\n"]), max_size=4),
)
def test_any_changes_keep_a_list_and_all_comments(
    steps: list[tuple[str, bool]], comments: list[str]
) -> None:
    content, there = "".join(comments).encode(), list[str]()
    for name, add in steps:
        if add and name not in there:
            before = content
            content = keys_file.with_entry(content, entry(name), "F")
            there.append(name)
            assert not there[1:] or content.startswith(before)
        elif not add and name in there:
            content = keys_file.without_entry(content, name, "F")
            there.remove(name)
        if content.strip(b"\n #x\xc3\xa9"):
            assert names(content) == there
    assert content.count(b"#") == sum(comment.count("#") for comment in comments)
