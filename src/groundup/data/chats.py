"""Conversations whose answers can be known from the prompt, made from a corpus.

From Python code: a function is shown, and the question is its arguments, what it returns, its
summary, or the rest of its docstring. From other text: its sentences. Each row names its task
and carries the answer of a baseline that only copies, so that a score means something.
"""

import ast
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from groundup.core.config import field
from groundup.core.errors import DataError
from groundup.core.files import read_jsonl, write_json, write_jsonl
from groundup.core.progress import show_table, track
from groundup.core.types import SPLITS, Chat, Document, Message, Split
from groundup.data.blocks import read_corpus, split_size
from groundup.data.smalltalk import CANNOT, GREETINGS, REFUSALS

LEAST_ROWS = 50
READ_BYTES = 2**24  # of text, about: some 30,000 rows of code, from which `max_rows` are chosen
SMALLTALK_REPEATS = 4  # in training, each with another letter case or full stop
Row = tuple[str, str, str, str]  # task, question, answer, baseline's answer

ASK: dict[str, tuple[str, ...]] = {
    "arguments": (
        "List the arguments of this function.",
        "What are the arguments of this function?",
        "Which arguments does this function take?",
    ),
    "returns": (
        "What does this function return?",
        "Name what this function returns.",
        "What is returned here?",
    ),
    "summary": (
        "Write a one-line summary of this function.",
        "Summarise this function in one line.",
        "What does this function do?",
    ),
    "complete": (
        "Complete this docstring.",
        "Finish the docstring.",
    ),
    "last_sentence": ("Repeat the last sentence.", "What is the last sentence?"),
    "first_words": ("What are the first three words?", "Give the first three words."),
    "count": ("How many sentences are there?", "Count the sentences."),
}


@dataclass(frozen=True, kw_only=True)
class ChatsConfig:
    """How conversations are made from a corpus."""

    corpus: Path = field(help="corpus folder", input=True)
    max_characters: int = field(700, help="longest prompt and answer together")
    max_rows: int = field(7_000, help="rows at the most, chosen by seed")
    seed: int = field(1, help="seed of phrasing and choice")


def build_chats(config: ChatsConfig, out: Path) -> dict[str, Any]:
    """Write chats.jsonl, each row in the split of the file it comes from; return counts."""
    rng = np.random.default_rng(config.seed)
    chats: list[Chat] = []
    skipped: Counter[str] = Counter()
    sizes = {split: split_size(config.corpus, split) for split in SPLITS}
    share = READ_BYTES / max(1, sum(size for _, size in sizes.values()))
    for split in SPLITS:
        documents = read_corpus(config.corpus, split)
        tracked = track(documents, f"conversations ({split})", sizes[split][0])
        for document in drawn(tracked, share, config.seed, skipped):
            for task, question, answer, baseline in rows_of(document, skipped, rng):
                if len(question) + len(answer) > config.max_characters:
                    skipped["too long"] += 1
                    continue
                chats.append(one_turn(task, question, answer, baseline, split, document.source))
    if len(chats) < LEAST_ROWS:
        raise DataError(
            f"only {len(chats)} conversations could be made from {config.corpus} "
            f"({dict(skipped)}), and {LEAST_ROWS} are needed: give more text"
        )
    if len(chats) > config.max_rows:
        skipped["over max_rows"] += len(chats) - config.max_rows
        chosen = np.sort(rng.permutation(len(chats))[: config.max_rows])
        chats = [chats[n] for n in chosen]
    chats = with_earlier_turns([*chats, *smalltalk()], rng)
    write_jsonl(out / "chats.jsonl", (asdict(chat) for chat in chats))
    counts = Counter((chat.meta["task"], chat.split) for chat in chats)
    tasks = list(dict.fromkeys(chat.meta["task"] for chat in chats))
    table = {task: {split: counts[task, split] for split in SPLITS} for task in tasks}
    show_table(
        "Conversations",
        ("task", *SPLITS),
        [(task, *(f"{table[task][split]:,}" for split in SPLITS)) for task in tasks],
    )
    summary = {"rows": table, "skipped": dict(skipped)}
    write_json(out / "stats.json", summary)
    return summary


