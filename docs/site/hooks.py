"""Hooks of mkdocs: what a reader on GitHub sees in place already becomes part of the site.

- A file of the repository that a page links to (a configuration, SECURITY.md, an image of a result) becomes a page or a file of
  the site, under ``repository/``. A link to a folder leads to the repository's address if ``repo_url`` is set; otherwise it is
  plain text.
- Formulas (``$...$`` and blocks fenced as ``math``) become MathML, which browsers show without scripts and fonts.
- Names in code are not broken over lines.
- Comments, such as the markers of generated sections, are removed.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from links import COMMENT, LINK, links_of, resolve
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# GitHub draws these; the site has the same picture as a file, because the theme would fetch mermaid from another host.
MERMAID = re.compile(r"^```mermaid\n.*?^```\n", re.DOTALL | re.MULTILINE)
PICTURE = "images/loop.svg"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
INLINE_CODE = re.compile(r"<code>([^<>\n]+)</code>")
NAME = re.compile(r"\S{1,40}(?!\S)")  # a longer one may be broken
WHOLE = r'<span class="whole">\g<0></span>'
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".json": "json", ".sbatch": "bash", "": "text"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository that the pages link to, and those that these link to in turn."""
    waiting = [(f"docs/{file.src_uri}", Path(str(file.abs_src_path))) for file in files.documentation_pages()]
    added: set[str] = set()
    while waiting:
        name, path = waiting.pop()
        for target in linked_files(name, path.read_text(encoding="utf-8")):
            if target in added or target.startswith("docs/"):
                continue
            added.add(target)
            files.append(site_file(target, config))
            if target.endswith(".md"):
                waiting.append((target, ROOT / target))
    return files


def linked_files(name: str, text: str) -> list[str]:
    """Return the files of the repository that the Markdown file ``name`` links to, relative to the repository."""
    places = (resolve(name, match) for match in links_of(text))
    return [place for place in places if place and (ROOT / place).is_file()]


def site_file(place: str, config: MkDocsConfig) -> File:
    """Return a file of the repository as a file of the site: images as they are, Markdown and code as pages."""
    path = ROOT / place
    if path.suffix in (".png", ".svg"):
        return File.generated(config, f"repository/{place}", abs_src_path=str(path))
    if path.suffix == ".md":
        return File.generated(config, page_of(place), content=path.read_text(encoding="utf-8"))
    code = path.read_text(encoding="utf-8")
    head = "---\nsearch: {exclude: true}\nhide: [toc]\n---\n\n"
    text = f"# {place}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{code}\n````\n"
    return File.generated(config, page_of(place), content=head + text)


def page_of(place: str) -> str:
    """Return the source of the page that shows a file of the repository."""
    return f"repository/{place}" if place.endswith((".md", ".png", ".svg")) else f"repository/{place}.md"


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Remove comments, and lead the links of a page to where their targets are on the site."""
    source = page.file.src_uri
    name = source.removeprefix("repository/") if source.startswith("repository/") else f"docs/{source}"

    def moved(match: re.Match[str]) -> str:
        place = None if match["code"] or not match["target"] else resolve(name, match)
        if place is None or not (ROOT / place).exists():
            return match[0]  # of a target that does not exist, mkdocs warns
        if (ROOT / place).is_dir():
            tree = f"{config.repo_url.rstrip('/')}/tree/HEAD/{place}" if config.repo_url else ""
            return f"[{match['text']}]({tree})" if tree else match["text"]
        target = place.removeprefix("docs/") if place.startswith("docs/") else page_of(place)
        url = posixpath.relpath(target, posixpath.dirname(source) or ".")
        return f"{match['image']}[{match['text']}]({url}{match['anchor'] or ''})"

    picture = posixpath.relpath(PICTURE, posixpath.dirname(source) or ".")
    markdown = MERMAID.sub(f"![The loop of self-play]({picture})\n", markdown)
    return LINK.sub(moved, COMMENT.sub("", markdown))


def on_page_content(content: str, **_: Any) -> str:
    """Write formulas as MathML, and keep the names in code on one line."""

    def formula(match: re.Match[str]) -> str:
        block = match[1] == "div"
        mathml = convert(html.unescape(match[2]).strip(), display="block" if block else "inline")
        return f'<div class="arithmatex">{mathml}</div>' if block else mathml

    def names(match: re.Match[str]) -> str:
        return f"<code>{NAME.sub(WHOLE, match[1])}</code>"

    return INLINE_CODE.sub(names, FORMULA.sub(formula, content))
