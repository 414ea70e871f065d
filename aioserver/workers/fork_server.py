"""Workers that are forked: they share the memory of everything that their parent has imported,
which is half of the memory of a worker.

A forked worker must be equal to a program that is executed now. If the code on the disk has
changed, or the parent has threads, which a fork would lack, the program is executed instead.
Descriptors are closed as exec closes them, and none of the parent's objects is finalized.

Private names of the standard library used here, guarded by `tests/workers/test_fork_server.py`:
`threading._shutdown`, `atexit._run_exitfuncs`. The interpreter ends with them, and so do the
forked processes of multiprocessing.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import os
import ssl
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import aioserver
from aioserver.server import systemd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Image:
    """The state that this process had loaded when this object was made: modules, libraries, all
    files of this package, and data that libraries read once, such as the authorities that aiohttp
    trusts.
    """

    def __init__(self) -> None:
        self._stamps = {path: stamp for path in _loaded() if (stamp := _stamp(path))}

    def differs(self) -> str | None:
        """Return why a process that is forked now would differ from an executed one; None if it
        would not.
        """
        try:
            threads = len([*Path("/proc/self/task").iterdir()])
        except OSError:
            return "there is no /proc"
        if threads > 1:
            return f"the parent has {threads} threads"
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                return f"{path} has changed"
        return None


def _loaded() -> Iterator[str]:
    for module in tuple(sys.modules.values()):
        yield getattr(module, "__file__", None) or ""
    # The interpreter and the libraries in C.
    with contextlib.suppress(OSError), Path("/proc/self/maps").open() as maps:
        yield from (line[line.find("/") : -1] for line in maps)
    for path in Path(aioserver.__file__).parent.rglob("*.*"):
        if path.suffix != ".pyc":
            yield str(path)
    openssl = ssl.get_default_verify_paths()
    yield os.getenv("OPENSSL_CONF") or f"{Path(openssl.openssl_cafile).parent}/openssl.cnf"
    yield from (openssl.cafile or "", openssl.capath or "", "/etc/localtime")


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - a thousand of them
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def pass_on(descriptors: Sequence[int]) -> range:
    """Give *descriptors* the numbers from `systemd.FIRST` on, in a process that was just forked,
    and return these numbers.
    """
    numbers = range(systemd.FIRST, systemd.FIRST + len(descriptors))
    # The copies lie above the target numbers, some of which are in use.
    copies = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, numbers.stop) for each in descriptors]
    for copy, number in zip(copies, numbers, strict=True):
        os.dup2(copy, number)
    return numbers


def close_others() -> None:
    """Close the descriptors that exec would close, in a process that was just forked."""
    # Objects of the parent own these numbers. None may ever be finalized, as that would close a
    # descriptor with the same number here.
    gc.disable()
    gc.freeze()
    for number in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        # OSError: the descriptor was that of the directory listing.
        with contextlib.suppress(OSError):
            if not os.get_inheritable(number):
                os.close(number)


def end_with(work: Callable[[], int]) -> NoReturn:
    """Do *work* in a process that was just forked, and end with the exit code that it returns. The
    interpreter ends as usual, except that objects of the parent stay as they are.
    """
    code = 1
    try:
        code = work()
        threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 - see above
        atexit._run_exitfuncs()  # noqa: SLF001
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    except KeyboardInterrupt:
        pass
    except BaseException:  # noqa: BLE001 - this is no longer the parent
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)
