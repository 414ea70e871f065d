"""Configuration: reads a YAML file and the environment into settings, and reports every fault at
once.

    configuration = Configuration.load("config.yaml")
    configuration.settings.chat.websocket.port

A fault is one line, `file:line:column path: message (hint)`. The place is that of the key; that of
the section, if the key is missing; or the variable, if a variable sets the value. The file names
secrets (`api_key_env`, `api_key_file`), and `credentials.py` reads them; no message and no output
shows a secret.

This file is one concept: how a file becomes settings, and which faults and warnings are reported
on the way.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from aioserver.config import keys_file, schema, views
from aioserver.config.credentials import Credentials
from aioserver.config.document import PREFIX, Document, Fault, KeyPath, decoded
from aioserver.config.faults import ConfigurationError
from aioserver.config.inheritance import Inheritance
from aioserver.config.llm import AUTO
from aioserver.config.schema import FAULTY, Faults, WrongShape
from aioserver.config.settings import (
    CALENDAR,
    SETTINGS,
    Auth,
    ClientKey,
    Limits,
    Provider,
    Settings,
)
from aioserver.config.shipped import SHIPPED, fill
from aioserver.files.reading import UnreadableFile, read_file
from aioserver.protocol.addresses import loopback
from aioserver.protocol.request_headers import PREAMBLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import voluptuous as vol


# Seconds of silence that what stands between a client and this server may take for a dead connection,
# less some.
SILENCE = 50.0
# A variable as a shell and LiteLLM write it.
_REFERENCE = re.compile(r"\$([A-Z_][A-Z0-9_]{1,63})|os\.environ/([A-Z_][A-Z0-9_]{1,63})")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Configuration:
    """Valid settings, the file they come from, and warnings for the author of that file.

    *content* is the content of that file.

    Always: every value has passed its validator, and no rule between the settings is broken.
    """

    settings: Settings
    source: str
    warnings: tuple[str, ...]
    content: bytes
    _document: Document

    def __repr__(self) -> str:
        return f"Configuration({self.source!r})"

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        again: bool = False,
        content: bytes | None = None,
    ) -> Configuration:
        """Read *path*, else `$AIOSERVER_CONFIG`, else `./config.yaml`, else the shipped file.

        Args:
            path: the file to read.
            environ: the environment; None stands for that of the process.
            again: whether the file was loaded before. A pipe with a key is refused then: its
                content is gone, and reading it would never end.
            content: the content of that file, if it was read before and is not to be read again.

        Raises:
            ConfigurationError: with every fault of the file, of the variables that override it,
                and of the keys that it names.
        """
        environ = os.environ if environ is None else environ
        source = _find(path, environ)
        if content is None:
            try:
                content = read_file(source)
            except UnreadableFile as exc:
                raise ConfigurationError([f"{source}: {exc}"]) from None
        document = _read(source, content, environ)
        fill(Settings, document.values)
        for name in sorted(environ):
            if name.startswith(PREFIX):
                document.override(name, environ[name])
        inheritance = Inheritance(document)
        try:
            settings = SETTINGS(document.values)
        except Faults as exc:
            settings = exc.partial
            document.faults += [
                document.fault(error.path, _message(error, document))
                for error in inheritance.without_inherited(exc.errors)
            ]
        credentials = Credentials(document, environ, again=again)
        providers = settings.llm.providers
        # The key of another provider is not read again: its file may be a pipe.
        provider_keys = {
            name: credentials.of_provider(name, provider)
            for name, provider in providers.items()
            if inheritance.key_owners[name] == name
        }
        auth = settings.auth
        client_keys = None
        if auth is not None and auth.keys is not None:
            client_keys = credentials.of_clients(auth.keys)
        file_keys, faults = _keys_of_file(auth, client_keys or (), document)
        chat = settings.chat
        tls = credentials.of_listener(chat.websocket.tls)
        for name, provider in providers.items():
            credentials.check_pair(name, provider)
        if document.faults or faults:
            raise ConfigurationError([*_lines(document.faults), *faults])
        providers = {
            name: replace(
                provider,
                name=name,
                api_key=provider_keys[inheritance.key_owners[name]],
                api_key_env=provider.variable(name),
                client_key_file=credentials.client_key(provider),
            )
            for name, provider in providers.items()
        }
        settings = replace(settings, llm=replace(settings.llm, providers=providers))
        if tls is not None:
            chat = replace(chat, websocket=replace(chat.websocket, tls=tls))
            settings = replace(settings, chat=chat)
        if auth is not None:
            auth = replace(auth, keys=client_keys, file_keys=file_keys)
            settings = replace(settings, auth=auth)
        return cls(
            settings=settings,
            source=document.source,
            warnings=tuple(_lines((*_warnings(settings, document), *credentials.warnings))),
            content=content,
            _document=document,
        )

    def get_websocket_concurrency_config(self) -> dict[str, Any]:
        """Return `chat.websocket.concurrency` as a dict, with its section "uvicorn"."""
        concurrency: dict[str, Any] = views.plain(self.settings.chat.websocket.concurrency)
        return concurrency

    def get_http_client_config(self, name: str | None = None) -> dict[str, Any]:
        """Return `http_client` of the provider *name*, or of the active one, as a dict.

        Raises:
            ValueError: no provider has this name.
        """
        llm = self.settings.llm
        if name is None:
            members = llm.members(llm.active)
            name = next(iter(llm.usable(llm.active)), llm.providers[members[0].provider]).name
        provider = llm.providers.get(name)
        if provider is None:
            raise ValueError(f"no provider {name!r}; configured: {', '.join(llm.providers)}")
        client: dict[str, Any] = views.plain(provider.http_client)
        return client

    def check_usable(self, hosts: Sequence[str] | None = None) -> None:
        """Refuse a configuration that is valid but cannot be served.

        *hosts* are the addresses that the server listens on, if not on the configured host.

        Raises:
            ConfigurationError: the active provider or a fallback lacks its key, other machines can
                reach one of the hosts and need no key, or the directory of the ledger cannot be
                written.
        """
        if hosts is None:
            hosts = (self.settings.chat.websocket.host,)
        faults = [*self._unusable_providers(), *self._unguarded(hosts), *self._unwritable()]
        if faults:
            raise ConfigurationError(_lines(faults))

    def effective(self) -> dict[str, Any]:
        """Return every setting as plain data, with defaults and overrides, and secrets as
        `***`.
        """
        data: dict[str, Any] = views.plain(self.settings)
        return data

    def _unusable_providers(self) -> Iterator[Fault]:
        llm, document = self.settings.llm, self._document
        names: dict[KeyPath, str] = {("llm", "active"): llm.active}
        names |= {
            ("llm", "fallbacks", index): name
            for index, name in enumerate(llm.fallbacks)
            if name != llm.active
        }
        for path, name in names.items():
            if llm.usable(name):
                continue
            missing = " and ".join(
                dict.fromkeys(
                    _missing(llm.providers[member.provider])
                    for link in llm.chain(name)
                    for member in llm.members(link)
                )
            )
            if name == llm.active:
                simulated = (other.name for other in llm.providers.values() if other.simulated)
                demo = next(simulated, "demo, with the provider demo that `aioserver init` writes")
                message = f"{name} is active but {missing}; set it, or set llm.active: {demo}"
            else:
                message = f"{name} is a fallback but {missing}; set it, or take {name} out"
            yield document.fault(path, message)

    def _unwritable(self) -> Iterator[Fault]:
        path = self.settings.usage.path
        if path is not None and (why := _why_not(Path(path).absolute())) is not None:
            yield self._document.fault(("usage", "path"), f"{path}: {why}")

    def _unguarded(self, hosts: Sequence[str]) -> Iterator[Fault]:
        auth = self.settings.auth
        if auth is not None and (auth.open or auth.guarded):
            return
        for host in dict.fromkeys(hosts):
            if not loopback(host):
                yield self._document.fault(
                    ("chat", "websocket", "host"),
                    f"{host} is open to others, and no key is required: listen on localhost, "
                    "or add keys to auth.keys (`aioserver key NAME` makes one), or set "
                    "`auth: {open: true}` if a proxy in front checks who may connect",
                )


def _why_not(directory: Path) -> str | None:
    """Return why *directory*, which may have to be made, cannot be written; None if it can."""
    there = directory
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    name = "" if there == directory else f"{there} "
    if not there.is_dir():
        return f"{name}is no directory"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{name}cannot be written by this user"
    return None


def _find(path: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> str:
    chosen = path or environ.get("AIOSERVER_CONFIG")
    if chosen:
        return os.fspath(chosen)
    # Not `exists`: a dangling link counts as a configuration, and its missing target is a fault.
    return "config.yaml" if os.path.lexists("config.yaml") else str(SHIPPED)


def _keys_of_file(
    auth: Auth | None, others: Iterable[ClientKey], document: Document
) -> tuple[tuple[ClientKey, ...], Sequence[str]]:
    """Return the keys in `auth.keys_file`, and its faults. *others* are those of `auth.keys`.

    The name of a missing file may be a misplaced key: it is not shown.
    """
    if auth is None or not isinstance(auth.keys_file, str):
        return (), ()
    if not os.path.lexists(auth.keys_file):
        message = "no such file here (`aioserver key NAME --add FILE` makes it)"
        document.faults.append(document.fault(("auth", "keys_file"), message))
        return (), ()
    try:
        return keys_file.read(Path(auth.keys_file), others), ()
    except ConfigurationError as exc:
        return (), exc.faults


def _read(source: str, content: bytes, environ: Mapping[str, str]) -> Document:
    """Return the document with *content* of the file *source*.

    Its values are a mapping; it may have faults.

    Raises:
        ConfigurationError: the content is no UTF-8, or its values are no mapping.
    """
    document = Document(source)
    document.read(decoded(content, source), environ)
    if not isinstance(document.values, dict):
        if document.values is None:
            document.faults.append(document.fault((), "the file is empty"))
        elif document.values is not FAULTY:
            message = f"expected a section of keys, not {schema.describe(document.values)}"
            document.faults.append(document.fault((), message))
        raise ConfigurationError(_lines(document.faults))
    return document


def _message(error: vol.Invalid, document: Document) -> str:
    """Return the message of *error*, with a hint how to write the list or section that
    it expects.
    """
    message = str(error.error_message)
    if not isinstance(error, WrongShape):
        return message
    path: KeyPath = tuple(error.path)  # type: ignore[arg-type]  # keys and indexes, always
    variable = document.variable(path)
    setting = f"{variable}='{error.written}'" if variable else None
    if path not in document.referenced:
        return f"{message} (write it as {error.written})"
    if setting and document.place(path).source == variable:
        return f"{message} (write {setting})"
    hint = f"a ${{…}} reference is always one value: write {error.written} in the file"
    return f"{message} ({hint}{f', or set {setting}' if setting else ''})"


def _warnings(settings: Settings, document: Document) -> Iterator[Fault]:
    yield from _ignored(Settings, document.values, (), document)
    auth = settings.auth or Auth()
    path: KeyPath
    concurrency: KeyPath = ("chat", "websocket", "concurrency")
    if "queue_timeout" not in _section(document, concurrency):
        message = (
            "nobody waits: without queue_timeout a full server refuses at once "
            "(set queue_timeout: 5.0, or 0 if that is wanted)"
        )
        yield document.fault((*concurrency, "connection_queue_size"), message)
    if settings.chat.streams.hold != PREAMBLE and settings.chat.websocket.ping_interval > SILENCE:
        path = ("chat", "websocket", "ping_interval")
        message = (
            f"above {SILENCE:g} s, while tool calls are held: proxies between here and an agent "
            "often end a connection on which nothing comes for 60 s"
        )
        yield document.fault(path, message)
    if "*" in settings.chat.websocket.allow_origins and not auth.guarded:
        path = ("chat", "websocket", "allow_origins")
        yield document.fault(path, 'with "*" and without keys every page on the web may chat')
    if auth.open:
        beside = "" if auth.keys is None else ", whatever keys says: take one of the two out"
        message = f"everybody who can reach the port may chat{beside}"
        yield document.fault(("auth", "open"), message)
    elif auth.guarded and not auth.all_keys and auth.jwt is None:
        message = "there is no key, so nobody may chat (`aioserver key NAME` makes one)"
        yield document.fault(("auth", "keys" if auth.keys is not None else "keys_file"), message)
    waiting = settings.chat.websocket.concurrency.connection_queue_size // 2
    roles = {} if auth.jwt is None else auth.jwt.limits
    limits: list[tuple[KeyPath, Limits]] = [
        *((("auth", "keys", index), key) for index, key in enumerate(auth.keys or ())),
        *((("auth", "jwt", "limits", name), role) for name, role in roles.items()),
    ]
    remembered = settings.usage.path is not None or settings.cluster.redis_url is not None
    for path, client in limits:
        for name in CALENDAR:
            if getattr(client, name) and not remembered:
                message = (
                    "what is used is forgotten at a restart: a ledger (usage.path) or a cluster "
                    "(redis_url) remembers it"
                )
                yield document.fault((*path, name), message)
        if client.queue_size > waiting:
            message = (
                f"{client.queue_size} cannot wait over HTTP: at all keys together {waiting} can, "
                "half of chat.websocket.concurrency.connection_queue_size"
            )
            yield document.fault((*path, "queue_size"), message)
    for name in settings.llm.providers:
        path = ("llm", "providers", name, "api_key")
        key = document.values["llm"]["providers"][name].get("api_key")
        plain = key is not None and document.written(path) and path not in document.referenced
        if plain and not _REFERENCE.fullmatch(str(key)):
            yield document.fault(path, "a key in this file is copied with it (use api_key_env)")
        base_url = settings.llm.providers[name].base_url
        written = document.written((*path[:-1], "base_url"))
        if base_url and written and not urlsplit(base_url).path.strip("/"):
            message = f"most APIs are below /v1 (write {base_url.rstrip('/')}/v1)"
            yield document.fault((*path[:-1], "base_url"), message)
        if (end := base_url.rstrip("/")).endswith("/chat/completions"):
            message = f"paths are added to it (write {end.removesuffix('/chat/completions')})"
            yield document.fault((*path[:-1], "base_url"), message)
        if not settings.llm.providers[name].simulated and _leads_here(base_url, settings):
            message = "it leads back to this server: every request would go in a circle"
            yield document.fault((*path[:-1], "base_url"), message)
        chosen, messages = (*path[:-1], "messages"), settings.llm.providers[name].messages
        if messages == AUTO and document.written(chosen) and "//api.anthropic.com" in base_url:
            message = "it speaks messages: nothing is to be found out (write true)"
            yield document.fault(chosen, message)
    for name in settings.llm.models:
        if not settings.llm.usable(name):
            message = "no member has its key, so nobody can ask for it"
            yield document.fault(("llm", "models", name), message)
            continue
        group = settings.llm.models[name]
        for index, member in enumerate(group.members):
            provider = settings.llm.providers.get(member.provider)
            if provider is not None and not provider.usable:
                message = f"{_missing(provider)}: this member is off"
                yield document.fault(("llm", "models", name, *group.path(index)), message)
    for path, text in _texts(document.values, ()):
        if (
            reference := _REFERENCE.fullmatch(text)
        ) is not None and path not in document.referenced:
            variable = reference[1] or reference[2]
            instead = f"api_key_env: {variable}, or " if path[-1] == "api_key" else ""
            message = f"this text is not replaced by a variable (write {instead}${{{variable}}})"
            yield document.fault(path, message)
    if "%(" in str((document.values.get("logging") or {}).get("format")):
        message = "a format string counts as console (the other choice is json)"
        yield document.fault(("logging", "format"), message)


def _texts(values: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Yield the texts in *values* with their paths from *path*."""
    if isinstance(values, str):
        yield path, values
    elif isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            yield from _texts(value, (*path, key))


