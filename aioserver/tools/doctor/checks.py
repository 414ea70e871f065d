"""The table of checks, and the function that runs them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from aioserver.config import Configuration
from aioserver.config.faults import ConfigurationError
from aioserver.config.settings import Cluster, Repository, Tracing, Usage
from aioserver.server.app import open_server
from aioserver.server.wings import WINGS, faults
from aioserver.tools.doctor import arrivals, machine, providers, server
from aioserver.tools.doctor.results import Result, fail, ok, warn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aioserver.config.settings import Settings
    from aioserver.tools.doctor.facts import Facts


async def configuration(facts: Facts) -> AsyncIterator[Result]:
    """Read the configuration. If it is valid but not usable, the other checks still run."""
    try:
        configuration = Configuration.load(facts.config)
        yield ok(f"{configuration.source} is valid")
        for warning in configuration.warnings:
            yield warn(warning)
        settings = configuration.settings
        known = settings.llm.providers
        if facts.only is None:
            facts.here = settings
        elif facts.only not in known:
            text = f"no provider is named {facts.only} (one of {', '.join(known)})"
            raise ConfigurationError([text])
        facts.settings = settings
        facts.server = await facts.stack.enter_async_context(open_server(_alone(settings)))
        if unfit := [*faults(settings, [wing() for wing in WINGS])]:
            raise ConfigurationError(unfit)
        configuration.check_usable()
    except ConfigurationError as error:
        facts.usable = False
        for fault in error.faults:
            yield fail(fault)


def _alone(settings: Settings) -> Settings:
    """Return *settings* with their providers, and with the defaults of everything else."""
    chat = settings.chat
    websocket = replace(chat.websocket, host="127.0.0.1", port=0, tls=None)
    chat = replace(
        chat, websocket=websocket, service=replace(chat.service, repository=Repository())
    )
    settings = replace(settings, chat=chat, auth=None, cluster=Cluster())
    return replace(settings, hooks=(), tracing=Tracing(), usage=Usage())


class Check(NamedTuple):
    """A row of the table: *look* yields the results about *subject*, if the fact *needs* is known
    and true; if that is empty, where no URL is given.

    *remedy* is the hint of its warnings and failures that have no hint themselves.
    """

    subject: str
    needs: str
    look: Callable[[Facts], AsyncIterator[Result]]
    remedy: str = ""


# In the order of the report.
CHECKS = (
    Check("configuration", "", configuration),
    Check("machine", "here", machine.limits),
    Check("providers", "server", providers.providers),
    Check(
        "groups",
        "here",
        providers.groups,
        "check `model` of the member, and the name by which its engine serves the model",
    ),
    Check("server", "url", server.reach),
    Check("server", "session", server.health),
    Check(
        "server",
        "healthy",
        server.ready,
        "`aioserver doctor` on its machine says what is wrong with its providers",
    ),
    Check(
        "server",
        "healthy",
        server.headers,
        "clients with long tokens or cookies fail (nginx: large_client_header_buffers)",
    ),
    Check("key", "healthy", server.key),
    Check("server", "accepted", server.state),
    Check(
        "WebSocket",
        "accepted",
        server.websocket,
        "the proxy must pass Upgrade and Connection on this path, by HTTP/1.1: docs/proxies.md",
    ),
    Check(
        "server",
        "accepted",
        server.body,
        "conversations with pictures fail there: allow more than "
        "chat.websocket.max_message_size (nginx: client_max_body_size)",
    ),
    Check(
        "streams",
        "accepted",
        arrivals.answers,
        "switch buffering and compression off for this path in the proxy (nginx: proxy_buffering "
        "off; gzip off; docs/proxies.md has the others)",
    ),
    Check(
        "idle WebSocket",
        "upgraded",
        arrivals.silence,
        "raise the proxy's timeout for reading (nginx: proxy_read_timeout) above 4 x "
        "ping_interval, or see chat.websocket.idle_timeout",
    ),
)


async def examine(facts: Facts, tell: Callable[[Result], None]) -> int:
    """Run the checks, and call *tell* with each result. Return the exit code."""
    failed = False
    async with facts.stack:
        for check in CHECKS:
            if getattr(facts, check.needs, None) if check.needs else not facts.url:
                async for result in check.look(facts):
                    failed |= result.level == "fail"
                    tell(result.shown(check.subject, check.remedy))
    return int(failed) if facts.usable else 2