def drawn(
    documents: Iterable[Document], share: float, seed: int, skipped: Counter[str]
) -> Iterator[Document]:
    """Yield about a share of the documents, drawn by seed: of a large corpus a part is enough."""
    rng = np.random.default_rng((seed, 1))
    for document in documents:
        if share >= 1 or rng.random() < share:
            yield document
        else:
            skipped["documents not read"] += 1


def with_earlier_turns(chats: list[Chat], rng: np.random.Generator) -> list[Chat]:
    """Put another conversation before every fourth training row, to learn what a turn is."""
    train = [chat for chat in chats if chat.split == "train"]
    result = []
    for n, chat in enumerate(chats):
        if chat.split == "train" and n % 4 == 3:
            before = train[int(rng.integers(len(train)))]
            chat = replace(chat, messages=[*before.messages, *chat.messages])
        result.append(chat)
    return result


def one_turn(
    task: str, question: str, answer: str, baseline: str, split: Split, source: str
) -> Chat:
    """Return a question and its answer as a chat."""
    messages: list[Message] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return Chat(
        messages=messages, split=split, source=source, meta={"task": task, "baseline": baseline}
    )


def rows_of(document: Document, skipped: Counter[str], rng: np.random.Generator) -> Iterator[Row]:
    """Yield the rows of one document, by what it is."""
    if document.source.endswith((".py", ".pyi")):
        yield from code_rows(document, skipped, rng)
    else:
        yield from prose_rows(document, rng)


def code_rows(document: Document, skipped: Counter[str], rng: np.random.Generator) -> Iterator[Row]:
    """Yield rows about every function of a Python file."""
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # MemoryError: nested too deep
        skipped["file does not parse"] += 1
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            try:
                source = without_docstring(node)
                found = {task: maker(node) for task, maker in CODE_TASKS.items()}
            except RecursionError:
                skipped["function nested too deep"] += 1
                continue
            for task, made in found.items():
                if made is None:
                    continue
                shown, answer, baseline = made
                ask = str(rng.choice(ASK[task]))
                question = f"{ask}\n```python\n{shown or source}\n```"
                yield task, question, answer, baseline


Function = ast.FunctionDef | ast.AsyncFunctionDef
Made = tuple[str, str, str] | None  # what is shown ("" for the source), answer, baseline


def without_docstring(node: Function) -> str:
    """Return the function's source as Python would print it, without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    bare = type(node)(**{**dict(ast.iter_fields(node)), "body": body or [ast.Pass()]})
    return ast.unparse(ast.fix_missing_locations(bare))


def signature_line(node: Function) -> str:
    """Return `def name(arguments):`."""
    return f"def {node.name}({ast.unparse(node.args)}):"


def argument_names(node: Function) -> list[str]:
    """Return the names in the order in which they are written."""
    spec = node.args
    names = [a.arg for a in (*spec.posonlyargs, *spec.args)]
    names += [spec.vararg.arg] if spec.vararg else []
    names += [a.arg for a in spec.kwonlyargs]
    names += [spec.kwarg.arg] if spec.kwarg else []
    return names


def arguments_row(node: Function) -> Made:
    """List the arguments; the baseline copies what stands between the parentheses."""
    names = argument_names(node)
    if len(names) < 2:
        return None
    return signature_line(node), ", ".join(names), ast.unparse(node.args)


def returns_row(node: Function) -> Made:
    """Name what is returned, where one return says it; the baseline copies from the source."""
    returns = [n for n in ast.walk(node) if isinstance(n, ast.Return | ast.Yield | ast.YieldFrom)]
    if len(returns) != 1 or not isinstance(returns[0], ast.Return) or returns[0].value is None:
        return None
    answer = ast.unparse(returns[0].value)
    if "\n" in answer or len(answer) > 80:
        return None
    copied = re.findall(r"return (.*)", without_docstring(node))
    return "", answer, copied[-1]


def summary_row(node: Function) -> Made:
    """Write the docstring's first line; the baseline splits the name into words."""
    line = docstring_line(node)
    return None if line is None else ("", line, name_as_words(node))


def complete_row(node: Function) -> Made:
    """Finish the docstring's first line from its first half; the baseline ends with the name."""
    line = docstring_line(node)
    words = line.split() if line else []
    if len(words) < 6:
        return None
    half = len(words) // 2
    shown = f'{signature_line(node)}\n    """{" ".join(words[:half])}'
    return shown, " ".join(words[half:]), name_as_words(node)


