"""How one load on one server is measured: both ends of it, what they use, and what went wrong."""

import contextlib
import dataclasses
import http.client
import json
import resource
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any, Self

from certificate import HARNESS, Encrypted
from loads import Load
from peers import Peer
from process import Watch, free_port, running, usage

HERE = Path(__file__).resolve().parent
CHAT = {"model": "mock-model", "messages": [{"role": "user", "content": "Hello, how are you?"}]}
# loadgen replaces %ID%: aioserver answers a request_id that it knows from its log, not anew.
FRAME = '{"action":"chat","request_id":"%ID%","payload":{"text":"Hello","streaming":true}}'
CREATE = '{"type":"response.create","model":"mock-model","input":"Hello","store":false}'
# What loadgen takes for an end of a response, where it does not know it by itself.
RESPONSE_ENDS = (
    *("--marker", '"type":"response.completed"'),
    *("--fail-marker", '"type":"response.failed"', "--fail-marker", '"type":"error"'),
)
# The string behind which the text of an event stands.
TEXTS = {"sse": "content", "ws": "data", "rws": "delta"}
# Where one of these is not 0 the numbers say nothing.
ERRORS = ("truncated", "seq_bad", "unfinished", "io_errors", "connect_errors", "timeouts")
RECOVERY = 90.0  # seconds at most until a server asks its provider again
SPARE_FILES = 500  # of a process, beside the sockets that are counted

Result = dict[str, Any]  # a step's numbers; "faults": list[str] says why they do not count


