"""Training: objectives, batch sources, optimizers, the one loop, checkpoints, the planner."""

from groundup.train.batches import Examples, Row, TokenStream, audit, collate_rows
from groundup.train.config import FitConfig
from groundup.train.loop import Hook, State, fit
from groundup.train.masked import MaskedLM, MaskedPairs
from groundup.train.middle import MiddleStream, MiddleTokens
from groundup.train.objectives import NextToken, Objective
from groundup.train.plan import Plan, make_plan

__all__ = [
    "Examples",
    "FitConfig",
    "Hook",
    "MaskedLM",
    "MaskedPairs",
    "MiddleStream",
    "MiddleTokens",
    "NextToken",
    "Objective",
    "Plan",
    "Row",
    "State",
    "TokenStream",
    "audit",
    "collate_rows",
    "fit",
    "make_plan",
]
