"""Pretraining encoders: masked words, and pairs of segments."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundup.core import device as devices
from groundup.core.errors import ConfigError, DataError
from groundup.core.progress import console, say
from groundup.data import Shard, open_shard
from groundup.figure import LiveTraining
from groundup.model.encoder import Encoder
from groundup.model.encoder_config import CLASSES, EncoderConfig
from groundup.model.hf import checkpoint_weights, save_model, write_model
from groundup.recipe.configs import PretrainConfig
from groundup.recipe.monitoring import refuse_unscored, scoring_hook, tracking
from groundup.recipe.shared import fit_settings, shards_of, watch
from groundup.recipe.sources import refuse_overlap
from groundup.recipe.starting import continued_encoder, within_positions
from groundup.tokenizer import Tokenizer
from groundup.train import Hook, MaskedLM, MaskedPairs, State, fit
from groundup.train.masked import PAIRS, Pairs
from groundup.train.ranks import here
from groundup.train.step import to_device

VALIDATION_STEPS = 20
# as published
MASKED = {"bert": 0.15, "modernbert": 0.3}  # of the tokens
DROPOUT = {"bert": 0.1, "modernbert": 0.0}


def pretrain_encoder(config: PretrainConfig, out: Path) -> dict[str, Any]:
    """Train on the training split; write `model/`, checkpoints and metrics.jsonl."""
    if config.init is None and config.model_type not in CLASSES:
        kinds = "modernbert (sooner on little text) or bert"
        raise ConfigError(
            f"{config.objective} trains encoders: add --model-type "
            f"{kinds if config.objective == 'mlm' else 'bert'} (now {config.model_type})"
        )
    tok = Tokenizer.load(config.tokenizer)
    pairs = PAIRS[config.objective]
    device = devices.pick(config.device, config.dtype)
    torch.manual_seed(config.seed)
    if config.init is None:
        model = Encoder(encoder_config(config, tok, pairs))
    else:
        model = continued_encoder(config.init, tok, pairs)
        config = within_positions(config, model.config.max_position_embeddings)
        config = dataclasses.replace(config, model_type=model.config.model_type)
    mask_id(tok)
    shards = shards_of(config, tok, out)
    size = sum(weight.numel() for weight in model.parameters())
    say(f"  device: {device.line}; {size / 1e6:.2f}M parameters; {config.steps:,} steps")
    train, validation = open_shard(shards, "train"), open_shard(shards, "validation")
    refuse_overlap(config, train, validation)
    source = pairs_of(config, tok, train, pairs)
    scoring = score(config, tok, validation, pairs, out)
    with (
        tracking(config, out) as trackers,
        LiveTraining(console(), steps=config.steps, unit="loss") as live,
    ):
        fit(
            model,
            MaskedLM(pairs=pairs),
            source,
            fit_settings(config),
            out,
            device=device.device,
            hooks=[Hook(1, watch(live)), *([scoring] if scoring else []), *trackers],
            write_model=lambda copied, folder: write_model(copied, tok, folder),
            read_weights=lambda folder: checkpoint_weights(model, folder),
        )
    if not here().first:
        return {}
    save_model(model, tok, out / "model")
    scores = validate(model, config, tok, validation, pairs) if scoring else {}
    return {"parameters": size, "steps": config.steps, "device": device.line, **scores}


def encoder_config(config: PretrainConfig, tok: Tokenizer, pairs: Pairs) -> EncoderConfig:
    """Return the encoder's shape: BERT's four times wider MLP where none is given."""
    modern = config.model_type == "modernbert"
    dropout = config.hidden_dropout_prob
    if dropout is None:
        dropout = DROPOUT[config.model_type]
    return EncoderConfig(
        model_type=config.model_type,
        task="mlm" if pairs == "none" or modern else "pretraining",
        vocab_size=tok.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size or 4 * config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads or max(1, config.hidden_size // 64),
        max_position_embeddings=config.max_position_embeddings,
        layer_norm_eps=1e-5 if modern else 1e-12,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        classifier_pooling="mean" if modern else "cls",  # as the published checkpoints have it
        pad_token_id=tok.pad_token_id,
        cls_token_id=tok.token_id("cls_token", "bos_token"),
        sep_token_id=tok.token_id("sep_token", "eos_token"),
    )


def mask_id(tok: Tokenizer) -> int:
    """Return the id of [MASK]."""
    found = tok.backend.token_to_id("[MASK]")
    if found is None:
        raise ConfigError(
            "masked words need the special token [MASK]: train the tokenizer with "
            "--kind wordpiece, or with --special-tokens '[MASK]'"
        )
    return int(found)


def pairs_of(config: PretrainConfig, tok: Tokenizer, shard: Shard, pairs: Pairs) -> MaskedPairs:
    """Return the batch source of a split."""
    share = MASKED[config.model_type] if config.mlm_probability is None else config.mlm_probability
    if not 0 < share < 1:
        raise ConfigError(f"--mlm-probability {share:g} must lie between 0 and 1")
    if config.model_type == "modernbert" and pairs != "none":
        raise ConfigError("modernbert has no head for pairs: take --objective mlm")
    starts = None
    if config.whole_word:
        starts = np.array([not piece[:1].isalnum() for piece in tok.token_bytes])
    return MaskedPairs(
        shard.tokens,
        shard.offsets,
        pairs=pairs,
        context=config.max_position_embeddings,
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        seed=config.seed,
        cls_token_id=tok.token_id("cls_token", "bos_token"),
        sep_token_id=tok.token_id("sep_token", "eos_token"),
        mask_token_id=mask_id(tok),
        pad_token_id=tok.pad_token_id,
        vocab_size=tok.vocab_size,
        mask_probability=share,
        word_starts=starts,
    )


def score(
    config: PretrainConfig, tok: Tokenizer, validation: Shard, pairs: Pairs, out: Path
) -> Hook | None:
    """Return a hook that appends the validation split's scores to `evals.jsonl`.

    The scores also join the step's metrics, as `eval_...`. None where there is nothing to score.
    """
    try:
        pairs_of(config, tok, validation, pairs)
    except DataError:
        refuse_unscored(config, *(f"eval_{name}" for name in MaskedLM(pairs=pairs).metrics))
        say("  no validation text that could be scored")
        return None

    def scored(state: State) -> dict[str, float]:
        assert isinstance(state.model, Encoder)
        return validate(state.model, config, tok, validation, pairs)

    return scoring_hook(config, out, scored)


@torch.no_grad()
def validate(
    model: Encoder, config: PretrainConfig, tok: Tokenizer, shard: Shard, pairs: Pairs
) -> dict[str, float]:
    """Return the loss a masked token and the accuracy of pairs on the validation split."""
    source = pairs_of(config, tok, shard, pairs)
    objective = MaskedLM(pairs=pairs)
    device = next(model.parameters()).device
    model.eval()
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for _ in range(VALIDATION_STEPS):
        for batch in source.next_step():
            _, metrics = objective(model, to_device(batch, device))
            for name, (value, weight) in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
                counts[name] = counts.get(name, 0.0) + weight
    return {name: sums[name] / counts[name] for name in sums}
