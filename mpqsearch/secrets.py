"""The one place that takes secrets out of text: the command line passes all that it prints on errors through here, and
so does a report with the command that made it."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote

HIDDEN = "***"

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.\-]*://)(?P<user>[^:/@\n]*)(?P<password>:[^\n]*)?@", re.IGNORECASE)
"""An address with a user, up to the last ``@`` of its line: passwords may hold any character."""

_QUERY = re.compile(
    r"(?P<head>[?&;](?:[^?&;=\n]*(?:pass|pwd|token|secret|key|auth|cred)[^?&;=\n]*|odbc_connect)=)[^&\s'\"]*",
    re.IGNORECASE,
)

_known: set[str] = set()


def redact(text: str) -> str:
    """Text without the passwords, tokens and keys of all addresses in it, and without those of `keep_secret`."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _URL.sub(lambda m: f"{m['scheme']}{m['user'] + ':' if m['password'] else ''}{HIDDEN}@", text)
    return _QUERY.sub(rf"\g<head>{HIDDEN}", text)


def keep_secret(url: str) -> None:
    """Remember the secrets of an address, so that `redact` finds them in the words of any library, too."""
    match = _URL.search(url)
    found = [] if match is None else [match["password"][1:] if match["password"] else match["user"]]
    found += [m[0].partition("=")[2] for m in _QUERY.finditer(url)]
    found += [value for key, value in parse_qsl(url.partition("?")[2]) if _QUERY.match(f"?{key}=")]
    for secret in found:
        _known.update(form for form in (secret, unquote(secret)) if len(form) >= MIN_LENGTH)


MIN_LENGTH = 4
"""A shorter secret is only hidden inside its address: its letters would be taken out of every word."""
