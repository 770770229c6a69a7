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


def duration(seconds: float) -> str:
    """Return a time as text: ``1 h 02 min``, ``3 min 05 s`` or ``8.2 s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{seconds:.1f} s"
