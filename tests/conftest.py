"""Small inputs that the tests share: a corpus of generated functions, a tokenizer, a model."""

from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(2)

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


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for n in range(40):
        (folder / f"module_{n}.py").write_text(python_file(n))
    return folder


@pytest.fixture(scope="session")
def corpus(text_folder, tmp_path_factory) -> Path:
    from groundup.data import CorpusConfig, build_corpus

    out = tmp_path_factory.mktemp("corpus")
    config = CorpusConfig(
        paths=(str(text_folder),), validation_fraction=0.2, duplicate_similarity=0.95
    )
    build_corpus(config, out)
    return out


@pytest.fixture(scope="session")
def tok(text_folder):
    from groundup.tokenizer import Tokenizer

    texts = [file.read_text() for file in sorted(text_folder.iterdir())]
    return Tokenizer.train(texts, vocab_size=400)


@pytest.fixture
def tiny(tok):
    from groundup.model import Decoder, ModelConfig

    torch.manual_seed(0)
    return Decoder(
        ModelConfig(
            vocab_size=tok.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=96,
            initializer_range=0.5,  # wide gaps between logits: greedy choices survive rounding
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        )
    ).eval()
