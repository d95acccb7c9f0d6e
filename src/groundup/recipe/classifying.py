"""Stage `classify`: generative against discriminative classifiers on one labelled file."""

import dataclasses
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.core import device as devices
from groundup.core.errors import ConfigError, DataError, closest
from groundup.core.files import read_json, read_jsonl, write_json, write_jsonl, write_text
from groundup.core.progress import console, say, show_table
from groundup.core.run import resolve_model
from groundup.core.types import Classifier
from groundup.data.labelled import Labelled, nested_samples, read_labelled, split_labelled
from groundup.evaluate.classification import score_classes
from groundup.evaluate.classifiers import LABELS, LMClassifier, NetworkClassifier
from groundup.figure import LiveTraining
from groundup.model.bayes import NaiveBayes
from groundup.model.config import ModelConfig
from groundup.model.decoder import Decoder
from groundup.model.encoder import Encoder
from groundup.model.encoder_config import EncoderConfig
from groundup.model.heads import HeadedDecoder
from groundup.model.hf import load_model, load_network, save_model
from groundup.recipe.classify_report import KINDS, report, show_scores
from groundup.recipe.configs import ClassifyConfig
from groundup.recipe.shared import watch
from groundup.tokenizer import Tokenizer
from groundup.train import Examples, FitConfig, Hook, NextToken, audit, collate_rows, fit
from groundup.train.plan import mlp_width
from groundup.train.supervised import Classify, LabelledRow, collate_labelled

LEAST = {
    "sizes": 2,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "max_length": 8,
    "batch_size": 1,
    "max_test_rows": 1,
    "least_steps": 1,
    "epochs": 0,
}
# peak rates of Muon and AdamW, docs/decisions/0010
RANDOM_RATES, LOADED_RATES = (0.02, 0.003), (0.005, 0.0005)


def classify(config: ClassifyConfig, out: Path) -> dict[str, Any]:
    """Train every method on nested samples; write scores, predictions, models and report.html."""
    check(config)
    train, test, counts = read_split(config)
    labels = sorted({row.label for row in train})
    if not any(row.label in labels for row in test):
        raise DataError(f"{config.test} shares no label with {config.data}: is the column right?")
    sizes = sorted({min(size, len(train)) for size in config.sizes or default_sizes(train, labels)})
    samples = nested_samples(train, sizes, config.seed)
    show_counts(train, test, labels, counts)
    dtype = devices.training_dtype(config.device, config.dtype)
    device = devices.pick(config.device, dtype)
    say(f"  device: {device.line}")
    bench = Bench(config, labels, test, small_tokenizer(config, train, out), out, device)
    results: dict[str, list[dict[str, Any]]] = {
        method: [bench.run(method, sample, last=sample is samples[-1]) for sample in samples]
        for method in config.methods
    }
    predicted = {method: np.load(bench.work / f"{method}.npy") for method in config.methods}
    write_predictions(out, test, labels, predicted)
    summary = {"labels": len(labels), "train": len(train), "test": len(test), "scores": results}
    write_json(out / "classify.json", summary | {"left_out": dict(counts)})
    show_scores(results)
    title = f"Classifiers on {config.data.name}"
    write_text(out / "report.html", report(title, samples[-1], test, labels, results, predicted))
    shutil.rmtree(bench.work)
    say(f"  pictures: {out / 'report.html'}")
    return summary


def check(config: ClassifyConfig) -> None:
    """Refuse settings that make no sense before anything is read."""
    for method in config.methods:
        if method not in KINDS:
            raise ConfigError(f"unknown method {method!r}{closest(method, KINDS)}")
    if not 0 < config.test_share < 1:
        raise ConfigError(f"--test-share {config.test_share:g} must lie between 0 and 1")
    if config.lm is not None:
        load_model(resolve_model(config.lm))
    if config.encoder is not None:  # damaged, it is not found so behind an hour of the others
        load_network(resolve_model(config.encoder), task="sequence")
    for name, least in LEAST.items():
        values = getattr(config, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value < least:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} {value} is too small: {least} or more")


@dataclass(frozen=True)
class Bench:
    """What all methods share: settings, labels, test texts, a tokenizer, a place and a device."""

    config: ClassifyConfig
    labels: list[str]
    test: list[Labelled]
    tok: Tokenizer | None
    out: Path
    device: devices.Device

    @property
    def work(self) -> Path:
        """Return where finished parts are kept until the stage is done."""
        return self.out / "work"

    def run(self, method: str, sample: list[Labelled], *, last: bool) -> dict[str, Any]:
        """Train and score one method on one sample, or read what an interrupted run found."""
        name = method if last else f"{method}-{len(sample)}"
        done = self.work / f"{name}.json"
        if done.is_file():
            found: dict[str, Any] = read_json(done)
            return found
        say(f"  {method}: {len(sample):,} texts")
        torch.manual_seed(self.config.seed)
        model, train_s = METHODS[method](self, sample, self.out / name)
        started = time.perf_counter()
        log_probs_NL = aligned(model, [row.text for row in self.test], self.labels)
        predict_s = time.perf_counter() - started
        scores = score_classes(log_probs_NL, gold(self.test, self.labels))
        if last:
            self.work.mkdir(parents=True, exist_ok=True)
            np.save(self.work / f"{name}.npy", log_probs_NL)
        times = {"train_s": train_s, "predict_s": predict_s}
        record = {"examples": len(sample), **scores, **times}
        write_json(done, record)
        if not last:
            shutil.rmtree(self.out / name, ignore_errors=True)
        return record


