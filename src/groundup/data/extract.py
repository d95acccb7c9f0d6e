"""Main text and metadata of HTML pages, by mode.

plain      every visible text; Python's own parser, no extra package
fast       main content by resiliparse: hundreds of pages a second
precise    main content by trafilatura with its settings for precision (those of FineWeb)

`docs/data.md` has the measured precision, recall and speed of each.
"""

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from typing import Any, Literal
from urllib.parse import urljoin

from groundup.core.errors import GroundupError, need
from groundup.data.notes import Notes

Mode = Literal["plain", "fast", "precise"]

LONGEST_PAGE = 8_000_000  # characters
SLOWEST_PAGE_S = 10.0
DEEPEST = 500  # browsers stop at 512 too; parsers become quadratic far beyond
MANY_TAGS = 2000  # pages of fewer tags need no look at their depth
NESTING = re.compile(
    r"<(/?)(?:div|span|table|section|article|ul|ol|dl|font|blockquote|center|form|b|i|em|strong|a)\b",
    re.I,
)
MOST_LINKS = 100
SIMPLE_PATH = re.compile(r"/[\w%~-][\w%~/.-]*(?:\?[\w%&=+.-]+)?", re.ASCII)
HIDDEN_TEXT = frozenset(("script", "style", "noscript", "template", "nav", "footer", "svg"))
BREAKS = frozenset(
    ("p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "section", "article")
)
DATES = (
    'meta[property="article:published_time"]', 'meta[property="og:published_time"]',
    'meta[itemprop="datePublished"]', 'meta[name="date"]', 'meta[name="pubdate"]',
    'meta[name="DC.date.issued"]', "time[datetime]",
)  # fmt: skip
DATE_IN_JSON = re.compile(r'"datePublished"\s*:\s*"([^"]{4,40})"')


def extract(page: str, url: str, mode: Mode, notes: Notes) -> tuple[str, dict[str, Any]] | None:
    """Return a page's text and metadata; None for a page that is too large, deep or slow."""
    if len(page) > LONGEST_PAGE:
        notes.skip("page too large", url)
        return None
    if nests_too_deep(page):
        notes.skip("page nested too deep", url)
        return None
    found, expired = None, list[bool]()
    try:
        with time_limit(SLOWEST_PAGE_S, expired):
            found = EXTRACTORS[mode](page, url)
    except GroundupError:
        raise
    except BaseException as err:  # whatever one page does to a library, the others go on
        if not isinstance(err, Exception) and not is_panic(err):
            raise
        if not expired:
            notes.skip(f"page cannot be parsed: {type(err).__name__}", url)
    if expired:  # a library may have swallowed the exception, and have gone on
        notes.skip("page too slow", url)
        return None
    return found


def is_panic(err: BaseException) -> bool:
    """Return whether a library in Rust gave up on its input: that is no Exception, by its rules."""
    return type(err).__name__ == "PanicException"


def nests_too_deep(page: str) -> bool:
    """Return whether elements are nested deeper than any browser would follow."""
    if page.count("<") < MANY_TAGS:
        return False
    depth = 0
    for found in NESTING.finditer(page):
        depth = max(0, depth - 1) if found[1] else depth + 1
        if depth > DEEPEST:
            return True
    return False


@contextmanager
def time_limit(seconds: float, expired: list[bool]) -> Iterator[None]:
    """Raise TimeoutError in the block after so much CPU time, and note it in `expired`.

    The processor's time, not the clock's: a machine that does other work drops no pages. Outside
    the main thread there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        expired.append(True)
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def extract_plain(page: str, url: str) -> tuple[str, dict[str, Any]]:
    """Return every visible text, without metadata."""
    return html_text(page), {}


def extract_fast(page: str, url: str) -> tuple[str, dict[str, Any]]:
    """Return the main content by resiliparse, with the page's metadata."""
    parse = need("resiliparse.parse.html", extra="data", purpose="extracting text from HTML")
    extractor = need("resiliparse.extract.html2text", extra="data", purpose="extracting text")
    tree = parse.HTMLTree.parse(page)
    text = extractor.extract_plain_text(
        tree, main_content=True, alt_texts=False, list_bullets=False, comments=False
    )
    return text, page_metadata(tree, page, url)


def extract_precise(page: str, url: str) -> tuple[str, dict[str, Any]]:
    """Return the main content by trafilatura, with the page's metadata."""
    trafilatura = need("trafilatura", extra="data", purpose="the precise extraction of text")
    parse = need("resiliparse.parse.html", extra="data", purpose="extracting text from HTML")
    # without its deduplication, which remembers the pages before: results would depend on the order
    text = trafilatura.extract(page, favor_precision=True, include_comments=False)
    return text or "", page_metadata(parse.HTMLTree.parse(page), page, url)


def page_metadata(tree: Any, page: str, url: str) -> dict[str, Any]:
    """Return title, date, declared language and links of a parsed page, as far as it has them."""
    found: dict[str, Any] = {"title": " ".join((tree.title or "").split())}
    html = tree.document.query_selector("html")
    found["html_language"] = (html.getattr("lang", "") or "") if html else ""
    found["date"] = page_date(tree, page)
    found["links"] = page_links(tree, url)
    return {key: value for key, value in found.items() if value}


def page_date(tree: Any, page: str) -> str:
    """Return the date of publication that the page declares."""
    for selector in DATES:
        element = tree.document.query_selector(selector)
        if element and (value := element.getattr("content") or element.getattr("datetime")):
            return str(value).strip()
    in_json = DATE_IN_JSON.search(page)
    return in_json[1] if in_json else ""


def page_links(tree: Any, url: str) -> list[str]:
    """Return the first distinct links of a page, as absolute addresses."""
    links: dict[str, None] = {}
    origin = "/".join(url.split("/", 3)[:3])
    for anchor in tree.document.get_elements_by_tag_name("a")[: 4 * MOST_LINKS]:
        href = (anchor.getattr("href", "") or "").strip()
        if href and not href.startswith(("#", "javascript:", "mailto:", "tel:", "data:")):
            links[absolute(url, origin, href)] = None
            if len(links) > MOST_LINKS:
                break
    return [link for link in links if link][:MOST_LINKS]


def absolute(url: str, origin: str, href: str) -> str:
    """Return a link as an absolute address, or nothing where it is none."""
    if origin and SIMPLE_PATH.fullmatch(href) and "/." not in href and "//" not in href:
        return origin + href
    try:
        link = urljoin(url, href)
    except ValueError:
        return ""
    return link if link.startswith(("http://", "https://")) else ""


class HTMLText(HTMLParser):
    """Collect the visible text of a page, one block a line."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Start a line at block elements."""
        self.hidden += tag in HIDDEN_TEXT
        if tag in BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """End a line behind block elements."""
        if tag in HIDDEN_TEXT:
            self.hidden = max(0, self.hidden - 1)
        elif tag in BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        """Keep visible text."""
        if not self.hidden:
            self.parts.append(data)


def html_text(page: str) -> str:
    """Return the text of an HTML page, blank lines folded."""
    parser = HTMLText()
    parser.feed(page)
    parser.close()  # a last stretch with an & in it waits for this
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if line)


EXTRACTORS: dict[Mode, Callable[[str, str], tuple[str, dict[str, Any]]]] = {
    "plain": extract_plain,
    "fast": extract_fast,
    "precise": extract_precise,
}