class StepFailed(Exception):
    """A step has no numbers at all; the message says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """A peer that is up."""

    peer: Peer
    port: int
    pid: int | None  # None: the mock provider itself, which is `direct`
    took: float = 0.0  # seconds from the start to the first good answer
    memory: float = 0.0  # MB resident after it


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """What is the same for every step: ports, cores and a folder for configurations and logs."""

    folder: Path
    loop: str
    provider: int  # port of the mock provider
    server_core: int
    load_core: int
    encrypted: Encrypted  # the same provider over TLS

    @classmethod
    def create(cls, folder: Path, loop: str, server_core: int, load_core: int) -> Self:
        """Choose the ports, and make the provider's certificate."""
        return cls(folder, loop, free_port(), server_core, load_core, Encrypted.made_in(folder))

    @contextlib.contextmanager
    def mock(self, load: Load) -> Iterator[int]:
        """Run the mock provider as *load* wants it; yields its pid once it answers."""
        command = [HARNESS / "mockllm", "--port", self.provider, *load.mock]
        command += ["--chunks", load.chunks, "--interval-ms", load.interval_ms]
        if self.encrypted.supported():
            command += ["--tls-port", self.encrypted.port]
            command += ["--tls-cert", self.encrypted.certificate]
        with (
            (self.folder / "mockllm.log").open("ab") as log,
            running(text(command), core=self.load_core, folder=str(HERE), output=log) as process,
        ):
            deadline = time.monotonic() + 5
            while ask(self.provider, "GET", "/stats") is None:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise StepFailed(f"mockllm does not start on port {self.provider}")
                time.sleep(0.01)
            time.sleep(0.2)  # for the server to see that the connections to the last one are dead
            yield process.pid

    def seen(self) -> Result:
        """What the mock provider has counted since its start."""
        counted: Result = json.loads(ask(self.provider, "GET", "/stats") or "{}")
        if not counted:
            raise StepFailed("the mock provider does not answer")
        return counted

    @contextlib.contextmanager
    def server(
        self,
        peer: Peer,
        *,
        config: str | None = None,
        port: int | None = None,
        tls: bool = False,
    ) -> Iterator[Server]:
        """Start *peer*; yields it after its first good answer. The mock provider must be up.

        With *port* another server is just leaving that port: the start is repeated while that one
        still has it. With *tls* it reaches the provider over TLS.
        """
        taken, port = port is not None, port or free_port()
        stem = self.folder / f"{peer.name}-{port}{'-again' if taken else ''}"
        file, path = stem.with_suffix(".yaml"), stem.with_suffix(".log")
        names = {"python": sys.executable, "here": HERE, "config": file, "loop": self.loop}
        names |= {"port": port, "folder": self.folder} | self.provider_names(tls=tls)
        file.write_text(Template(config or peer.config).substitute(names))
        command = [Template(part).substitute(names) for part in peer.command]
        began = time.monotonic()
        while True:
            with (
                path.open("wb") as log,
                running(
                    command, core=self.server_core, folder=str(HERE.parent), output=log
                ) as process,
            ):
                while process.poll() is None and time.monotonic() - began < peer.patience:
                    if good_answer(peer, port):
                        took = time.monotonic() - began
                        time.sleep(0.3)
                        yield Server(peer, port, process.pid, took, usage(process.pid)[1])
                        return
                    time.sleep(0.005)
            if not taken or time.monotonic() - began > peer.patience:
                tail = " ".join(path.read_text(errors="replace")[-600:].split())
                raise StepFailed(f"{peer.name} does not start: {tail}")

    def provider_names(self, *, tls: bool) -> dict[str, object]:
        """What a peer's configuration has to say of the mock provider."""
        scheme, port, haproxy_tls = "http", self.provider, ""
        authority = self.encrypted.authority
        if tls:
            scheme, port = "https", self.encrypted.port
            haproxy_tls = f"ssl verify required ca-file {authority}"
        return {
            "scheme": scheme,
            "provider": port,
            "origin": f"{scheme}://127.0.0.1:{port}",
            "authority": authority,
            "haproxy_tls": haproxy_tls,
        }

    def recover(self, server: Server) -> None:
        """Wait until *server* answers again: its provider has just gone with all its streams.

        A server may leave a provider alone for some seconds that broke off so many answers.
        """
        time.sleep(1)
        deadline = time.monotonic() + RECOVERY
        with self.mock(Load(mode="http", connections=1)):
            while not good_answer(server.peer, server.port):
                if time.monotonic() > deadline:
                    raise StepFailed(f"{server.peer.name} does not answer again")
                time.sleep(0.25)

    def measure(
        self,
        server: Server,
        load: Load,
        *,
        during: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> Result:
        """Put *load* on *server*, and watch what it uses from the warm-up's end to the last start.

        Inside *during* the load runs. There are no "faults" in the result yet.
        """
        with self.mock(load) as mock:
            return self.loaded(server, load, mock, during=during)

    def loaded(
        self,
        server: Server,
        load: Load,
        mock: int,
        *,
        during: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> Result:
        """The same, while the mock provider of pid *mock* runs."""
        pids = () if server.pid is None else (server.pid,)
        cores = (self.server_core, self.load_core)
        output = b""
        with (
            running(
                self.loadgen(server, load),
                core=self.load_core,
                folder=str(HERE),
                output=subprocess.PIPE,
            ) as loadgen,
            during(),
        ):
            time.sleep(load.ramp + load.warmup)
            watch = Watch((mock, loadgen.pid, *pids), cores)
            time.sleep(load.duration)
            (_, _, *cpu), foreign = watch.read()
            memory = sum(usage(pid)[1] for pid in pids)
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, _ = loadgen.communicate(timeout=load.drain + 10)
        if not output:
            raise StepFailed("loadgen failed, or did not end in time")
        result: Result = json.loads(output)
        counted = self.seen()
        events = result.get("chunks_per_second", result["per_second"]) * result["seconds"]
        result["cpu_us"] = sum(cpu) * 1e6 / events if events else 0.0
        result["cpu_share"] = sum(cpu) / load.duration
        result["rss_mb"], result["foreign_share"] = memory, foreign
        result["provider_late_p99_ms"] = counted["late_ms"]["p99"]
        result["peak_active"] = counted["peak_active"]
        return result

    @contextlib.contextmanager
    def beside(self, server: Server, load: Load, seen: Result, *, after: float) -> Iterator[None]:
        """Put a second *load* on *server*, *after* so many seconds.

        Its numbers are in *seen* at the end.

        Raises `StepFailed` at the end, if it has no numbers in its own time.
        """
        time.sleep(after)
        with running(
            self.loadgen(server, load, "beside-"),
            core=self.load_core,
            folder=str(HERE),
            output=subprocess.PIPE,
        ) as loadgen:
            yield
            output = b""
            seconds = load.ramp + load.warmup + load.duration + load.drain + 10
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, _ = loadgen.communicate(timeout=seconds)
        if not output:
            raise StepFailed("the second loadgen failed, or did not end in time")
        seen.update(json.loads(output))

    def loadgen(self, server: Server, load: Load, prefix: str = "") -> list[str]:
        """The command that puts *load* on *server*."""
        peer, body = server.peer, self.folder / f"{prefix}{load.mode}.json"
        path = peer.path
        if load.mode == "ws":
            assert peer.websocket is not None
            path = peer.websocket
            body.write_text(FRAME)
        elif load.mode == "rws":
            path = peer.responses
            body.write_text(CREATE)
        else:
            body.write_text(json.dumps({**(load.body or CHAT), "stream": load.mode == "sse"}))
        mode = "ws" if load.mode == "rws" else load.mode
        command = [HARNESS / "loadgen", "--json", "--mode", mode, "--port", server.port]
        command += ["--path", path, "--body-file", body, "--connections", load.connections]
        command += ["--ramp", load.ramp, "--warmup", load.warmup, "--duration", load.duration]
        command += ["--drain", load.drain, "--timeout", max(load.drain, 10.0)]
        if load.mode != "http":
            command += ["--expect", load.chunks]
            command += ["--seq-key", TEXTS[load.mode]]
        if load.mode == "rws":
            command += RESPONSE_ENDS
        command += load.options
        if peer.tls:
            command += ["--tls"]
        for header in peer.headers:
            command += ["--header", header]
        for key in peer.keys:
            command += ["--key", key]
        return text(command)

    @contextlib.contextmanager
    def idle(
        self, server: Server, count: int, *, ramp: float, watching: bool = False
    ) -> Iterator[None]:
        """Hold *count* idle WebSockets, opened over *ramp* seconds; pings are answered.

        Or as many who are *watching*: they read the event stream of the server's state.

        Raises `StepFailed` at the end, where not all of them were there all the time.
        """
        path = server.peer.events if watching else server.peer.websocket
        command = [HARNESS / "loadgen", "--json", "--mode", "idle"]
        command += ["--idle-proto", "http" if watching else "ws"]
        command += ["--port", server.port, "--path", path]
        command += ["--connections", count, "--ramp", ramp, "--duration", 120]
        for key in server.peer.keys:
            command += ["--key", key]
        output = b""
        with running(
            text(command), core=self.load_core, folder=str(HERE), output=subprocess.PIPE
        ) as loadgen:
            time.sleep(ramp + 2)
            yield
            loadgen.terminate()  # it ends with its numbers
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, _ = loadgen.communicate(timeout=5)
        held: Result = json.loads(output or b"{}")
        if held.get("held") != count or held["closed_early"]:
            raise StepFailed(
                f"of {count} idle connections {held.get('held')} were held, "
                f"{held.get('closed_early')} closed by the server"
            )


def text(command: Sequence[object]) -> list[str]:
    return [str(part) for part in command]


def most_sockets(wanted: int) -> int:
    """*wanted*, or as many as a process may have here, in whole hundreds."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return min(wanted, (limit - SPARE_FILES) // 100 * 100)


def ask(
    port: int,
    method: str,
    path: str,
    body: str = "",
    headers: Sequence[str] = (),
    *,
    tls: bool = False,
) -> bytes | None:
    """The body of a 200, else None. With *tls* the certificate is not looked at."""
    fields = {"Content-Type": "application/json"}
    fields |= dict(header.split(": ", 1) for header in headers)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=context)
    try:
        connection.request(method, path, body or None, fields)
        response = connection.getresponse()
        return response.read() if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def good_answer(peer: Peer, port: int) -> bool:
    """One request that is not streamed: its answer must hold the provider's text."""
    headers = [*peer.headers, *(f"Authorization: Bearer {key}" for key in peer.keys[:1])]
    return b"00010002" in (
        ask(port, "POST", peer.path, json.dumps(CHAT), headers, tls=peer.tls) or b""
    )


def faults(result: Result, *, ignored: Sequence[str] = ()) -> list[str]:
    """Why the numbers of *result* do not count, but for the errors in *ignored*."""
    problems = [
        f"{name}={result[name]}" for name in ERRORS if result.get(name) and name not in ignored
    ]
    problems += [
        f"status {status}: {count}"
        for status, count in result["status"].items()
        if status not in {"200", "101"}
    ]
    if not result["ok"] and "ok" not in ignored:
        problems.append("nothing was measured")
    return problems
