"""MinHash and clustering beside rensa, datasketch and datatrove: documents per CPU-second, error.

    python benchmarks/minhash.py

Five-word shingles and 112 hashes everywhere; signatures are timed from the text on. datatrove is
optional (pip install datatrove spacy) and timed on fewer documents; scipy counts the components.
"""

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from groundup.data import minhash, read_documents
from groundup.data.dedup import near_clusters
from groundup.data.keyed import read_keyed, write_keyed
from groundup.data.tasks import run_here

ROUNDS = 5
LENGTH = 5_600  # characters, about 900 words of prose
DOCUMENTS = 400
HASHES = minhash.BANDS * minhash.ROWS
WORD = re.compile(r"\w+")


def texts_of_python(count: int) -> list[str]:
    """Return pieces of the installed Python's library."""
    pieces: list[str] = []
    for document in read_documents(["python"]):
        text = document.text
        pieces += [text[n : n + LENGTH] for n in range(0, len(text) - LENGTH, LENGTH)]
        if len(pieces) >= count:
            break
    return pieces[:count]


def shingle_words(text: str) -> set[str]:
    """Return the five-word shingles as the peers take them."""
    words = WORD.findall(text.lower())
    return {" ".join(words[n : n + 5]) for n in range(max(1, len(words) - 4))}


def ours(texts: Sequence[str]) -> np.ndarray:
    return np.stack([minhash.signature(minhash.shingles(text)) for text in texts])


def rensa(texts: Sequence[str]) -> np.ndarray:
    from rensa import RMinHash

    digests = []
    for text in texts:
        made = RMinHash(num_perm=HASHES, seed=1)
        made.update(list(shingle_words(text)))
        digests.append(made.digest())
    return np.array(digests)


def datasketch(texts: Sequence[str]) -> np.ndarray:
    from datasketch import MinHash

    made = []
    for text in texts:
        one = MinHash(num_perm=HASHES, seed=1)
        one.update_batch([shingle.encode() for shingle in shingle_words(text)])
        made.append(one.hashvalues)
    return np.stack(made)


def datatrove(texts: Sequence[str]) -> np.ndarray:
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(
        n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=HashConfig(hash_fc="sha1")
    )
    step = MinhashDedupSignature(output_folder=tempfile.mkdtemp(), config=config)
    return np.array([np.concatenate(step.get_signature(step.get_shingles(t))) for t in texts])


PEERS: dict[str, tuple[Callable[[Sequence[str]], np.ndarray], int]] = {
    "rensa": (rensa, DOCUMENTS),
    "datasketch": (datasketch, DOCUMENTS // 2),
    "datatrove": (datatrove, 40),
}


def rate(run: Callable[[Sequence[str]], object], texts: Sequence[str]) -> float:
    started = time.process_time()
    run(texts)
    return len(texts) / (time.process_time() - started)


def compare_rates(texts: Sequence[str]) -> list[str]:
    """Print the median rates of alternating rounds; return the peers that are installed."""
    present = []
    for name, (peer, count) in PEERS.items():
        try:
            peer(texts[:2])
        except ImportError as err:
            print(f"  {name}: not measured ({err})")
            continue
        present.append(name)
        pairs = [(rate(ours, texts), rate(peer, texts[:count])) for _ in range(ROUNDS)]
        mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"  {name:<11} ours {mine:7,.0f}  theirs {theirs:7,.0f}  ratio {mine / theirs:.2f}")
    return present


def compare_errors(present: Sequence[str]) -> None:
    """Print the root mean square error of the estimates against the true similarity."""
    rng = np.random.default_rng(0)
    pairs, true = [], []
    for n in range(120):
        a = [f"w{k}" for k in rng.integers(0, 5000, 400)]
        shared = int(400 * (n + 0.5) / 120)
        b = a[:shared] + [f"w{k}" for k in rng.integers(0, 5000, 400 - shared)]
        pairs += [" ".join(a), " ".join(b)]
        sets = [shingle_words(text) for text in pairs[-2:]]
        true.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
    exact = np.array(true)
    theory = np.sqrt(np.mean(exact * (1 - exact)) / HASHES)
    print(f"  theory      RMSE {theory:.4f}")
    for name in ("ours", *present):
        found = (ours if name == "ours" else PEERS[name][0])(pairs)
        error = (found[::2] == found[1::2]).mean(axis=1) - exact
        print(f"  {name:<11} RMSE {np.sqrt(np.mean(error**2)):.4f}  bias {error.mean():+.4f}")


def clustering(count: int = 200_000) -> None:
    """Print the rate from signatures on disk to clusters; the components are checked by scipy."""
    rng = np.random.default_rng(1)
    signatures = rng.integers(0, 1 << 32, (count, HASHES), dtype=np.uint32)
    copies = rng.integers(0, count // 2, count // 10)
    places = rng.choice(np.arange(count // 2, count), count // 10, replace=False)
    signatures[places] = signatures[copies]
    changed = rng.uniform(size=(len(places), HASHES)) < 0.1
    signatures[places] ^= changed.astype(np.uint32)
    with tempfile.TemporaryDirectory() as folder:
        blocks = []
        for n, part in enumerate(np.array_split(signatures, 4)):
            block = Path(folder) / f"block{n}"
            block.mkdir()
            blocks.append(block)
            rows = np.repeat(np.arange(len(part)), minhash.BANDS)
            write_keyed(block, "band", {"key": minhash.band_keys(part).ravel(), "row": rows})
            np.save(block / "signature.npy", part)
            np.save(block / "size.npy", np.zeros(len(part), np.int64))
        wall, cpu = time.monotonic(), time.process_time()
        found = near_clusters(Path(folder), blocks, 0.7, 1 << 30, run_here)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        members = len(read_keyed(found, "small", ("key",))[0]["key"])
    print(
        f"  {count:,} documents in {cpu:.2f} CPU-s ({wall:.2f} s): {count / cpu:,.0f} a second; "
        f"{members:,} of {len(places):,} planted copies joined to another"
    )


def main() -> None:
    texts = texts_of_python(DOCUMENTS)
    print(f"Signatures of {len(texts)} texts of {LENGTH:,} characters, a CPU-second:")
    present = compare_rates(texts)
    print("Estimates of the Jaccard similarity of 120 pairs:")
    compare_errors(present)
    print("From signatures on disk to clusters, pairs verified:")
    clustering()


if __name__ == "__main__":
    main()
