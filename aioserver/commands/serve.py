"""`aioserver serve`: read the configuration, listen, run until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import json
import logging
import os
import signal
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from aioserver.commands import output
from aioserver.config import Configuration
from aioserver.config.faults import ConfigurationError
from aioserver.server import listener, preflight, systemd
from aioserver.server.app import open_server
from aioserver.server.reload import Reload, log_remarks
from aioserver.server.runner import Runner
from aioserver.server.stop import Stop
from aioserver.server.wings import WINGS, faults
from aioserver.telemetry import logs

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from aioserver.config.settings import Settings
    from aioserver.server.app import Server
    from aioserver.workers.balance import Balance
    from aioserver.workers.loads import Loads
    from aioserver.workers.worker import Worker

logger = logging.getLogger("aioserver.serve")

# Seconds for threads to end, after everything else has ended.
THREADS_TIMEOUT = 1.0
# The number of new objects, beyond those that were freed, after which the garbage collector scans
# the young generation, and the number of such passes after which it scans older ones. A log is
# many new objects: with 10,000 a pass takes twice as long.
YOUNG, OLD = 2_000, 100


def serve(
    config: Path | None, *, host: str | None, port: int | None, loop: str, replaceable: bool
) -> int:
    """Serve until SIGTERM or SIGINT.

    *host* and *port* replace the configured ones. *replaceable*: a single process has a parent,
    too, which can replace it. Returns the exit code: 0, 2 for a configuration or an interpreter
    that cannot serve, 1 for anything else.
    """
    output.open_closed()
    # By default SIGHUP kills; it is ignored until there is a server that can reload.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    environ = dict(os.environ)
    if host is not None:
        # In quotes, since brackets have another meaning in YAML.
        environ["AIOSERVER__CHAT__WEBSOCKET__HOST"] = json.dumps(host)
    if port is not None:
        environ["AIOSERVER__CHAT__WEBSOCKET__PORT"] = str(port)
    try:
        preflight.check_interpreter()
        factory = loop_factory(loop)
        inherited = systemd.inherited(os.environ)
        worker = _worker()
        if worker is None:
            configuration = Configuration.load(config, environ=environ)
        else:
            content = worker.content()
            configuration = Configuration.load(
                config, environ=environ, again=True, content=content
            )
        configuration.check_usable(listener.hosts(inherited))
        settings = configuration.settings
        if worker is not None:
            settings = worker.settings(settings)
        elif replaceable or settings.chat.websocket.concurrency.uvicorn.workers > 1:
            again = partial(
                serve, config, host=host, port=port, loop=loop, replaceable=replaceable
            )
            return _serve_with_workers(configuration, environ, inherited, again)
        few_files = preflight.raise_file_limit(settings)
        preflight.make_room_for_files(settings)
    except ConfigurationError as exc:
        return _refuse(exc)
    except preflight.Unfit as unfit:
        print(unfit, file=sys.stderr)
        return unfit.code
    preflight.keep_freed_memory()
    # After a crash, or the SIGABRT of systemd's watchdog, the stacks of all threads are on stderr.
    faulthandler.enable(2)
    logs.set_up(settings.logging, None if worker is None else worker.slot)
    if few_files is not None:
        logger.warning("%s", few_files)
    with asyncio.Runner(loop_factory=factory) as runner:
        code = runner.run(_run(configuration, environ, inherited, worker))
        _leave_soon(code)
    logging.shutdown()
    output.give_up()
    return code


def _worker() -> Worker | None:
    """Return the worker that the parent describes; None if this process has no such parent.

    Raises:
        Unfit: the parent does not give what a worker needs.
    """
    if "AIOSERVER_WORKER" not in os.environ:
        return None
    from aioserver.workers.worker import Worker  # noqa: PLC0415 - one process needs none of it

    worker = Worker.take(os.environ)
    if worker is None:
        # As a separate process it would serve the same sockets, with limits that others already
        # use.
        raise preflight.Unfit(
            "AIOSERVER_WORKER is set, but other variables of a worker are missing: "
            "the parent process is of another version; restart it",
            1,
        )
    return worker


def _serve_with_workers(
    configuration: Configuration,
    environ: Mapping[str, str],
    inherited: Sequence[socket.socket],
    again: Callable[[], int],
) -> int:
    """Serve with workers below a parent: see `aioserver.workers.parent`. Return the exit code.

    *again* serves as one of them.

    Raises:
        ConfigurationError: a worker could not read what this process has read.
        Unfit: this system lacks what a parent needs.
    """
    preflight.check_workers()
    # A single process needs none of it.
    from aioserver.workers.fork_server import end_with  # noqa: PLC0415
    from aioserver.workers.parent import Parent  # noqa: PLC0415

    # If it is ignored, the kernel keeps no exit codes.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # The check runs in a process of its own: it imports the hooks, whose files and threads must
    # not be inherited.
    if (pid := os.fork()) == 0:
        end_with(partial(_check_wings, configuration.settings))
    if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        return code

    # As each worker does.
    Configuration.load(
        configuration.source, environ=environ, again=True, content=configuration.content
    )
    faulthandler.enable(2)
    logs.set_up_without_thread(configuration.settings.logging)
    logger.info("configuration: %s", configuration.source)
    log_remarks(configuration)
    parent = Parent(configuration, environ, inherited, again, sys.orig_argv, output.announce)
    try:
        parent.listen()
    except OSError as exc:
        websocket = configuration.settings.chat.websocket
        print(preflight.cannot_listen(websocket.host, websocket.port, exc), file=sys.stderr)
        return 1
    for wing in WINGS:
        wing.before_workers(configuration.settings)
    _collect_garbage()
    code = parent.run()
    output.give_up()
    return code


def _collect_garbage() -> None:
    """Begin to collect garbage, except the objects that exist now, which live as long as the
    server.

    A full collection before this would free only 0.4 MB, and take 20 ms.
    """
    gc.freeze()
    gc.set_threshold(YOUNG, OLD)
    gc.enable()


def _check_wings(settings: Settings) -> NoReturn:
    """Print the settings that the wings cannot serve with, and end without waiting for the wings'
    threads.
    """
    unfit = list(faults(settings, (wing() for wing in WINGS)))
    os._exit(_refuse(ConfigurationError(unfit)) if unfit else 0)


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
        Unfit: *name* is `uvloop`, which is not installed.
    """
    if name != "asyncio":
        try:
            import uvloop  # noqa: PLC0415 - optional

            return uvloop.new_event_loop
        except ModuleNotFoundError:
            if name == "uvloop":
                raise preflight.Unfit(
                    "--loop uvloop: uvloop is not installed; run pip install '.[speedups]' in the"
                    " clone of aioserver",
                    2,
                ) from None
    return asyncio.new_event_loop


