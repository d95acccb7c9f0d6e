"""Stage `pretrain`: from text or token shards to a base model."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from groundup.core import device as devices
from groundup.core.errors import ConfigError, DataError
from groundup.core.files import read_json
from groundup.core.memory import peak_memory
from groundup.core.progress import console, say
from groundup.core.run import FINISHED
from groundup.core.types import SamplingParams
from groundup.data import Shard, open_shard
from groundup.figure import LiveTraining
from groundup.generate import LLM
from groundup.model.config import ModelConfig
from groundup.model.counts import num_parameters, train_flops_per_token
from groundup.model.decoder import Decoder
from groundup.model.encoder_config import CLASSES as ENCODERS
from groundup.model.families import FAMILIES
from groundup.model.hf import checkpoint_weights, save_model, write_model
from groundup.recipe.configs import PretrainConfig
from groundup.recipe.encoders import pretrain_encoder
from groundup.recipe.monitoring import (
    evaluation_hooks,
    steps_between,
    tracking,
)
from groundup.recipe.planning import outcome, planned
from groundup.recipe.shared import (
    fit_settings,
    for_ranks,
    last_metrics,
    remaining,
    shards_of,
    tokens_trained,
    with_dtype,
)
from groundup.recipe.sources import (
    check_tokens,
    refuse_overlap,
    row_length,
    show_epochs,
    token_source,
    with_phases,
)
from groundup.recipe.starting import check_start, continued_decoder, within_positions
from groundup.tokenizer import Tokenizer
from groundup.train import (
    Hook,
    NextToken,
    State,
    fit,
)
from groundup.train.memory import check_memory, memory_free
from groundup.train.plan import adam_rate, mlp_width
from groundup.train.ranks import here
from groundup.train.step import DTYPES

PROMPT_TOKENS, SAMPLE_TOKENS = 16, 32


def pretrain(config: PretrainConfig, out: Path) -> dict[str, Any]:
    """Train on the training split; write `model/`, checkpoints and metrics.jsonl."""
    check_start(config)
    level = ngram_level(config)
    config, made = planned(config, out)
    config = for_ranks(with_phases(with_dtype(config)))
    if config.objective.startswith("mlm"):
        return pretrain_encoder(config, out)
    tok = Tokenizer.load(config.tokenizer)
    check_tokens(config, tok)
    device = devices.pick(config.device, config.dtype)
    model, config = starting_model(config, tok, device)
    shards = shards_of(config, tok, out)  # takes hours of much text: behind all that may be refused
    train, validation = open_shard(shards, "train"), open_shard(shards, "validation")
    refuse_overlap(config, train, validation)
    if here().size == 1:  # hooks take the model as it lies
        model.to(device.device)
    size = num_parameters(model.config)
    say(f"  device: {device.line}; {size / 1e6:.2f}M parameters; {config.steps:,} steps")
    source = token_source(config, tok, train)
    bits_per_nat = len(train.tokens) / max(1, train.num_bytes) / math.log(2)
    with tracking(config, out) as trackers, live_training(config, level) as live:
        metrics = fit(
            model,
            next_token(model.config, config.z_loss),
            source,
            fit_settings(config),
            out,
            device=device.device,
            hooks=[
                Hook(1, watch(live, model.config, device.device, bits_per_nat, config)),
                speaking_hook(live, model, tok, validation, config),
                *evaluation_hooks(config, model, tok, validation, out),
                *trackers,
            ],
            write_model=lambda copied, folder: write_model(copied, tok, folder),
            read_weights=lambda folder: checkpoint_weights(model, folder),
        )
    if not metrics:  # every step was done before: only the last folder is missing
        say("  every step is done already")
    if not here().first:
        return {}
    save_model(model, tok, out / "model")
    return {
        **(outcome(made, out, device.device) if made else {}),
        **show_epochs(source),
        "parameters": size,
        "steps": config.steps,
        "tokens": tokens_trained(out),
        "metrics": last_metrics(out),
        "train_bits_per_byte_per_nat": bits_per_nat,
        "ngram_bits_per_byte": level,
        "device": device.line,
    }


def live_training(config: PretrainConfig, level: float | None) -> LiveTraining:
    """Return the live view, with the n-gram's level where there is one."""
    return LiveTraining(
        console(),
        steps=config.steps,
        unit="bits per byte",
        level=level,
        level_name="n-gram on validation text, the line to beat",
    )


def starting_model(
    config: PretrainConfig, tok: Tokenizer, device: devices.Device
) -> tuple[Decoder, PretrainConfig]:
    """Return the model to train, of random weights or to go on from, and a config that suits it."""
    torch.manual_seed(config.seed)
    ranks, model = here(), None
    free = ranks.told(memory_free(device))
    if config.init is None:
        shape = model_config(config, tok)
    else:
        model = continued_decoder(config.init, tok)
        config = within_positions(config, model.config.max_position_embeddings)
        positions = config.max_position_embeddings
        shape = dataclasses.replace(model.config, max_position_embeddings=positions)
    config = with_adam_rate(config, shape)
    check_memory(shape, fit_settings(config), config.batch_size, free, ranks.size)
    return Decoder(shape) if model is None else model, config


