"""The requests that are written to a provider: how its key is presented, and which path and
version are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from multidict import CIMultiDict

from aioserver.config.schema import Secret
from aioserver.config.settings import Provider
from aioserver.protocol.request_headers import NO_HEADERS, collect
from aioserver.providers.http1 import RequestWriter
from aioserver.providers.request import CHAT, ProviderRequest
from aioserver.wings.anthropic.api import COUNT_TOKENS, MESSAGES
from tests.support.scripted_provider import LIMITS
from tests.support.virtual_loop import run_virtually

if TYPE_CHECKING:
    from collections.abc import Mapping

ANTHROPIC, OTHER = "https://api.anthropic.com/v1", "http://127.0.0.1:9/v1"
KEY = "sk-1"
APIS = {api.path: api for api in (CHAT, MESSAGES, COUNT_TOKENS)}


def written(
    base_url: str, path: str, sent: Mapping[str, str] | None = None, **settings: Any
) -> tuple[str, dict[str, str]]:
    """The first line of a request for *path*, and its headers by their names in lower case."""
    provider = Provider(name="p", base_url=base_url, model="m", http_client=LIMITS, **settings)
    writer = RequestWriter(provider, base_url, absolute=False, proxy_headers={})
    client: Any = sent or {}
    path, _, query = path.partition("?")

    async def make() -> ProviderRequest:
        return ProviderRequest(APIS[path], lambda _, __: b"", query=query, streamed=False)

    request = run_virtually(make())
    (lines,) = writer.write(
        request.api,
        request.path,
        b"{}",
        collect(client, (), "anthropic-") if client else NO_HEADERS,
    )
    head = lines.decode().partition("\r\n\r\n")[0]
    first, *rest = head.split("\r\n")
    fields = [line.split(": ", 1) for line in rest]
    names = [name.lower() for name, _ in fields]
    assert len(names) == len(set(names))
    return first, dict(zip(names, (value for _, value in fields), strict=True))


@pytest.mark.parametrize(
    ("base_url", "path", "bearer", "own"),
    [
        (ANTHROPIC, "messages", False, True),
        (ANTHROPIC, "messages/count_tokens?beta=true", False, True),
        (ANTHROPIC, "chat/completions", True, False),
        ("https://x.anthropic.com/v1", "messages", False, True),
        ("https://notanthropic.com/v1", "messages", True, True),
        (OTHER, "messages", True, True),
        (OTHER, "chat/completions", True, False),
    ],
)
def test_a_key_is_presented_as_its_provider_takes_it(
    base_url: str, path: str, bearer: bool, own: bool
) -> None:
    _, headers = written(base_url, path, api_key=Secret(KEY))

    assert headers.get("authorization") == (f"Bearer {KEY}" if bearer else None)
    assert headers.get("x-api-key") == (KEY if own else None)
    assert headers.get("anthropic-version") == ("2023-06-01" if own else None)


def test_what_the_settings_add_replaces_what_is_ours_and_the_clients() -> None:
    fixed = {"X-Api-Key": "fixed", "Anthropic-Version": "2020-01-01", "anthropic-beta": "a"}

    client = {"anthropic-version": "2099-01-01", "anthropic-beta": "b", "anthropic-new": "n"}
    _, headers = written(
        OTHER, "messages", CIMultiDict(client), api_key=Secret(KEY), headers=fixed
    )

    assert headers["x-api-key"] == "fixed"
    assert headers["anthropic-version"] == "2020-01-01"
    assert headers["anthropic-beta"] == "a"
    assert headers["anthropic-new"] == "n"


def test_the_version_is_the_clients_where_it_sends_one() -> None:
    client = CIMultiDict({"Anthropic-Version": "2099-01-01"})

    assert written(OTHER, "messages", client)[1]["anthropic-version"] == "2099-01-01"


def test_a_value_that_looks_like_the_version_is_none() -> None:
    client = CIMultiDict({"anthropic-beta": "anthropic-version: 2099-01-01"})

    assert written(OTHER, "messages", client)[1]["anthropic-version"] == "2023-06-01"


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("messages", "/v1/messages"),
        ("messages?beta=true", "/v1/messages?beta=true"),
        ("messages/count_tokens", "/v1/messages/count_tokens"),
    ],
)
def test_the_path_is_below_the_base_url(path: str, target: str) -> None:
    for base_url in (OTHER, OTHER + "/"):
        assert written(base_url, path)[0] == f"POST {target} HTTP/1.1"
