"""Stage `classify`: generative against discriminative classifiers on one labelled file."""

import dataclasses
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.core import device as devices
from groundup.core.errors import ConfigError, DataError, closest
from groundup.core.files import read_json, write_json, write_jsonl, write_text
from groundup.core.progress import console, say, show_table
from groundup.core.types import Classifier
from groundup.data.labelled import Labelled, nested_samples, read_labelled, split_labelled
from groundup.evaluate.classification import BINS, reliability, score_classes
from groundup.evaluate.classifiers import LABELS, LMClassifier, NetworkClassifier
from groundup.evaluate.projection import project
from groundup.figure import LiveTraining, Series, line_plot, page
from groundup.figure.plots import reliability_plot, two_views
from groundup.model.bayes import NaiveBayes
from groundup.model.config import ModelConfig
from groundup.model.decoder import Decoder
from groundup.model.encoder import Encoder
from groundup.model.encoder_config import EncoderConfig
from groundup.model.heads import HeadedDecoder
from groundup.model.hf import load_model, load_network, save_model
from groundup.recipe.configs import ClassifyConfig
from groundup.recipe.shared import watch
from groundup.tokenizer import Tokenizer
from groundup.train import Examples, FitConfig, Hook, NextToken, audit, collate_rows, fit
from groundup.train.plan import mlp_width
from groundup.train.supervised import Classify, LabelledRow, collate_labelled

KINDS = {
    "naive-bayes": "generative",
    "lm": "generative",
    "encoder": "discriminative",
}
CLASSES_DRAWN, POINTS_DRAWN = 3, 300


def classify(config: ClassifyConfig, out: Path) -> dict[str, Any]:
    """Train every method on nested samples; write scores, predictions, models and report.html."""
    for method in config.methods:
        if method not in KINDS:
            raise ConfigError(f"unknown method {method!r}{closest(method, KINDS)}")
    train, test, counts = read_split(config)
    labels = sorted({row.label for row in train})
    if len(labels) < 2:
        raise DataError(f"{config.data} holds one label only ({labels[0]}): nothing to tell apart")
    sizes = sorted({min(size, len(train)) for size in config.sizes or default_sizes(train, labels)})
    samples = nested_samples(train, sizes, config.seed)
    show_counts(train, test, labels, counts)
    device = devices.pick(config.device)
    say(f"  device: {device.line}")
    tok = small_tokenizer(config, train, out)
    gold_N = np.array([labels.index(r.label) if r.label in labels else -1 for r in test])
    results: dict[str, list[dict[str, Any]]] = {}
    predicted: dict[str, NDArray[np.float64]] = {}
    for method in config.methods:
        results[method] = []
        for sample in samples:
            last = sample is samples[-1]
            name = method if last else f"{method}-{len(sample)}"
            done = out / "work" / f"{name}.json"
            if not done.is_file():
                say(f"  {method}: {len(sample):,} texts")
                model, train_s = train_one(method, config, sample, labels, tok, out, name, device)
                started = time.perf_counter()
                log_probs_NL = aligned(model, [row.text for row in test], labels)
                predict_s = time.perf_counter() - started
                if last:
                    np.save(out / "work" / f"{name}.npy", log_probs_NL)
                scores = score_classes(log_probs_NL, gold_N)
                times = {"train_s": train_s, "predict_s": predict_s}
                write_json(done, {"examples": len(sample), **scores, **times})
                if not last:
                    shutil.rmtree(out / name, ignore_errors=True)
            results[method].append(read_json(done))
        predicted[method] = np.load(out / "work" / f"{method}.npy")
    write_predictions(out, test, labels, predicted)
    summary = {"labels": len(labels), "train": len(train), "test": len(test), "scores": results}
    write_json(out / "classify.json", summary | {"left_out": dict(counts)})
    show_scores(results)
    write_text(out / "report.html", report(config, train, test, labels, results, predicted))
    shutil.rmtree(out / "work")
    say(f"  pictures: {out / 'report.html'}")
    return summary


def read_split(config: ClassifyConfig) -> tuple[list[Labelled], list[Labelled], Counter[str]]:
    """Return training and test rows and what was left out, by reason."""
    columns = {"text_column": config.text_column, "label_column": config.label_column}
    rows, counts = read_labelled(config.data, **columns)
    if config.test is None:
        train, test = split_labelled(rows, config.test_share, config.seed)
    else:
        test, more = read_labelled(config.test, **columns)
        shared = {row.text for row in test}
        train = [row for row in rows if row.text not in shared]
        counts += more
        counts["training text that is also in the test"] += len(rows) - len(train)
    if not train or not test:
        raise DataError(f"{config.data}: {len(train)} texts to train on and {len(test)} to test on")
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
    scratch = ("lm" in config.methods and config.lm is None) or (
        "encoder" in config.methods and config.encoder is None
    )
    if not scratch:
        return None
    texts = [f"{row.label.replace('_', ' ')}: {row.text}" for row in train]
    tok = Tokenizer.train(texts, kind="wordpiece", vocab_size=config.vocab_size)
    tok.save(out / "tokenizer")
    return tok


