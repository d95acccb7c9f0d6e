"""Training: objectives, batch sources, optimizers, the one loop, checkpoints, the planner.

The names below are imported on first use, so that configs can be read without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groundup.train.batches import Examples, Row, TokenStream, audit, collate_rows
    from groundup.train.config import FitConfig, LoopOptions
    from groundup.train.loop import Hook, State, fit
    from groundup.train.masked import MaskedLM, MaskedPairs
    from groundup.train.middle import MiddleStream, MiddleTokens
    from groundup.train.objectives import NextToken, Objective
    from groundup.train.packing import PackedStream, collate_packed, pack_rows
    from groundup.train.plan import Plan, make_plan

_HOMES = {
    "Examples": "batches",
    "FitConfig": "config",
    "Hook": "loop",
    "LoopOptions": "config",
    "MaskedLM": "masked",
    "MaskedPairs": "masked",
    "MiddleStream": "middle",
    "MiddleTokens": "middle",
    "NextToken": "objectives",
    "Objective": "objectives",
    "PackedStream": "packing",
    "Plan": "plan",
    "Row": "batches",
    "State": "loop",
    "TokenStream": "batches",
    "audit": "batches",
    "collate_packed": "packing",
    "collate_rows": "batches",
    "fit": "loop",
    "make_plan": "plan",
    "pack_rows": "packing",
}

__all__ = [
    "Examples",
    "FitConfig",
    "Hook",
    "LoopOptions",
    "MaskedLM",
    "MaskedPairs",
    "MiddleStream",
    "MiddleTokens",
    "NextToken",
    "Objective",
    "PackedStream",
    "Plan",
    "Row",
    "State",
    "TokenStream",
    "audit",
    "collate_packed",
    "collate_rows",
    "fit",
    "make_plan",
    "pack_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'groundup.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"groundup.train.{_HOMES[name]}"), name)
