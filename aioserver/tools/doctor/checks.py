"""The checks of a configuration and of this machine; the table of all checks, and the function that
runs them.

A server itself warns at its start where open files are few, or its accept queue is short.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import aiohttp

from aioserver.config import Configuration
from aioserver.config.chat import Chat, WebSocket
from aioserver.config.faults import ConfigurationError
from aioserver.config.settings import Settings
from aioserver.protocol.eventstream import EventTooLong
from aioserver.protocol.frames import BadFrame
from aioserver.server.app import open_server
from aioserver.server.wings import WINGS, faults
from aioserver.telemetry import kernel
from aioserver.tools import remote
from aioserver.tools.doctor import providers, server
from aioserver.tools.doctor.results import Facts, Result, fail, ok, skip, warn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aioserver.config.llm import Llm

MIB = 1 << 20
# Bytes of a process before its first client, measured.
PROCESS = 64 * MIB


async def configuration(facts: Facts) -> AsyncIterator[Result]:
    """Read the configuration. If it is valid but not usable, the other checks still run."""
    try:
        configuration = Configuration.load(facts.config)
        yield ok(f"{configuration.source} is valid")
        for warning in configuration.warnings:
            yield warn(warning)
        settings = configuration.settings
        if facts.only is None:
            facts.here = settings
        elif facts.only not in settings.llm.providers:
            names = ", ".join(settings.llm.providers)
            text = f"no provider is named {facts.only} (one of {names})"
            raise ConfigurationError([text])
        facts.server = await facts.stack.enter_async_context(open_server(_alone(settings.llm)))
        if unfit := [*faults(settings, [wing() for wing in WINGS])]:
            raise ConfigurationError(unfit)
        configuration.check_usable()
    except ConfigurationError as error:
        for fault in error.faults:
            yield fail(fault)


def _alone(llm: Llm) -> Settings:
    """Return settings with the providers of *llm*, which are asked once, and with defaults."""
    once = {
        name: replace(provider, http_client=replace(provider.http_client, max_retries=0))
        for name, provider in llm.providers.items()
    }
    return Settings(chat=Chat(websocket=WebSocket(port=0)), llm=replace(llm, providers=once))


async def limits(facts: Facts) -> AsyncIterator[Result]:
    """Compare the limits of this machine with the needs of the settings."""
    chat, bounds = facts.here.chat, facts.here.chat.websocket.concurrency
    workers = bounds.uvicorn.workers
    # Each connection to one address needs a port: those to a provider, and those of a proxy on
    # this machine to the server.
    pools = (
        provider.http_client.max_connections * workers
        for provider in facts.here.llm.providers.values()
        if provider.usable
    )
    connections = max(bounds.max_connections + bounds.connection_queue_size, *pools)
    kept = (chat.streams.max_kept_bytes + bounds.max_body_bytes + PROCESS) * workers // MIB
    free = kernel.free_memory(facts.root)
    for have, wanted, text, remedy in (
        (
            kernel.local_ports(facts.root),
            connections,
            "local ports: {}, and up to {} connections to one address may need one each",
            'sysctl -w net.ipv4.ip_local_port_range="1024 65535"',
        ),
        (
            free and free // MIB,
            kept,
            "memory: {} MiB are free, and kept answers and bodies may take {}",
            "lower chat.streams.max_kept_bytes and concurrency.max_body_bytes, or add memory",
        ),
    ):
        shown = text.format(have, wanted)
        if have is None:
            yield skip(f"{text.partition(':')[0]}: this system does not show it")
        else:
            yield ok(shown) if have >= wanted else warn(shown, remedy)


async def held(facts: Facts) -> AsyncIterator[Result]:
    """Say what is held of whose streamed answers."""
    auth = facts.here.auth
    roles = auth.jwt.limits if auth is not None and auth.jwt is not None else {}
    words = [
        ("chat.streams.hold", facts.here.chat.streams.hold),
        *((f"key {key.name}", key.hold) for key in (() if auth is None else auth.all_keys)),
        *((f"role {name}", role.hold) for name, role in roles.items()),
    ]
    yield ok("; ".join(f"{whose}: {word}" for whose, word in words if word is not None))


async def wings(facts: Facts) -> AsyncIterator[Result]:
    """Let each wing look at what it needs outside of this process."""
    for wing in WINGS:
        async for level, text, hint in wing().examine(facts.here):
            yield Result(level, text, hint, subject=wing.name)


# The subject of each check; the fact without which it is not made, or empty if that is a URL that
# must not be given; and the function that yields its results. They have the order of the report.
CHECKS: tuple[tuple[str, str, Callable[[Facts], AsyncIterator[Result]]], ...] = (
    ("configuration", "", configuration),
    ("machine", "here", limits),
    ("streams", "here", held),
    ("wings", "here", wings),
    ("providers", "server", providers.providers),
    ("groups", "server", providers.groups),
    ("server", "url", server.reach),
    ("server", "session", server.health),
    ("key", "healthy", server.key),
    ("server", "accepted", server.state),
    ("server", "accepted", server.body),
    ("streams", "accepted", server.answers),
    ("WebSocket", "accepted", server.websocket),
)
# A server that does not answer, or whose answer is none.
NO_ANSWER = (aiohttp.ClientError, OSError, BadFrame, EventTooLong, remote.Unreachable)


async def examine(facts: Facts, tell: Callable[[Result], None]) -> int:
    """Run the checks, and call *tell* with each result. Return the exit code."""
    failed = set[str]()
    async with facts.stack:
        for subject, needs, look in CHECKS:
            if getattr(facts, needs, None) if needs else not facts.url:
                async for result in _answered(look(facts)):
                    if result.level == "fail":
                        failed.add(subject)
                    result.subject = result.subject or subject
                    tell(result)
    # 2: `serve` would refuse the configuration.
    return 2 if "configuration" in failed else int(bool(failed))


async def _answered(results: AsyncIterator[Result]) -> AsyncIterator[Result]:
    try:
        async for result in results:
            yield result
    except NO_ANSWER as error:
        yield fail(f"no answer: {remote.describe(error)}", "docs/proxies.md: what must pass")
