"""What may be shown of text that comes from users, data and servers."""

from __future__ import annotations

import re
from typing import Any

_URL_USER = re.compile(r"(?<=://)[^\s/?#]*@")
_PLAIN_USER = re.compile(r"(?<![\w/.:-])[\w.%+-]+:[^\s/@,]+@(?=[\w.-]+:\d)")  # without a scheme
_URL_SECRET = re.compile(
    r"([?&][\w.-]*(?:key|token|secret|password|passwd|signature|sig|auth)[\w.-]*=)[^&#\s'\",]+",
    re.IGNORECASE,
)
MASK = "***"


def mask_credentials(value: Any) -> Any:
    """Replaces user names, passwords and keys in URLs by `***`.

    Args:
        value: a text, or nested dictionaries, lists and tuples of values; others are kept.
    """
    if isinstance(value, str):
        text = _URL_USER.sub(f"{MASK}@", value)
        text = _PLAIN_USER.sub(f"{MASK}@", text)
        return _URL_SECRET.sub(rf"\1{MASK}", text)
    if isinstance(value, dict):
        return {key: mask_credentials(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(mask_credentials, value))
    return value


def printable(text: Any) -> str:
    """A message on one line for a terminal, without credentials.

    White space becomes single spaces. Control characters, and others that a terminal does not
    print as they are, become escapes such as \\x1b.
    """
    line = " ".join(str(mask_credentials(str(text))).split())
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
