"""A synthetic crawl with planted duplicates, personal data and contamination, built end to end.

    python benchmarks/data_scale.py --mb 200 800            # is memory flat?
    python benchmarks/data_scale.py --mb 1000 --executor ray

Pages are English sentences of random words in the markup of made-up sites, about nine parts markup
to one of text, written as WARC (or JSONL, without markup) a file of 50 MB at a time.
Prints what was planted and what was found, MB/s, and the peak memory of the largest process.
"""

import argparse
import gzip
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from groundup.core.files import read_json
from groundup.core.types import SPLITS
from groundup.data import read_corpus
from groundup.data.minhash import meeting_probability

FILE_BYTES = 50_000_000
POOL = 4_000  # pages that can be copied, so that a crawl of any size needs little memory
KINDS = {"exact": 0.04, "near-95": 0.02, "near-90": 0.02, "near-80": 0.02, "quiz": 0.01}
PERSONAL = 0.02
QUESTIONS = 200
SITES = 97


class Writer:
    """Sentences, paragraphs and pages of English words in their usual frequencies."""

    def __init__(self, seed: int) -> None:
        from pydoc_data.topics import topics

        words = Counter(re.findall(r"[a-z]{1,14}", " ".join(topics.values()).lower()))
        self.words = np.array(list(words))
        often = np.cumsum(np.array(list(words.values()), float) ** 0.8)
        self.upto = often / often[-1]
        self.rng = np.random.default_rng(seed)

    def draw(self, count: int) -> list[str]:
        """Return words in their usual frequencies."""
        return self.words[np.searchsorted(self.upto, self.rng.random(count))].tolist()

    def page(self) -> list[list[str]]:
        """Return paragraphs of sentences."""
        sizes = [self.rng.integers(3, 8) for _ in range(self.rng.integers(5, 16))]
        words = iter(self.draw(24 * sum(sizes)))
        return [
            [self.sentence(next(words) for _ in range(self.rng.integers(8, 24))) for _ in range(n)]
            for n in sizes
        ]

    def sentence(self, words) -> str:
        """Return a sentence."""
        return " ".join(words).capitalize() + "."

    def changed(self, page: list[list[str]], similarity: float) -> list[list[str]]:
        """Return a page with so many words replaced that this much of the 5-grams stays."""
        count = sum(len(s.split()) for part in page for s in part)
        replaced = round(count * (1 - similarity) / (1 + similarity) / 5)
        at = set(np.linspace(3, count - 3, replaced).astype(int).tolist())
        n, result = 0, []
        for part in page:
            sentences = []
            for sentence in part:
                words = sentence.split()
                for k in range(len(words)):
                    if n in at:
                        words[k] = f"changed{self.rng.integers(10**9)}"
                    n += 1
                sentences.append(" ".join(words))
            result.append(sentences)
        return result


class Layout:
    """A site's markup around its texts: styles, scripts, menus, related pages, footers.

    Real pages are mostly markup (53 kB with 5 kB of text is usual), most of it the same on each
    page of a site; addresses and attributes differ.
    """

    def __init__(self, writer: Writer, site: int, markup_bytes: int) -> None:
        rng = writer.rng
        share = markup_bytes // 8

        def words(count: int) -> str:
            return " ".join(writer.draw(count))

        def filled(size: int, piece: Callable[[int], str]) -> str:
            parts: list[str] = []
            while sum(map(len, parts)) < size:
                parts.append(piece(len(parts)))
            return "".join(parts)

        def rule(n: int) -> str:
            color = f"{rng.integers(1 << 24):06x}"
            return f".{words(1)}-{n}>.col{{margin:{rng.integers(99)}px;color:#{color}}}\n"

        def statement(n: int) -> str:
            return (
                f"window.{words(1)}{n}=function(a){{return a[{rng.integers(99)}]||'{words(2)}'}};\n"
            )

        def entry(n: int) -> str:
            return (
                f'<li class="menu-item item-{rng.integers(9999)}"><a href="/{words(1)}/{n}" '
                f'data-track="{rng.integers(1 << 40):x}"><span>{words(2)}</span></a></li>\n'
            )

        def card(n: int) -> str:
            return (
                f'<div class="card"><a href="/PAGE/{n}"><img loading="lazy" alt="" width="320" '
                f'src="/media/{rng.integers(1 << 40):x}.jpg" srcset="/media/large.jpg 2x">'
                f"</a><div class=title>{words(4)}</div></div>\n"
            )

        self.head = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>A page</title>'
            f"<style>{filled(2 * share, rule)}</style>"
            f"<script>{filled(2 * share, statement)}</script>"
            f'</head><body class="site-{site}"><header><nav><ul>{filled(share, entry)}</ul></nav>'
            '</header><div class="wrap"><main><article>'
        )
        self.tail = (
            f'</article></main><aside class="sidebar">{filled(share, card)}</aside></div>'
            f"<footer><ul>{filled(share, entry)}</ul></footer>"
            f"<script>{filled(share, statement)}</script></body></html>"
        )

    def html(self, page: list[list[str]], number: int) -> str:
        """Return the page around these paragraphs."""
        body = "".join(
            f'<p class="text" data-n="{number}-{n}">{" ".join(part)}</p>\n'
            for n, part in enumerate(page)
        )
        return f"{self.head}{body}{self.tail.replace('PAGE', str(number))}"