def read_split(config: ClassifyConfig) -> tuple[list[Labelled], list[Labelled], Counter[str]]:
    """Return training and test rows and what was left out, by reason."""
    columns = {"text_column": config.text_column, "label_column": config.label_column}
    rows, counts = read_labelled(config.data, **columns)
    if len({row.label for row in rows}) < 2:
        raise DataError(f"{config.data} holds one label only ({rows[0].label}): nothing to compare")
    if config.test is None:
        train, test = split_labelled(rows, config.test_share, config.seed)
    else:
        test, more = read_labelled(config.test, **columns)
        shared = {row.text for row in test}
        train = [row for row in rows if row.text not in shared]
        counts += more
        counts["training text that is also in the test"] += len(rows) - len(train)
    if not train or not test:
        raise DataError(
            f"{config.data}: {len(train)} texts to train on and {len(test)} to test on: give more "
            "texts, another --test-share, or a --test file of other texts"
        )
    if len(test) > config.max_test_rows:
        chosen = np.random.default_rng(config.seed).permutation(len(test))[: config.max_test_rows]
        counts["test text not drawn (--max-test-rows)"] += len(test) - len(chosen)
        test = [test[n] for n in sorted(chosen)]
    return train, test, +counts


def default_sizes(train: Sequence[Labelled], labels: Sequence[str]) -> list[int]:
    """Return a sixteenth, a quarter and all of the texts; at least one for each label."""
    return [max(len(labels), len(train) // 16), max(len(labels), len(train) // 4), len(train)]


def show_counts(
    train: list[Labelled], test: list[Labelled], labels: list[str], counts: Counter[str]
) -> None:
    """Print what is there and what was left out."""
    common = Counter(row.label for row in train).most_common()
    rows = [
        ("texts to train on", f"{len(train):,}"),
        ("texts to test on", f"{len(test):,}"),
        ("labels", f"{len(labels):,}"),
        (f"most common label ({common[0][0]})", f"{common[0][1]:,}"),
        (f"rarest label ({common[-1][0]})", f"{common[-1][1]:,}"),
        *((f"left out: {why}", f"{n:,}") for why, n in counts.items()),
    ]
    unknown = sum(row.label not in labels for row in test)
    if unknown:
        rows.append(("test texts whose label training lacks", f"{unknown:,}"))
    show_table("Labelled texts", ("what", "count"), rows)


def small_tokenizer(config: ClassifyConfig, train: list[Labelled], out: Path) -> Tokenizer | None:
    """Return a WordPiece tokenizer of the training texts, if a network starts from nothing."""
    if not config.from_random:
        return None
    texts = [f"{row.label.replace('_', ' ')}: {row.text}" for row in train]
    tok = Tokenizer.train(texts, kind="wordpiece", vocab_size=config.vocab_size)
    tok.save(out / "tokenizer")
    return tok


def count_bayes(bench: Bench, sample: list[Labelled], out: Path) -> tuple[Classifier, float]:
    """Count a naive Bayes model; return it and the seconds taken."""
    started = time.perf_counter()
    bayes = NaiveBayes.train([row.text for row in sample], [row.label for row in sample])
    seconds = time.perf_counter() - started
    bayes.save(out)
    return bayes, seconds


def train_lm(bench: Bench, sample: list[Labelled], out: Path) -> tuple[Classifier, float]:
    """Train a language model on texts behind their labels; the loss counts the text only."""
    config, labels, tok = bench.config, bench.labels, bench.tok
    if config.lm is None:
        assert tok is not None
        model = Decoder(small_decoder(config, tok))
    else:
        folder = resolve_model(config.lm)
        model = load_model(folder)
        tok = Tokenizer.load(folder).need_rows(model.config.vocab_size, folder)
    rows = []
    for row in sample:
        name, text = LMClassifier.parts(tok, row.label, row.text)
        ids = [tok.eos_token_id, *name, *text]
        rows.append((ids, [False] * (1 + len(name)) + [True] * len(text)))
    longest = min(config.max_length, model.config.max_position_embeddings)
    kept, counts = audit(rows, longest)
    if counts["rows_cut"]:
        say(f"    {counts['rows_cut']:,} texts cut to {longest} tokens")
    source = Examples(
        kept,
        collate=lambda chosen: collate_rows(chosen, tok.pad_token_id),
        length=lambda row: len(row[0]),
        batch_size=config.batch_size,
        micro_batch_size=config.batch_size,
        seed=config.seed,
    )
    seconds = learn(model, NextToken(), source, bench, out, loaded=config.lm is not None)
    share_L = np.array([sum(row.label == label for row in sample) for label in labels]) + 1.0
    log_prior_L = np.log(share_L / share_L.sum())
    save_model(model, tok, out / "model")
    write_json(out / "model" / LABELS, {"labels": labels, "log_prior": log_prior_L.tolist()})
    return LMClassifier(model, tok, labels, log_prior_L), seconds


def train_encoder(bench: Bench, sample: list[Labelled], out: Path) -> tuple[Classifier, float]:
    """Fine-tune a network with a new head for the labels."""
    config, labels, tok = bench.config, bench.labels, bench.tok
    model: Any
    if config.encoder is None:
        assert tok is not None
        model = Encoder(small_encoder(config, tok, labels))
    else:
        folder = resolve_model(config.encoder)
        model = load_network(folder, task="sequence", num_labels=len(labels))
        tok = Tokenizer.load(folder).need_rows(model.config.vocab_size, folder)
    if isinstance(model, HeadedDecoder):
        model.labels = tuple(labels)
    else:
        model.config = dataclasses.replace(model.config, labels=tuple(labels))
    classifier = NetworkClassifier(model, tok, labels, max_length=config.max_length)
    rows = [LabelledRow(classifier.ids(row.text), labels.index(row.label)) for row in sample]
    if classifier.cut:
        say(f"    {classifier.cut:,} texts cut to {classifier.longest} tokens")
    source = Examples(
        rows,
        collate=lambda rows: collate_labelled(rows, tok.pad_token_id, most=classifier.longest),
        length=lambda row: len(row.ids),
        batch_size=config.batch_size,
        micro_batch_size=config.batch_size,
        seed=config.seed,
    )
    seconds = learn(model, Classify(), source, bench, out, loaded=config.encoder is not None)
    save_model(model, tok, out / "model")
    return classifier, seconds


METHODS = {"naive-bayes": count_bayes, "lm": train_lm, "encoder": train_encoder}


def small_decoder(config: ClassifyConfig, tok: Tokenizer) -> ModelConfig:
    """Return the shape of a language model that starts from random weights."""
    heads = max(1, config.hidden_size // 64)
    return ModelConfig(
        vocab_size=tok.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=mlp_width(config.hidden_size),
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=config.hidden_size // heads,
        max_position_embeddings=padded(config.max_length),
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )


def small_encoder(config: ClassifyConfig, tok: Tokenizer, labels: list[str]) -> EncoderConfig:
    """Return the shape of an encoder that starts from random weights."""
    return EncoderConfig(
        task="sequence",
        vocab_size=tok.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=4 * config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=max(1, config.hidden_size // 64),
        max_position_embeddings=config.max_length,
        num_labels=len(labels),
        pad_token_id=tok.pad_token_id,
        cls_token_id=tok.token_id("cls_token", "bos_token"),
        sep_token_id=tok.token_id("sep_token", "eos_token"),
    )


def padded(length: int) -> int:
    """Return the positions that batches of texts so long are padded to."""
    return -(-length // 32) * 32


def learn(
    model: Any, objective: Any, source: Examples, bench: Bench, out: Path, *, loaded: bool
) -> float:
    """Run the one loop for the epochs asked for; return the seconds that its steps took."""
    config = bench.config
    steps = max(config.least_steps, round(config.epochs * source.steps_per_epoch))
    matrices, others = LOADED_RATES if loaded else RANDOM_RATES
    settings = FitConfig(
        steps=steps,
        learning_rate=config.learning_rate or matrices,
        adam_learning_rate=config.adam_learning_rate or others,
        warmup_fraction=0.1,
        weight_decay=0.01,
        dtype=devices.training_dtype(config.device, config.dtype),  # type: ignore[arg-type]
        seed=config.seed,
        checkpoint_every=max(200, steps // 3),
    )
    with LiveTraining(console(), steps=steps, unit="loss") as live:
        hooks = [Hook(1, watch(live))]
        fit(model, objective, source, settings, out, device=bench.device.device, hooks=hooks)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return float(sum(row["seconds"] for _, row in read_jsonl(out / "metrics.jsonl")))


def gold(test: list[Labelled], labels: list[str]) -> NDArray[np.int64]:
    """Return the label's number for each text, -1 where training lacks the label."""
    number = {label: n for n, label in enumerate(labels)}
    return np.array([number.get(row.label, -1) for row in test])


def aligned(model: Classifier, texts: list[str], labels: list[str]) -> NDArray[np.float64]:
    """Return log-probabilities with a column for every label, -inf where a model lacks it."""
    found = model.log_probs(texts)
    result = np.full((len(texts), len(labels)), -np.inf)
    result[:, [labels.index(name) for name in model.labels]] = found
    return result


def write_predictions(
    out: Path, test: list[Labelled], labels: list[str], predicted: dict[str, NDArray[np.float64]]
) -> None:
    """Write what every method said of every test text, and how sure it was."""
    rows = []
    for n, row in enumerate(test):
        said = {
            method: {
                "label": labels[int(values[n].argmax())],
                "probability": round(float(np.exp(values[n].max())), 4),
            }
            for method, values in predicted.items()
        }
        rows.append({"text": row.text, "label": row.label, **said})
    write_jsonl(out / "predictions.jsonl", rows)
