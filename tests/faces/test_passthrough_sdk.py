"""OpenAI's own client on the paths that are passed on: files, batches, audio, images,
moderations.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import openai
import pytest
from openai import AsyncOpenAI

from tests.support.keys import key_of, keys_of
from tests.support.passing import Account, Passed, answer, settings_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.server import MakeServer, RunningServer

FILE = {
    "id": "file-1",
    "object": "file",
    "bytes": 5,
    "created_at": 1,
    "filename": "a.jsonl",
    "purpose": "batch",
    "status": "processed",
}
BATCH = {
    "id": "batch_1",
    "object": "batch",
    "endpoint": "/v1/responses",
    "input_file_id": "file-1",
    "completion_window": "24h",
    "status": "validating",
    "created_at": 1,
}
STORE = {
    "id": "vs_1",
    "object": "vector_store",
    "created_at": 1,
    "name": "n",
    "usage_bytes": 0,
    "status": "completed",
    "file_counts": {"in_progress": 0, "completed": 0, "failed": 0, "cancelled": 0, "total": 0},
}
VIDEO = {
    "id": "video_1",
    "object": "video",
    "created_at": 1,
    "model": "sora-2",
    "progress": 0,
    "seconds": "4",
    "size": "720x1280",
    "status": "queued",
}
DECISION = {
    "model": "gpt-6-luna",
    "answers": [{"type": "predicate", "probability": 0.75}],
    "usage": {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 1,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 10,
    },
}
CONTENT = bytes(range(256)) * 400
ANSWERS: dict[str, object] = {
    "POST files": FILE,
    "GET files": {"object": "list", "data": [FILE], "has_more": False},
    "GET files/file-1": FILE,
    "DELETE files/file-1": {"id": "file-1", "object": "file", "deleted": True},
    "POST batches": BATCH,
    "GET batches": {"object": "list", "data": [BATCH], "has_more": False},
    "POST batches/batch_1/cancel": {**BATCH, "status": "cancelling"},
    "POST vector_stores": STORE,
    "POST audio/transcriptions": {"text": "hello"},
    "POST images/generations": {"created": 1, "data": [{"b64_json": "eA=="}]},
    "POST images/edits": {"created": 1, "data": [{"b64_json": "eA=="}]},
    "POST decisions": DECISION,
    "POST videos": VIDEO,
    "GET videos/video_1": {**VIDEO, "status": "completed", "progress": 100},
    "GET videos": {"object": "list", "data": [VIDEO], "has_more": False},
    "DELETE videos/video_1": {"id": "video_1", "object": "video.deleted", "deleted": True},
    "POST moderations": {"id": "m", "model": "omni", "results": []},
}


def reply(passed: Passed) -> bytes:
    path = passed.target.partition("?")[0].removeprefix("/v1/")
    name = f"{passed.method} {path}"
    if name in {"GET files/file-1/content", "GET videos/video_1/content"}:
        return answer(CONTENT, 200, "Content-Type: application/octet-stream")
    if name == "POST audio/speech":
        return answer(CONTENT, 200, "Content-Type: audio/mpeg")
    if name in ANSWERS:
        return answer(json.dumps(ANSWERS[name]).encode())
    return answer(b'{"error":{"message":"no such object","code":"theirs"}}', 404)


@pytest.fixture
async def account() -> AsyncIterator[Account]:
    async with Account(reply) as provider:
        yield provider


@pytest.fixture
async def passing(make_server: MakeServer, account: Account) -> RunningServer:
    return await make_server(**settings_for(account), **keys_of("web", "root"))


@pytest.fixture
async def admin(passing: RunningServer) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key=key_of("root"), base_url=passing.v1, max_retries=0) as client:
        yield client


@pytest.fixture
async def web(passing: RunningServer) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key=key_of("web"), base_url=passing.v1, max_retries=0) as client:
        yield client


async def test_files_are_those_of_the_providers_account(
    admin: AsyncOpenAI, account: Account
) -> None:
    created = await admin.files.create(file=("a.jsonl", CONTENT), purpose="batch")
    listed = await admin.files.list(purpose="batch", limit=5)
    retrieved = await admin.files.retrieve("file-1")
    content = await admin.files.content("file-1")
    deleted = await admin.files.delete("file-1")

    assert created.id == retrieved.id == "file-1"
    assert [file.filename for file in listed.data] == ["a.jsonl"]
    assert content.content == CONTENT
    assert deleted.deleted
    assert CONTENT in account.passed[0].body
    assert account.passed[0].headers["content-type"].startswith("multipart/form-data; boundary=")
    assert account.passed[1].target == "/v1/files?limit=5&purpose=batch"


async def test_batches_and_vector_stores_are_made_and_cancelled(
    admin: AsyncOpenAI, account: Account
) -> None:
    batch = await admin.batches.create(
        completion_window="24h", endpoint="/v1/responses", input_file_id="file-1"
    )
    cancelled = await admin.batches.cancel(batch.id)
    assert [batch.id async for batch in admin.batches.list()] == ["batch_1"]
    store = await admin.vector_stores.create(name="n")

    assert (batch.status, cancelled.status) == ("validating", "cancelling")
    assert store.id == "vs_1"
    assert json.loads(account.passed[0].body)["input_file_id"] == "file-1"


async def test_questions_of_every_kind_pass_for_a_key_that_is_no_admin(
    web: AsyncOpenAI, account: Account
) -> None:
    speech = await web.audio.speech.create(model="tts-1", voice="alloy", input="Hello")
    text = await web.audio.transcriptions.create(model="whisper-1", file=("a.mp3", CONTENT))
    image = await web.images.generate(model="gpt-image-1", prompt="A house")
    edit = await web.images.edit(model="gpt-image-1", image=("a.png", CONTENT), prompt="Red")
    moderation = await web.moderations.create(input="Hello")
    async with web.audio.speech.with_streaming_response.create(
        model="tts-1", voice="alloy", input="Hello"
    ) as streamed:
        parts = [part async for part in streamed.iter_bytes(1000)]

    assert speech.content == b"".join(parts) == CONTENT
    assert text.text == "hello"
    assert image.data is not None
    assert edit.data is not None
    assert moderation.id == "m"
    assert json.loads(account.passed[0].body)["model"] == "tts-1"
    assert CONTENT in account.passed[1].body
    assert json.loads(account.passed[4].body) == {"input": "Hello"}


# OpenAI's own videos are over; others have the path.
@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
async def test_decisions_and_videos_pass_where_the_provider_has_opened_them(
    make_server: MakeServer, account: Account
) -> None:
    opened = {
        "llm.providers.sim.account_paths": False,
        "llm.providers.sim.pass_paths": ["decisions", "videos"],
    }
    server = await make_server(**settings_for(account, **opened), **keys_of("web"))
    async with AsyncOpenAI(api_key=key_of("web"), base_url=server.v1, max_retries=0) as web:
        decision = await web.decisions.create(
            model="gpt-6-luna",
            input="A refund, please.",
            questions=[{"type": "predicate", "instructions": "Is it about money?"}],
            safety_identifier="u",
        )
        video = await web.videos.create(prompt="A house", model="sora-2", seconds="4")
        polled = await web.videos.retrieve(video.id)
        content = await web.videos.download_content(video.id)
        listed = [each.id async for each in web.videos.list()]
        deleted = await web.videos.delete(video.id)
        with pytest.raises(openai.NotFoundError):
            await web.files.list()

    assert decision.answers[0].type == "predicate"
    assert json.loads(account.passed[0].body)["safety_identifier"] == "u"
    assert (video.status, polled.status) == ("queued", "completed")
    assert content.content == CONTENT
    assert listed == [video.id]
    assert deleted.deleted


async def test_refusals_are_the_sdks_own_exceptions(
    web: AsyncOpenAI, admin: AsyncOpenAI, account: Account
) -> None:
    with pytest.raises(openai.PermissionDeniedError):
        await web.files.list()
    assert account.passed == []
    with pytest.raises(openai.NotFoundError) as caught:
        await admin.files.retrieve("file-2")

    assert caught.value.code == "theirs"
