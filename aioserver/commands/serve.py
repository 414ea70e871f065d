"""`aioserver serve`: read the configuration, listen, run until told to stop."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

from aioserver.config import Configuration
from aioserver.errors import ConfigurationError
from aioserver.faces import context
from aioserver.server import app as application
from aioserver.server import listener, preflight, systemd
from aioserver.server.reload import Reload
from aioserver.server.runner import Runner
from aioserver.telemetry import logs

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from aiohttp import web

logger = logging.getLogger("aioserver.serve")

THREADS_TIMEOUT = 1.0  # seconds for threads to end, when all else has

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
        preflight.check_interpreter()
        inherited = systemd.inherited(os.environ)
        configuration = Configuration.load(config, environ=environ)
        configuration.check_usable(listener.hosts(inherited))
        few_files = preflight.raise_file_limit(configuration.settings)
    except ConfigurationError as exc:
        return _refuse(exc)
    except preflight.Unfit as unfit:
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
    faulthandler.enable(2)  # a crash, or the SIGABRT of systemd's watchdog, leaves stacks
    logs.set_up(configuration.settings.logging)
    if few_files is not None:
        logger.warning("%s", few_files)
    with asyncio.Runner(loop_factory=factory) as runner:
        code = runner.run(_run(configuration, environ, inherited))
        _leave_soon(code)
    return code


def _leave_soon(code: int) -> None:
    """End with *code* even if a thread does not: Python waits for a name that is being looked up."""
    timer = threading.Timer(THREADS_TIMEOUT, _leave, (code,))
    timer.daemon = True
    timer.start()


def _leave(code: int) -> None:
    logging.shutdown()
    os._exit(code)


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


async def _run(
    configuration: Configuration, environ: Mapping[str, str], inherited: Sequence[socket.socket]
) -> int:
    settings = configuration.settings
    logger.info("configuration: %s", configuration.source)
    for warning in configuration.warnings:
        logger.warning("%s", warning)
    for key in configuration.not_enforced():
        logger.warning("%s is valid, but not enforced yet", key)
    app = application.build(settings)
    runner = Runner(app, settings.chat.websocket)
    notifier = systemd.Notifier.take(os.environ, lambda: _status(app))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, stop)
    hosts = listener.hosts(inherited)
    reload = Reload(runner, configuration, environ, hosts=hosts, notifier=notifier)
    loop.add_signal_handler(signal.SIGHUP, reload.ask)
    try:
        await runner.setup()
    except ConfigurationError as exc:
        return _refuse(exc)
    reloading: asyncio.Task[NoReturn] | None = None
    try:
        if stop.is_set():
            return 0  # told to while it started
        try:
            listening = await listener.listen(
                runner,
                settings.chat.websocket,
                send_timeout=settings.chat.streams.send_timeout,
                inherited=inherited,
            )
        except OSError as exc:
            host, port = settings.chat.websocket.host, settings.chat.websocket.port
            print(preflight.cannot_listen(host, port, exc), file=sys.stderr)
            return 1
        print(f"aioserver is ready: {listening[0].url}", flush=True)
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        notifier.ready()
        reloading = loop.create_task(reload.run())  # not before: its end says READY=1, too
        await stop.wait()
        logger.info("stopping")
        notifier.stopping()
        reloading.cancel()
        await application.end(runner)
    finally:
        if reloading is not None:
            reloading.cancel()
        await runner.cleanup()
        notifier.close()
    logger.info("stopped")
    return 0


def _status(app: web.Application) -> str:
    """The line that `systemctl status` shows."""
    gate = app[context.ADMISSION].gate
    return f"{gate.inside} of {gate.limit} connections, {gate.waiting} waiting"


def _stop(stop: asyncio.Event) -> None:
    """A first signal asks to stop; a second one ends at once."""
    if stop.is_set():
        os._exit(1)
    stop.set()
