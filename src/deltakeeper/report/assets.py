"""What all pages share: files of this package, hashes for their policies, and model text made fit to be shown."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

# C0 and C1 controls but tab and newline, direction overrides and isolates, zero-width marks, lone surrogates.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def excerpt(text: str, length: int) -> str:
    """Model text fit to be shown: unseen characters marked, long text cut with the number of characters left out."""
    seen = _UNSEEN.sub("\ufffd", text)
    if not seen.strip():
        return "(empty)"
    return seen if len(seen) <= length else f"{seen[:length].rstrip()} … (+{len(seen) - length} characters)"


def asset(name: str) -> str:
    """Text of a file of this package."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def source_hash(text: str) -> str:
    """The hash by which a content security policy names a style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
