"""Complete the prompts of a JSONL file: in order, with progress, continued where it stopped.

Answers go to a file beside the output as they come, in the order of the rows; it takes the
output's name when all are there. What was cut off in the middle of a line is done again.
"""

import json
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from groundup.core import config as configs
from groundup.core.errors import ConfigError, GroundupError
from groundup.core.files import hash_file, read_json, read_jsonl, storage_errors, write_json
from groundup.core.progress import say, show_table, track
from groundup.core.run import exclusive
from groundup.core.types import CompletionOutput, SamplingParams
from groundup.generate import LLM, Request
from groundup.generate.llm import best

Row = dict[str, Any]
BEHIND = 64  # rows a place that may be done before one that takes long, and are lost by a kill


def complete_file(
    llm: LLM,
    data: Path,
    out: Path,
    params: SamplingParams,
    *,
    model: str,
    adapter: str | None = None,
) -> dict[str, Any]:
    """Answer every row of `data` ("prompt" or "messages"; "params" of its own) into `out`.

    A row may name an "adapter" that is loaded, in place of `adapter`.
    A row that cannot be answered gets an "error" and disturbs no other. Returns the summary.
    """
    if not out.name or os.path.isdir(out):  # no trouble with a name that is too long
        raise ConfigError(f"--out {out} is a folder: name a file for the answers")
    partial = out.with_name(f".{out.name}.partial")
    notes = out.with_name(f".{out.name}.partial.json")
    given = params.logits_processors
    identity = {
        "model": model,
        "data": hash_file(data) if data.is_file() else "",
        "params": configs.dump(params) | {"logits_processors": list(map(name_of, given))},
        "quantization": llm.engine.config.quantization,
        "dtype": llm.engine.config.dtype,
        "weights": stamp_of(Path(model)),
        "adapter": adapter,
    }
    llm.engine.prepare([], params)  # what is wrong for every row is said at once
    with exclusive(out), storage_errors(out):
        if out.exists():
            raise ConfigError(f"{out} exists: choose another --out, or delete it")
        rows = [row for _, row in read_jsonl(data)]
        done = resume(partial, notes, identity)
        if done:
            say(f"{out}: {done:,} of {len(rows):,} rows are there, continuing")
        started = time.monotonic()
        counts: Counter[str] = Counter()
        with open(partial, "ab") as handle:
            answers = answer_rows(llm, rows[done:], params, adapter=adapter)
            for row in track(answers, "rows", total=len(rows) - done):
                count(counts, row)
                handle.write(line_of(row))
                handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, out)
        notes.unlink(missing_ok=True)
    return summarise(counts, len(rows), done, time.monotonic() - started)


def name_of(function: Any) -> str:
    """Return where a user's function comes from."""
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}"


def stamp_of(folder: Path) -> list[list[Any]]:
    """Return what changes when a model is written anew: its files, their sizes and times."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    own = [f for f in files if f.is_file() and f.name[0] != "." and f.suffix != ".jsonl"]
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in own]


def line_of(row: Row) -> bytes:
    """Return a row as a line of UTF-8."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can say
        return json.dumps(row).encode() + b"\n"


def resume(partial: Path, notes: Path, identity: dict[str, Any]) -> int:
    """Return how many rows an interrupted run has answered; other settings are a ConfigError."""
    if not partial.exists() or not notes.exists():
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        write_json(notes, identity)
        return 0
    before = read_json(notes)
    now = json.loads(json.dumps(identity))
    for name in now:
        if before.get(name) != now[name]:
            raise ConfigError(
                f"{partial} was begun with another {name}: run that again, or delete the file"
            )
    content = partial.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with open(partial, "r+b") as handle:
            handle.truncate(whole)
    return content.count(b"\n")


def answer_rows(
    llm: LLM, rows: Sequence[Row], params: SamplingParams, *, adapter: str | None = None
) -> Iterator[Row]:
    """Yield each row with its answers, in order; a few more than can run are under way.

    Rows behind a long one are answered while it is, and wait for it to be yielded.
    """
    engine = llm.engine
    ahead, most, queue = 2 * engine.rows, BEHIND * engine.rows, engine.queue
    under_way: deque[tuple[Row, list[Request]]] = deque()
    waiting = deque(rows)
    try:
        while waiting or under_way:
            while waiting and len(under_way) < most and len(queue.all) < ahead:
                under_way.append(started(llm, waiting.popleft(), params, adapter))
            if any(not request.finished for request in under_way[0][1]):
                engine.step()
                continue
            row, requests = under_way.popleft()
            if requests:
                row = row | {"outputs": [as_json(output) for output in best(requests)]}
                if requests[0].prompt_logprobs is not None:
                    row["prompt_logprobs"] = requests[0].prompt_logprobs
            yield row
    finally:
        engine.abort([request for _, requests in under_way for request in requests])


def started(
    llm: LLM, row: Row, params: SamplingParams, adapter: str | None
) -> tuple[Row, list[Request]]:
    """Return a row and its requests, now under way; what is wrong with it is told in its place."""
    try:
        ids, own = request_of(llm, row, params)
        return row, llm.engine.add(ids, own, adapter=row.get("adapter", adapter))
    except Exception as err:
        known = isinstance(err, GroundupError)
        return row | {"error": str(err) if known else f"{type(err).__name__}: {err}"}, []


def request_of(llm: LLM, row: Row, params: SamplingParams) -> tuple[list[int], SamplingParams]:
    """Return a row's prompt as ids, and its sampling parameters."""
    if isinstance(row.get("messages"), list):
        ids = llm.chat_ids(row["messages"])
    elif isinstance(row.get("prompt"), str):
        ids = llm.encode(row["prompt"])
    else:
        raise ConfigError('a row needs "prompt" (text) or "messages" (a list)')
    own = row.get("params") or {}
    if not isinstance(own, dict):
        raise ConfigError('"params" must be an object of sampling parameters')
    given = {name: getattr(params, name) for name in params.__dataclass_fields__}
    return ids, configs.load(SamplingParams, given | own, where="params") if own else params


def as_json(output: CompletionOutput) -> Row:
    """Return an answer as JSON values; what was not asked for is left out."""
    found: Row = {
        "text": output.text,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "token_ids": output.token_ids,
    }
    if output.logprobs is not None:
        found["logprobs"] = output.logprobs
    if output.score is not None:
        found["score"] = output.score
    return found


def count(counts: Counter[str], row: Row) -> None:
    """Count a row's answers by the reason of their end, and their tokens."""
    if "error" in row:
        counts["refused"] += 1
    for output in row.get("outputs", []):
        counts[output["finish_reason"]] += 1
        counts["tokens"] += len(output["token_ids"])


def summarise(counts: Counter[str], rows: int, done: int, seconds: float) -> dict[str, Any]:
    """Print and return what was done."""
    rate = counts["tokens"] / max(seconds, 1e-9)
    reasons = {name: n for name, n in counts.items() if name != "tokens"}
    summary: dict[str, Any] = {"rows": rows, "continued_from": done, "tokens": counts["tokens"]}
    summary |= {"seconds": round(seconds, 2), "tokens_per_s": round(rate, 1)}
    table = [(name, f"{value:,}") for name, value in (summary | reasons).items()]
    show_table("Answered", ("", ""), table)
    return summary | {"ended": reasons}