def train_one(
    method: str,
    config: ClassifyConfig,
    sample: list[Labelled],
    labels: list[str],
    tok: Tokenizer | None,
    out: Path,
    name: str,
    device: devices.Device,
) -> tuple[Classifier, float]:
    """Train one method on one sample; return it and the seconds taken."""
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    classifier: Classifier
    if method == "naive-bayes":
        bayes = NaiveBayes.train([row.text for row in sample], [row.label for row in sample])
        shutil.rmtree(out / name, ignore_errors=True)
        bayes.save(out / name)
        classifier = bayes
    elif method == "lm":
        classifier = train_lm(config, sample, labels, tok, out / name, device)
    else:
        classifier = train_encoder(config, sample, labels, tok, out / name, device)
    return classifier, time.perf_counter() - started


def train_lm(
    config: ClassifyConfig,
    sample: list[Labelled],
    labels: list[str],
    tok: Tokenizer | None,
    out: Path,
    device: devices.Device,
) -> LMClassifier:
    """Train a language model on texts behind their labels; the loss counts the text only."""
    if config.lm is None:
        assert tok is not None
        model = Decoder(small_decoder(config, tok))
    else:
        model, tok = load_model(config.lm), Tokenizer.load(config.lm)
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
    run(model, NextToken(), source, config, out, device)
    share_L = np.array([sum(row.label == label for row in sample) for label in labels]) + 1.0
    log_prior_L = np.log(share_L / share_L.sum())
    save_model(model, tok, out / "model")
    write_json(out / "model" / LABELS, {"labels": labels, "log_prior": log_prior_L.tolist()})
    return LMClassifier(model, tok, labels, log_prior_L)


def train_encoder(
    config: ClassifyConfig,
    sample: list[Labelled],
    labels: list[str],
    tok: Tokenizer | None,
    out: Path,
    device: devices.Device,
) -> NetworkClassifier:
    """Fine-tune a network with a new head for the labels."""
    model: Any
    if config.encoder is None:
        assert tok is not None
        model = Encoder(small_encoder(config, tok, labels))
    else:
        tok = Tokenizer.load(config.encoder)
        model = load_network(config.encoder, task="sequence", num_labels=len(labels))
    if isinstance(model, HeadedDecoder):
        model.labels = tuple(labels)
    else:
        model.config = dataclasses.replace(model.config, labels=tuple(labels))
    classifier = NetworkClassifier(model, tok, labels)
    rows = [LabelledRow(classifier.ids(row.text), labels.index(row.label)) for row in sample]
    if classifier.cut:
        say(f"    {classifier.cut:,} texts cut to {model.config.max_position_embeddings} tokens")
    source = Examples(
        rows,
        collate=lambda chosen: collate_labelled(chosen, tok.pad_token_id),
        length=lambda row: len(row.ids),
        batch_size=config.batch_size,
        micro_batch_size=config.batch_size,
        seed=config.seed,
    )
    run(model, Classify(), source, config, out, device)
    save_model(model, tok, out / "model")
    return classifier


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
        max_position_embeddings=config.max_length,
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


