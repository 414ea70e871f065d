"""The router: which provider is asked, and for which model."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from aioserver.auth.callers import NO_CALLER
from aioserver.errors import ModelNotFound
from aioserver.provider_errors import NoProvider
from aioserver.providers.provider import Provider
from tests.support import routers
from tests.support.server import HTTP_CLIENT, NOWHERE, configured

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aioserver.gateway.router import Router


@asynccontextmanager
async def router_of(tmp_path: Path, active: str = "sim") -> AsyncIterator[Router]:
    """`sim` and `local` are usable; `groq` lacks its key."""
    changes = {
        f"llm.providers.{name}": {
            "base_url": NOWHERE,
            "model": f"{name}-model",
            "http_client": dict(HTTP_CLIENT),
        }
        for name in ("local", "groq")
    }
    configuration = configured(NOWHERE, changes, tmp_path / "config.yaml")
    providers = {
        name: Provider(
            provider_settings, provider_settings.base_url or NOWHERE, max_response_bytes=1000
        )
        for name, provider_settings in configuration.settings.llm.providers.items()
    }
    yield routers.router_of(providers, active)
    for provider in providers.values():
        await provider.close()


# The model and the provider that a request names; the provider that is asked, for which model, and
# whether the fallbacks follow.
WAYS = [
    # provider given in a chat
    (None, "local", "local", None, False),
    ("any", "local", "local", "any", False),
    ("sim", "local", "local", "sim", False),
    ("sim/x", "local", "local", "sim/x", False),
    # model absent, or a provider's name
    (None, None, "sim", None, True),
    ("sim", None, "sim", None, False),
    ("local", None, "local", None, False),
    # the first segment is a provider's name
    ("local/llama", None, "local", "llama", False),
    ("local/meta/llama-3", None, "local", "meta/llama-3", False),
    ("local/local", None, "local", "local", False),
    # anything else
    ("gpt-4o-mini", None, "sim", "gpt-4o-mini", True),
    ("meta/llama-3", None, "sim", "meta/llama-3", True),
    ("local/", None, "sim", "local/", True),
    ("/local", None, "sim", "/local", True),
    ("Local", None, "sim", "Local", True),
    (" local", None, "sim", " local", True),
    ("x/local", None, "sim", "x/local", True),
]
NOT_FOUND = [
    *((None, "nobody"), ("any", "nobody"), (None, ""), (None, "x" * 5000)),
    # configured, without its key
    *((None, "groq"), ("groq", None), ("groq/llama", None)),
]


async def test_a_request_goes_where_the_table_says(tmp_path: Path) -> None:
    async with router_of(tmp_path) as router:
        for model, provider, asked, as_model, fallbacks in WAYS:
            route = router.route(model, provider, caller=NO_CALLER)

            assert route.provider.name == asked, (model, provider)
            assert (route.model, route.fallbacks, route.pinned) == (as_model, fallbacks, False)


async def test_a_named_provider_that_cannot_be_asked_is_not_found(tmp_path: Path) -> None:
    async with router_of(tmp_path) as router:
        for model, provider in NOT_FOUND:
            with pytest.raises(ModelNotFound, match=r"there are: local, sim$") as caught:
                router.route(model, provider, caller=NO_CALLER)

            assert caught.value.http_status == 404
            assert len(caught.value.message) < 200


async def test_without_a_usable_active_provider_only_named_ones_are_asked(tmp_path: Path) -> None:
    async with router_of(tmp_path, active="groq") as router:
        assert not router.usable
        for model in (None, "gpt", "meta/llama"):
            with pytest.raises(NoProvider, match="groq"):
                router.route(model, caller=NO_CALLER)
        assert router.route("local", caller=NO_CALLER).provider.name == "local"
        assert router.route(None, "sim", caller=NO_CALLER).provider.name == "sim"


async def test_the_active_provider_is_usable(tmp_path: Path) -> None:
    async with router_of(tmp_path) as router:
        assert router.usable
        assert router.active is router.providers["sim"]
        assert {"sim", "local", "groq"} <= router.providers.keys()