def with_adam_rate(config: PretrainConfig, shape: ModelConfig) -> PretrainConfig:
    """Return the config with the rate of what Muon does not train in a new model, where unset."""
    if config.adam_learning_rate is not None or config.optim == "adamw" or config.init is not None:
        return config
    rows = config.batch_size * config.gradient_accumulation_steps
    rate = adam_rate(shape, config.steps * rows * config.max_position_embeddings)
    say(f"  AdamW's peak rate: {rate:.4f}, by this size and so many tokens")
    return dataclasses.replace(config, adam_learning_rate=rate)


def next_token(config: ModelConfig, z_loss: float) -> NextToken:
    """Return the objective, with the router's loss where there are experts."""
    if not config.family.experts:
        return NextToken(z_loss=z_loss)
    return NextToken(
        z_loss=z_loss,
        load_balance=config.router_aux_loss_coef,
        experts_per_token=config.num_experts_per_tok,
    )


def model_config(config: PretrainConfig, tok: Tokenizer) -> ModelConfig:
    """Return the model's shape, heads and MLP width filled in where unset."""
    heads = config.num_attention_heads or max(1, config.hidden_size // 64)
    if config.num_attention_heads is None and config.hidden_size % 64:
        raise ConfigError(
            f"hidden_size = {config.hidden_size} is no multiple of 64: give one that is, "
            "or set num_attention_heads"
        )
    if config.hidden_size % heads:
        raise ConfigError(
            f"num_attention_heads = {heads} does not divide hidden_size = {config.hidden_size}"
        )
    if config.model_type in ENCODERS:
        raise ConfigError(
            f"{config.objective} trains decoders, and {config.model_type} is an encoder: "
            "add --objective mlm, or take another --model-type"
        )
    made = ModelConfig(
        model_type=config.model_type,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        norm_topk_prob=config.num_experts > 0,
        router_aux_loss_coef=config.router_aux_loss_coef,
        vocab_size=tok.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size or mlp_width(config.hidden_size),
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=config.num_key_value_heads or heads,
        head_dim=config.hidden_size // heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    if config.num_experts and not made.family.experts:
        having = " or ".join(name for name, family in FAMILIES.items() if family.experts)
        raise ConfigError(f"{config.model_type} has no experts: take --model-type {having}")
    return made


def ngram_level(config: PretrainConfig) -> float | None:
    """Return the bits per byte of the n-gram to compare with, if there is one."""
    if config.ngram is None:
        return None
    if not (config.ngram / FINISHED).is_file():
        raise DataError(f"{config.ngram} holds no finished n-gram: `groundup ngram` counts one")
    found = read_json(config.ngram / FINISHED)["summary"].get("bits_per_byte")
    return None if found is None else float(found)  # there was no validation text


def watch(
    live: LiveTraining,
    shape: ModelConfig,
    place: torch.device,
    bits_per_nat: float,
    config: PretrainConfig,
) -> Callable[[State], None]:
    """Return what draws the loss, and adds its bits per byte to the metrics."""
    dtype = DTYPES[devices.training_dtype(config.device, config.dtype)]
    peak = devices.matmul_flops_per_s(place, dtype) * here().size
    left = remaining()

    def run(state: State) -> None:
        metrics = state.metrics
        # z-loss and a router's loss are no text
        metrics["bits_per_byte"] = metrics.get("nll", metrics["loss"]) * bits_per_nat
        rate = metrics["tokens"] / metrics["seconds"]
        flops_per_token = train_flops_per_token(shape, row_length(config, state.step))
        note = (
            f"loss {metrics['loss']:.3f}   {rate * flops_per_token / peak:.0%} of matmul   "
            f"{peak_memory(place) / 1e9:.1f} GB   "
        )
        live.update(state.step, metrics["bits_per_byte"], rate, left(state), note)

    return run


def speaking_hook(
    live: LiveTraining, model: Decoder, tok: Tokenizer, validation: Shard, config: PretrainConfig
) -> Hook:
    """Return a hook that lets the model speak now and then.

    By the clock; but several ranks gather the weights for it, so there with the evaluations. Of a
    short context half is read, and half is said.
    """
    llm = LLM(model, tok, max_num_seqs=3)
    context = model.config.max_position_embeddings
    documents = sorted(validation.documents(), key=len)[-3:] if context > 1 else []
    middle = [len(document) // 2 for document in documents]
    shown = min(PROMPT_TOKENS, context // 2)
    prompts = [
        [int(i) for i in document[at : at + shown]]
        for document, at in zip(documents, middle, strict=True)
    ]
    length = min(SAMPLE_TOKENS, context - shown)
    params = SamplingParams(max_tokens=length, temperature=0.7, top_k=40, seed=1)
    alone = here().size == 1
    spoken = time.monotonic()

    def run(state: State) -> None:
        nonlocal spoken
        due = time.monotonic() - spoken >= config.sample_every_s or not alone
        if prompts and (due or state.step == state.steps):
            with state.as_saved():
                outputs = llm.generate(prompts, params)
            live.show_samples(
                [
                    f"{tok.decode(ids)} -> {output.outputs[0].text}"
                    for ids, output in zip(prompts, outputs, strict=True)
                ]
            )
            spoken = time.monotonic()

    return Hook(1 if alone else steps_between(config), run, looks=True)