async def _run(
    configuration: Configuration,
    environ: Mapping[str, str],
    inherited: Sequence[socket.socket],
    worker: Worker | None,
) -> int:
    if worker is None:
        logger.info("configuration: %s", configuration.source)
        log_remarks(configuration)
    stop, hangup = Stop(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.by_signal)
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    # The default action kills the process.
    loop.add_signal_handler(signal.SIGUSR2, _ignore)
    settings, loads, balance = configuration.settings, None, None
    if worker is not None:
        settings, loads = worker.settings(settings), worker.take_loads()
        loop.add_signal_handler(signal.SIGUSR1, stop.by_parent)
        lifeline = worker.descriptors["lifeline"]
        loop.add_reader(lifeline, stop.by_lifeline, lifeline)
    try:
        async with open_server(
            settings,
            session_secret=None if worker is None else worker.session_secret(),
            share_door=None if worker is None or loads is None else worker.door_sharer(loads),
            scope=None if worker is None else worker.scope,
            private_server=None if worker is None else worker.server_url,
            worker=None if worker is None else worker.slot,
        ) as server:
            if worker is not None and loads is not None:
                balance = await _balance(worker, loads, server)
                worker.count_deaths(server)
            runner = Runner(server, balance)
            if worker is None:
                notifier = systemd.Notifier.take(os.environ, lambda: _status(server))
            else:
                notifier = worker.notifier(lambda: _status(server))
            hosts = listener.hosts(inherited)
            reload = Reload(
                server,
                runner,
                configuration,
                environ,
                hosts=hosts,
                notifier=notifier,
                share_out=None if worker is None else worker.settings,
            )
            loop.add_signal_handler(signal.SIGHUP, reload.ask)
            # A SIGHUP may have come while the server was made.
            if hangup.is_set():
                reload.ask()
            try:
                code = await _serve(server, runner, reload, notifier, inherited, stop, loads)
            finally:
                await runner.cleanup()
                notifier.close()
    except ConfigurationError as exc:
        return _refuse(exc)
    if code == 0:
        logger.info("stopped")
    return code


