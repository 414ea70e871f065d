"""`aioserver serve`: read the configuration, listen, run until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

import click

from aioserver.commands import options, output
from aioserver.config import Configuration
from aioserver.errors import ConfigurationError
from aioserver.server import listener, preflight, systemd
from aioserver.server.app import open_server
from aioserver.server.reload import Reload
from aioserver.server.runner import Runner
from aioserver.telemetry import logs

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from aioserver.server.app import Server

logger = logging.getLogger("aioserver.serve")

# Seconds for threads to end, once everything else has.
THREADS_TIMEOUT = 1.0

# Objects that live as long as the server are frozen. The logs of the streams are many young
# objects without cycles: short passes over these, and few over older objects, halve the p99 gap
# of WebSocket streams, compared with (50_000, 20, 20).
GC_THRESHOLDS = (10_000, 50, 50)


@click.command("serve")
@options.config
@click.option("--host", help="Address to listen on, instead of the configured one.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Port to listen on, instead of the configured one; 0: any free one.",
)
@click.option(
    "--loop",
    type=click.Choice(["auto", "uvloop", "asyncio"]),
    default="auto",
    show_default=True,
    help="Event loop; auto: uvloop if it is installed.",
)
@options.version
def command(config: Path | None, *, host: str | None, port: int | None, loop: str) -> int:
    """Serve chat clients; the default.

    SIGTERM and Ctrl-C stop the server: answers that are running have the seconds of
    chat.websocket.shutdown_timeout to finish; a second signal ends the process at once. SIGHUP
    reloads the configuration.
    """
    return serve(config, host=host, port=port, loop=loop)


def serve(config: Path | None, *, host: str | None, port: int | None, loop: str) -> int:
    """Serve until SIGTERM or SIGINT.

    *host* and *port* replace the configured ones. Returns the exit code: 0, 2 for a configuration
    or an interpreter that cannot serve, 1 for anything else.
    """
    output.open_closed()
    # By default SIGHUP kills; it is ignored until there is a server that can reload.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
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
            "--loop uvloop: uvloop is not installed; run pip install '.[speedups]' in the clone of"
            " aioserver",
            file=sys.stderr,
        )
        return 2
    # After a crash, or the SIGABRT of systemd's watchdog, the stacks of all threads are on stderr.
    faulthandler.enable(2)
    logs.set_up(configuration.settings.logging)
    if few_files is not None:
        logger.warning("%s", few_files)
    with asyncio.Runner(loop_factory=factory) as runner:
        code = runner.run(_run(configuration, environ, inherited))
        _leave_soon(code)
    logging.shutdown()
    output.give_up()
    return code


def _leave_soon(code: int) -> None:
    """End with *code* after THREADS_TIMEOUT even if a thread has not ended.

    Python waits for its threads, and a look-up of a host name in one of them may take long.
    """
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
    """Return the factory of the event loop *name*; `auto` is uvloop where that is installed.

    Raises:
        ModuleNotFoundError: *name* is `uvloop`, which is not installed.
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
    logger.info("configuration: %s", configuration.source)
    for warning in configuration.warnings:
        logger.warning("%s", warning)
    for setting in configuration.not_enforced():
        logger.warning("not in effect yet: %s", setting)
    stop, hangup = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, stop)
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    try:
        async with open_server(configuration.settings) as server:
            runner = Runner(server)
            notifier = systemd.Notifier.take(os.environ, lambda: _status(server))
            hosts = listener.hosts(inherited)
            reload = Reload(server, runner, configuration, environ, hosts=hosts, notifier=notifier)
            loop.add_signal_handler(signal.SIGHUP, reload.ask)
            # A SIGHUP may have come while the server was made.
            if hangup.is_set():
                reload.ask()
            try:
                code = await _serve(server, runner, reload, notifier, inherited, stop)
            finally:
                await runner.cleanup()
                notifier.close()
    except ConfigurationError as exc:
        return _refuse(exc)
    if code == 0:
        logger.info("stopped")
    return code


async def _serve(
    server: Server,
    runner: Runner,
    reload: Reload,
    notifier: systemd.Notifier,
    inherited: Sequence[socket.socket],
    stop: asyncio.Event,
) -> int:
    """Listen, and serve until *stop* is set. Return the exit code."""
    await runner.setup()
    # A signal to stop may have come while the server was made.
    if stop.is_set():
        return 0
    try:
        listening = await runner.listen(inherited)
    except OSError as exc:
        settings = server.context.settings.chat.websocket
        print(preflight.cannot_listen(settings.host, settings.port, exc), file=sys.stderr)
        return 1
    output.announce(f"aioserver is ready: {listening[0].url}")
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    notifier.ready()
    # Not before `ready`: the end of a reload says READY=1, too.
    reloading = asyncio.create_task(reload.run())
    try:
        await stop.wait()
        logger.info("stopping")
        notifier.stopping()
        reloading.cancel()
        await runner.end()
    finally:
        reloading.cancel()
    return 0


def _status(server: Server) -> str:
    """Return the line that `systemctl status` shows."""
    gate = server.context.admission.gate
    return f"{gate.inside} of {gate.limit} connections, {gate.waiting} waiting"


def _stop(stop: asyncio.Event) -> None:
    """Ask the server to stop; a second signal ends the process at once."""
    if stop.is_set():
        os._exit(1)
    stop.set()
