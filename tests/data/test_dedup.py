"""MinHash against theory, components against scipy, and splits against their rule in words."""

import hashlib
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.data import minhash
from groundup.data.components import find_components, unique_edges, write_edges
from groundup.data.dedup import heads
from groundup.data.keyed import read_keyed, write_keyed
from groundup.data.split import LARGEST_SHARE, hold_out, source_key
from groundup.data.tasks import run_here
from inputs import ANY_TEXT


def words(rng, count):
    return [f"w{n}" for n in rng.integers(0, 5000, count)]


@given(ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_words_are_those_of_a_regular_expression(text):
    unspaced = "".join(f"{chr(a)}-{chr(b)}" for a, b in minhash.UNSPACED)
    lowered = "".join(c if ord(c) < 0xFFFF else "x" for c in text.lower())
    alone = re.sub(f"([{unspaced}])", lambda m: f" {m[1]} " if m[1].isalnum() else " ", lowered)
    found = re.findall(r"\w+", alone)
    hashes = minhash.word_hashes(text)
    assert len(hashes) == len(found)
    if text.isascii():
        assert len(set(hashes.tolist())) == len(set(found))


def test_long_texts_hash_as_their_pieces_do(monkeypatch):
    text = " ".join(words(np.random.default_rng(0), 3000)) + " " + "y" * 300
    whole = minhash.word_hashes(text)
    minhash.powers.cache_clear()
    monkeypatch.setattr(minhash, "PIECE", 128)
    try:
        pieces = minhash.word_hashes(text)
    finally:
        minhash.powers.cache_clear()
    assert (pieces[:3000] == whole[:3000]).all()


def test_long_texts_take_time_by_their_length(monkeypatch):
    """Every code point is copied into one piece, not once for each piece before it."""
    copied = 0

    def counting(parts, **options):
        nonlocal copied
        copied += sum(len(part) for part in parts)
        return concatenate(parts, **options)

    concatenate = np.concatenate
    monkeypatch.setattr(minhash.np, "concatenate", counting)
    text = "some words " * 200_000
    minhash.words_of(text)
    assert copied < 2 * len(text)


def test_estimates_are_unbiased_with_the_spread_of_theory():
    rng = np.random.default_rng(0)
    errors, variances = [], []
    for n in range(400):
        shared = int(400 * rng.uniform())
        a = words(rng, 400)
        b = a[:shared] + words(rng, 400 - shared)
        sets = [minhash.shingles(" ".join(text)) for text in (a, b)]
        both = np.intersect1d(*sets).size
        true = both / np.union1d(*sets).size
        found = minhash.similarity(*(minhash.signature(s, seed=n) for s in sets))
        errors.append(float(found) - true)
        variances.append(true * (1 - true) / (minhash.BANDS * minhash.ROWS))
    spread = np.sqrt(np.mean(variances))
    assert abs(np.mean(errors)) < 4 * spread / np.sqrt(len(errors))
    assert 0.9 < np.sqrt(np.mean(np.square(errors))) / spread < 1.1


def test_pairs_meet_as_often_as_the_curve_says():
    rng = np.random.default_rng(1)
    for shared, size in ((300, 400), (340, 400), (380, 400)):
        met, chance = [], []
        for n in range(150):
            a = rng.integers(0, 1 << 32, size, dtype=np.uint32)
            b = np.r_[a[:shared], rng.integers(0, 1 << 32, size - shared, dtype=np.uint32)]
            pair = np.stack([minhash.signature(x, seed=n) for x in (a, b)])
            keys = minhash.band_keys(pair)
            met.append((keys[0] == keys[1]).any())
            chance.append(minhash.meeting_probability(shared / (2 * size - shared)))
        error = np.sqrt(np.mean(chance) * (1 - np.mean(chance)) / len(met)) + 1e-3
        assert abs(np.mean(met) - np.mean(chance)) < 4 * error


def test_band_keys_are_equal_only_where_a_whole_band_is():
    rng = np.random.default_rng(2)
    a = rng.integers(0, 1 << 32, (1, 112), dtype=np.uint32)
    b = a.copy()
    b[0, ::8] += 1
    b[0, 16] = a[0, 16]
    assert (minhash.band_keys(a) == minhash.band_keys(b))[0].tolist() == [n == 2 for n in range(14)]
    same = np.repeat(a[:, :8], 14, axis=0).reshape(1, -1)
    assert len(np.unique(minhash.band_keys(same))) == 14  # equal minima in two bands do not meet


@pytest.mark.parametrize("memory_bytes", [1 << 30, 40_000])
@pytest.mark.parametrize(("nodes", "edges"), [(300, 200), (300, 299), (300, 0)])
def test_components_are_scipys(tmp_path, nodes, edges, memory_bytes):
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    rng = np.random.default_rng(nodes + edges)
    a, b = rng.integers(0, nodes, (2, edges))
    if edges == 299:  # a path in random order: as deep as a component can be
        order = rng.permutation(nodes)
        a, b = order[:-1], order[1:]
    folders = []
    for part in range(3):
        folders.append(tmp_path / f"in{part}")
        folders[-1].mkdir()
        mine = slice(part, None, 3)
        larger, smaller = np.maximum(a, b)[mine], np.minimum(a, b)[mine]
        write_edges(folders[-1], unique_edges(larger, smaller))
    found = find_components(tmp_path, folders, nodes, memory_bytes, run_here)
    records, _ = read_keyed(found, "small", ("key", "other"))
    labels = np.arange(nodes)
    labels[records["key"]] = records["other"]
    graph = coo_matrix((np.ones(edges), (a, b)), shape=(nodes, nodes))
    _, theirs = connected_components(graph, directed=False)
    first = {label: n for n, label in reversed(list(enumerate(theirs)))}
    assert labels.tolist() == [first[label] for label in theirs]


def test_heads_point_at_the_first_of_each_group():
    keys = np.array([1, 1, 2, 3, 3, 3], np.uint64)
    check = np.array([0, 0, 0, 0, 1, 1], np.uint64)
    assert heads(keys).tolist() == [0, 0, 2, 3, 3, 3]
    assert heads(keys, check).tolist() == [0, 0, 2, 3, 4, 4]
    assert heads(np.zeros(0, np.uint64)).tolist() == []


def test_ranges_of_keys_partition_the_records(tmp_path):
    keys = np.array([0, 5, 1 << 63, (1 << 64) - 1, 7], np.uint64)
    write_keyed(tmp_path, "x", {"key": keys, "row": np.arange(5)})
    cuts = [0, 6, 1 << 63, (1 << 64) - 1, 1 << 64]
    parts = [
        read_keyed([tmp_path], "x", ("row",), start, stop)[0]["row"].tolist()
        for start, stop in pairwise(cuts)
    ]
    assert parts == [[0, 1], [4], [2], [3]]


def written_units(folder: Path, sizes: dict[str, int], seed: int) -> list[Path]:
    folders = []
    for part in range(2):
        folders.append(folder / str(part))
        folders[-1].mkdir(parents=True)
        mine = list(sizes.items())[part::2]
        keys = np.array([source_key(name, seed) for name, _ in mine], np.uint64)
        lengths = np.array([size for _, size in mine], np.int64)
        write_keyed(folders[-1], "unit", {"key": keys, "characters": lengths})
    return folders


@given(
    st.integers(0, 10_000),
    st.lists(st.integers(1, 5000), min_size=3, max_size=60),
    st.sampled_from([200, 1 << 30]),
)
@settings(max_examples=40, deadline=None)
def test_held_out_sources_are_those_of_the_rule(tmp_path_factory, seed, lengths, memory_bytes):
    sizes = {f"f{n}": size for n, size in enumerate(lengths)}
    target = 0.1 * sum(lengths)
    order = sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    fitting = [name for name in order if sizes[name] <= target * LARGEST_SHARE]
    wanted: list[str] = []
    for name in fitting or sorted(order, key=lambda name: (sizes[name], source_key(name, seed))):
        if wanted and sum(sizes[name] for name in wanted) >= target:
            break
        wanted.append(name)
    folders = written_units(tmp_path_factory.mktemp("units"), sizes, seed)
    found = hold_out(folders, target, memory_bytes)
    assert sorted(found.tolist()) == sorted(source_key(name, seed) for name in wanted)


def test_no_file_rules_a_held_out_split(tmp_path):
    sizes = {"huge": 1000, **{f"f{n}": 10 for n in range(100)}}
    found = hold_out(written_units(tmp_path, sizes, 1), 100, 1 << 30)
    assert len(found) == 10
    assert source_key("huge", 1) not in found.tolist()
