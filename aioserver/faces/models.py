"""The models that a client may ask for: `GET /v1/models`, and one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiohttp import web

from aioserver.auth.callers import CALLER
from aioserver.errors import ModelNotFound
from aioserver.gateway.groups import Modalities
from aioserver.provider_errors import NoProvider

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aioserver.auth.callers import Caller
    from aioserver.faces.context import Context
    from aioserver.faces.form import Form
    from aioserver.gateway.request import Route
    from aioserver.gateway.router import Router
    from aioserver.providers.request import Api

# The owner that is shown for the names of `llm.models`.
OURS = "aioserver"
# What clients hear of a simulated model, which takes a prompt of any length: without a context some
# agents take a model for one of a million tokens.
SIMULATED_CONTEXT = 200_000
SIMULATED_MODALITIES = Modalities(("text", "image"), ("text",))


async def listing(context: Context, request: web.Request) -> web.Response:
    """Answer `GET /v1/models` with the usable providers and their models, without asking a
    provider.

    A client gets the models that speak its API, in the form that it expects.
    """
    form, router = context.admission.forms.of(request), context.router
    entries, caller = [], request[CALLER]
    for name, owner in _names(router, form.api, caller):
        try:
            route = router.route(name, caller=caller, api=form.api)
        except (ModelNotFound, NoProvider):
            continue
        entries.append(_model(form, route, name, owner))
    return web.json_response(form.models(entries))


def _model(form: Form, route: Route, name: str, owner: str | None) -> dict[str, Any]:
    """Return the entry of the model *name*, which *route* leads to."""
    settings, group = route.provider.settings, route.group
    context, modalities = group.max_context(route.model), group.modalities
    if settings.simulated:
        context = context or SIMULATED_CONTEXT
        modalities = modalities if any(modalities) else SIMULATED_MODALITIES
    owner = owner or settings.name
    return form.model(name, owner, context, modalities, simulated=settings.simulated)


async def model(context: Context, request: web.Request) -> web.Response:
    """Answer `GET /v1/models/{id}` with the provider to which a request for this model goes.

    A model that names no provider goes to the active one, and only that provider knows whether it
    has the model: `listed` is false if the configuration does not list it.

    Raises:
        ModelNotFound, NoProvider: a request for this model would be refused, too.
    """
    name, form = request.match_info["id"], context.admission.forms.of(request)
    route = context.router.route(name, caller=request[CALLER], api=form.api)
    provider = route.provider.settings
    ours = name in context.router.groups
    entry = _model(form, route, name, OURS if ours else None)
    known = route.model in (None, provider.model, *provider.models)
    if not known and not route.group.name:
        entry["listed"] = False
    return web.json_response(entry)


def _names(router: Router, api: Api, caller: Caller) -> Iterator[tuple[str, str]]:
    """Yield the names by which *caller* may ask for models of *api*, as `_all_names`.

    A name that belongs to the caller's key is included, though no other caller sees it.
    """
    names = {name: owner for name, owner in _all_names(router, api) if caller.may_ask(name)}
    for name in caller.models or ():
        if not name.endswith("*"):
            names.setdefault(name, "")
    yield from names.items()


def _all_names(router: Router, api: Api) -> Iterator[tuple[str, str]]:
    """Yield the names by which models of *api* can be asked for, each with its owner. The owner is
    empty if the name leads to a provider.
    """
    for name in router.groups:
        if not name.endswith("*"):
            yield name, OURS
    for owner, provider in router.providers.items():
        configured = provider.settings
        if not configured.usable:
            continue
        yield owner, ""
        for name in dict.fromkeys((configured.model, *configured.models)):
            yield f"{owner}/{name}", ""
    for name, group in router.listed.items():
        if name not in router.groups and name not in router.providers and group.usable(api):
            yield name, ""
