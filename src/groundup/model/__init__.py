"""Models: the decoder, the n-gram, their mixture, and Hugging Face folders in and out.

Importing this package imports no torch; a name that needs it does so on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groundup.model.adapter import Adapter, apply_adapter, load_adapter, save_adapter
    from groundup.model.config import ModelConfig
    from groundup.model.counts import num_parameters, train_flops_per_token
    from groundup.model.decoder import Decoder
    from groundup.model.encoder import Encoder
    from groundup.model.encoder_config import EncoderConfig
    from groundup.model.heads import HeadedDecoder, pool
    from groundup.model.hf import load_model, load_network, save_model
    from groundup.model.lm import NeuralLM
    from groundup.model.lora import LoraConfig, apply_lora, merge_lora, remove_lora
    from groundup.model.mixture import Mixture
    from groundup.model.ngram import NGram
    from groundup.model.vocabulary import remap_vocabulary

__all__ = [
    "Adapter",
    "Decoder",
    "Encoder",
    "EncoderConfig",
    "HeadedDecoder",
    "LoraConfig",
    "Mixture",
    "ModelConfig",
    "NGram",
    "NeuralLM",
    "apply_adapter",
    "apply_lora",
    "load_adapter",
    "load_model",
    "load_network",
    "merge_lora",
    "num_parameters",
    "pool",
    "remap_vocabulary",
    "remove_lora",
    "save_adapter",
    "save_model",
    "train_flops_per_token",
]

_HOMES = {
    "Adapter": "adapter",
    "Decoder": "decoder",
    "Encoder": "encoder",
    "EncoderConfig": "encoder_config",
    "HeadedDecoder": "heads",
    "LoraConfig": "lora",
    "Mixture": "mixture",
    "ModelConfig": "config",
    "NGram": "ngram",
    "NeuralLM": "lm",
    "apply_adapter": "adapter",
    "apply_lora": "lora",
    "load_adapter": "adapter",
    "load_model": "hf",
    "load_network": "hf",
    "merge_lora": "lora",
    "num_parameters": "counts",
    "pool": "heads",
    "remap_vocabulary": "vocabulary",
    "remove_lora": "lora",
    "save_adapter": "adapter",
    "save_model": "hf",
    "train_flops_per_token": "counts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'groundup.model' has no attribute {name!r}")
    return getattr(importlib.import_module(f"groundup.model.{_HOMES[name]}"), name)
