"""Links and headings of Markdown files, as GitHub reads them."""

from __future__ import annotations

import posixpath
import re

COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
FENCE = re.compile(r"^(`{3,}).*?^\1\s*$", re.DOTALL | re.MULTILINE)
# Code, which contains no links, or an inline link or image: its text, target and anchor.
LINK = re.compile(
    r"(?P<code>^(`{3,}).*?^\2\s*$|`[^`\n]+`)"
    r"|(?P<image>!?)\[(?P<text>(?:[^\[\]`]|`[^`]*`)*)\]\((?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?\)",
    re.DOTALL | re.MULTILINE,
)
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


def links_of(text: str) -> list[re.Match[str]]:
    """Return the links and images of a Markdown text that are not in code or in comments."""
    return [match for match in LINK.finditer(COMMENT.sub("", text)) if not match["code"]]


def resolve(name: str, link: re.Match[str]) -> str | None:
    """Return where a link of the file ``name`` leads, relative to the repository; None if it leads to another host.

    Args:
        name: the file that contains the link, relative to the repository.
    """
    target = link["target"]
    if "://" in target or target.startswith(("mailto:", "/")):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), target)) if target else name


def anchors_of(text: str) -> set[str]:
    """Return the anchors of the headings of a Markdown text; a repeated heading gets a number."""
    found: dict[str, int] = {}
    for heading in HEADING.findall(FENCE.sub("", COMMENT.sub("", text))):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)
