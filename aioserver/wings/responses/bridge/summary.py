"""A conversation in summary: the question for it, and the item that stands for the conversation.

The name `encrypted_content` is the API's. The text in it is only encoded: the item goes to the
client that has sent the conversation, and comes back from it.
"""

from __future__ import annotations

import base64
import uuid

import msgspec
import orjson
from msgspec import Raw

from aioserver.protocol import json_body
from aioserver.protocol.bridging.reading import members
from aioserver.protocol.json_body import ABSENT
from aioserver.wings.responses.items import input_items

# The beginning of the content of an item that was made here.
_MARK = "aioserver:1:"
_QUESTION = (
    "Summarize this conversation for yourself: you will go on with it, and know nothing of it but "
    "your summary. Keep each decision, fact, name, number and path that matters, what was asked "
    "and is not done yet, and the results of tools that are still needed. Answer with the summary "
    "alone."
)
_INTRODUCTION = "The conversation so far, in summary:\n\n"


class _Asked(msgspec.Struct, gc=False):
    model: str
    instructions: Raw = ABSENT
    previous_response_id: Raw = ABSENT
    service_tier: Raw = ABSENT
    prompt_cache_key: Raw = ABSENT


_ASKED = msgspec.json.Decoder(_Asked)


def question(body: bytes) -> bytes:
    """Return the request for the summary of the conversation in *body*.

    Raises:
        InvalidJson, InvalidRequest: *body* is no request with a model.
    """
    asked = json_body.decode(_ASKED, body, "the body")
    message = orjson.dumps({"type": "message", "role": "user", "content": _QUESTION})
    items = b",".join(filter(None, (input_items(body), message)))
    further = members(
        (b"instructions", asked.instructions),
        (b"previous_response_id", asked.previous_response_id),
        (b"service_tier", asked.service_tier),
        (b"prompt_cache_key", asked.prompt_cache_key),
    )
    return b'{"model":%b,"store":false,"input":[%b]%b}' % (
        orjson.dumps(asked.model),
        items,
        further,
    )


def summary_item(text: str) -> dict[str, str]:
    """Return the compaction item with the summary *text*."""
    return {
        "id": f"cmp_{uuid.uuid4().hex}",
        "type": "compaction",
        "encrypted_content": _MARK + base64.b64encode(text.encode()).decode(),
    }


def summary_of(content: str) -> bytes | None:
    """Return the message, a JSON string, that stands for a compaction item with this *content*;
    None if the item was not made here.
    """
    encoded = content.removeprefix(_MARK)
    if encoded == content:
        return None
    try:
        text = base64.b64decode(encoded, validate=True).decode()
    except ValueError:
        return None
    return orjson.dumps(_INTRODUCTION + text)
