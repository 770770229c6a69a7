"""Text that can be stored and printed. JSON can escape half of a surrogate pair, which Python accepts but UTF-8 does not."""

from __future__ import annotations


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8: it has no unpaired surrogate (half a character)."""
    if text.isascii():  # known without a copy
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str, encoding: str = "utf-8") -> str:
    """Return the text with every character that ``encoding`` lacks written as an escape, such as ``\\ud83d``."""
    return text.encode(encoding, "backslashreplace").decode(encoding)
