"""Token shards: every token, resumed at the document, found again by content."""

import numpy as np
import pytest

from groundup.core.types import SPLITS
from groundup.data import open_shard, read_corpus, write_shards
from groundup.data import shards as module


class Counting:
    """A byte encoder that counts texts, and may fail after some."""

    vocab_size, eos_token_id, fingerprint = 257, 256, "bytes"

    def __init__(self, fail_after: int | None = None) -> None:
        self.seen, self.fail_after = 0, fail_after

    def encode_batch(self, texts):
        if self.fail_after is not None and self.seen + len(texts) > self.fail_after:
            raise KeyboardInterrupt
        self.seen += len(texts)
        return [list(text.encode()) for text in texts]


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 5_000)


@pytest.fixture
def whole(corpus, tmp_path, small_batches):
    write_shards(corpus, Counting(), tmp_path / "whole")
    return files_of(tmp_path / "whole")


def test_shards_hold_every_token(corpus, tok, tmp_path):
    index = write_shards(corpus, tok, tmp_path)
    for split in SPLITS:
        texts = [d.text for d in read_corpus(corpus, split)]
        shard = open_shard(tmp_path, split)
        assert [tok.decode(ids[:-1]) for ids in shard.documents()] == texts
        assert all(ids[-1] == tok.eos_token_id for ids in shard.documents())
        assert shard.num_bytes == sum(len(text.encode()) for text in texts)
        ratio = index["splits"][split]["bytes_per_token"]
        assert ratio == shard.num_bytes / len(shard.tokens)


@pytest.mark.parametrize("damage", ["none", "tokens", "records", "both"])
def test_a_stopped_run_goes_on_behind_the_last_document(
    corpus, tmp_path, whole, small_batches, damage
):
    total = sum(len(list(read_corpus(corpus, split))) for split in SPLITS)
    first = Counting(fail_after=total // 2)
    with pytest.raises(KeyboardInterrupt):
        write_shards(corpus, first, tmp_path / "again")
    parts = tmp_path / "again" / "checkpoints"
    part = max(parts.glob("*.bin"), key=lambda file: file.stat().st_size)
    if damage in ("tokens", "both"):  # as if the last write had not reached the disk
        part.write_bytes(part.read_bytes()[:-333])
    if damage in ("records", "both"):
        records = part.with_suffix(".documents")
        records.write_bytes(records.read_bytes()[:-5])
    second = Counting()
    write_shards(corpus, second, tmp_path / "again")
    again = total - first.seen
    assert again <= second.seen <= again + (0 if damage == "none" else 2)
    assert files_of(tmp_path / "again") == whole
    assert not parts.exists()


def test_parts_are_found_again_by_content(corpus, tmp_path, whole):
    first, second = Counting(), Counting()
    write_shards(corpus, first, tmp_path / "a", cache=tmp_path / "cache")
    write_shards(corpus, second, tmp_path / "b", cache=tmp_path / "cache")
    assert first.seen > 0
    assert second.seen == 0
    assert files_of(tmp_path / "b") == whole
    other = Counting()
    other.fingerprint = "another"
    write_shards(corpus, other, tmp_path / "c", cache=tmp_path / "cache")
    assert other.seen == first.seen


def test_a_corpus_of_several_files_is_one_shard(corpus, tmp_path, whole):
    import pyarrow.parquet as pq

    (tmp_path / "cut").mkdir()
    for split in SPLITS:
        table = pq.read_table(corpus / f"{split}.parquet")
        half = len(table) // 2
        for n, part in enumerate((table[:half], table[half:])):
            pq.write_table(part, tmp_path / "cut" / f"{split}-{n:05d}-of-00002.parquet")
    write_shards(tmp_path / "cut", Counting(), tmp_path / "out")
    assert files_of(tmp_path / "out") == whole


def test_large_vocabularies_take_32_bits(corpus, tmp_path):
    encoder = Counting()
    encoder.vocab_size = 2**16 + 1
    assert write_shards(corpus, encoder, tmp_path)["dtype"] == "uint32"
    assert open_shard(tmp_path, "train").tokens.dtype == np.uint32