def run(
    model: Any,
    objective: Any,
    source: Examples,
    config: ClassifyConfig,
    out: Path,
    device: devices.Device,
) -> None:
    """Run the one loop for the epochs asked for."""
    steps = max(config.least_steps, round(config.epochs * source.steps_per_epoch))
    settings = FitConfig(
        steps=steps,
        learning_rate=config.learning_rate,
        adam_learning_rate=config.adam_learning_rate,
        warmup_fraction=0.1,
        weight_decay=0.01,
        seed=config.seed,
        checkpoint_every=max(200, steps // 3),
    )
    with LiveTraining(console, steps=steps, unit="loss") as live:
        hooks = [Hook(1, watch(live))]
        fit(model, objective, source, settings, out, device=device.device, hooks=hooks)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


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


HEADERS = (
    "method",
    "kind",
    "accuracy",
    "95 % interval",
    "macro-F1",
    "calibration error",
    "nats a text",
    "train s",
    "predict s",
)


def score_rows(results: dict[str, list[dict[str, Any]]]) -> list[tuple[str, ...]]:
    """Return a row for each method on all training texts."""
    rows: list[tuple[str, ...]] = []
    for method, runs in results.items():
        s = runs[-1]
        rows.append(
            (
                method,
                KINDS[method],
                f"{s['accuracy']:.3f}",
                f"{s['low']:.3f} to {s['high']:.3f}",
                f"{s['macro_f1']:.3f}",
                f"{s['ece']:.3f}",
                f"{s['nll']:.3f}",
                f"{s['train_s']:.1f}",
                f"{s['predict_s']:.1f}",
            )
        )
    return rows


def show_scores(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table, and accuracy by number of examples."""
    show_table("Classifiers, all training texts", HEADERS, score_rows(results))
    sizes = [f"{run['examples']:,} texts" for run in next(iter(results.values()))]
    curve = [(m, *(f"{run['accuracy']:.3f}" for run in runs)) for m, runs in results.items()]
    show_table("Accuracy by number of examples", ("method", *sizes), curve)


def report(
    config: ClassifyConfig,
    train: list[Labelled],
    test: list[Labelled],
    labels: list[str],
    results: dict[str, list[dict[str, Any]]],
    predicted: dict[str, NDArray[np.float64]],
) -> str:
    """Return the page: one table, the pictures, and what was confused."""
    gold_N = np.array([labels.index(r.label) if r.label in labels else -1 for r in test])
    curves = {
        method: [
            (b.confidence, b.accuracy, b.count) for b in reliability(values, gold_N) if b.count
        ]
        for method, values in predicted.items()
    }
    by_size = [
        Series(method, [r["examples"] for r in runs], [r["accuracy"] for r in runs])
        for method, runs in results.items()
    ]
    first = next(iter(predicted))
    sections = [
        page.section(
            "Scores",
            page.table(HEADERS, score_rows(results)),
            page.text(
                "A generative classifier learns how the texts of each label look, p(text | label), "
                "and turns that round with Bayes' rule. A discriminative one learns only what "
                "tells labels apart, p(label | text)."
            ),
        ),
        page.section(
            "Accuracy and examples",
            page.picture(
                line_plot(by_size, x_label="training texts", y_label="accuracy", log_x=True),
                "Each sample holds the smaller ones; labels are spread evenly.",
            ),
        ),
        page.section(
            "Calibration",
            page.picture(
                reliability_plot(curves),
                f"Test texts by how sure the method was, in {BINS} bins. On the dashed line, what "
                "is said with 80 % confidence is right in 80 % of cases. Dots grow with the count.",
            ),
        ),
        page.section("Densities and a boundary", *plane_blocks(train, labels, predicted, gold_N)),
        page.section(
            "Most confused",
            page.table(
                ("is", "was called", "times"), confusions(labels, predicted[first], gold_N)[:10]
            ),
            page.text(f"By {first}.", soft=True),
        ),
    ]
    subtitle = f"{len(train):,} texts to train on, {len(test):,} to test on, {len(labels):,} labels"
    return page.page(f"Classifiers on {config.data.name}", subtitle, sections)


def confusions(
    labels: list[str], log_probs_NL: NDArray[np.float64], gold_N: NDArray[np.int64]
) -> list[tuple[str, str, str]]:
    """Return (label, what it was taken for, how often), most often first."""
    said_N = log_probs_NL.argmax(1)
    pairs = Counter(
        (int(gold), int(said))
        for gold, said in zip(gold_N, said_N, strict=True)
        if gold != said and gold >= 0
    )
    return [(labels[gold], labels[said], f"{n}") for (gold, said), n in pairs.most_common()]


def plane_blocks(
    train: list[Labelled],
    labels: list[str],
    predicted: dict[str, NDArray[np.float64]],
    gold_N: NDArray[np.int64],
) -> list[str]:
    """Return the picture of the classes that are confused most."""
    drawn = labels
    if len(labels) > CLASSES_DRAWN:
        pairs = confusions(labels, next(iter(predicted.values())), gold_N)
        named = [name for gold, said, _ in pairs for name in (gold, said)]
        common = [name for name, _ in Counter(row.label for row in train).most_common()]
        drawn = list(dict.fromkeys([*named, *common]))[:CLASSES_DRAWN]
    chosen: list[Labelled] = []
    for label in drawn:
        chosen += [row for row in train if row.label == label][:POINTS_DRAWN]
    if min(Counter(row.label for row in chosen).values()) < 3:
        return [page.text("Too few texts of a label to draw.")]
    label_N = np.array([drawn.index(row.label) for row in chosen])
    plane = project([row.text for row in chosen], label_N)
    points = {
        name: [(float(x), float(y)) for x, y in plane.points_N2[label_N == n]]
        for n, name in enumerate(drawn)
    }
    caption = (
        "Training texts of the labels confused most, as bags of words projected onto the two axes "
        "that separate them best. Left: one Gaussian a label says where its texts lie, and a new "
        "text goes to the highest hill. Right: a logistic regression on the same two numbers "
        "knows no hills, only the borders between them."
    )
    drawing = two_views(points, plane.densities, plane.regions, plane.extent)
    return [page.picture(drawing, caption)]