async def _balance(worker: Worker, loads: Loads, server: Server) -> Balance:
    """Return the balance of *worker*, once the leases of killed workers are free."""
    if (sharing := server.sharing) is None:
        return worker.balance(loads)

    def replaced(kept: int, cut: int) -> None:
        text = f"a former process has ended: of its answers {kept} were completed, {cut} were cut"
        server.context.monitor.incident("replaced", text, severity="info")

    if any(kept := loads.kept(loads.slot)):
        # This worker reports it: perhaps no other worker was serving at that time.
        replaced(*kept)
    loads.tell_instance(sharing.token)
    balance = worker.balance(loads, sharing.ended, replaced)
    await sharing.settled()
    return balance


async def _serve(
    server: Server,
    runner: Runner,
    reload: Reload,
    notifier: systemd.Notifier,
    inherited: Sequence[socket.socket],
    stop: Stop,
    loads: Loads | None,
) -> int:
    """Listen, and serve until *stop* is asked for. Return the exit code.

    *loads* is the page of a worker; None if the process is no worker: then stdout gets the line
    that the server is ready.
    """
    await runner.setup()
    # A signal to stop may have come while the server was made.
    if stop.asked.is_set():
        return 0
    try:
        listening = await runner.listen(inherited)
    except OSError as exc:
        settings = server.context.settings.chat.websocket
        print(preflight.cannot_listen(settings.host, settings.port, exc), file=sys.stderr)
        return 1
    _collect_garbage()
    if loads is None:
        output.announce(f"aioserver is ready: {listening[0].url}")
    notifier.ready()
    # Not before `ready`: the end of a reload sends READY=1, too.
    reloading = asyncio.create_task(reload.run())
    try:
        await stop.asked.wait()
        outcomes, replaced = server.context.metrics.outcomes.values(), not stop.now.is_set()
        before = sum(counter.value for counter in outcomes)
        if replaced:
            logger.info(
                "replaced: this process accepts no more connections, and keeps its answers"
            )
            await runner.retire(stop.now)
            ended = sum(counter.value for counter in outcomes) - before
            running = server.context.gateway.running
            logger.info("replaced: %d answers have ended since, %d still run", ended, running)
        logger.info("stopping")
        if stop.orphaned:
            # No receiver is left.
            notifier.close()
        else:
            notifier.stopping()
        reloading.cancel()
        await runner.end(at_once=stop.orphaned)
        if replaced and loads is not None:
            ended = sum(counter.value for counter in outcomes) - before
            loads.tell_kept(int(ended) - runner.cut, runner.cut)
    finally:
        reloading.cancel()
    return 0


def _ignore() -> None:
    logger.warning(
        "SIGUSR2 is ignored: it is for the parent of workers, which serve --replaceable makes"
    )


def _status(server: Server) -> str:
    """Return the line that `systemctl status` shows."""
    gate = server.context.admission.gate
    text = f"{gate.inside} of {gate.limit} connections, {gate.waiting} waiting"
    for former in server.context.monitor.snapshot["former"]:
        text += f"; {former['answers']} answers, longest {former['longest']:.0f} s"
    return text
