"""What pretraining reads: one stream, packed rows, rearranged documents, or a mixture by phases."""

from dataclasses import replace
from typing import Any

import numpy as np

from groundup.core.errors import ConfigError, DataError
from groundup.core.progress import say
from groundup.data import Shard, open_shard, overlap
from groundup.data.mix import MixConfig, phase_order, show_mixture
from groundup.recipe.configs import PretrainConfig
from groundup.recipe.monitoring import tokens_per_step
from groundup.recipe.shared import given
from groundup.tokenizer import Tokenizer
from groundup.train import MiddleStream, MiddleTokens, TokenStream
from groundup.train.batches import BatchSource
from groundup.train.growing import GrowingStream, warmup_lengths
from groundup.train.middle import MIDDLE, PREFIX, SUFFIX
from groundup.train.mixture import MixtureStream
from groundup.train.packing import PackedStream

MOST_OVERLAP = 0.01  # of the validation text's tokens


def with_phases(config: PretrainConfig) -> PretrainConfig:
    """Return a config whose steps are a mixture's tokens; `wsd` decays in its phase `decay`."""
    if config.mix is None:
        return config
    if config.packing_strategy == "bfd":
        raise ConfigError("a mixture is for --packing-strategy wrapped")
    if config.steps != PretrainConfig.steps:
        raise ConfigError("a mixture's phases say how many tokens there are: leave out --steps")
    total = sum(phase.tokens for phase in config.mix.phases)
    last = config.mix.phases[-1]
    decays = last.name == "decay" and config.lr_scheduler_type == "wsd"
    if decays and given(config, ("decay_fraction",)):
        raise ConfigError("the mixture's phase `decay` says it: leave out --decay-fraction")
    decay = last.tokens / total if decays else config.decay_fraction
    steps = max(1, total // tokens_per_step(config))
    return replace(config, steps=steps, decay_fraction=decay)


def mixture_source(mix: MixConfig, tok: Tokenizer, options: dict[str, Any]) -> MixtureStream:
    """Return the rows of a mixture; print what each phase takes."""
    shards = {name: open_shard(folder, "train") for name, folder in mix.sources.items()}
    for name, shard in shards.items():
        if shard.tokenizer != tok.fingerprint:
            raise ConfigError(
                f"the source {name!r} in {mix.sources[name]} was encoded with another tokenizer: "
                "make its shards again with `groundup data shards`"
            )
    lengths = {name: np.diff(shard.offsets) for name, shard in shards.items()}
    show_mixture(mix, {name: int(found.sum()) for name, found in lengths.items()})
    orders = [phase_order(mix, lengths, number) for number in range(len(mix.phases))]
    return MixtureStream(shards, orders, **options)


def refuse_overlap(config: PretrainConfig, train: Shard, validation: Shard) -> None:
    """Refuse to train on the text that is measured on; say it where that is little."""
    trained = [train]
    if config.mix is not None:
        trained = [open_shard(folder, "train") for folder in config.mix.sources.values()]
    documents, share = overlap(trained, validation)
    if not documents:
        return
    said = (
        f"{documents:,} documents of the validation text, {share:.1%} of its tokens, are in the "
        "training text too"
    )
    if share > MOST_OVERLAP and not config.allow_overlap:
        raise DataError(
            f"{said}: what is measured on them is no held-out loss. Build the corpus again with "
            "`groundup data build`, which keeps each text once, or give --allow-overlap"
        )
    say(f"  {said}")


def show_epochs(source: BatchSource) -> dict[str, Any]:
    """Print and return how often each source of a mixture was read."""
    if not isinstance(source, MixtureStream):
        return {}
    epochs = source.epochs()
    say("  passes over the sources: " + ", ".join(f"{n} {e:.2f}" for n, e in epochs.items()))
    return {"epochs": epochs}


def check_tokens(config: PretrainConfig, tok: Tokenizer) -> None:
    """Refuse a tokenizer without the special tokens that the objective needs."""
    wanted = (PREFIX, MIDDLE, SUFFIX) if config.objective == "fim" else ()
    if missing := [name for name in wanted if name not in tok.specials]:
        raise ConfigError(
            f"fim needs the special tokens {', '.join(missing)}: train the tokenizer with "
            f"--special-tokens {' '.join(repr(name) for name in missing)}"
        )


def growth_of(config: PretrainConfig) -> list[tuple[int, int]]:
    """Return steps and length of the shorter rows that a run begins with."""
    fraction = config.context_warmup_fraction
    return warmup_lengths(fraction, config.steps, config.max_position_embeddings)


def row_length(config: PretrainConfig, step: int) -> int:
    """Return how long the rows of step 1, 2, ... are."""
    for steps, length in growth_of(config):
        if step <= steps:
            return length
        step -= steps
    return config.max_position_embeddings


def token_source(
    config: PretrainConfig, tok: Tokenizer, train: Shard
) -> TokenStream | PackedStream | MixtureStream:
    """Return rows of next tokens: mixed, packed or rearranged for fill-in-the-middle if asked."""
    options: dict[str, Any] = {
        "eos_token_id": tok.eos_token_id,
        "context": config.max_position_embeddings,
        "batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "seed": config.seed,
    }
    if config.mix is not None:
        return mixture_source(config.mix, tok, options | {"growth": growth_of(config)})
    if config.objective == "causal":
        if config.context_warmup_fraction:
            growth = growth_of(config)
            return GrowingStream(train.tokens, train.offsets, growth=growth, **options)
        kind = PackedStream if config.packing_strategy == "bfd" else TokenStream
        return kind(train.tokens, train.offsets, **options)
    ids = (tok.specials[name] for name in (PREFIX, MIDDLE, SUFFIX))
    return MiddleStream(
        train.tokens,
        train.offsets,
        sentinels=MiddleTokens(*ids),
        rate=config.fim_rate,
        spm_rate=config.fim_spm_rate,
        level=config.fim_level,
        **options,
    )
