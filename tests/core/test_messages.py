"""Messages show no control characters, no line breaks and no credentials."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verippo.core.messages import mask_credentials, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a b c"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x9b2J\x07\x00", "\\x9b2J\\x07\\x00"),
        ("txt\u202egpj.exe", "txt\\u202egpj.exe"),
        ("a\ud800b", "a\\ud800b"),
        ("发热 äöü – “quoted” 🩺", "发热 äöü – “quoted” 🩺"),
    ],
)
def test_control_characters_become_escapes(text, shown):
    assert printable(text) == shown


@given(st.text())
def test_message_is_one_printable_line(text):
    assert printable(text).isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:password@host:30000/v1", "http://***@host:30000/v1"),
        ("https://token@host/v1 failed", "https://***@host/v1 failed"),
        ("http://u:p@ss@host/", "http://***@host/"),
        ("user:password@host:30000", "***@host:30000"),
        ("http://h/v1?api_key=s3cret&n=1", "http://h/v1?api_key=***&n=1"),
        ("http://h/v1?n=1&access-token=s3cret'", "http://h/v1?n=1&access-token=***'"),
        ("http://h/v1?X-Amz-Signature=ab#x", "http://h/v1?X-Amz-Signature=***#x"),
        ("GET /v1?KEY=abc HTTP/1.1", "GET /v1?KEY=*** HTTP/1.1"),
        ("http://host:30000/v1?n=1", "http://host:30000/v1?n=1"),
        ("write to a@example.org: org/model@main", "write to a@example.org: org/model@main"),
    ],
)
def test_credentials_in_urls_are_masked(text, shown):
    assert mask_credentials(text) == shown
    assert mask_credentials({"a": [text, 3], "b": (text, None)}) == {
        "a": [shown, 3],
        "b": (shown, None),
    }
