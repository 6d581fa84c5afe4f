"""Follow every internal link and picture of a built site, and check that the file and the anchor exist.

    python tests/site/links.py docs/_build/html

``make links-elsewhere`` tries the links to other sites, which needs the network.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links of a page, with their lines, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[tuple[int, str]] = []
        self.anchors = {"", "top"}  # both mean the page's beginning
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value is not None:
                self.links.append((self.getpos()[0], value))


def dead_links(site: Path) -> tuple[int, list[str]]:
    """Return the number of followed links, and the dead ones as ``page:line: link: why``."""
    site = site.resolve()
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    followed, dead = 0, []
    for path, page in pages.items():
        for line, link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            followed += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_relative_to(site):
                why = "outside the site"
            elif not target.is_file():
                why = "no such file"
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                why = "no such anchor"
            else:
                continue
            dead.append(f"{path.relative_to(site)}:{line}: {link}: {why}")
    return followed, dead


def main(folder: str) -> int:
    """Print the result; return 1 for a dead link, or for a folder without links."""
    followed, dead = dead_links(Path(folder))
    print(*dead, f"{folder}: {followed} links followed, {len(dead)} dead", sep="\n")
    return int(bool(dead) or not followed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
