"""Stage `reading`: fine-tune an encoder to point at answers, on files in SQuAD's form."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from groundup.core import device as devices
from groundup.core.errors import CheckpointError, DataError
from groundup.core.files import read_json, write_json
from groundup.core.progress import console, say, show_table
from groundup.core.run import FINISHED
from groundup.data.squad import Question, read_squad, split_by_article
from groundup.evaluate.reading import SpanReader, closest_sentence, score_reading
from groundup.figure import LiveTraining
from groundup.model.encoder import Encoder
from groundup.model.hf import checkpoint_weights, load_network, save_model, write_model
from groundup.recipe.configs import ReadingConfig
from groundup.recipe.shared import rows_for_ranks, watch
from groundup.tokenizer import Tokenizer
from groundup.train import Examples, FitConfig, Hook, fit
from groundup.train.ranks import here
from groundup.train.supervised import LabelledRow, Spans, collate_labelled
from groundup.train.windows import cut_windows, span_rows


def read_spans(config: ReadingConfig, out: Path) -> dict[str, Any]:
    """Train on windows of the contexts; write `model/`, predictions.json and scores."""
    tok = Tokenizer.load(config.model)
    dtype = devices.training_dtype(config.device, config.dtype)
    device = devices.pick(config.device, dtype)
    torch.manual_seed(config.seed)
    model = span_model(config.model)
    tok.need_rows(model.config.vocab_size, config.model)
    longest = min(config.max_length, model.config.max_position_embeddings)
    train, test, counts = read_splits(config)
    windows, cut = cut_windows(train, tok, max_length=longest, doc_stride=config.doc_stride)
    rows, trained = span_rows(train, windows)
    show_audit(train, test, counts + cut + trained, longest)
    if not trained["windows with the answer"] and not trained["questions without an answer"]:
        raise DataError(f"no window of {longest} tokens holds an answer: raise --max-length")
    source = source_of(rows, tok, config)
    steps = config.steps or max(1, round(config.epochs * source.steps_per_epoch))
    say(f"  device: {device.line}; {steps:,} steps, {steps / source.steps_per_epoch:.2f} epochs")
    settings = FitConfig(
        steps=steps,
        learning_rate=config.learning_rate,
        adam_learning_rate=config.adam_learning_rate,
        warmup_fraction=0.1,
        weight_decay=0.01,
        dtype=dtype,  # type: ignore[arg-type]
        seed=config.seed,
        checkpoint_every=config.checkpoint_every,
    )
    with LiveTraining(console(), steps=steps, unit="loss") as live:
        fit(
            model,
            Spans(),
            source,
            settings,
            out,
            device=device.device,
            hooks=[Hook(1, watch(live))],
            write_model=lambda copied, folder: write_model(copied, tok, folder),
            read_weights=lambda folder: checkpoint_weights(model, folder),
        )
    if not here().first:
        return {}
    save_model(model, tok, out / "model")
    reader = SpanReader(model, tok, max_length=longest, doc_stride=config.doc_stride)
    scores = score(reader, test, out)
    return {"audit": dict(counts + cut + trained), "steps": steps, **scores}


def span_model(folder: Path) -> Encoder:
    """Return the folder's encoder with its span head, or with a new one."""
    found = load_network(folder)
    if not isinstance(found, Encoder):
        raise CheckpointError(
            f"{folder} is a decoder; spans need an encoder (bert, modernbert), which sees what "
            "follows a token too"
        )
    if found.config.task == "span":
        return found
    model = load_network(folder, task="span")
    assert isinstance(model, Encoder)
    return model


def read_splits(config: ReadingConfig) -> tuple[list[Question], list[Question], Counter[str]]:
    """Return questions to train on and to test on, and what was mended or left out."""
    questions, counts = read_squad(config.data)
    if config.test is not None:
        test, more = read_squad(config.test)
        return questions, test, counts + more
    train, test = split_by_article(questions, config.test_share, config.seed)
    if not train or not test:
        raise DataError(
            f"{config.data}: {len(train)} questions to train on and {len(test)} to test on: "
            "give more articles, another --test-share, or a --test file"
        )
    return train, test, counts


def source_of(rows: list[LabelledRow], tok: Tokenizer, config: ReadingConfig) -> Examples:
    """Return the batch source."""
    longest = max(len(row.ids) for row in rows)
    return Examples(
        rows,
        collate=lambda chosen: collate_labelled(chosen, tok.pad_token_id, most=longest),
        length=lambda row: len(row.ids),
        batch_size=config.batch_size,
        micro_batch_size=rows_for_ranks(config.batch_size)[0],
        seed=config.seed,
    )


def show_audit(
    train: list[Question], test: list[Question], counts: Counter[str], longest: int
) -> None:
    """Print what will be learned from, before it is."""
    rows = [
        ("questions to train on", f"{len(train):,}"),
        ("questions to test on", f"{len(test):,}"),
        ("tokens a window at most", f"{longest:,}"),
        *((what, f"{count:,}") for what, count in counts.items()),
    ]
    show_table("Reading audit", ("what", "count"), rows)


def score(reader: SpanReader, test: list[Question], out: Path | None) -> dict[str, Any]:
    """Print exact match and F1 beside the baseline; write predictions.json, if there is a place."""
    abstain = any(not question.answers for question in test)
    said = reader.answers(test, may_abstain=abstain)
    scores = score_reading(test, said)
    baseline = score_reading(test, [closest_sentence(question) for question in test])
    rows = [
        (
            name,
            f"{values['exact_match']:.1%}",
            f"{values['f1']:.1%}",
            f"{values['f1_low']:.1%} to {values['f1_high']:.1%}",
        )
        for name, values in (("model", scores), ("the closest sentence", baseline))
    ]
    title = f"Answers to {len(test):,} questions"
    show_table(title, ("what answers", "exact match", "F1", "95 % of F1"), rows)
    if out is not None:  # the form that SQuAD's own script reads
        answers = {question.id: text for question, text in zip(test, said, strict=True)}
        write_json(out / "predictions.json", answers)
    return {
        **scores,
        "baseline_exact_match": baseline["exact_match"],
        "baseline_f1": baseline["f1"],
    }


def evaluate_reading(
    model: Path,
    data: Sequence[str],
    *,
    max_length: int | None = None,
    doc_stride: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Score a model with a span head on files in SQuAD's form.

    Windows are those that are asked for, else those that the model was trained with.
    """
    network: Any = load_network(model, device=devices.pick(device, "fp32").device)
    tok = Tokenizer.load(model).need_rows(network.config.vocab_size, model)
    used = windows_of_training(model) | {
        name: asked
        for name, asked in (("max_length", max_length), ("doc_stride", doc_stride))
        if asked is not None
    }
    reader = SpanReader(network, tok, **used)
    say(f"  windows of {reader.max_length:,} tokens at most, {reader.doc_stride:,} apart")
    questions: list[Question] = []
    for path in data:
        found, counts = read_squad(Path(path))
        questions += found
        for what, count in counts.items():
            say(f"  {path}: {what}: {count:,}")
    return score(reader, questions, None)


def windows_of_training(model: Path) -> dict[str, int]:
    """Return max_length and doc_stride of the stage that wrote a model; empty if none says so."""
    for folder in (model, *model.resolve().parents[:2]):
        if (folder / FINISHED).is_file():
            record = read_json(folder / FINISHED)
            if record["stage"] != "reading":
                return {}
            return {name: record["config"][name] for name in ("max_length", "doc_stride")}
    return {}
