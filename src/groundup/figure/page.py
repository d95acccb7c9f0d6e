"""Report pages: one self-contained HTML file, no scripts, no requests; all text is escaped."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

NUMBER = re.compile(r"[<+-]?[\d.,]+%?")
STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6570; --line: #dfe3e8;
  --paper: #ffffff; --card: #f6f8fa; --good: #0a7d4f; --bad: #b3401b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #333b44;
  --paper: #14181c; --card: #1d2329; --good: #53c795; --bad: #f08a5d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .5rem 0 1rem; max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .92rem; }
nav a { margin-right: 1rem; color: inherit; display: inline-block; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0; }
.card { background: var(--card); border-radius: .5rem; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.6rem; line-height: 1.25; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td.n, th.n { text-align: right; }
figure { margin: 1rem 0; }
figure.wide { overflow-x: auto; }
figure.wide svg { width: auto; min-width: 100%; max-width: none; }
figure svg { width: 100%; height: auto; background: #ffffff; border-radius: .5rem;
  padding: .5rem; border: 1px solid var(--line); }
pre { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; overflow-x: auto;
  font: .85rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .5rem;
  align-items: start; }
.answers div { background: var(--card); border-radius: .5rem; padding: .5rem .75rem;
  font: .85rem/1.4 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
.answers span { display: block; color: var(--soft); font: .8rem system-ui, sans-serif; }
.good { border-left: 3px solid var(--good); } .bad { border-left: 3px solid var(--bad); }
.marked { font: .85rem/1.5 ui-monospace, monospace; margin: .15rem 0; white-space: pre-wrap; }
.marked b { display: inline-block; min-width: 2.5rem; color: var(--soft); }
mark { background: none; color: var(--good); border: 1px solid var(--line); padding: 0 .2rem; }
mark.bad { color: var(--bad); text-decoration: line-through; }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
"""


def text(content: str, *, soft: bool = False) -> str:
    """Return a paragraph."""
    return f"<p{' class=soft' if soft else ''}>{escape(content)}</p>"


def code(content: str) -> str:
    """Return preformatted text."""
    return f"<pre>{escape(content)}</pre>"


def picture(svg: str, caption: str, *, wide: bool = False) -> str:
    """Return an SVG with its caption; a wide one keeps its size, and is scrolled."""
    kind = " class=wide" if wide else ""
    return f"<figure{kind}>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def cards(items: Sequence[tuple[str, str, str]]) -> str:
    """Return (label, value, note) cards."""
    body = "".join(
        f"<div class=card>{escape(label)}<b>{escape(value)}</b>"
        f"<span class=soft>{escape(note)}</span></div>"
        for label, value, note in items
    )
    return f"<div class=cards>{body}</div>"


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table; columns of numbers are right-aligned."""
    body = [[str(cell) for cell in row] for row in rows]
    numeric = [
        any(row[n] for row in body) and all(NUMBER.fullmatch(row[n]) for row in body if row[n])
        for n in range(len(headers))
    ]

    def line(tag: str, cells: Sequence[str]) -> str:
        marked = (
            f"<{tag}{' class=n' if number else ''}>{escape(cell)}</{tag}>"
            for cell, number in zip(cells, numeric, strict=True)
        )
        return f"<tr>{''.join(marked)}</tr>"

    inside = line("th", headers) + "".join(line("td", row) for row in body)
    return f"<div class=scroll><table>{inside}</table></div>"


def example(prompt: str, answers: Sequence[tuple[str, str, bool | None]]) -> str:
    """Return a prompt and (label, answer, good?) boxes beside each other."""
    boxes = "".join(
        f"<div class={'good' if good else 'bad' if good is False else 'plain'}>"
        f"<span>{escape(label)}</span>{escape(answer) or '(nothing)'}</div>"
        for label, answer, good in answers
    )
    return f"{code(prompt)}<div class=answers>{boxes}</div>"


def marked(label: str, pieces: Sequence[tuple[str, str]]) -> str:
    """Return a line of (text, "good" | "bad") pieces, each in its colour, behind a label."""
    spans = "".join(f"<mark class={kind}>{escape(repr(t)[1:-1])}</mark>" for t, kind in pieces)
    return f"<p class=marked><b>{escape(label)}</b>{spans}</p>"


def section(title: str, *blocks: str) -> tuple[str, str]:
    """Return a section: its title and its blocks."""
    return title, "\n".join(blocks)


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """Return a whole page with links to its sections."""
    links = "".join(f"<a href='#s{n}'>{escape(name)}</a>" for n, (name, _) in enumerate(sections))
    body = "".join(
        f"<h2 id='s{n}'>{escape(name)}</h2>\n{content}\n"
        for n, (name, content) in enumerate(sections)
    )
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>"
        f"<h1>{escape(title)}</h1>{text(subtitle, soft=True)}<nav>{links}</nav>\n"
        f"{body}</body></html>\n"
    )
