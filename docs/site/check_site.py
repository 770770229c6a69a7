"""Checks the built site: every link and anchor leads somewhere, and no page makes a request to another host.

python docs/site/check_site.py FOLDER
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes that a browser loads by itself; a link (a href) is only followed when a reader clicks on it.
LOADED = {("link", "href"), ("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("object", "data")}
# What the theme's stylesheets and pages may load. Its scripts are checked by what a browser requests: see tests/test_site.py.
CSS_URL = re.compile(r"url\(\s*['\"]?(?:https?:)?//|@import\s+['\"]?(?:https?:)?//")


class PageLinks(HTMLParser):
    """The ids of a page, its links, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {str(values[name]) for name in ("id", "name") if values.get(name)}
        # The address of the page itself (rel=canonical) and of its neighbours is not loaded.
        named = tag == "link" and values.get("rel") in ("canonical", "prev", "next")
        for name, value in attrs:
            if value and name in ("href", "src", "data") and not named:
                (self.loaded if (tag, name) in LOADED else self.links).append(value)


def problems_of(folder: Path) -> list[str]:
    """Return one sentence for each broken link, missing anchor and request to another host."""
    pages = {path: PageLinks(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    if not pages:
        return [f"{folder} contains no pages: build the site first (bash scripts/docs.sh)"]
    problems = []
    for path, page in pages.items():
        name = path.relative_to(folder)
        problems += [f"{name} loads {url}" for url in page.loaded if urlsplit(url).netloc]
        for url in page.links + page.loaded:
            problem = _broken(url, path, folder, pages)
            if problem:
                problems.append(f"{name} links to {url}: {problem}")
    for path in sorted(folder.rglob("*.css")):
        if CSS_URL.search(path.read_text(encoding="utf-8")):
            problems.append(f"{path.relative_to(folder)} loads something from another host")
    return problems


def _broken(url: str, path: Path, folder: Path, pages: dict[Path, PageLinks]) -> str | None:
    """Return what is wrong with a link of the page ``path``, or None."""
    parts = urlsplit(url)
    if parts.scheme or parts.netloc:
        return None
    # 404.html may be shown for any address, so its links start at the top of the site.
    place = unquote(parts.path)
    target = folder / place.lstrip("/") if place.startswith("/") else path.parent / place if place else path
    target = target.resolve()
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return "there is no such file"
    anchor = unquote(parts.fragment)
    page = pages.get(target)
    if anchor and page is not None and anchor not in page.ids and anchor != "__skip":
        return f"the page has no heading #{anchor}"
    return None


if __name__ == "__main__":
    found = problems_of(Path(sys.argv[1]).resolve())
    for sentence in found:
        print(sentence, file=sys.stderr)
    sys.exit(2 if found else 0)
