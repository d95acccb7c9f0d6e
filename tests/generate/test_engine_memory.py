"""A prompt's numbers take memory that the one before has used: the system gives no new pages."""

import subprocess
import sys

import pytest

from groundup.model import kernels

RUN = """
import resource, torch
from groundup.generate import Engine, EngineConfig
from groundup.core.types import SamplingParams
from groundup.model import Decoder, ModelConfig
from groundup.tokenizer import Tokenizer

tokenizer = Tokenizer.train(["a few words"], vocab_size=300)
sizes = {"hidden_size": 64, "intermediate_size": 4096, "num_hidden_layers": 4}
config = ModelConfig(vocab_size=300, max_position_embeddings=520, **sizes)
engine = Engine(Decoder(config), tokenizer, EngineConfig(enable_prefix_caching=False))
taken = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    engine.add([7] * 512, SamplingParams(temperature=0, max_tokens=1))
    while engine.busy:
        engine.step()
    taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(taken[3:]))  # the heap may grow once more, but not for every prompt
"""


@pytest.mark.skipif(sys.platform != "linux" or not kernels.available(), reason="glibc's malloc")
def test_reading_prompts_takes_no_new_pages():
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 1000  # a layer's widest numbers alone are 2,048 pages