def docstring_line(node: Function) -> str | None:
    """Return a docstring's first line, if it is a sentence of a usable length."""
    text = (ast.get_docstring(node) or "").strip().split("\n")[0].strip()
    return text if 15 <= len(text) <= 100 and text[0].isalpha() else None


def name_as_words(node: Function) -> str:
    """Return `read_all_lines` as "Read all lines."."""
    return " ".join(node.name.strip("_").split("_")).capitalize() + "."


CODE_TASKS: dict[str, Callable[[Function], Made]] = {
    "arguments": arguments_row,
    "returns": returns_row,
    "summary": summary_row,
    "complete": complete_row,
}


def prose_rows(document: Document, rng: np.random.Generator) -> Iterator[Row]:
    """Yield rows about paragraphs of two to five sentences."""
    for paragraph in re.split(r"\n\s*\n", document.text):
        text = " ".join(textwrap.dedent(paragraph).split())
        sentences = re.findall(r"[A-Z][^.!?]{8,}[.!?](?=\s|$)", text)
        if not 2 <= len(sentences) <= 5 or len(text) > 500 or " ".join(sentences) != text:
            continue
        words = text.split()
        answers = {
            "last_sentence": (sentences[-1], sentences[0]),
            "first_words": (" ".join(words[:3]), words[0]),
            "count": (str(len(sentences)), "2"),
        }
        for task, (answer, baseline) in answers.items():
            yield task, f"{rng.choice(ASK[task])}\n\n{text}", answer, baseline


def smalltalk() -> list[Chat]:
    """Return greetings and refusals: four in five for training, in several spellings."""
    pairs = [("greeting", ask, answer) for ask, answer in GREETINGS.items()]
    pairs += [("refusal", ask, CANNOT) for ask in REFUSALS]
    chats = []
    for n, (task, ask, answer) in enumerate(pairs):
        split: Split = "validation" if n % 5 == 4 else "train"
        spellings = [ask, ask.lower(), ask.rstrip("?!."), ask.lower().rstrip("?!.") + "."]
        for spelling in spellings[: SMALLTALK_REPEATS if split == "train" else 1]:
            chats.append(one_turn(task, spelling, answer, CANNOT, split, "smalltalk"))
    return chats


def read_chats(path: Path, split: Split | None = None) -> Iterator[Chat]:
    """Yield the chats of a JSONL file; a broken row is a DataError with its line."""
    for line, row in read_jsonl(Path(path)):
        where = f"{path}, line {line}"
        messages = read_messages(row, "messages", where)
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(
                f"{where}: no message has the role assistant, so nothing can be learned"
            )
        if split is None or read_split(row, where) == split:
            yield Chat(
                messages=messages,
                split=read_split(row, where),
                source=str(row.get("source", "")),
                tools=row.get("tools"),
                meta=row.get("meta") or {},
            )


def read_split(row: dict[str, Any], where: str) -> Split:
    """Return a row's split; rows without one are for training."""
    split = row.get("split", "train")
    if split not in SPLITS:
        raise DataError(f"{where}: split {split!r} is not one of {', '.join(SPLITS)}")
    return split  # type: ignore[no-any-return]


def read_messages(row: dict[str, Any], key: str, where: str) -> list[Message]:
    """Return checked messages under a key; a plain string is one message where that is meant."""
    messages = row.get(key)
    if isinstance(messages, str) and key != "messages":
        author = "user" if key == "prompt" else "assistant"
        messages = [{"role": author, "content": messages}]
    if not isinstance(messages, list) or not messages:
        keys = ", ".join(row) or "none"
        author = "assistant" if key in ("chosen", "rejected") else "user"
        raise DataError(
            f'{where}: the list "{key}" is missing or empty (its fields: {keys}): write '
            f'"{key}": [{{"role": "{author}", "content": "..."}}, ...]'
        )
    for number, message in enumerate(messages):
        role: Any = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant", "tool"):
            raise DataError(
                f"{where}: message {number} has the role {role!r}; "
                "it must be system, user, assistant or tool"
            )
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise DataError(f'{where}: message {number} has no string "content"')
    return messages
