"""Checks of each provider: its name, a connection, TLS, the key, and the first token of an answer.

The question is asked by the code that serves clients, with the same pool, timeouts, headers and
classes of faults. The report quotes no text of a provider, since it may contain our key: it has
only statuses, lengths, and names of models that stand in our configuration.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from yarl import URL

from aioserver.config.llm import INSTRUCT, NO_CONTINUATION, PREFIXED
from aioserver.files.certificates import client_context
from aioserver.gateway.continuation import continued
from aioserver.gateway.prompts import chat_body
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
from aioserver.providers.attempt import Attempt
from aioserver.providers.passthrough import PassedAttempt, PassedRequest
from aioserver.providers.pool import environment_proxy
from aioserver.providers.request import CHAT, ProviderRequest
from aioserver.streams.cursor import ConditionReader
from aioserver.streams.stream import Stream
from aioserver.tools.doctor import agents
from aioserver.tools.doctor.network import connect, context_for
from aioserver.tools.doctor.results import Result, fail, ok, skip, warn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioserver.config import settings
    from aioserver.providers.provider import Provider
    from aioserver.tools.doctor.facts import Facts

QUESTION = b'[{"role":"user","content":"Say OK."}]'
# A question whose answer is known, the beginning of this answer, and the word that follows.
COUNTING = b'[{"role":"user","content":"Count from one to ten in words."}]'
SAID, FOLLOWING = "one two three four", "five"
# Tokens that such an answer may cost at most. The answer to QUESTION is cancelled at its first.
MAX_TOKENS = 16
# Bytes of an answer or of a list of models at most: the list of OpenRouter has 500 KiB.
MAX_BYTES = 1 << 22
# The text and the hint for each class of fault: the first row that fits counts.
FAULTS: tuple[tuple[type[ProviderFault] | tuple[type[ProviderFault], ...], str, str], ...] = (
    (
        ProviderAuthError,
        "the key is refused: HTTP {status}",
        "check {key}, what the key may do, and the credit of its account",
    ),
    (
        ProviderRateLimited,
        "refuses requests for their rate at the moment: HTTP {status}",
        "lower requests_per_minute, or ask for a higher limit there",
    ),
    (
        ProviderRefused,
        "refuses a simple question: HTTP {status}",
        "check base_url, and whether there is a model {model}",
    ),
    (
        (ProviderError, ProviderBadResponse),
        "{code}: HTTP {status}, without an answer that can be read",
        "check base_url; it is the provider's fault otherwise",
    ),
    (ProviderFault, "{code}: {fault}", "docs/errors.md explains this code"),
)


class Asked(NamedTuple):
    """The outcome of a request: its fault, its HTTP status, and the seconds that it took."""

    fault: ProviderFault | None
    status: int
    took: float


async def providers(facts: Facts) -> AsyncIterator[Result]:
    """Check the providers one after the other, the active one and the fallbacks first.

    Faults of all others are only warnings.
    """
    llm, known = facts.settings.llm, facts.server.provider_registry.providers
    needed = [
        member.provider
        for name in (llm.active, *llm.fallbacks)
        for link in llm.chain(name)
        for member in llm.members(link)
    ]
    if facts.only is not None:
        needed = [facts.only]
    for name in needed if facts.only is not None else dict.fromkeys((*needed, *known)):
        async for result in _provider(facts, known[name], needed=name in needed):
            yield dataclasses.replace(result, subject=f"provider {name}")


async def _provider(facts: Facts, provider: Provider, *, needed: bool) -> AsyncIterator[Result]:
    settings = provider.settings
    problem = fail if needed else warn
    if not settings.usable:
        yield skip(f"off: {settings.missing_key} is not set")
        return
    if not settings.simulated:
        where = settings.api_key_env or settings.api_key_file or "the configuration"
        yield ok("needs no key" if settings.api_key is None else f"its key is in {where}")
        url = URL(settings.base_url)
        if proxy := URL(settings.proxy) if settings.proxy else environment_proxy(url):
            yield ok(f"reached through the proxy {proxy.host}:{proxy.port}")
        context = context_for(proxy or url)
        if context is not None and not proxy:
            # The settings are not for a proxy, which aiohttp trusts by the system's certificates.
            pair = settings.client_cert_file, settings.client_key_file
            context, _ = client_context(settings.ca_file, *pair)
        seconds = settings.http_client.connect_timeout
        connected = await connect(proxy or url, context, seconds, problem)
        for result in connected.results:
            yield result
        if not connected.reached:
            return
    if settings.simulated or (needed and facts.ask):
        asked, _ = await _chat(provider, _short(settings, QUESTION, streamed=True), streamed=True)
        if asked.fault is None:
            yield ok(f"answers: the first token of {settings.model} came", seconds=asked.took)
        else:
            yield problem(*_meaning(settings, asked.fault, asked.status))
        if settings.continuation != NO_CONTINUATION:
            yield await _continuation(provider)
        if facts.only is not None and asked.fault is None and not settings.simulated:
            async for result in agents.agents(facts.server, provider):
                yield result
        return
    _, asked = await _models(provider)
    if asked.fault is None:
        yield ok("GET /models is answered: the key is not refused", seconds=asked.took)
    elif not isinstance(asked.fault, ProviderRefused):
        yield problem(*_meaning(settings, asked.fault, asked.status))
    else:
        yield skip(f"GET /models: HTTP {asked.status}: it may have no such list")
    reason = "--no-ask" if needed else "it is neither active nor a fallback"
    yield skip(f"no question was asked: {reason}")


async def _ask(
    provider: Provider, attempt: Attempt, enough: asyncio.Future[Any] | None = None
) -> Asked:
    """Run *attempt* to its end, or cancel it when *enough* is done.

    The settings of the provider have a deadline for each wait in it.
    """
    fault, began = None, time.perf_counter()
    answering = asyncio.ensure_future(provider.run(attempt))
    waited = (answering,) if enough is None else (answering, enough)
    try:
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            await answering
    except ProviderFault as exc:
        fault = exc
    finally:
        answering.cancel()
        await asyncio.wait((answering,))
    return Asked(fault, attempt.status, time.perf_counter() - began)


def _short(settings: settings.Provider, question: bytes, *, streamed: bool) -> bytes:
    """Return the body of *question*, for an answer of few tokens."""
    # Without the setting the body has no such parameter either: some models refuse it.
    limit = settings.max_tokens and min(settings.max_tokens, MAX_TOKENS)
    short = dataclasses.replace(settings, max_tokens=limit)
    return chat_body(short, None, question, b"{}", frozenset(), streamed=streamed)


async def _chat(provider: Provider, data: bytes, *, streamed: bool) -> tuple[Asked, str]:
    """Ask for the chat completion of *data*, and return the outcome and the text of the answer.

    A *streamed* answer is cancelled as soon as it begins.
    """
    reading = Reading()
    request = ProviderRequest(CHAT, lambda *_: data, streamed=streamed, reading=reading)
    stream = Stream("doctor", "doctor", window=0.0, max_bytes=MAX_BYTES)
    # The first event is our own and says that the request started; the provider sends the second.
    reader = ConditionReader(stream, lambda log: log.last > 1 or log.ended)
    attempt = Attempt(provider, request, stream)
    try:
        asked = await _ask(provider, attempt, reader.reached if streamed else None)
    finally:
        reader.leave()
    if asked.fault is None and isinstance(stream.error, ProviderFault):
        asked = asked._replace(fault=stream.error)
    return asked, reading.text


def _meaning(settings: settings.Provider, fault: ProviderFault, status: int) -> tuple[str, str]:
    """Return the text and the hint for *fault*, whose answer had *status*."""
    text, hint = next(row[1:] for row in FAULTS if isinstance(fault, row[0]))
    key = settings.api_key_env or settings.api_key_file or "its key in the configuration"
    return (
        text.format(code=fault.code, fault=fault, status=status),
        hint.format(key=key, model=settings.model),
    )


async def _continuation(provider: Provider) -> Result:
    """Check that the provider continues an answer that broke off, in the configured form.

    With a form that the provider does not know, a client would see the same text twice.
    """
    form = provider.settings.continuation
    question = _short(provider.settings, COUNTING, streamed=False)
    data = await continued(question, form, SAID, 0)
    asked, rest = await _chat(provider, data, streamed=False)
    if isinstance(asked.fault, ProviderRefused):
        text = f"refuses to go on with an answer: HTTP {asked.status}"
    elif asked.fault is not None:
        text = f"does not go on with an answer: {asked.fault.code}"
    else:
        text = _rest_found(form, rest)
    if text:
        return warn(text, f"another `continuation` than {form}, or none: docs/rescue.md")
    return ok(f"goes on with an answer that broke off ({form})", seconds=asked.took)


def _rest_found(form: str, text: str) -> str:
    """Return what is wrong with *text* as the continuation of SAID; "" if nothing is wrong."""
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


async def _models(
    provider: Provider,
) -> tuple[dict[str, int | None] | None, Asked]:
    """Ask for the list of models of *provider*.

    The list costs nothing, and most providers check the key for it. Return the `max_model_len` (or
    None) of each model, and the outcome. Instead of a list that cannot be read, return None.
    """
    # Anthropic demands the version here, too.
    headers = {"anthropic-version": "2023-06-01"} if provider.settings.messages is True else {}
    request = PassedRequest("GET", "models", lambda *_: b"", headers)
    body = bytearray()

    async def read() -> None:
        while len(body) < MAX_BYTES and (part := await request.answer.take()):
            body.extend(part)

    reading = asyncio.ensure_future(read())
    asked = await _ask(provider, PassedAttempt(provider, request, None), reading)
    request.answer.stop()
    await reading
    try:
        content: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        content = None
    entries = content.get("data") if isinstance(content, dict) else None
    if asked.fault is not None or not isinstance(entries, list):
        return None, asked
    models: dict[str, int | None] = {}
    for entry in entries:
        if isinstance(entry, dict) and isinstance(id_ := entry.get("id"), str):
            length = entry.get("max_model_len")
            models[id_] = length if isinstance(length, int) and length > 0 else None
    return models, asked


async def groups(facts: Facts) -> AsyncIterator[Result]:
    """Check whether each member of a group lists its model, and takes prompts of the same length.

    Each provider is asked only once.
    """
    known = facts.server.provider_registry.providers
    lists: dict[str, dict[str, int | None] | None] = {}
    for name, group in facts.here.llm.groups().items():
        subject, lengths = f"group {name}", {}
        for member in group.members:
            provider = known[member.provider]
            settings, model = provider.settings, member.model or provider.settings.model
            if settings.usable and not settings.simulated and provider.name not in lists:
                lists[provider.name], _ = await _models(provider)
            if not settings.usable:
                result = skip(f"{provider.name} is off")
            elif settings.simulated:
                result = skip(f"{provider.name} is simulated: it has any model")
            elif (models := lists[provider.name]) is None:
                result = skip(f"{provider.name} shows no list of models that can be read")
            elif not (fitting := [each for each in models if _names(each, model)]):
                result = warn(f"{provider.name} does not list {model} under /v1/models")
            else:
                result = ok(f"{provider.name} lists {model}")
                if (length := models[fitting[0]]) is not None:
                    lengths[member.provider, member.max_context] = length
            yield dataclasses.replace(result, subject=subject)
        for (provider_name, bound), length in lengths.items():
            if bound is None and length < (most := max(lengths.values())):
                text = f"{provider_name} takes {length:,} tokens, and others take {most:,}"
                hint = f"set max_context: {length} there, so that longer prompts go to the others"
                yield warn(f"{text} (max_model_len)", hint, subject=subject)


def _names(listed: str, model: str) -> bool:
    """Return whether *listed* is the name of *model*: Ollama's names have a tag, and Gemini's a
    folder, which requests may leave out.
    """
    return listed in {model, f"{model}:latest"} or listed.endswith(f"/{model}")
