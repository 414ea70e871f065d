"""A server that would start here: its configuration, this machine, and the road to its
providers.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

from yarl import URL

from aioserver.config import Configuration
from aioserver.config.faults import ConfigurationError
from aioserver.tools.doctor import certificate, machine, providers
from aioserver.tools.doctor.network import Peer, Steps

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from aioserver.config.settings import Cluster, Hook, Jwt, Settings
    from aioserver.tools.doctor.findings import Report

SUBJECT = "configuration"
REDIS_TLS = "rediss"
REDIS_PORT = 6379
# Seconds for each step to the Redis server, which is near.
REDIS_TIMEOUT = 5.0
# As for a fetch of the issuer's keys.
ISSUER_TIMEOUT = 5.0


def examine(report: Report, config: Path | None, *, ask: bool, only: str | None = None) -> int:
    """Examine what *config* (None: the file that `serve` would choose) asks for. Returns the exit
    code.

    *ask*: whether a question may cost money. *only*: the provider that alone is examined. A
    configuration that is valid, but cannot be served,
    is examined to the end all the same.
    """
    machine.examine_interpreter(report)
    usable = True
    try:
        configuration = Configuration.load(config)
        report.ok(SUBJECT, f"{configuration.source} is valid")
        for warning in configuration.warnings:
            report.warn(SUBJECT, warning)
        try:
            configuration.check_usable()
        except ConfigurationError as error:
            usable = False
            _tell_faults(report, error)
        known = configuration.settings.llm.providers
        if only is not None and only not in known:
            report.fail(SUBJECT, f"no provider is named {only}", f"one of {', '.join(known)}")
            return 2
        asyncio.run(_examine(report, configuration.settings, ask=ask, only=only))
    except ConfigurationError as error:
        usable = False
        _tell_faults(report, error)
    return int(report.failed) if usable else 2


def _tell_faults(report: Report, error: ConfigurationError) -> None:
    for fault in error.faults:
        report.fail(SUBJECT, fault)


async def _examine(report: Report, settings: Settings, *, ask: bool, only: str | None) -> None:
    if only is None:
        await machine.examine(report, settings)
        if settings.chat.websocket.tls is not None:
            certificate.examine(report, settings.chat.websocket.tls)
        await examine_cluster(report, settings.cluster)
        await examine_hooks(report, settings.hooks)
        if settings.auth is not None and settings.auth.jwt is not None:
            await examine_issuer(report, settings.auth.jwt)
    await providers.examine(report, settings, ask=ask, only=only)


async def examine_issuer(report: Report, jwt: Jwt) -> None:
    """Examine the way to the keys of the issuer, without which no token can be checked."""
    if jwt.jwks_url is None:
        report.skip("tokens", "the issuer's keys are in a file, which the start reads")
        return
    url = URL(jwt.jwks_url)
    assert url.host is not None
    assert url.port is not None
    context = ssl.create_default_context() if url.scheme == "https" else None
    await Steps(report, "tokens", Peer(url.host, url.port, context, ISSUER_TIMEOUT)).take()


async def examine_cluster(report: Report, cluster: Cluster) -> None:
    """Examine the way to the Redis or Valkey server, without which shares are fixed."""
    if cluster.redis_url is None:
        return
    url = URL(cluster.redis_url)
    if url.host is None:
        report.skip("cluster", "a UNIX socket is not examined")
        return
    context = ssl.create_default_context() if url.scheme == REDIS_TLS else None
    peer = Peer(url.host, url.port or REDIS_PORT, context, REDIS_TIMEOUT)
    await Steps(report, "cluster", peer, report.warn).take()


async def examine_hooks(report: Report, hooks: Sequence[Hook]) -> None:
    """Examine the way to each hook: a closed one that is away lets nothing pass."""
    for hook in hooks:
        if hook.url is not None:
            url = URL(hook.url)
            context = ssl.create_default_context() if url.scheme == "https" else None
            peer = Peer(url.host or "", url.port or 0, context, hook.timeout)
            problem = report.fail if hook.closed else report.warn
            await Steps(report, f"hook {hook.name}", peer, problem).take()
