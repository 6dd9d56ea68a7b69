"""Bring the pages outside docs/ into the site, with the links that a Git host follows."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

__all__ = ["on_files", "on_page_markdown", "site_links"]

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages in the root of the repository, and their places in the site."""
CODE_OR_LINK = re.compile(
    r"^```.*?^```|\]\((?P<target>[^)\s#]+)(?P<heading>#[^)\s]*)?\)", re.DOTALL | re.MULTILINE
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages in the root of the repository."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point a page's links into the site; add files of the repository that it links to."""
    text, linked = site_links(markdown, page.file.src_uri)
    for path in linked:
        if path not in files.src_uris:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return text


def site_links(markdown: str, page: str) -> tuple[str, list[str]]:
    """Rewrite the relative links of a page from places in the repository to places in the site.

    Args:
        markdown: text of the page.
        page: place of the page in the site, such as ``how-to/ci.md``.

    Returns:
        The text, and the linked files that lie outside docs/: paths from the root.
    """
    origins = {place: source for source, place in PAGES.items()}
    origin = ROOT / origins.get(page, f"docs/{page}")
    linked = list[str]()

    def rewritten(match: re.Match[str]) -> str:
        target, heading = match["target"], match["heading"] or ""
        if target is None or re.match(r"[a-z]+:", target):
            return match[0]
        path = (origin.parent / target).resolve()
        if not path.is_file() or not path.is_relative_to(ROOT):
            return match[0]  # the strict build reports it
        inside = path.relative_to(ROOT).as_posix()
        if inside.startswith("docs/"):
            place = inside.removeprefix("docs/")
        elif inside in PAGES:
            place = PAGES[inside]
        else:
            place = inside
            linked.append(inside)
        return f"]({os.path.relpath(place, Path(page).parent)}{heading})"

    return CODE_OR_LINK.sub(rewritten, markdown), linked
