from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from tests.support.configurations import load, refused, small

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "c.yaml"


def test_a_key_in_the_file_is_warned_of(file: Path) -> None:
    configuration = load(small("base_url: http://h/v1", "api_key: canary"), file)

    assert len(configuration.warnings) == 1
    assert ":14:7 llm.providers.mine.api_key: " in configuration.warnings[0]
    assert "canary" not in configuration.warnings[0]


def test_a_key_from_an_override_is_not_warned_of(file: Path) -> None:
    made = load(small(), file, AIOSERVER__LLM__PROVIDERS__MINE__API_KEY="*canary")

    assert made.warnings == ()
    assert made.settings.llm.providers["mine"].usable


def test_a_key_file_is_looked_for_in_the_credentials_first(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    folder = file.parent / "credentials"
    folder.mkdir()
    (folder / "key").write_text("one\n")
    (file.parent / "key").write_text(" two ")
    text = small("base_url: http://h", "api_key_file: key")

    def key(**environ: str) -> str | None:
        api_key = load(text, file, **environ).settings.llm.providers["mine"].api_key
        return None if api_key is None else api_key.reveal()

    assert key(CREDENTIALS_DIRECTORY=str(folder)) == "one"
    assert key(CREDENTIALS_DIRECTORY="/nowhere") == "two"
    assert key() == "two"
    (file.parent / "key").unlink()
    assert key() is None


@pytest.mark.parametrize("content", [b"", b"a b", b"a\nb", b"\xff", "schlüssel".encode()])
def test_a_file_without_one_key_is_a_fault(content: bytes, file: Path) -> None:
    key = file.parent / "key"
    key.write_bytes(content)

    faults = refused(lambda: load(small("base_url: http://h", f"api_key_file: {key}"), file), file)

    assert len(faults) == 1
    assert faults[0].startswith("F:14:7 llm.providers.mine.api_key_file: ")


def test_a_variable_without_a_usable_key_is_a_fault(file: Path) -> None:
    text = small("base_url: http://h", "api_key_env: KEY")

    assert refused(lambda: load(text, file, KEY="ca nary"), file) == [
        (
            "F:14:7 llm.providers.mine.api_key_env: KEY contains a space, "
            "or a character that is not printable ASCII"
        )
    ]
    assert load(text, file, KEY=" canary\n").settings.llm.providers["mine"].usable
    assert load(text, file, KEY="").settings.llm.providers["mine"].missing_key == "KEY"


def test_keys_of_callers_become_hashes(file: Path) -> None:
    (file.parent / "key").write_text("two\n")
    digests = [hashlib.sha256(key).hexdigest() for key in (b"one", b"two", b"three")]
    text = small() + (
        "auth:\n  keys:\n  - {name: a, key_env: A}\n"
        f"  - {{name: b, key_file: {file.parent / 'key'}}}\n"
        f"  - {{name: c, sha256: {digests[2].upper()}}}\n"
    )

    configuration = load(text, file, A="one")

    assert configuration.settings.auth is not None
    assert [key.sha256 for key in configuration.settings.auth.all_keys] == digests


def test_a_callers_key_that_is_missing_or_shared_is_a_fault(file: Path) -> None:
    text = small() + (
        "auth:\n  keys:\n  - {name: a, key_env: A}\n  - {name: b, key_env: B}\n"
        "  - {name: c, key_env: A}\n  - {name: d, key_file: gone}\n"
    )

    assert refused(lambda: load(text, file, A="canary"), file) == [
        "F:21:5 auth.keys[1]: B holds no key",
        "F:22:5 auth.keys[2]: the same key as a",
        "F:23:5 auth.keys[3]: gone holds no key",
    ]


def test_the_hash_of_no_key_is_a_fault(file: Path) -> None:
    digest = hashlib.sha256(b"").hexdigest().upper()
    text = small() + f"auth:\n  keys:\n  - {{name: a, sha256: {digest}}}\n"

    assert refused(lambda: load(text, file), file) == [
        "F:20:5 auth.keys[0]: the hash of an empty key, which anybody could send",
    ]


def test_no_secret_is_in_any_output(file: Path) -> None:
    text = (
        small(
            "base_url: http://h",
            "api_key: canary-a",
            "headers: {Authorization: canary-b}",
            "proxy: http://u:canary-c@p",
        )
        + "cluster: {redis_url: 'redis://:canary-d@r'}\nauth: {keys: [{name: a, key_env: K}]}\n"
    )

    configuration = load(text, file, K="canary-e")

    shown = f"{configuration!r} {configuration.effective()} {configuration.warnings}"
    assert "canary" not in shown
    assert hashlib.sha256(b"canary-e").hexdigest() not in shown
    assert configuration.effective()["llm"]["providers"]["mine"]["api_key"] == "***"
