"""Checks of each provider: its name, a connection, TLS, the key, the first token of an answer, and
whether agents can work with it.

The questions go to a server in this process, as those of any client: with the same pool, timeouts,
headers and classes of faults, and without retries. The report quotes no text of a provider, since
it may contain our key.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from typing import TYPE_CHECKING, Any

import orjson
from yarl import URL

from aioserver.client import AnswerError, Client, Reasoning, Text, ToolCalls
from aioserver.config.llm import INSTRUCT, NO_CONTINUATION, PREFIXED
from aioserver.files.certificates import client_context
from aioserver.gateway.bridging import ABSENT_STATUSES
from aioserver.gateway.continuation import continued
from aioserver.monitoring.findings import FLAGGED, OF_PROVIDERS
from aioserver.provider_errors import ProviderAuthError, ProviderFault, ProviderRefused
from aioserver.providers.passthrough import PassedAttempt, PassedRequest
from aioserver.providers.pool import environment_proxy
from aioserver.server.runner import Runner
from aioserver.tools import remote
from aioserver.tools.doctor.network import connect
from aioserver.tools.doctor.results import Facts, Result, fail, ok, skip, warn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aioserver.providers.provider import Provider

    Problem = Callable[[str, str], Result]

QUESTION = [{"role": "user", "content": "Say OK."}]
# A question whose answer is known, the beginning of this answer, and the word that follows.
COUNTING = b'{"messages":[{"role":"user","content":"Count from one to ten in words."}]}'
SAID, FOLLOWING = "one two three four", "five"
# Tokens that such an answer may cost at most. The answer to QUESTION is cancelled at its first.
MAX_TOKENS = 16
# Bytes of a list of models at most: that of OpenRouter has 500 KiB.
MAX_BYTES = 1 << 22
# Questions as agents ask them, for each path below `/v1`. Each asks for one call of a tool, has
# every parameter that an engine may not know, and leaves room for models that think first.
QUESTIONS = orjson.loads("""{
  "responses": {
    "input": "Call the tool `note` once, with the word ready. Say nothing else.",
    "tools": [{"type": "function", "name": "note", "description": "Notes a word.", "parameters":
      {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}}],
    "stream": true, "store": false, "parallel_tool_calls": false, "reasoning": {"effort": "low"},
    "max_output_tokens": 512},
  "messages": {
    "messages": [{"role": "user",
      "content": "Call the tool `note` once, with the word ready. Say nothing else."}],
    "tools": [{"name": "note", "description": "Notes a word.", "input_schema":
      {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": true},
    "stream": true, "output_config": {"effort": "low"}, "top_k": 40, "max_tokens": 512}
}""")
# In the events of an answer: its end, its calls, and the pieces of their arguments. A text of a model
# has its quotation marks escaped.
END = re.compile(rb'"type":\s*"(?:response\.(?:completed|incomplete)|message_stop)"')
CALLS = re.compile(rb'"type":"(?:response\.function_call_arguments\.done|tool_use)"')
ARGUMENTS = re.compile(rb'"(?:arguments|partial_json)":"((?:[^"\\]|\\.)*)"')
NO_CALL = "vLLM: --enable-auto-tool-choice --tool-call-parser; llama.cpp: --jinja; another model"


async def providers(facts: Facts) -> AsyncIterator[Result]:
    """Check the providers one after the other, the active one and the fallbacks first.

    Faults of all others are only warnings.
    """
    known = facts.server.provider_registry.providers
    if facts.only is not None:
        needed = others = [facts.only]
    else:
        llm, others = facts.here.llm, [*known]
        needed = [each.name for name in (llm.active, *llm.fallbacks) for each in llm.usable(name)]
    runner = Runner(facts.server)
    facts.stack.push_async_callback(runner.cleanup)
    await runner.setup()
    (listening, *_) = await runner.listen()
    url = f"http://127.0.0.1:{listening.port}"
    async with Client(url, deadline=None, retry=False) as client:
        for name in dict.fromkeys((*needed, *others)):
            problem = fail if name in needed else warn
            async for result in _provider(facts, client, known[name], problem):
                result.subject = f"provider {name}"
                yield result


async def _provider(
    facts: Facts, client: Client, provider: Provider, problem: Problem
) -> AsyncIterator[Result]:
    """Check *provider*, which is needed if *problem* is `fail`."""
    settings = provider.settings
    if not settings.usable:
        yield skip(f"off: {settings.missing_key} is not set")
        return
    if not settings.simulated:
        where = settings.api_key_env or settings.api_key_file or "the configuration"
        yield ok("needs no key" if settings.api_key is None else f"its key is in {where}")
        url, context = URL(settings.base_url), None
        if proxy := URL(settings.proxy) if settings.proxy else environment_proxy(url):
            # aiohttp trusts it by the system's certificates.
            yield ok(f"reached through the proxy {proxy.host}:{proxy.port}")
        elif url.scheme == "https":
            pair = settings.client_cert_file, settings.client_key_file
            context, _ = client_context(settings.ca_file, *pair)
        seconds = settings.http_client.connect_timeout
        results, protocol = await connect(proxy or url, seconds, context, problem)
        for result in results:
            yield result
        if protocol is None:
            return
    began = time.perf_counter()
    if settings.simulated or (problem is fail and facts.ask):
        _, error = await _ask(client, provider, whole=False, messages=QUESTION)
        if error is not None:
            yield problem(*_meaning(provider, error))
        else:
            text = f"answers: the first token of {settings.model} came"
            yield ok(text, seconds=time.perf_counter() - began)
        if settings.continuation != NO_CONTINUATION:
            yield await _continuation(client, provider)
        if facts.only is not None and error is None and not settings.simulated:
            async for result in _agents(client.url, provider):
                yield result
        return
    models = await _models(provider)
    if isinstance(models, ProviderRefused):
        yield skip(f"GET /models: HTTP {models.http_status}: it may have no such list")
    elif isinstance(models, ProviderFault):
        yield problem(*_meaning(provider, models))
    else:
        took = time.perf_counter() - began
        yield ok("GET /models is answered: the key is not refused", seconds=took)
    reason = "--no-ask" if problem is fail else "it is neither active nor a fallback"
    yield skip(f"no question was asked: {reason}")


async def _ask(
    client: Client, provider: Provider, *, whole: bool, messages: list[Any], **options: Any
) -> tuple[str, AnswerError | None]:
    """Return the answer of *provider*, *whole* or up to its first token, and why it failed."""
    # Without the setting the body has no such parameter either: some models refuse it.
    if provider.settings.max_tokens:
        options["max_tokens"] = min(provider.settings.max_tokens, MAX_TOKENS)
    answer = client.chat(messages, provider=provider.name, options=options)
    try:
        async with answer:
            async for event in answer.events():
                if not whole and isinstance(event, Text | Reasoning | ToolCalls):
                    break
    except AnswerError as error:
        return "", error
    return answer.received, None


def _meaning(provider: Provider, fault: AnswerError | ProviderFault) -> tuple[str, str]:
    """Return the text and the hint for *fault*, without the words of the provider."""
    key = OF_PROVIDERS[FLAGGED].remedy.format(name=provider.name)
    model = f"check base_url, and whether there is a model {provider.settings.model}"
    remedies = {ProviderAuthError.code: key, ProviderRefused.code: model}
    text = f"{fault.code}: {fault.message.partition(': ')[0]}"
    return text, remedies.get(fault.code, "docs/errors.md explains this code")


async def _continuation(client: Client, provider: Provider) -> Result:
    """Check that the provider continues an answer that broke off, in the configured form.

    With a form that the provider does not know, a client would see the same text twice.
    """
    form, began = provider.settings.continuation, time.perf_counter()
    body = orjson.loads(await continued(COUNTING, form, SAID, 0))
    text, error = await _ask(client, provider, whole=True, **body)
    words = " ".join(text.lower().split())
    again, rest = words.startswith(SAID), words.removeprefix(SAID).lstrip(" ,.;-")
    if error is not None:
        problem = f"does not go on with an answer: {_meaning(provider, error)[0]}"
    elif not words:
        problem = "says nothing where an answer broke off"
    elif not rest.startswith(FOLLOWING) or (form == INSTRUCT and not again):
        problem = "begins a new turn where an answer broke off"
    elif again and form not in {INSTRUCT, PREFIXED}:
        problem = "says the beginning again where an answer broke off"
    else:
        took = time.perf_counter() - began
        return ok(f"goes on with an answer that broke off ({form})", seconds=took)
    return warn(problem, f"another `continuation` than {form}, or none: docs/rescue.md")


async def _agents(url: str, provider: Provider) -> AsyncIterator[Result]:
    """Ask for a call of a tool as agents do, over the server at *url*, which translates that for a
    provider that has chat completions only.

    This finds models that answer with text instead of a call, and engines that leave calls in the
    text.
    """
    settings, bridged = provider.settings, provider.meter.bridged
    for path, question in QUESTIONS.items():
        shown, before, began = f"/v1/{path}", bridged[path].value, time.perf_counter()
        if path == "messages" and settings.messages is False:
            yield skip(f"{shown}: not asked for, as messages is false")
            continue
        body = {"model": f"{provider.name}/{settings.model}", **question}
        async with (
            remote.session(None) as session,
            session.post(url + shown, json=body) as response,
        ):
            data = await response.read()
        took = time.perf_counter() - began
        calls, arguments = len(CALLS.findall(data)), b"".join(ARGUMENTS.findall(data))
        if not END.search(data):
            hint = "docs/errors.md explains the codes of errors"
            if path == "messages" and response.status in ABSENT_STATUSES:
                hint = "`messages: auto` has its requests translated, if it has no such path"
            yield warn(f"{shown}: no whole answer: HTTP {response.status}", hint)
        elif bridged[path].value == before:
            yield ok(f"{shown}: the provider has it, and answers", seconds=took)
        elif calls == 1 and rb"\"word\"" in arguments:
            yield ok(f"{shown}, translated: its tool was called", seconds=took)
        else:
            text = f"{calls} calls of its tool came, or without its argument"
            yield warn(f"{shown}, translated: {text}", NO_CALL)


async def _models(provider: Provider) -> dict[str, Any] | ProviderFault | None:
    """Ask for the list of models of *provider*, which costs nothing, and for which most providers
    check the key. Return the `max_model_len` of each model; None for a list that cannot be read.
    """
    # Anthropic demands the version here, too.
    headers = {"anthropic-version": "2023-06-01"} if provider.settings.messages is True else {}
    request, body = PassedRequest("GET", "models", lambda *_: b"", headers), bytearray()
    running = asyncio.ensure_future(provider.run(PassedAttempt(provider, request, None)))
    running.add_done_callback(lambda _: request.answer.stop())
    while len(body) < MAX_BYTES and (part := await request.answer.take()):
        body.extend(part)
    # It has ended, unless the list is too long.
    running.cancel()
    await asyncio.wait((running,))
    if not running.cancelled() and (fault := running.exception()) is not None:
        assert isinstance(fault, ProviderFault), fault
        return fault
    with contextlib.suppress(orjson.JSONDecodeError):
        match orjson.loads(body):
            case {"data": list(entries)}:
                listed = [entry for entry in entries if isinstance(entry, dict)]
                return {str(each.get("id")): each.get("max_model_len") for each in listed}
    return None


async def groups(facts: Facts) -> AsyncIterator[Result]:
    """Check whether each member of a group lists its model, and takes prompts of the same length.

    Each provider is asked only once.
    """
    known, llm = facts.server.provider_registry.providers, facts.server.context.settings.llm
    lists: dict[str, dict[str, Any] | ProviderFault | None] = {}
    for name, group in ({} if facts.only else llm.groups()).items():
        subject, lengths = f"group {name}", {}
        for member in group.members:
            owner, settings = member.provider, known[member.provider].settings
            model = member.model or settings.model
            # A provider that is off is reported above, and the simulated provider has any model.
            if not settings.usable or settings.simulated:
                continue
            if owner not in lists:
                lists[owner] = await _models(known[owner])
            if not isinstance(models := lists[owner], dict):
                yield skip(f"{owner} shows no list of models that can be read", subject=subject)
            elif not (fitting := [each for each in models if _names(each, model)]):
                hint = "check `model` of the member, and the name by which its engine serves the model"
                text = f"{owner} does not list {model} under /v1/models"
                yield warn(text, hint, subject=subject)
            else:
                yield ok(f"{owner} lists {model}", subject=subject)
                if isinstance(length := models[fitting[0]], int):
                    lengths[owner, member.max_context] = length
        for (owner, bound), length in lengths.items():
            if bound is None and length < (most := max(lengths.values())):
                text = f"{owner} takes {length:,} tokens, and others take {most:,}"
                hint = f"set max_context: {length} there, so that longer prompts go to the others"
                yield warn(f"{text} (max_model_len)", hint, subject=subject)


def _names(listed: str, model: str) -> bool:
    """Return whether *listed* is the name of *model*: Ollama's names have a tag, and Gemini's a
    folder, which requests may leave out.
    """
    return listed in {model, f"{model}:latest"} or listed.endswith(f"/{model}")
