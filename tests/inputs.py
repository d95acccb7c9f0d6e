"""What several tests feed in: any text, and real data where there is some."""

import hashlib
from base64 import b32encode
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


HTML = "HTTP/1.1 200 OK\r\nContent-Type: text/html"


def real_data(name: str) -> Path:
    """Return a folder of real data beside the repository, or skip the test without it."""
    found = sorted(Path(__file__).parents[2].glob(f"*/data/{name}"))
    if not found:
        pytest.skip(f"the data set {name} is not here")
    return found[0]


WORDS = ("alpha", "beta", "gamma", "delta", "omega", "count", "total", "index", "value", "query")


def python_file(n: int) -> str:
    """Return a Python file of documented functions; every n gives another one."""
    rng = np.random.default_rng(n)
    parts = [f'"""Module number {n} about {rng.choice(WORDS)}."""\n']
    for k in range(12):
        a, b, c, d = (str(word) for word in rng.permutation(WORDS)[:4])
        parts.append(
            f"def {a}_{b}_{n}_{k}({c}, {d}={k}):\n"
            f'    """Return the {a} of the {b} and the {c} number {n} here."""\n'
            f"    {b} = {c} * {rng.integers(1, 99)} + {d}\n"
            f"    return {b} - {rng.integers(1, 99)}\n"
        )
    return "\n\n".join(parts)


def warc_record(url: str, body: bytes, *, digest: str | None = None, http: str = HTML) -> bytes:
    """Return a response record of a WARC file."""
    block = f"{http}\r\n\r\n".encode() + body
    digest = digest or "sha1:" + b32encode(hashlib.sha1(block).digest()).decode()
    head = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\n"
        f"WARC-Date: 2024-01-01T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:{url}>\r\n"
        f"WARC-Block-Digest: {digest}\r\nContent-Type: application/http; msgtype=response\r\n"
        f"Content-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"
