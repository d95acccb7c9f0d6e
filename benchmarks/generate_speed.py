"""Decoding speed beside transformers' generate, one process, alternating; prints the ratio.

python benchmarks/generate_speed.py [MODEL]
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from groundup.core.run import resolve_model
from groundup.core.types import SamplingParams
from groundup.generate import LLM
from groundup.model import Decoder, ModelConfig, save_model
from groundup.tokenizer import Tokenizer

TOKENS, ROUNDS = 64, 5


def main() -> None:
    if len(sys.argv) > 1:
        folder = resolve_model(sys.argv[1])
    else:
        folder = Path(tempfile.mkdtemp()) / "model"
        tok = Tokenizer.train([Path(__file__).read_text()], vocab_size=300)
        config = ModelConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
        save_model(Decoder(config), tok, folder)
    ours = LLM(folder, device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    for batch in (1, 8):
        prompts = torch.randint(5, 250, (batch, 32))
        rates: dict[str, list[float]] = {"groundup": [], "transformers": []}
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            ours.generate(prompts.tolist(), params)
            rates["groundup"].append(batch * TOKENS / (time.perf_counter() - start))
            start = time.perf_counter()
            theirs.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
            rates["transformers"].append(batch * TOKENS / (time.perf_counter() - start))
        mine, other = (statistics.median(r[1:]) for r in rates.values())
        print(f"batch {batch}: groundup {mine:,.0f} tokens/s, transformers {other:,.0f}, ", end="")
        print(f"ratio {mine / other:.2f}")


if __name__ == "__main__":
    main()
