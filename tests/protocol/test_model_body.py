"""A body with a model: what is read of it, and that nothing but the value of `model` is ever
replaced.
"""

from __future__ import annotations

import pytest

from aioserver.errors import InvalidRequest
from aioserver.protocol.model_body import MAX_PLACES, ModelBody


def body(text: str) -> ModelBody:
    return ModelBody(text.encode())


def test_what_is_read() -> None:
    parsed = body(
        '{"model":"m","stream":true,"user":"u","store":true,"background":false,"x":[{"model":1}]}'
    )

    assert (parsed.model, parsed.streamed, parsed.user) == ("m", True, "u")
    assert (parsed.stored, parsed.background) == (True, False)


@pytest.mark.parametrize("first", ["", '"stream":null,"n":"1",'])
def test_a_safety_identifier_is_the_user_where_there_is_none(first: str) -> None:
    assert body(f'{{{first}"safety_identifier":"s"}}').user == "s"
    assert body(f'{{{first}"user":null,"safety_identifier":"s"}}').user == "s"
    assert body(f'{{{first}"user":"u","safety_identifier":"s"}}').user == "u"


# The second form is that of a body whose other members make it be read again.
@pytest.mark.parametrize("first", ["", '"stream":null,"n":"1",'])
def test_the_window_of_an_answer_in_the_background(first: str) -> None:
    for options, window in (
        ("null", None),
        ("{}", None),
        ('{"completion_window":null}', None),
        ('{"continuation_id":"c","completion_window":"2h"}', "2h"),
        ('{"completion_window":""}', ""),
        ('{"completion_window":7200}', ""),
        ('{"completion_window":["2h"]}', ""),
        ('{"completion_window":{"2h":true}}', ""),
        (f'{{"completion_window":"{"x" * 2000}"}}', ""),
    ):
        assert body(f'{{{first}"background_options":{options}}}').completion_window == window
    for options in ("[]", '"2h"', "7", "true"):
        with pytest.raises(InvalidRequest) as refused:
            _ = body(f'{{{first}"background_options":{options}}}').completion_window
        assert refused.value.param == "background_options"
    assert body("{}").completion_window is None


def test_what_is_absent_or_null_is_not_set() -> None:
    for text in (
        "{}",
        '{"model":null,"stream":null,"user":null,"store":null}',
        '{"user":{"a":1}}',
        '{"safety_identifier":{"a":1}}',
    ):
        parsed = body(text)

        assert (parsed.model, parsed.streamed, parsed.user) == (None, False, None)
        assert not parsed.stored


@pytest.mark.parametrize(
    ("text", "param"),
    [
        *(('{"model":7}', "model"), ('{"model":""}', "model"), ('{"model":["a"]}', "model")),
        *(
            ('{"stream":1}', "stream"),
            ('{"stream":"true"}', "stream"),
            ('{"stream":[]}', "stream"),
        ),
        (f'{{"model":"{"x" * 4095}"}}', "model"),
        ("[]", None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_wrong_field_is_named(text: str, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        body(text)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", '{"model":"new"}'),
        (" { } ", ' { "model":"new"} '),
        ('{ "a" : 1 }', '{ "model":"new","a" : 1 }'),
        ('{"model":null}', '{"model":"new"}'),
        ('{"a":1, "model" :\t"groq" , "b":2.50}', '{"a":1, "model" :\t"new" , "b":2.50}'),
        (r'{"model":"gr\u006fq"}', '{"model":"new"}'),
        # The last of several keys is the one that is read, however it is written.
        ('{"model":"x","model":"groq"}', '{"model":"x","model":"new"}'),
        ('{"model":"groq","model":"groq"}', '{"model":"groq","model":"new"}'),
        (r'{"model":"groq","mod\u0065l":"groq"}', r'{"model":"groq","mod\u0065l":"new"}'),
        (
            r'{"\u006dod\u0065l":"groq","model":"groq"}',
            r'{"\u006dod\u0065l":"groq","model":"new"}',
        ),
        (r'{"\u006Dodel":"groq"}', r'{"\u006Dodel":"new"}'),
        # The same on other levels, and in texts.
        ('{"a":{"model":"groq"},"model":"groq"}', '{"a":{"model":"groq"},"model":"new"}'),
        ('{"model":"groq","a":[{"model":"groq"}]}', '{"model":"new","a":[{"model":"groq"}]}'),
        (
            r'{"a":"\"model\":\"groq\"","model":"groq"}',
            r'{"a":"\"model\":\"groq\"","model":"new"}',
        ),
        ('{"a":"model","model":"groq"}', '{"a":"model","model":"new"}'),
        ('{"a":{"model":"b"},"model":"groq"}', '{"a":{"model":"b"},"model":"new"}'),
        (
            r'{"mod\u0065l":"groq","a":{"model":"groq"}}',
            r'{"mod\u0065l":"new","a":{"model":"groq"}}',
        ),
        (r'{"mod\u0065l":"groq","a":"model"}', r'{"mod\u0065l":"new","a":"model"}'),
    ],
)
def test_only_the_value_of_the_model_that_was_read_is_replaced(text: str, expected: str) -> None:
    parsed = body(text)

    assert parsed.with_model("new") == expected.encode()
    # And again for the next provider.
    assert parsed.with_model('n"é') == expected.replace('"new"', r'"n\"é"').encode()
    assert parsed.data == text.encode()


@pytest.mark.parametrize("surplus", [0, 1])
def test_more_keys_than_can_be_told_apart_are_refused(surplus: int) -> None:
    nested = '{"model":"groq"},' * (MAX_PLACES - 1 + surplus)
    parsed = body(f'{{"x":[{nested}1],"model":"groq"}}')

    if surplus:
        with pytest.raises(InvalidRequest, match="more than 10000"):
            parsed.with_model("new")
        # Where nothing is replaced, nothing is refused.
        assert parsed.data.endswith(b'"groq"}')
    else:
        assert parsed.with_model("new") == parsed.data[:-7] + b'"new"}'
