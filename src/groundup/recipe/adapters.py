"""Training an adapter in place of all weights: what `finetune` and `align` have in common."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundup.core import device as devices
from groundup.core.errors import ConfigError
from groundup.core.progress import say
from groundup.model.adapter import adapter_weights, save_adapter, write_adapter
from groundup.model.decoder import Decoder
from groundup.model.hf import checkpoint_weights, save_model, write_model
from groundup.model.lora import LoraConfig, adaptable, apply_lora, matching, trained_share
from groundup.recipe.configs import AlignConfig, FinetuneConfig
from groundup.tokenizer import Tokenizer
from groundup.train.memory import check_tuning_memory, memory_free
from groundup.train.ranks import here

Files = tuple[Callable[[Any, Path], None], Callable[[Path], dict[str, Tensor]]]


def lora_of(config: FinetuneConfig | AlignConfig) -> LoraConfig | None:
    """Return the adapter that a stage's config asks for."""
    if config.lora_r == 0:
        return None
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def adapt(
    model: Decoder, config: FinetuneConfig | AlignConfig, device: devices.Device
) -> dict[str, Any]:
    """Put the adapter on the model, if the config asks for one; return what to report.

    Without one all weights are trained, for which there must be memory.
    """
    lora = lora_of(config)
    if lora is None:
        ranks = here()
        check_tuning_memory(model.config, config.optim, ranks.told(memory_free(device)), ranks.size)
        return {}
    layers = adaptable(model)
    names = matching(layers, lora.target_modules)
    if lora.r > (most := max(min(layers[name].weight.shape) for name in names)):
        raise ConfigError(
            f"lora_r = {lora.r:,} is above the rank of every adapted matrix ({most:,} at most): "
            "give less, or train all weights without it"
        )
    torch.manual_seed(config.seed)
    names = apply_lora(model, lora)
    trained, total = trained_share(model)
    word = "DoRA" if lora.use_dora else "LoRA"
    say(
        f"  {word}: rank {lora.r} on {len(names)} layers; "
        f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})"
    )
    return {"adapted_layers": len(names), "trained_parameters": trained, "parameters": total}


def checkpoint_files(model: Decoder, tok: Tokenizer, config: FinetuneConfig | AlignConfig) -> Files:
    """Return what writes a checkpoint's weights and what reads them: the adapter's, or all."""
    lora = lora_of(config)
    if lora is None:
        return (
            lambda copied, folder: write_model(copied, tok, folder),
            lambda folder: checkpoint_weights(model, folder),
        )
    return (
        lambda copied, folder: write_adapter(copied, lora, str(config.model), folder),
        lambda folder: adapter_weights(model, folder),
    )


def save_results(
    model: Decoder, tok: Tokenizer, config: FinetuneConfig | AlignConfig, out: Path
) -> None:
    """Write `model/`, and `adapter/` beside it where one was trained (merged in `model/`)."""
    if lora := lora_of(config):
        save_adapter(model, lora, str(config.model), out / "adapter")
    save_model(model, tok, out / "model")
