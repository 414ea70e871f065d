"""The road to each provider: its name, a connection, TLS, the key, and the first token of an
answer; and whether agents can work with it.

The first token comes by the very code that serves clients: the same pool, timeouts, headers and
meaning of a fault. Nothing that a provider says is shown but its status: its words may hold our
key.

This file is one concept: the steps on that road, each of which may end it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import orjson
from yarl import URL

from aioserver.config.llm import INSTRUCT, NO_CONTINUATION, PREFIXED
from aioserver.faces.wing import Core, Wing
from aioserver.files.certificates import client_context
from aioserver.files.watched_files import WatchedFiles
from aioserver.gateway.bridging import ABSENT_STATUSES, ChatCapabilities
from aioserver.gateway.continuation import continued
from aioserver.gateway.probe import ARGUMENT
from aioserver.gateway.prompts import chat_body
from aioserver.limits.scheduler import Scheduler
from aioserver.protocol.bridging.accepted_parameters import MAX_COMPLETION_TOKENS as NEWER_BOUND
from aioserver.protocol.bridging.accepted_parameters import MAX_TOKENS as MAX_BOUND
from aioserver.protocol.openai import Reading
from aioserver.protocol.seam import Anchored, Onward, SeamBroken, anchor_of
from aioserver.provider_errors import (
    ProviderAuthError,
    ProviderBadResponse,
    ProviderError,
    ProviderFault,
    ProviderRateLimited,
    ProviderRefused,
)
from aioserver.providers.api import CHAT
from aioserver.providers.attempt import Attempt
from aioserver.providers.passthrough import PassedAttempt
from aioserver.providers.pool import environment_proxy
from aioserver.providers.registry import ProviderRegistry
from aioserver.providers.request import ProviderRequest
from aioserver.server.wings import WINGS
from aioserver.streams.cursor import ConditionReader
from aioserver.streams.store import StreamStore
from aioserver.streams.stream import Stream
from aioserver.telemetry.metrics import Metrics
from aioserver.tools.doctor.groups import examine_groups, models_of, models_request
from aioserver.tools.doctor.network import Peer, Steps

if TYPE_CHECKING:
    import ssl

    from aioserver.config import settings
    from aioserver.config.settings import Settings
    from aioserver.gateway.probe import Probe
    from aioserver.providers.provider import Provider
    from aioserver.tools.doctor.findings import Report
    from aioserver.tools.doctor.network import Problem

QUESTION = b'[{"role":"user","content":"Say OK."}]'
# A question whose answer is known, the beginning of that, and the word that follows it.
COUNTING = b'[{"role":"user","content":"Count from one to ten in words."}]'
SAID, FOLLOWING = "one two three four", "five"
# Tokens that such an answer may cost at most. It is cancelled at its first.
MAX_TOKENS = 16
MAX_BYTES = 1 << 20
# Where most providers have the API, and what they say elsewhere.
USUAL_PATH, NOT_FOUND = "v1", 404
NOT_ASKED = "it is neither active nor a fallback"


async def examine(
    report: Report, settings: Settings, *, ask: bool, only: str | None = None
) -> None:
    """Examine the providers of *settings*, one after the other, or *only* the one of this name,
    which is also asked as agents ask.

    A small question is asked of those that clients are answered by unless they choose (the active
    one and the fallbacks), and of simulated ones; only these can fail. *ask* False: of simulated
    ones alone.

    Raises:
        ConfigurationError: a `ca_file` holds no certificate.
    """
    llm, metrics = settings.llm, Metrics(settings.llm.providers)
    # Without that wing this one does nothing.
    wing = next((wing() for wing in WINGS if wing.name == "simulator"), Wing())
    async with AsyncExitStack() as stack:
        loop = asyncio.get_running_loop()
        streams = StreamStore(max_stream_bytes=MAX_BYTES, max_kept_bytes=MAX_BYTES)
        core = Core(
            settings=settings,
            metrics=metrics,
            loop=loop,
            scheduler=Scheduler(loop),
            streams=streams,
            # Never begun: nothing changes while it is examined.
            watched=WatchedFiles(lambda _kind, _text: None),
        )
        await wing.open(core, stack)
        registry = ProviderRegistry(metrics, simulated=wing.simulated)
        try:
            await registry.prepare(llm)
            registry.apply(llm, max_response_bytes=MAX_BYTES)
            needed = [
                member.provider
                for name in (llm.active, *llm.fallbacks)
                for link in llm.chain(name)
                for member in llm.members(link)
            ]
            if only is not None:
                provider = registry.providers[only]
                answers = await _examine(report, provider, needed=True, ask=ask)
                if answers and not provider.settings.simulated:
                    await _call_tools(report, provider)
                return
            # The providers that matter most come first.
            for name in dict.fromkeys((*needed, *registry.providers)):
                await _examine(report, registry.providers[name], needed=name in needed, ask=ask)
            await examine_groups(report, llm, registry.providers)
        finally:
            await registry.close()


async def _examine(report: Report, provider: Provider, *, needed: bool, ask: bool) -> bool:
    """Examine *provider*; return whether it has answered a question."""
    settings, subject = provider.settings, f"provider {provider.name}"
    problem: Problem = report.fail if needed else report.warn
    if not settings.usable:
        report.skip(subject, f"off: {settings.missing_key} is not set")
        return False
    if not settings.simulated:
        _tell_key(report, subject, settings)
        if not await _reach(report, subject, settings, problem):
            return False
    if settings.simulated or (needed and ask):
        answers = await _first_token(report, subject, provider, problem)
        if settings.continuation != NO_CONTINUATION:
            await _goes_on(report, subject, provider)
        return answers
    await _list_models(report, subject, provider, problem)
    reason = "--no-ask" if needed else NOT_ASKED
    report.skip(subject, f"no question was asked: {reason}")
    return False


def _tell_key(report: Report, subject: str, settings: settings.Provider) -> None:
    source = settings.api_key_env or settings.api_key_file
    if settings.api_key is None:
        report.ok(subject, "needs no key")
    else:
        report.ok(subject, f"its key is in {source or 'the configuration'}")


async def _reach(
    report: Report, subject: str, settings: settings.Provider, problem: Problem
) -> bool:
    """Reach the provider, or the proxy in front of it, to which the same steps are made."""
    url = URL(settings.base_url)
    proxy = URL(settings.proxy) if settings.proxy else environment_proxy(url)
    if proxy is not None:
        report.ok(subject, f"reached through the proxy {proxy.host}:{proxy.port}")
        url = proxy
    context: ssl.SSLContext | None = None
    if url.scheme == "https":
        # A proxy is trusted as aiohttp does it, by the certificates of the system.
        files = (settings.ca_file, settings.client_cert_file, settings.client_key_file)
        context, _ = client_context(*((None, None, None) if proxy else files))
    peer = Peer(url.host or "", url.port or 0, context, settings.http_client.connect_timeout)
    return await Steps(report, subject, peer, problem).take() is not None


async def _first_token(report: Report, subject: str, provider: Provider, problem: Problem) -> bool:
    """Ask a small question, and cancel the answer as soon as it begins; return whether it has."""
    configured = provider.settings.max_tokens
    # A provider whose models refuse the parameter gets none, as in a chat.
    limit = configured and min(configured, MAX_TOKENS)

    def body(settings: settings.Provider, _model: str | None) -> bytes:
        short = dataclasses.replace(settings, max_tokens=limit)
        return chat_body(short, None, QUESTION, b"{}", frozenset(), streamed=True)

    request = ProviderRequest(CHAT, body, streamed=True, reading=Reading())
    stream = Stream("doctor", "doctor", window=0.0, max_bytes=MAX_BYTES)
    attempt = Attempt(provider, request, stream)
    # The first event says that the request has its place here, the second comes from the provider.
    reader = ConditionReader(stream, lambda log: log.last > 1 or log.ended)
    began = time.perf_counter()
    try:
        await _run(provider, attempt, reader.reached)
    except ProviderFault as fault:
        if not await _tell_wrong_base(subject, provider, fault, problem):
            _tell_fault(subject, attempt, fault, problem)
        return False
    finally:
        reader.leave()
    took = time.perf_counter() - began
    if isinstance(stream.error, ProviderFault):
        _tell_fault(subject, attempt, stream.error, problem)
        return False
    report.ok(subject, f"answers: the first token of {provider.settings.model} came", took)
    return True


async def _goes_on(report: Report, subject: str, provider: Provider) -> None:
    """Have the rest of an answer said, in the form that the provider is asked for it.

    A text that was shown to a client comes twice where the form is none of the provider's.
    """
    form = provider.settings.continuation
    configured = provider.settings.max_tokens
    short = dataclasses.replace(
        provider.settings, max_tokens=configured and min(configured, MAX_TOKENS)
    )
    asked = chat_body(short, None, COUNTING, b"{}", frozenset(), streamed=False)
    data = await continued(asked, form, SAID, 0)
    reading = Reading()
    request = ProviderRequest(
        CHAT, lambda _settings, _model: data, streamed=False, reading=reading
    )
    stream = Stream("doctor", "doctor", window=0.0, max_bytes=MAX_BYTES)
    began = time.perf_counter()
    try:
        await provider.run(Attempt(provider, request, stream))
    except ProviderRefused as fault:
        text = f"refuses to go on with an answer: HTTP {fault.provider_status}"
    except ProviderFault as fault:
        text = f"does not go on with an answer: {fault.code}"
    else:
        text = _rest_found(form, reading.text)
    if text:
        report.warn(subject, text, f"another `continuation` than {form}, or none: docs/rescue.md")
    else:
        took = time.perf_counter() - began
        report.ok(subject, f"goes on with an answer that broke off ({form})", took)


def _rest_found(form: str, text: str) -> str:
    """Return what is wrong with *text* as the rest of SAID; "" if nothing is."""
    text = " ".join(text.lower().split())
    if not text:
        return "says nothing where an answer broke off"
    seam = Anchored(anchor_of(SAID)) if form == INSTRUCT else Onward(SAID, repeats=True)
    try:
        rest = seam.feed(text) + seam.close()
    except SeamBroken:
        return "begins a new turn where it is asked for its last words and the rest"
    if not rest.lstrip(" ,.;-").startswith(FOLLOWING):
        return "begins a new turn where an answer broke off"
    if isinstance(seam, Onward) and seam.repeated and form != PREFIXED:
        return "says the beginning again where an answer broke off"
    return ""


async def _call_tools(report: Report, provider: Provider) -> None:
    """Ask for a call of a tool in the API of each wing, over the bridge where the provider has
    chat completions only, and say what was learned of it.
    """
    probes = [probe for wing in WINGS if (probe := wing.probe()) is not None]
    if any([await _call_tool(report, provider, probe) for probe in probes]):
        _tell_learned(report, f"provider {provider.name}", provider.capabilities(ChatCapabilities))


async def _call_tool(report: Report, provider: Provider, probe: Probe) -> bool:
    """Ask for such a call; return whether a bridge has answered."""
    subject, path = f"provider {provider.name}", probe.make_attempt.shown_path
    api = probe.request.api
    if not api.speaks(provider.settings):
        report.skip(subject, f"{path}: not asked for, as {api.setting} is false")
        return False
    stream = Stream("doctor", "doctor", window=0.0, max_bytes=MAX_BYTES)
    stream.events = api.events()
    attempt = probe.make_attempt(provider, probe.request, stream)
    began = time.perf_counter()
    try:
        await provider.run(attempt)
    except ProviderFault as fault:
        absent = api.setting and attempt.status in ABSENT_STATUSES
        report.warn(
            subject,
            f"{path}: {fault.code}: HTTP {attempt.status}",
            f"`{api.setting}: auto` has its requests translated, if it has no such path"
            if absent
            else "docs/errors.md explains this code",
        )
        return False
    took = time.perf_counter() - began
    if not attempt.bridged:
        report.ok(subject, f"{path}: it has that, and answers", took)
        return False
    calls = probe.calls(b"".join([entry.data for entry in stream.entries]))
    if len(calls) == 1 and _has_argument(calls[0]):
        report.ok(subject, f"{path}, translated: its tool was called", took)
    else:
        report.warn(
            subject,
            f"{path}, translated: {len(calls)} calls of its tool came, or without its argument",
            "agents need a model that was trained for calls, and an engine that finds them in its "
            "answers (vLLM: --enable-auto-tool-choice, --tool-call-parser; llama.cpp: --jinja)",
        )
    if stream.outcome.usage is None:
        report.warn(subject, f"{path}, translated: no usage came: tokens are estimated")
    return True


def _has_argument(arguments: str) -> bool:
    try:
        content = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return False
    return isinstance(content, dict) and ARGUMENT in content


def _tell_learned(report: Report, subject: str, capabilities: ChatCapabilities) -> None:
    """Say what the bridges have learned, as the server will at the first requests of agents."""
    learned = [
        f"it refuses {word}, which is left out" for word in sorted(capabilities.refused_words)
    ]
    if capabilities.renaming:
        learned.append(f"it has {NEWER_BOUND} in place of {MAX_BOUND}")
    for model, tokens in capabilities.context_limits.items():
        learned.append(f"{model} has {tokens:,} tokens in its context")
    for model, tokens in capabilities.most.items():
        learned.append(f"{model} has {tokens:,} tokens in an answer at most")
    if capabilities.reasoning_field:
        learned.append(f"its reasoning is in {capabilities.reasoning_field}")
    for text in learned or ["it takes every word that the bridges send"]:
        report.ok(subject, f"learned: {text}")


async def _list_models(report: Report, subject: str, provider: Provider, problem: Problem) -> None:
    """Ask for the list of models, which costs nothing; most providers want their key for it."""
    request = models_request()
    attempt = PassedAttempt(provider, request, None)
    began = time.perf_counter()
    begun = asyncio.ensure_future(request.answer.begun())
    try:
        await _run(provider, attempt, begun)
    except ProviderRefused as fault:
        if not await _tell_wrong_base(subject, provider, fault, problem):
            status = fault.provider_status
            report.skip(subject, f"GET /models: HTTP {status}: it may have no such list")
        return
    except ProviderFault as fault:
        _tell_fault(subject, attempt, fault, problem)
        return
    finally:
        begun.cancel()
    report.ok(
        subject, "GET /models is answered: the key is not refused", time.perf_counter() - began
    )


async def _tell_wrong_base(
    subject: str, provider: Provider, fault: ProviderFault, problem: Problem
) -> bool:
    """Say so if *fault* is that of a `base_url` without the path below which the API is; return
    whether it is.
    """
    if not isinstance(fault, ProviderRefused) or fault.provider_status != NOT_FOUND:
        return False
    models = await models_of(provider, f"{USUAL_PATH}/models")
    if models is None:
        return False
    url = f"{provider.settings.base_url.rstrip('/')}/{USUAL_PATH}"
    listed = f"{len(models)} model{'' if len(models) == 1 else 's'}"
    problem(
        subject,
        f"nothing of its API is there: HTTP {NOT_FOUND}; below /{USUAL_PATH} it has {listed}",
        f"set base_url: {url}",
    )
    return True


async def _run(provider: Provider, attempt: Attempt, enough: asyncio.Future[Any]) -> None:
    """Run *attempt* until *enough* is done, and then cancel it.

    Each wait in it has its deadline in the settings of the provider.

    Raises:
        ProviderFault: the attempt has failed before.
    """
    answering = asyncio.ensure_future(provider.run(attempt))
    try:
        await asyncio.wait((answering, enough), return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            await answering
    finally:
        answering.cancel()
        await asyncio.wait((answering,))


def _tell_fault(subject: str, attempt: Attempt, fault: ProviderFault, problem: Problem) -> None:
    settings = attempt.provider.settings
    match fault:
        case ProviderAuthError():
            where = settings.api_key_env or settings.api_key_file or "its key in the configuration"
            problem(
                subject,
                f"the key is refused: HTTP {attempt.status}",
                f"check {where}, what the key may do, and the credit of its account",
            )
        case ProviderRateLimited():
            problem(
                subject,
                f"refuses requests for their rate at the moment: HTTP {attempt.status}",
                "lower requests_per_minute, or ask for a higher limit there",
            )
        case ProviderRefused():
            problem(
                subject,
                f"refuses a simple question: HTTP {fault.provider_status}",
                f"check base_url, and whether there is a model {settings.model}",
            )
        case ProviderError() | ProviderBadResponse():
            problem(
                subject,
                f"{fault.code}: HTTP {attempt.status}, without an answer that can be read",
                "check base_url; it is the provider's fault otherwise",
            )
        case _:
            problem(subject, f"{fault.code}: {fault}", "docs/errors.md explains this code")
