"""The groups: whether each member lists the model that it is asked for, and takes prompts of the
same length as the others.

`GET /models` costs nothing. Of what a provider says, only names of ours and lengths are shown.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.provider_errors import ProviderFault
from aioserver.providers.passthrough import PassedAttempt, PassedRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.config.settings import Llm, Member
    from aioserver.providers.provider import Provider
    from aioserver.tools.doctor.findings import Report

# OpenRouter's list has 500 KiB.
MAX_BYTES = 1 << 22


def models_request(path: str = "models") -> PassedRequest:
    """Return a request for the list of a provider's models, at *path* below its base URL."""
    return PassedRequest("GET", path, lambda _settings, _model: b"", {})


async def examine_groups(report: Report, llm: Llm, providers: Mapping[str, Provider]) -> None:
    """Examine the groups of *llm*, whose members are of *providers*; each is asked once."""
    groups = llm.groups()
    names = dict.fromkeys(member.provider for group in groups.values() for member in group.members)
    lists: dict[str, dict[str, int | None] | None] = {}
    for name in names:
        settings = providers[name].settings
        if settings.usable and not settings.simulated:
            lists[name] = await models_of(providers[name])
    for name, group in groups.items():
        lengths: dict[str, int] = {}
        for member in group.members:
            length = _examine_member(report, f"group {name}", llm, member, lists)
            if length is not None:
                lengths[member.provider] = length
        most = max(lengths.values(), default=0)
        for member in group.members:
            length = lengths.get(member.provider, most)
            if length < most and member.max_context is None:
                report.warn(
                    f"group {name}",
                    f"{member.provider} takes {length:,} tokens, and others take {most:,} "
                    "(max_model_len)",
                    f"set max_context: {length} there, so that longer prompts go to the others",
                )


def _examine_member(
    report: Report,
    subject: str,
    llm: Llm,
    member: Member,
    lists: Mapping[str, dict[str, int | None] | None],
) -> int | None:
    """Say whether *member* lists its model; return the tokens that this one takes, if known."""
    name = member.provider
    model = member.model or llm.providers[name].model
    if name not in lists:
        off = not llm.providers[name].usable
        report.skip(subject, f"{name} is off" if off else f"{name} is simulated: it has any model")
        return None
    models = lists[name]
    if models is None:
        report.skip(subject, f"{name} shows no list of models that can be read")
        return None
    # Ollama's names have a tag, and Gemini's a folder, which requests may leave out.
    listed = next((id_ for id_ in models if _same(id_, model)), None)
    if listed is None:
        report.warn(
            subject,
            f"{name} does not list {model} under /v1/models",
            "check `model` of the member, and the name by which its engine serves the model",
        )
        return None
    report.ok(subject, f"{name} lists {model}")
    return models[listed]


def _same(listed: str, model: str) -> bool:
    return listed in {model, f"{model}:latest"} or listed.endswith(f"/{model}")


async def models_of(provider: Provider, path: str = "models") -> dict[str, int | None] | None:
    """Return the models that *provider* lists at *path* below its base URL, each with its
    `max_model_len`, if it has one; None if there is no such list.
    """
    try:
        content: Any = orjson.loads(await _read(provider, path))
    except (ProviderFault, orjson.JSONDecodeError):
        return None
    entries = content.get("data") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        return None
    models: dict[str, int | None] = {}
    for entry in entries:
        if isinstance(entry, dict) and isinstance(id_ := entry.get("id"), str):
            length = entry.get("max_model_len")
            models[id_] = length if isinstance(length, int) and length > 0 else None
    return models


async def _read(provider: Provider, path: str) -> bytes:
    """Return the list of models of *provider*, or as much as MAX_BYTES of it.

    Raises:
        ProviderFault: it has no good answer.
    """
    request = models_request(path)
    running = asyncio.ensure_future(provider.run(PassedAttempt(provider, request, None)))
    running.add_done_callback(lambda _task: request.answer.stop())
    body = bytearray()
    try:
        while len(body) < MAX_BYTES and (part := await request.answer.take()):
            body += part
        if running.done():
            await running
    finally:
        running.cancel()
        await asyncio.wait((running,))
    return bytes(body)
