"""The chat page and its assets: nothing inline, nothing loaded from elsewhere."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.server import RunningServer

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


async def test_a_browser_gets_the_page_and_a_program_json(server: RunningServer) -> None:
    async with server.session.get(server.base + "/", headers={"Accept": BROWSER}) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        assert (await response.text()).startswith("<!doctype html>")
    for accept in ("application/json", "*/*"):
        async with server.session.get(server.base + "/", headers={"Accept": accept}) as response:
            assert response.headers["Content-Type"] == "application/json; charset=utf-8"
            assert (await response.json())["name"] == "aioserver"


async def test_the_page_loads_only_what_is_here_and_runs_nothing_inline(
    server: RunningServer,
) -> None:
    async with server.session.get(server.base + "/", headers={"Accept": BROWSER}) as response:
        page = await response.text()
    links = re.findall(r'(?:src|href)="([^"]+)"', page)

    assert links
    for link in links:
        assert link.startswith("/assets/") or link == "/dashboard"
        async with server.session.get(server.base + link) as response:
            assert response.status == 200
            body = await response.text()
        assert "innerHTML" not in body
        assert not re.search(r"https?://(?!www\.w3\.org/)", body)
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=|javascript:", page)
    assert not re.search(r"https?://", page)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/assets/chat/chat.js", "text/javascript"),
        ("/assets/chat/chat.css", "text/css"),
        ("/assets/icon.svg", "image/svg+xml"),
    ],
)
async def test_every_page_is_guarded_by_its_headers(
    server: RunningServer, path: str, kind: str
) -> None:
    async with server.session.get(server.base + path, headers={"Accept": BROWSER}) as response:
        assert response.status == 200
        assert response.content_type == kind
        assert await response.read()
        policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize(
    "path",
    ["/assets/", "/assets/chat/index.html", "/assets/nothing.js", "/assets/..%2f__init__.py"],
)
async def test_nothing_else_is_served(server: RunningServer, path: str) -> None:
    async with server.session.get(server.base + path) as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "not_found"
