"""Stage `evaluate`: three models on held-out text, the answers of each stage, the preferences."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from groundup.align import answer_logps
from groundup.core import device as devices
from groundup.core.errors import ConfigError, DataError
from groundup.core.files import write_json, write_jsonl
from groundup.core.progress import say, show_table
from groundup.core.types import Chat, SamplingParams
from groundup.data import Shard, open_shard, read_chats, read_documents, read_preferences
from groundup.evaluate import (
    bits_per_byte,
    compare_three,
    exact_match,
    preference_accuracy,
    score_answers,
    token_f1,
)
from groundup.evaluate.perplexity import ngram_scores
from groundup.evaluate.tasks import read_task, run_task
from groundup.generate import LLM
from groundup.model.hf import load_model
from groundup.model.lm import NeuralLM
from groundup.model.loading import AnyLM, load_lm
from groundup.model.mixture import save_mixture
from groundup.model.ngram import NGram
from groundup.recipe.configs import EvaluateConfig
from groundup.recipe.monitoring import bytes_of, spread
from groundup.recipe.tuning import pair_rows
from groundup.tokenizer import Tokenizer

STAGES = ("base", "finetuned", "aligned")
MAX_PAIRS = 300
KEPT_TOKENS = 16_384  # of validation text, on which every stage's model is scored
CARD_QUESTIONS = 5


def evaluate(config: EvaluateConfig, out: Path) -> dict[str, Any]:
    """Write metrics.json, answers.jsonl and samples.jsonl; print the tables."""
    device = devices.pick(config.device, "fp32")
    tok = Tokenizer.load(config.base)
    base = load_model(config.base, device=device.device)
    validation = open_shard(config.shards, "validation")
    ngram = NGram.load(config.ngram)
    scored = part_of(validation, config.eval_tokens, tok)
    three = compare_three(ngram, NeuralLM(base, tok.eos_token_id, progress="scoring"), scored)
    show_three(three, f"Kneser-Ney {ngram.order}-gram")
    folders = {"base": config.base, "finetuned": config.finetuned, "aligned": config.aligned}
    engines = {
        stage: LLM(load_model(folder, device=device.device), tok, max_num_seqs=32)
        for stage, folder in folders.items()
    }
    text = text_kept(engines, validation, tok)
    rows = answer(engines, choose_questions(config), config)
    scores = {stage: score_answers(rows, stage) for stage in STAGES}
    show_answers(scores)
    preferences = compare_preferences(config, tok, engines)
    samples = sample(engines, validation, tok, config.seed)
    write_jsonl(out / "answers.jsonl", rows)
    write_jsonl(out / "samples.jsonl", samples)
    metrics = {
        "bits_per_byte": three,
        "text_kept": text,
        "answers": scores,
        "preferences": preferences,
    }
    write_json(out / "metrics.json", metrics)
    write_json(out / "card.json", card(base.config, rows, scores["aligned"]))
    return {
        "ngram": three["ngram"]["bits_per_byte"],
        "network": three["network"]["bits_per_byte"],
        "mixture": three["mixture"]["bits_per_byte"],
        "exact_match": scores["aligned"]["all"]["exact_match"],
        "preference_accuracy": preferences["aligned"]["accuracy"],
    }


def part_of(validation: Shard, most_tokens: int, tok: Tokenizer) -> Shard:
    """Return documents from all over a split, and say so where that is not all of it."""
    total = len(validation.tokens)
    if total <= most_tokens:
        return validation
    documents = spread(validation, most_tokens)
    say(f"  {most_tokens:,} of {total:,} tokens of the validation text, drawn from all over it")
    return replace(
        validation,
        tokens=np.concatenate(documents),
        offsets=np.cumsum([0, *map(len, documents)]),
        num_bytes=bytes_of(documents, tok),
    )


def show_three(three: dict[str, Any], ngram: str, title: str = "Validation text") -> None:
    """Print the three-model table."""
    names = {"ngram": ngram, "network": "network", "mixture": "both interpolated"}
    rows = [
        (
            name,
            f"{three[key]['bits_per_byte']:.3f}",
            f"{three[key]['low']:.3f} to {three[key]['high']:.3f}",
            f"{three[key]['perplexity']:.1f}",
        )
        for key, name in names.items()
    ]
    show_table(title, ("model", "bits per byte", "95 %", "perplexity"), rows)
    gain = three["gain"]
    say(
        f"  interpolation gains {gain['bits_per_byte']:.3f} bits per byte on the network (95 %: "
        f"{gain['low']:.3f} to {gain['high']:.3f}); every document is scored by weights fitted on "
        "others"
    )


def text_kept(engines: dict[str, LLM], validation: Shard, tok: Tokenizer) -> dict[str, float]:
    """Return each stage's bits per byte of some validation text: what it still knows of it."""
    documents = spread(validation, KEPT_TOKENS)
    bits = math.log(2) * bytes_of(documents, tok)
    found = {}
    for stage, llm in engines.items():
        logprobs = NeuralLM(llm.engine.model, tok.eos_token_id).token_logprobs(documents)
        found[stage] = -sum(float(row.sum()) for row in logprobs) / bits
    told = ", ".join(f"{stage} {value:.3f}" for stage, value in found.items())
    say(f"  of {sum(map(len, documents)):,} tokens of it, bits per byte: {told}")
    return found


