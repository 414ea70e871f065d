"""The chat page and its assets: nothing inline, nothing loaded from elsewhere."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from aioserver import __version__

if TYPE_CHECKING:
    from tests.support.server import MakeServer, RunningServer

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
        ("/client.js", "text/javascript"),
        ("/client.d.ts", "application/typescript"),
        (f"/client/{__version__}.js", "text/javascript"),
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
        assert response.headers["Vary"] == "Origin"


@pytest.mark.parametrize(
    "path",
    ["/assets/", "/assets/chat/index.html", "/assets/nothing.js", "/assets/..%2f__init__.py"],
)
async def test_nothing_else_is_served(server: RunningServer, path: str) -> None:
    async with server.session.get(server.base + path) as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "not_found"


@pytest.mark.parametrize("path", ["/", "/client.js", "/assets/chat/chat.js"])
async def test_what_a_browser_has_already_is_not_sent_again(
    server: RunningServer, path: str
) -> None:
    headers = {"Accept": BROWSER}
    async with server.session.get(server.base + path, headers=headers) as response:
        assert response.headers["Cache-Control"] == "no-cache"
        tag = response.headers["ETag"]
    for known, status in ((tag, 304), ("*", 304), (f'"x", {tag}', 304), ('"x"', 200)):
        headers["If-None-Match"] = known
        async with server.session.get(server.base + path, headers=headers) as response:
            assert response.status == status
            assert response.headers["ETag"] == tag
            assert bool(await response.read()) == (status == 200)


async def test_the_client_of_this_version_may_be_kept_for_ever_and_no_other_is_served(
    server: RunningServer,
) -> None:
    async with server.session.get(server.base + "/client.js") as response:
        newest = await response.read()
    async with server.session.get(f"{server.base}/client/{__version__}.js") as response:
        assert await response.read() == newest
        assert response.headers["Cache-Control"] == "public, max-age=31536000, immutable"
        tag = response.headers["ETag"]
    headers = {"If-None-Match": tag}
    async with server.session.get(
        f"{server.base}/client/{__version__}.js", headers=headers
    ) as response:
        assert response.status == 304
        assert "immutable" in response.headers["Cache-Control"]
    for version in ("0.0.1", "latest", "..%2fclient"):
        async with server.session.get(f"{server.base}/client/{version}.js") as response:
            assert response.status == 404
            assert response.headers.get("Cache-Control") is None
            error = (await response.json())["error"]
        assert error["code"] == "not_found"
        assert f"/client/{__version__}.js" in error["message"]


async def test_pages_of_allowed_origins_may_import_the_client(make_server: MakeServer) -> None:
    ours, other = "https://chat.example.com", "https://evil.example"
    server = await make_server(**{"chat.websocket.allow_origins": [ours]})
    for path in ("/client.js", f"/client/{__version__}.js", "/client.d.ts"):
        for origin, allowed in ((ours, ours), (other, None)):
            headers = {"Origin": origin}
            async with server.session.get(server.base + path, headers=headers) as response:
                assert response.status == 200
                assert response.headers.get("Access-Control-Allow-Origin") == allowed
                assert response.headers.getall("Vary") == ["Origin"]
