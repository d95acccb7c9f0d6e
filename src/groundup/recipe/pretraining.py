"""Stages `plan` and `pretrain`: from token shards to a base model."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundup.core import device as devices
from groundup.core.errors import ConfigError
from groundup.core.files import read_json, write_json
from groundup.core.progress import console, say
from groundup.core.run import FINISHED
from groundup.core.types import SamplingParams
from groundup.data import Shard, open_shard, write_shards
from groundup.figure import LiveTraining
from groundup.generate import LLM
from groundup.model.config import ModelConfig
from groundup.model.counts import num_parameters
from groundup.model.decoder import Decoder
from groundup.model.hf import save_model, write_model
from groundup.recipe.configs import PlanConfig, PretrainConfig
from groundup.tokenizer import Tokenizer
from groundup.train import FitConfig, Hook, NextToken, State, TokenStream, fit, make_plan
from groundup.train.plan import mlp_width

PROMPT_TOKENS = 16
SAMPLE = SamplingParams(max_tokens=32, temperature=0.7, top_k=40, seed=1)
PLANNED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "batch_size",
    "gradient_accumulation_steps",
    "steps",
    "learning_rate",
    "adam_learning_rate",
    "dtype",
    "compile",
)


def plan(config: PlanConfig, out: Path) -> dict[str, Any]:
    """Time this machine and write plan.json: every number with its reason."""
    train = open_shard(config.shards, "train")
    device = devices.pick(config.device)
    say(f"  device: {device.line}")
    made = make_plan(
        pretrain_s=config.pretrain_s,
        train_tokens=len(train.tokens),
        vocab_size=train.vocab_size,
        device=device,
    )
    write_json(out / "plan.json", asdict(made))
    for name, reason in made.reasons.items():
        say(f"  {name}: {reason}")
    return asdict(made)


def read_plan(path: Path) -> dict[str, Any]:
    """Read plan.json, from a folder or as a file."""
    content: dict[str, Any] = read_json(path / "plan.json" if path.is_dir() else path)
    return content


def pretrain(config: PretrainConfig, out: Path) -> dict[str, Any]:
    """Train on the training split; write `model/`, checkpoints and metrics.jsonl."""
    if config.plan:
        found = read_plan(config.plan)
        config = replace(config, **{name: found[name] for name in PLANNED})
        config = replace(config, max_position_embeddings=found["context"])
    tok = Tokenizer.load(config.tokenizer)
    shards = shards_of(config, tok, out)
    train, validation = open_shard(shards, "train"), open_shard(shards, "validation")
    device = devices.pick(config.device, config.dtype)
    torch.manual_seed(config.seed)
    model = Decoder(model_config(config, tok))
    size = num_parameters(model.config)
    say(f"  device: {device.line}; {size / 1e6:.2f}M parameters; {config.steps:,} steps")
    source = TokenStream(
        train.tokens,
        train.offsets,
        eos_token_id=tok.eos_token_id,
        context=config.max_position_embeddings,
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        seed=config.seed,
    )
    fit_config = FitConfig(
        steps=config.steps,
        learning_rate=config.learning_rate,
        adam_learning_rate=config.adam_learning_rate,
        dtype=config.dtype,
        compile=config.compile,
        seed=config.seed,
        checkpoint_every=config.checkpoint_every,
    )
    bits_per_nat = len(train.tokens) / train.num_bytes / float(np.log(2))
    level = ngram_level(config)
    with LiveTraining(
        console,
        steps=config.steps,
        unit="bits per byte",
        level=level,
        level_name="n-gram on validation text, the line to beat",
    ) as live:
        metrics = fit(
            model,
            NextToken(),
            source,
            fit_config,
            out,
            device=device.device,
            hooks=[Hook(1, watch(live, model, tok, validation, bits_per_nat, config))],
            write_model=lambda folder: write_model(model, tok, folder),
        )
    if not metrics:  # every step was done before: only the last folder is missing
        say("  every step is done already")
    save_model(model, tok, out / "model")
    return {
        "parameters": size,
        "steps": config.steps,
        "tokens": config.steps
        * config.batch_size
        * config.gradient_accumulation_steps
        * config.max_position_embeddings,
        "train_bits_per_byte_per_nat": bits_per_nat,
        "ngram_bits_per_byte": level,
        "device": device.line,
    }


def model_config(config: PretrainConfig, tok: Tokenizer) -> ModelConfig:
    """Return the model's shape, heads and MLP width filled in where unset."""
    heads = config.num_attention_heads or max(1, config.hidden_size // 64)
    if config.num_attention_heads is None and config.hidden_size % 64:
        raise ConfigError(
            f"hidden_size = {config.hidden_size} is no multiple of 64: give one that is, "
            "or set num_attention_heads"
        )
    return ModelConfig(
        model_type=config.model_type,
        vocab_size=tok.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size or mlp_width(config.hidden_size),
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=config.num_key_value_heads or heads,
        head_dim=config.hidden_size // heads,
        max_position_embeddings=config.max_position_embeddings,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )


def shards_of(config: PretrainConfig, tok: Tokenizer, out: Path) -> Path:
    """Return a folder of shards made by this tokenizer: the one given, or one made of a corpus."""
    if not (config.corpus / "index.json").is_file():
        if not (out / "shards" / "index.json").is_file():
            write_shards(config.corpus, tok, out / "shards")
        return out / "shards"
    if read_json(config.corpus / "index.json")["tokenizer"] != tok.fingerprint:
        raise ConfigError(
            f"the shards in {config.corpus} were made with another tokenizer than "
            f"{config.tokenizer}: make them again, or give the corpus"
        )
    return config.corpus


def ngram_level(config: PretrainConfig) -> float | None:
    """Return the n-gram's bits per byte, if there is an n-gram stage to compare with."""
    if config.ngram is None or not (config.ngram / FINISHED).is_file():
        return None
    return float(read_json(config.ngram / FINISHED)["summary"]["bits_per_byte"])


def watch(
    live: LiveTraining,
    model: Decoder,
    tok: Tokenizer,
    validation: Shard,
    bits_per_nat: float,
    config: PretrainConfig,
) -> Any:
    """Return a hook that draws the loss and lets the model speak now and then."""
    llm = LLM(model, tok, max_num_seqs=3)
    documents = sorted(validation.documents(), key=len)[-3:]
    middle = [len(document) // 2 for document in documents]
    prompts = [
        [int(i) for i in document[at : at + PROMPT_TOKENS]]
        for document, at in zip(documents, middle, strict=True)
    ]
    spoken = time.monotonic()

    def run(state: State) -> None:
        nonlocal spoken
        metrics = state.metrics
        left_s = metrics["seconds"] * (state.steps - state.step)
        rate = metrics["tokens"] / metrics["seconds"]
        live.update(state.step, metrics["loss"] * bits_per_nat, rate, left_s)
        due = time.monotonic() - spoken >= config.sample_every_s
        if prompts and (due or state.step == state.steps):
            outputs = llm.generate(prompts, SAMPLE)
            live.show_samples(
                [
                    f"{tok.decode(ids)} -> {output.outputs[0].text}"
                    for ids, output in zip(prompts, outputs, strict=True)
                ]
            )
            spoken = time.monotonic()

    return run
