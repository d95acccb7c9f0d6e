"""Alignment: preference pairs as batches, and the objectives that learn from them."""

from groundup.align.dpo import DPO, Pair, answer_logps, collate_pairs, with_reference

__all__ = ["DPO", "Pair", "answer_logps", "collate_pairs", "with_reference"]