def record(url: str, page: str) -> bytes:
    """Return one WARC response, a gzip member by itself."""
    content = page.encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n"
    lines = (
        "WARC/1.0",
        "WARC-Type: response",
        f"WARC-Target-URI: {url}",
        "WARC-Date: 2026-01-01T00:00:00Z",
        f"WARC-Record-ID: <urn:uuid:{abs(hash(url)):032x}>",
        "Content-Type: application/http; msgtype=response",
        f"Content-Length: {len(head) + len(content)}",
    )
    whole = "\r\n".join(lines).encode() + b"\r\n\r\n" + head + content + b"\r\n\r\n"
    return gzip.compress(whole, 1)


def crawl(folder: Path, size_bytes: int, kind: str, markup: int, seed: int) -> Counter[str]:
    """Write a crawl of so many bytes (of HTML in WARC); return what was planted."""
    folder.mkdir(parents=True)
    writer, planted = Writer(seed), Counter()
    layouts = [Layout(writer, site, markup) for site in range(SITES)]
    questions = [" ".join(writer.draw(24)) for _ in range(QUESTIONS)]
    quiz = "".join(json.dumps({"question": q}) + "\n" for q in questions)
    (folder.parent / f"{folder.name}-quiz.jsonl").write_text(quiz)
    pool: list[tuple[str, list[list[str]]]] = []
    total = n = number = 0
    handle, written = None, FILE_BYTES
    while total < size_bytes:
        if written >= FILE_BYTES:
            if handle:
                handle.close()
            suffix = "warc.gz" if kind == "warc" else "jsonl"
            file = folder / f"crawl-{number:05d}.{suffix}"
            handle, written = file.open("wb"), 0
            number += 1
        name, page = "page", writer.page()
        draw = writer.rng.uniform()
        for what, share in KINDS.items():
            draw -= share
            if draw < 0 and len(pool) > 100:
                origin, copied = pool[writer.rng.integers(len(pool))]
                name = f"{what}/of-{origin}" if what != "quiz" else what
                if what.startswith("near"):
                    page = writer.changed(copied, int(what[-2:]) / 100)
                elif what == "exact":
                    page = copied
                else:
                    page[len(page) // 2].append(questions[n % QUESTIONS].capitalize() + ".")
                planted[what] += 1
                break
        if name == "page" and writer.rng.uniform() < PERSONAL:
            page[0].append(f"Write to planted.person{n}@mail-of-{n}.org for more of it.")
            planted["personal"] += 1
        if name == "page":
            if len(pool) < POOL:
                pool.append((str(n), page))
            elif writer.rng.uniform() < 0.2:
                pool[writer.rng.integers(POOL)] = (str(n), page)
        url = f"http://site-{n % SITES}.test/{name}/{n}"
        if kind == "warc":
            content = layouts[n % SITES].html(page, n)
            size = len(content)
            content = record(url, content)
        else:
            text = "\n".join(" ".join(part) for part in page)
            size = len(text)
            content = (json.dumps({"text": text, "id": url}) + "\n").encode()
        handle.write(content)
        planted["text bytes"] += sum(len(s) + 1 for part in page for s in part)
        total, written, n = total + size, written + size, n + 1
    handle.close()
    planted["pages"] = n
    return planted


def build(folder: Path, out: Path, arguments: argparse.Namespace) -> tuple[float, int, int]:
    """Build in a process of its own; return seconds, its peak and its largest child's in bytes."""
    command = [
        *(sys.executable, __file__, "--only-build", str(folder), str(out)),
        *("--executor", arguments.executor, "--workers", str(arguments.workers)),
        *("--steps", *arguments.steps, "--memory-mb", str(arguments.memory_mb)),
    ]
    started = time.monotonic()
    subprocess.run(command, check=True)
    peaks = read_json(out.parent / f"{out.name}-peaks.json")
    return time.monotonic() - started, *peaks


def only_build(folder: Path, out: Path, arguments: argparse.Namespace) -> None:
    from groundup.data import CorpusConfig, build_corpus

    config = CorpusConfig(
        paths=(str(folder),),
        steps=tuple(arguments.steps),
        benchmarks=(str(folder.parent / f"{folder.name}-quiz.jsonl"),),
        executor=arguments.executor,
        workers=arguments.workers,
        memory_mb=arguments.memory_mb,
    )
    build_corpus(config, out)
    peaks = [
        resource.getrusage(who).ru_maxrss * 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    (out.parent / f"{out.name}-peaks.json").write_text(json.dumps(peaks))


def judge(out: Path, planted: Counter[str]) -> None:
    """Print what was found of each planted kind, beside what theory lets expect."""
    kept: set[str] = set()
    pairs: list[tuple[str, str, str]] = []
    leaked = quizzes = 0
    for split in SPLITS:
        for document in read_corpus(out, split):
            url = document.meta.get("url", document.id)
            path = url.split(".test/")[1]
            kept.add(path.rsplit("/", 1)[1])
            leaked += "planted.person" in document.text
            if path.startswith(("exact", "near")):
                kind, origin, number = path.split("/")
                pairs.append((kind, origin.removeprefix("of-"), number))
            quizzes += path.startswith("quiz")
    both = Counter(kind for kind, origin, _ in pairs if origin in kept)
    stats = read_json(out / "stats.json")
    rows = {row["step"]: row for row in stats["steps"]}
    for kind in KINDS:
        count = planted[kind]
        found = count - (quizzes if kind == "quiz" else both[kind])
        expect = "all"
        if kind.startswith("near"):
            expect = f"at most {meeting_probability(int(kind[-2:]) / 100):.1%}"
        print(f"  {kind:<10} planted {count:>8,}  found {found / max(1, count):7.2%}  ({expect})")
    notes = rows.get("privacy", {}).get("notes", {})
    print(f"  {'personal':<10} planted {planted['personal']:>8,}  left {leaked:,}  {dict(notes)}")
    for row in stats["steps"]:
        reasons = ", ".join(f"{n:,} {why}" for why, n in row["reasons"].items())
        print(f"  {row['step']:<20} {row['documents_out']:>10,} documents  {reasons}")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--mb", type=int, nargs="+", default=[100], help="megabytes of HTML")
    flags.add_argument("--markup-kb", type=float, default=45, help="markup of a page of 5 kB text")
    flags.add_argument("--format", choices=("warc", "jsonl"), default="warc")
    flags.add_argument("--steps", nargs="+", default=["web"])
    flags.add_argument("--workers", type=int, default=os.cpu_count())
    flags.add_argument("--executor", default="local")
    flags.add_argument("--memory-mb", type=float, default=256)
    flags.add_argument("--folder", type=Path, help="where to work; kept (a temporary one is not)")
    flags.add_argument("--only-build", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.only_build:
        only_build(*arguments.only_build, arguments)
        return
    place = arguments.folder or Path(tempfile.mkdtemp(prefix="crawl-"))
    place.mkdir(parents=True, exist_ok=True)
    lines, markup = [], int(arguments.markup_kb * 1000)
    for size in arguments.mb:
        folder, out = place / f"crawl-{size}", place / f"corpus-{size}"
        for old in (folder, out):
            shutil.rmtree(old, ignore_errors=True)
        planted = crawl(folder, size * 1_000_000, arguments.format, markup, seed=1)
        text = planted["text bytes"] / 1e6
        print(f"{size} MB: {planted['pages']:,} pages with {text:,.0f} MB of text")
        seconds, driver, worker = build(folder, out, arguments)
        judge(out, planted)
        lines.append(
            f"{size:>7} MB  {seconds:8.1f} s  {size / seconds:6.2f} MB/s, "
            f"{text / seconds:.2f} of text; peaks: largest worker {worker / 1e6:,.0f} MB, "
            f"driver {driver / 1e6:,.0f} MB"
        )
        if not arguments.folder:
            shutil.rmtree(folder)
            shutil.rmtree(out)
    print("\n".join(lines))
    if not arguments.folder:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