def _leads_here(base_url: str, settings: Settings) -> bool:
    """Return whether *base_url* has the host and the port on which the server itself listens."""
    own, url = settings.chat.websocket, urlsplit(base_url)
    host = url.hostname or ""
    if (url.port or {"http": 80, "https": 443}.get(url.scheme)) != own.port:
        return False
    everywhere = own.host in {"", "0.0.0.0", "::"}  # noqa: S104 - it is looked for
    return host == own.host.lower() or (loopback(host) and (everywhere or loopback(own.host)))


def _section(document: Document, path: KeyPath) -> dict[str, Any]:
    """Return the section at *path* as it is written, in a document without faults."""
    section = document.values
    for step in path:
        section = (section or {}).get(step)
    return section or {}


def _ignored(cls: type[Any], values: Any, path: KeyPath, document: Document) -> Iterator[Fault]:
    """Yield a warning for each key that is accepted for compatibility and has no effect."""
    for key, instead in schema.ignored_keys(cls).items():
        if key in values:
            yield document.fault((*path, key), f"ignored: {instead}")
    for setting in schema.fields(cls):
        inner, value = setting.metadata["validator"].inner, values.get(setting.name)
        if inner is not None and isinstance(value, dict):
            yield from _ignored(inner, value, (*path, setting.name), document)


def _lines(faults: Iterable[Fault]) -> list[str]:
    """Return the texts of *faults* in the order of the file, each once."""
    return list(dict.fromkeys(str(fault) for fault in sorted(faults)))


def _missing(provider: Provider) -> str:
    return f"{provider.missing_key} is not {'set' if provider.api_key_env else 'there'}"
