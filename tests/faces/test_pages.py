"""The chat page and its assets: nothing inline, nothing loaded from elsewhere."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files
from typing import TYPE_CHECKING

import pytest

from aioserver import __version__

if TYPE_CHECKING:
    from tests.support.server import MakeServer, RunningServer

# The SHA-256 of each file of others, in the folder `vendor`, as it was released.
VENDORED = {
    # uPlot 1.6.32, MIT
    "uplot.js": "4408ace91a18b4888998171e122da65b9ab28711c30f19a6a591491c5a82caf1",
    "uplot.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "uplot.LICENSE.txt": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
    # marked 18.2.1, MIT: lib/marked.esm.js
    "marked.js": "5371fea86fd0656b4fc7bea7c94c663109d82789b69433eeee78d42895aa44de",
    "marked.LICENSE.txt": "8e3a3f82f59a60958f56ca08f445647c32a4733dc7ca6c2c46f6eb898471ab9c",
    # DOMPurify 3.5.0, Apache-2.0 or MPL-2.0: dist/purify.min.js
    "dompurify.js": "f69a46022ab1f53e969c8ebbca98172c8995785a9b3be72ea4a12d25b1a1bf67",
    "dompurify.LICENSE.txt": "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30",
    "dompurify.LICENSE-MPL.txt": "fab3dd6bdab226f1c08630b1dd917e11fcb4ec5e1e020e2c16f83a0a13863e85",
}
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


def test_files_of_others_are_as_they_were_released() -> None:
    folder = files("aioserver.faces").joinpath("assets", "vendor")
    found = {file.name: hashlib.sha256(file.read_bytes()) for file in folder.iterdir()}

    assert {name: sum_.hexdigest() for name, sum_ in found.items()} == VENDORED
    for name, version in {"uplot": "1.6.32", "marked": "18.2.1", "dompurify": "3.5.0"}.items():
        assert version in folder.joinpath(f"{name}.js").read_text()[:400]


async def test_every_page_is_guarded_by_its_headers(server: RunningServer) -> None:
    for path, kind in [
        ("/", "text/html"),
        ("/dashboard", "text/html"),
        ("/assets/chat/chat.js", "text/javascript"),
        ("/assets/chat/chat.css", "text/css"),
        ("/assets/vendor/dompurify.js", "text/javascript"),
        ("/assets/icon.svg", "image/svg+xml"),
        ("/client.js", "text/javascript"),
        ("/client.d.ts", "application/typescript"),
        (f"/client/{__version__}.js", "text/javascript"),
    ]:
        async with server.session.get(server.base + path, headers={"Accept": BROWSER}) as response:
            assert response.status == 200, path
            assert response.content_type == kind, path
            assert await response.read(), path
            policy = response.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'self';"), path
            assert "unsafe" not in policy, path
            assert response.headers["X-Content-Type-Options"] == "nosniff", path
            assert response.headers["Referrer-Policy"] == "no-referrer", path
            assert response.headers["Vary"] == "Origin", path


async def test_nothing_else_is_served(server: RunningServer) -> None:
    for path in [
        "/assets/",
        "/assets/chat/index.html",
        "/assets/dashboard/index.html",
        "/assets/nothing.js",
        "/assets/vendor/marked.LICENSE.txt",
        "/assets/..%2f__init__.py",
    ]:
        async with server.session.get(server.base + path) as response:
            assert response.status == 404, path
            assert (await response.json())["error"]["code"] == "not_found", path


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
