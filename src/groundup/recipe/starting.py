"""Continued pretraining: a model to go on from, its vocabulary brought to the tokenizer given."""

import dataclasses
from pathlib import Path
from typing import Any

from groundup.core.errors import CheckpointError, ConfigError, closest
from groundup.core.progress import say
from groundup.core.run import resolve_model
from groundup.evaluate.tasks import read_task
from groundup.model import Decoder, Encoder, load_network, remap_vocabulary
from groundup.model.vocabulary import AnyModel
from groundup.recipe.configs import PretrainConfig, ShapeOptions
from groundup.recipe.monitoring import TRACKERS, metric_names
from groundup.recipe.shared import given
from groundup.tokenizer import Tokenizer
from groundup.train.config import check_best
from groundup.train.masked import PAIRS, Pairs


def continued_decoder(folder: Path, tok: Tokenizer) -> Decoder:
    """Return the decoder of a folder, with this tokenizer's vocabulary."""
    model = load_network(resolve_model(folder))
    if not isinstance(model, Decoder):
        raise CheckpointError(
            f"{folder} holds a {type(model).__name__}: next tokens need a decoder; go on from an "
            "encoder with --objective mlm"
        )
    return with_vocabulary(model, folder, tok)


def continued_encoder(folder: Path, tok: Tokenizer, pairs: Pairs) -> Encoder:
    """Return the encoder of a folder with heads for masked words, and for pairs if asked for."""
    place = resolve_model(folder)
    task = "mlm" if pairs == "none" else "pretraining"
    model = load_network(place)
    if not isinstance(model, Encoder):
        raise CheckpointError(f"{folder} is a decoder: masked words need an encoder")
    if model.config.task != task:
        model = load_network(place, task=task)  # type: ignore[assignment]
    assert isinstance(model, Encoder)
    return with_vocabulary(model, folder, tok)


def with_vocabulary(model: AnyModel, folder: Path, tok: Tokenizer) -> AnyModel:
    """Return the model as it is, or with rows for another tokenizer's tokens."""
    own = Tokenizer.load(resolve_model(folder))
    if own.fingerprint == tok.fingerprint and tok.vocab_size <= model.config.vocab_size:
        return model
    rows = rows_between(own, tok)
    kept = sum(len(row) == 1 for row in rows)
    say(
        f"  another vocabulary: {kept:,} of {len(rows):,} tokens keep a row, "
        f"{len(rows) - kept:,} start as the mean of their parts"
    )
    changed = remap_vocabulary(model, rows)
    ends: dict[str, Any] = {"pad_token_id": tok.pad_token_id}
    if isinstance(changed, Decoder):
        ends |= {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id}
    else:
        ends["cls_token_id"] = tok.token_id("cls_token", "bos_token")
        ends["sep_token_id"] = tok.token_id("sep_token", "eos_token")
    changed.config = dataclasses.replace(changed.config, **ends)
    return changed


def rows_between(old: Tokenizer, new: Tokenizer) -> list[list[int]]:
    """Return for each new token the old ones whose embeddings' mean it starts from.

    The same bytes, or the same special token, keep their row; other text is cut by the old
    tokenizer; what that cannot write (broken UTF-8) is cut into the old tokens of its bytes.
    """
    by_bytes = {piece: n for n, piece in reversed(list(enumerate(old.token_bytes)))}
    specials = {i: name for name, i in new.specials.items()}
    rows = []
    for n, piece in enumerate(new.token_bytes):
        if n in specials:
            rows.append([old.specials.get(specials[n], old.eos_token_id)])
        elif piece in by_bytes:
            rows.append([by_bytes[piece]])
        else:
            text = piece.decode("utf-8", errors="replace")
            parts = [by_bytes[b] for b in (bytes([b]) for b in piece) if b in by_bytes]
            if "\ufffd" not in text:
                parts = old.encode(text) or parts
            rows.append(parts or [old.eos_token_id])
    return rows


def check_start(config: PretrainConfig) -> None:
    """Refuse settings that exclude each other, and what is not there."""
    if config.context_warmup_fraction and config.packing_strategy == "bfd":
        raise ConfigError(
            "packed rows have one length: no --context-warmup-fraction with --packing-strategy bfd"
        )
    if config.mix is not None and (config.plan or config.budget):
        raise ConfigError("a mixture's phases have their own tokens: leave plan and budget out")
    check_watching(config)
    if config.init is None:
        return
    if config.plan is not None or config.budget is not None:
        raise ConfigError("--init brings its own shape: give --steps, and no --plan or --budget")
    shape = [f.name for f in dataclasses.fields(ShapeOptions)] + ["hidden_dropout_prob"]
    shape.remove("max_position_embeddings")  # the length of rows, here
    if flags := given(config, shape):
        raise ConfigError(f"--init brings its own shape: leave out {flags}")


def check_watching(config: PretrainConfig) -> None:
    """Refuse trackers, tasks and metrics that are not there: now, not behind hours of encoding."""
    for name in config.report_to:
        if name not in TRACKERS:
            raise ConfigError(f"report_to: unknown tracker {name!r}{closest(name, TRACKERS)}")
    if config.tasks and config.objective in PAIRS:
        raise ConfigError("tasks need a model that writes from left to right: drop --tasks")
    tasks = [read_task(path, limit=config.eval_limit, seed=config.seed) for path in config.tasks]
    if len({task.name for task in tasks}) < len(tasks):
        raise ConfigError("two tasks have one name, and scores are kept by it: rename a file")
    check_best(config, metric_names(config, tasks))
    name, every = config.metric_for_best_model or "", config.eval_steps
    if name.startswith("eval_") and every and config.checkpoint_every % every:
        raise ConfigError(
            f"--metric-for-best-model {name} is measured every {every} steps, and checkpoints are "
            f"made every {config.checkpoint_every}: let --eval-steps divide --checkpoint-every"
        )


def within_positions(config: PretrainConfig, positions: int) -> PretrainConfig:
    """Return the config with rows no longer than the model's positions."""
    if config.max_position_embeddings <= positions:
        return config
    say(f"  rows of {positions:,} tokens: the model has no more positions")
    return dataclasses.replace(config, max_position_embeddings=positions)
