"""Small inputs that the tests share: a corpus of generated functions, a tokenizer, a model."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

from inputs import python_file

hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


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
