"""groundup builds a language model from the ground up: raw text to a served assistant.

The names below are imported on first use, so that `import groundup` costs nothing.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groundup.core.types import SamplingParams
    from groundup.generate import LLM, AsyncLLM
    from groundup.model import load_model, save_model
    from groundup.recipe.api import align, evaluate, finetune, pretrain
    from groundup.recipe.configs import AlignConfig, FinetuneConfig, PretrainConfig
    from groundup.tokenizer import Tokenizer

__all__ = [
    "LLM",
    "AlignConfig",
    "AsyncLLM",
    "FinetuneConfig",
    "PretrainConfig",
    "SamplingParams",
    "Tokenizer",
    "align",
    "evaluate",
    "finetune",
    "load_model",
    "pretrain",
    "save_model",
]

_HOMES = {
    "LLM": "groundup.generate",
    "AsyncLLM": "groundup.generate",
    "AlignConfig": "groundup.recipe.configs",
    "FinetuneConfig": "groundup.recipe.configs",
    "PretrainConfig": "groundup.recipe.configs",
    "SamplingParams": "groundup.core.types",
    "Tokenizer": "groundup.tokenizer",
    "align": "groundup.recipe.api",
    "evaluate": "groundup.recipe.api",
    "finetune": "groundup.recipe.api",
    "load_model": "groundup.model",
    "pretrain": "groundup.recipe.api",
    "save_model": "groundup.model",
}


class _Package(ModuleType):
    """Keeps sub-packages from taking the place of the stages of their names: align, evaluate.

    An import binds a module in its package, and would hide the function from then on.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return __all__  # before their first use too: what a notebook offers behind `groundup.`


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("groundup")
    if name not in _HOMES:
        raise AttributeError(f"module 'groundup' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