def choose_questions(config: EvaluateConfig) -> list[Chat]:
    """Return held-out questions, the same number of each task as far as there are enough."""
    by_task: dict[str, list[Chat]] = defaultdict(list)
    for chat in read_chats(config.chats, "validation"):
        by_task[str(chat.meta.get("task", "chat"))].append(chat)
    if not by_task:
        raise DataError(f"{config.chats} holds no row with split validation to evaluate on")
    rng = np.random.default_rng(config.seed)
    each = max(1, config.questions // len(by_task))
    chosen: list[Chat] = []
    for members in by_task.values():
        chosen += [members[n] for n in np.sort(rng.permutation(len(members))[:each])]
    return chosen


def answer(
    engines: dict[str, LLM], chats: Sequence[Chat], config: EvaluateConfig
) -> list[dict[str, Any]]:
    """Return one row a question with the greedy answer of every stage."""
    params = SamplingParams(temperature=0, max_tokens=config.max_tokens)
    any_engine = next(iter(engines.values()))
    prompts = [any_engine.chat_ids(chat.messages[:-1]) for chat in chats]
    fits = [len(ids) + config.max_tokens < any_engine.context for ids in prompts]
    kept = [n for n, good in enumerate(fits) if good]
    if len(kept) < len(chats):
        say(f"  {len(chats) - len(kept)} questions left out: longer than the model's context")
    rows = [
        {
            "task": chats[n].meta.get("task", "chat"),
            "source": chats[n].source,
            "prompt": chats[n].messages[-2]["content"],
            "reference": chats[n].messages[-1]["content"],
            "baseline": chats[n].meta.get("baseline", ""),
        }
        for n in kept
    ]
    for stage, llm in engines.items():
        outputs = llm.generate([prompts[n] for n in kept], params)
        for row, output in zip(rows, outputs, strict=True):
            row[stage] = output.outputs[0].text.strip()
    for row in rows:
        row["exact"] = exact_match(row["aligned"], row["reference"])
        row["f1"] = token_f1(row["aligned"], row["reference"])
    return rows


def show_answers(scores: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print exact match by task, beside copying."""
    rows = [
        (
            task,
            f"{score['rows']}",
            f"{score['baseline_exact_match']:.0%}",
            *(f"{scores[stage][task]['exact_match']:.0%}" for stage in STAGES),
            f"{score['low']:.0%} to {score['high']:.0%}",
        )
        for task, score in scores["aligned"].items()
    ]
    show_table("Held-out answers, exact match", ("task", "rows", "copying", *STAGES, "95 %"), rows)


def compare_preferences(
    config: EvaluateConfig, tok: Tokenizer, engines: dict[str, LLM]
) -> dict[str, dict[str, float]]:
    """Return how often each stage finds the better held-out answer likelier."""
    held_out = list(read_preferences(config.preferences, "validation"))
    chosen = np.random.default_rng(config.seed).permutation(len(held_out))[:MAX_PAIRS]
    context = next(iter(engines.values())).context
    pairs, _ = pair_rows([held_out[n] for n in chosen], tok, context)
    if not pairs:
        raise DataError(f"{config.preferences} holds no held-out pair to evaluate on")
    lengths = [(sum(pair.chosen[1]), sum(pair.rejected[1])) for pair in pairs]
    table = {}
    for stage in STAGES:
        model = engines[stage].engine.model
        better = answer_logps(model, [pair.chosen for pair in pairs], tok.pad_token_id)
        worse = answer_logps(model, [pair.rejected for pair in pairs], tok.pad_token_id)
        table[stage] = preference_accuracy(better, worse, lengths)
    rows = [
        (stage, f"{score['pairs']}", f"{score['accuracy']:.1%}", f"{score['shorter_wins']:.1%}")
        for stage, score in table.items()
    ]
    show_table(
        "Held-out preferences", ("model", "pairs", "better is likelier", "better is shorter"), rows
    )
    return table


def sample(
    engines: dict[str, LLM], validation: Shard, tok: Tokenizer, seed: int
) -> list[dict[str, Any]]:
    """Return fixed-seed continuations of the same three beginnings after each stage."""
    documents = sorted(validation.documents(), key=len)[-3:]
    params = SamplingParams(temperature=0.7, top_k=40, max_tokens=48, seed=seed)
    rows = []
    for document in documents:
        ids = [int(i) for i in document[:24]]
        row = {"prompt": tok.decode(ids)}
        for stage, llm in engines.items():
            row[stage] = llm.generate([tok.bos_token_id, *ids], params)[0].outputs[0].text
        rows.append(row)
    return rows


def card(
    shape: Any, rows: list[dict[str, Any]], scores: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Return what the chat says of the model at its start."""
    tasks = [
        f"{task} {score['exact_match']:.0%}"
        for task, score in scores.items()
        if task not in ("all", "greeting", "refusal")
    ]
    by_task: dict[str, list[str]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (not row["exact"], len(row["prompt"]))):
        by_task[row["task"]].append(row["prompt"])
    questions = [prompt for turn in zip_longest(*by_task.values()) for prompt in turn if prompt]
    return {
        "tasks": tasks,
        "score": f"{scores['all']['exact_match']:.0%} of held-out questions answered exactly",
        "questions": questions[:CARD_QUESTIONS],
        "layers": shape.num_hidden_layers,
        "width": shape.hidden_size,
    }


def evaluate_texts(
    model: Path, data: Sequence[str], *, device: str | None = None
) -> dict[str, float]:
    """Return bits per byte, perplexity and counts of a model on files or folders.

    `low` and `high` are the interval over texts, where there are several.
    Of an n-gram also its perplexity without the tokens that training never saw.
    """
    tok, lm = load_scorer(model, device)
    shard = read_shard(data, tok)
    scores = ngram_scores(lm, shard) if isinstance(lm, NGram) else bits_per_byte(lm, shard)
    if scores["documents"] == 1:  # says nothing of how much texts differ
        del scores["low"], scores["high"]
    return scores


def evaluate_mixture(
    model: Path,
    ngram: Path,
    data: Sequence[str],
    *,
    out: Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Return the scores of a network, an n-gram and both interpolated, and what that gains.

    With `out` the mixture is kept as a model, its weights fitted on these texts.
    """
    tok, network = load_scorer(model, device)
    if Tokenizer.load(ngram).fingerprint != tok.fingerprint:
        raise ConfigError(
            f"{ngram} has another tokenizer than {model}: count it with that one "
            f"(groundup ngram CORPUS --tokenizer {model})"
        )
    if out is not None and out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} cannot be used: the folder holds other files")
    counted, shard = NGram.load(ngram), read_shard(data, tok)
    if len(shard.offsets) < 3:
        raise DataError("weights are fitted on one document and tried on another: give two or more")
    three = compare_three(counted, network, shard)
    show_three(three, f"Kneser-Ney {counted.order}-gram", "Held-out text")
    if out is not None:
        tok.save(out)
        save_mixture(out, model, ngram, np.array(three["weights"]))
        say(f"  the mixture, its weights fitted on these texts: {out}")
    return three


def load_scorer(model: Path, device: str | None) -> tuple[Tokenizer, AnyLM]:
    """Return a folder's tokenizer and language model: a network, an n-gram or a mixture."""
    tok = Tokenizer.load(model)
    lm = load_lm(model, tok.eos_token_id, device=devices.pick(device, "fp32").device)
    if isinstance(lm, NeuralLM):
        lm.progress = "scoring"
    return tok.need_rows(lm.vocab_size, model), lm


def read_shard(data: Sequence[str], tok: Tokenizer) -> Shard:
    """Return files or folders as one split of ids; no text at all is a DataError."""
    texts = [document.text for document in read_documents(data) if document.text]
    encoded = [[*ids, tok.eos_token_id] for ids in tok.encode_batch(texts)]
    if not encoded:
        raise DataError(f"{', '.join(map(str, data))} holds no text")
    return Shard(
        tokens=np.concatenate([np.array(ids) for ids in encoded]),
        offsets=np.cumsum([0, *(len(ids) for ids in encoded)]),
        num_bytes=sum(len(text.encode()) for text in texts),
        eos_token_id=tok.eos_token_id,
        vocab_size=tok.vocab_size,
        tokenizer=tok.fingerprint,
    )


TASK_HEADERS = ("task", "items", "acc", "95 %", "acc_norm", "chance", "perplexity", "cut")


def evaluate_tasks(
    model: Path, paths: Sequence[Path], *, limit: int | None = None, device: str | None = None
) -> dict[str, dict[str, float]]:
    """Return a model's scores in log-likelihood tasks; print them as a table."""
    tasks = [read_task(path, limit=limit) for path in paths]
    tok, lm = load_scorer(model, device)
    scores = {task.name: run_task(lm, tok, task) for task in tasks}
    rows = [
        (
            name,
            f"{found['items']:,}",
            f"{found['acc']:.3f}" if "acc" in found else "",
            f"{found['low']:.3f} to {found['high']:.3f}" if "acc" in found else "",
            *(f"{found[key]:.3f}" if key in found else "" for key in TASK_HEADERS[4:7]),
            f"{found.get('cut', 0):,}",
        )
        for name, found in scores.items()
    ]
    filled = [n for n in range(len(TASK_HEADERS)) if any(row[n] for row in rows)]
    headers = [TASK_HEADERS[n] for n in filled]
    show_table("Tasks", headers, [[row[n] for n in filled] for row in rows])
    return scores
