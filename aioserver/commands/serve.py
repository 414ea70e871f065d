"""`aioserver serve`: read the configuration, listen, run until told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

from aioserver import app as application
from aioserver import listener, logs, startup
from aioserver.config import Configuration
from aioserver.errors import ConfigurationError
from aioserver.reload import Reload

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

logger = logging.getLogger("aioserver.serve")

# What lives long is frozen. The logs are many young objects and no cycles: short passes, and few over
# the older ones, halve the p99 gap of WebSocket streams against (50_000, 20, 20).
GC_THRESHOLDS = (10_000, 50, 50)


def serve(config: Path | None, *, host: str | None, port: int | None, loop: str) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code: 0, 2 bad configuration, 1 else."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it is listened to: by default it kills
    environ = dict(os.environ)
    if host is not None:
        environ["AIOSERVER__CHAT__WEBSOCKET__HOST"] = host
    if port is not None:
        environ["AIOSERVER__CHAT__WEBSOCKET__PORT"] = str(port)
    try:
        startup.check_interpreter()
        configuration = Configuration.load(config, environ=environ)
        configuration.check_usable()
        few_files = startup.raise_file_limit(configuration.settings)
    except ConfigurationError as exc:
        return _refuse(exc)
    except startup.Unfit as unfit:
        print(unfit, file=sys.stderr)
        return unfit.code
    try:
        factory = loop_factory(loop)
    except ModuleNotFoundError:
        print(
            "--loop uvloop: uvloop is not installed (pip install aioserver[speedups])",
            file=sys.stderr,
        )
        return 2
    logs.set_up(configuration.settings.logging)
    if few_files is not None:
        logger.warning("%s", few_files)
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_run(configuration, environ))


def _refuse(error: ConfigurationError) -> int:
    for fault in error.faults:
        print(fault, file=sys.stderr)
    return 2


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """The maker of the event loop: `uvloop`, `asyncio`, or `auto`: uvloop where it is installed.

    Raises:
        ModuleNotFoundError: uvloop was asked for and is not there.
    """
    if name != "asyncio":
        try:
            import uvloop  # noqa: PLC0415 - optional

            return uvloop.new_event_loop
        except ModuleNotFoundError:
            if name == "uvloop":
                raise
    return asyncio.new_event_loop


async def _run(configuration: Configuration, environ: Mapping[str, str]) -> int:
    settings = configuration.settings
    logger.info("configuration: %s", configuration.source)
    for warning in configuration.warnings:
        logger.warning("%s", warning)
    for key in configuration.not_enforced():
        logger.warning("%s is valid, but not enforced yet", key)
    app = application.build(settings)
    runner = listener.Runner(app, settings.chat.websocket)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, stop)
    reload = Reload(runner, configuration, environ)
    loop.add_signal_handler(signal.SIGHUP, reload.ask)
    try:
        await runner.setup()
    except ConfigurationError as exc:
        return _refuse(exc)
    reloading = loop.create_task(reload.run())
    try:
        if stop.is_set():
            return 0  # told to while it started
        try:
            listening = await listener.listen(
                runner,
                settings.chat.websocket,
                send_timeout=settings.chat.streams.send_timeout,
            )
        except OSError as exc:
            host, port = settings.chat.websocket.host, settings.chat.websocket.port
            print(startup.cannot_listen(host, port, exc), file=sys.stderr)
            return 1
        print(f"aioserver is ready: {listening[0].url}", flush=True)
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        await stop.wait()
        logger.info("stopping")
        reloading.cancel()
        await application.end(runner)
    finally:
        reloading.cancel()
        await runner.cleanup()
    logger.info("stopped")
    return 0


def _stop(stop: asyncio.Event) -> None:
    """A first signal asks to stop; a second one ends at once."""
    if stop.is_set():
        os._exit(1)
    stop.set()
