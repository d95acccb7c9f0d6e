"""Talking to a model in the terminal, streaming."""

import select
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from groundup.core.types import Message, SamplingParams
from groundup.generate import LLM

HELP = (
    "/reset forgets the conversation, /quit or Ctrl-D ends it; a number asks that question; "
    "lines pasted together are one message."
)


def introduce(console: Console, card: dict[str, Any], *, complete: bool) -> None:
    """Print what the model is, what it can do, and questions to pick."""
    console.print(f"[bold]{escape(card['title'])}[/]")
    for line in card["lines"]:
        console.print(escape(line))
    if complete:
        console.print("Write the beginning of a text; the model goes on.")
        return
    for number, question in enumerate(card["questions"], start=1):
        console.print(f"[cyan]{number}[/] {escape(one_line(question))}")
    console.print(f"[dim]{escape(HELP)}[/]")


def escape(text: str) -> str:
    """Keep brackets in text from being read as markup."""
    from rich.markup import escape as rich_escape

    return rich_escape(text)


def one_line(text: str) -> str:
    """Return a question in one line."""
    line = " ".join(text.replace("```python", "").replace("```", "").split())
    return line if len(line) <= 90 else line[:87] + "..."


def read_lines(console: Console) -> Iterator[str]:
    """Yield what the user types or pastes, or the lines of a pipe.

    Lines pasted together are one message, and so are the lines of a fenced block.
    """
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            console.print("[bold]> [/]", end="")
        line = sys.stdin.readline()
        if not line:
            return
        while line.count("```") % 2 or (interactive and pasted_more()):
            more = sys.stdin.readline()
            if not more:
                break
            line += more
        yield line.rstrip("\n").encode(errors="replace").decode()  # half a surrogate pair: ?


def pasted_more() -> bool:
    """Whether the terminal already holds another line: nobody types that fast."""
    ready, _, _ = select.select([sys.stdin], [], [], 0.03)
    return bool(ready)


def chat(llm: LLM, card: dict[str, Any], params: SamplingParams, *, complete: bool = False) -> None:
    """Answer line after line; the oldest turns are dropped, out loud, when the context is full."""
    console = Console(highlight=False)
    llm.engine.prepare([], params)  # what is wrong for every answer is said at once
    introduce(console, card, complete=complete)
    messages: list[Message] = []
    for typed in read_lines(console):
        line = typed.strip()
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            messages = []
            console.print("[dim]The conversation is forgotten.[/]")
            continue
        if line in ("", "/help"):
            console.print(f"[dim]{escape(HELP)}[/]")
            continue
        if complete:
            print_stream(console, llm.stream(typed, params))
            continue
        if line.isdigit() and 0 < int(line) <= len(card["questions"]):
            line = card["questions"][int(line) - 1]
            console.print(escape(line), style="dim")
        messages.append({"role": "user", "content": line.replace("\\n", "\n")})
        if not trim(llm, messages, params, console):
            messages = []
            continue
        answer = print_stream(console, llm.stream(messages, params))
        messages.append({"role": "assistant", "content": answer})


def trim(llm: LLM, messages: list[Message], params: SamplingParams, console: Console) -> bool:
    """Drop the oldest turns until question and answer fit; say so. False: nothing fits."""
    room = llm.context - (params.max_tokens or 64)
    dropped = 0
    while len(llm.chat_ids(messages)) >= room and len(messages) > 1:
        del messages[:2]
        dropped += 1
    if dropped:
        console.print(f"[dim](the oldest {dropped} turns no longer fit and are forgotten)[/]")
    if messages and len(llm.chat_ids(messages)) < room:
        return True
    console.print(f"[red]That is too long: the model reads {llm.context} tokens at most.[/]")
    return False


def print_stream(console: Console, pieces: Iterator[str]) -> str:
    """Print text as it comes; return all of it. Ctrl-C ends the answer, not the chat."""
    answer = ""
    try:
        for piece in pieces:
            answer += piece
            console.out(piece, end="", highlight=False)
    except KeyboardInterrupt:
        pass
    console.print()
    return answer
