"""`stream_options` in a body: who has asked for the usage, and the bytes that ask for it."""

from __future__ import annotations

import json

import pytest

from aioserver.protocol.model_body import (
    MAX_OPTIONS_BYTES,
    MAX_READ_TWICE,
    ModelBody,
    asking,
    reading,
)
from aioserver.protocol.steps import at_once

ASKING = b'"stream_options":{"include_usage":true}'


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (b"{}", b"{%b}" % ASKING),
        (b'{"model":"m"}', b'{%b,"model":"m"}' % ASKING),
        (b' {\n "model": "m" } ', b' {\n %b,"model": "m" } ' % ASKING),
        (b'{"stream_options":null,"a":1}', b'{%b,"a":1}' % ASKING),
        (b'{"a":1,"stream_options": {}}', b'{"a":1,"stream_options": {"include_usage":true}}'),
        (
            b'{"stream_options":{ "include_obfuscation":false }}',
            b'{"stream_options":{ "include_usage":true,"include_obfuscation":false }}',
        ),
        (
            b'{"stream_options":{"x":[1],"include_usage" : false, "y":{}}}',
            b'{"stream_options":{"x":[1],"include_usage" : true, "y":{}}}',
        ),
        (
            b'{"stream_options":{"include_usage":null}}',
            b'{"stream_options":{"include_usage":true}}',
        ),
        # What is nested, and what is a text, is none of it.
        (
            b'{"tools":[{"stream_options":null}],"t":"\\"stream_options\\":null"}',
            b'{%b,"tools":[{"stream_options":null}],"t":"\\"stream_options\\":null"}' % ASKING,
        ),
        (
            b'{"tools":[{"stream_options":{}}],"stream_options":{}}',
            b'{"tools":[{"stream_options":{}}],%b}' % ASKING,
        ),
        # Of several the last counts, as it does for whoever reads the body.
        (
            b'{"stream_options":{"include_usage":true},"stream_options":null}',
            b'{"stream_options":{"include_usage":true},%b}' % ASKING,
        ),
        (
            b'{"stream_options":{"include_usage":true,"include_usage":false}}',
            b'{"stream_options":{"include_usage":true,"include_usage":true}}',
        ),
        (b'{"stream\\u005foptions":null}', b'{"stream\\u005foptions":{"include_usage":true}}'),
    ],
)
def test_members_are_edited_where_they_stand(body: bytes, sent: bytes) -> None:
    options = ModelBody(body).usage_options
    assert options is not None
    assert asking(body, options) == sent
    assert json.loads(sent)["stream_options"]["include_usage"] is True


@pytest.mark.parametrize(
    "options",
    [
        b'{"include_usage":true}',
        b'{"include_usage":false,"include_usage":true}',
        # Whatever means nothing is for the engine to refuse.
        b'{"include_usage":1}',
        b'{"include_usage":"yes"}',
        b"[]",
        b"7",
        b'"x"',
        b"false",
        b'{"x":"%b"}' % (b"x" * MAX_OPTIONS_BYTES),
    ],
)
def test_who_asks_and_what_means_nothing_is_left_alone(options: bytes) -> None:
    assert ModelBody(b'{"stream_options":%b}' % options).usage_options is None


@pytest.mark.parametrize("size", [MAX_READ_TWICE, 3 << 20])
def test_long_bodies_are_read_in_the_same_way(size: int) -> None:
    text = b'[%b""]' % (b'"x",' * (size // 4))
    for options in (b'{"include_usage":false}', b"null"):
        data = b'{"messages":%b,"stream_options":%b,"model":"m"}' % (text, options)
        body = at_once(reading(data))
        assert body.usage_options == options
        assert json.loads(asking(body.data, options))["stream_options"] == {"include_usage": True}
