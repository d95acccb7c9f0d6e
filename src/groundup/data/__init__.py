"""Data: from files to a clean, deduplicated, split corpus, token shards, chats and pairs."""

from groundup.data.blocks import read_corpus
from groundup.data.build import build_corpus
from groundup.data.chats import ChatsConfig, build_chats, read_chats
from groundup.data.config import CorpusConfig
from groundup.data.mix import MixConfig, Phase, phase_order, plan_mixture
from groundup.data.preferences import (
    mismatched_pairs,
    pair_of,
    read_preferences,
    write_preferences,
)
from groundup.data.readers import read_documents
from groundup.data.shards import Shard, open_shard, overlap, write_shards

__all__ = [
    "ChatsConfig",
    "CorpusConfig",
    "MixConfig",
    "Phase",
    "Shard",
    "build_chats",
    "build_corpus",
    "mismatched_pairs",
    "open_shard",
    "overlap",
    "pair_of",
    "phase_order",
    "plan_mixture",
    "read_chats",
    "read_corpus",
    "read_documents",
    "read_preferences",
    "write_preferences",
    "write_shards",
]
