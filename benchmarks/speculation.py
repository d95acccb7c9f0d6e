"""Speculation beside plain decoding on text that repeats its prompt, and what a grammar costs.

python benchmarks/speculation.py MODEL|25M|125M [--text FILE] [--quantization int8] [--threads N]

Greedy, batches of 1 and 4, alternating rounds, medians; the tokens are asserted to be equal.
25M and 125M are the random Llamas of engine_speed.py with attention's share taken out: a token
depends on the one before alone, so that they come to loop, and prompts are what they wrote
themselves. They cost what others of their size do, and all guesses hold: the most there is to gain.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch
from engine_speed import SHAPES, make_model, make_tokenizer

from groundup.core.types import SamplingParams, StructuredOutputsParams
from groundup.generate import LLM
from groundup.generate.config import SpeculativeConfig
from groundup.model import load_model, save_model
from groundup.tokenizer import Tokenizer

ROUNDS, TOKENS = 5, 96
REPEATED = "value_{n} = read(name_{n}, size={n})\nreturn value_{n}\n"


Prompts = list[str] | list[list[int]]


def looping_model(size: str, folder: Path) -> Path:
    """Write a random Llama whose attention adds nothing to what it knows."""
    made = make_model(size, folder, make_tokenizer())
    model = load_model(made)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data = torch.zeros_like(layer.self_attn.o_proj.weight)
    return save_model(model, Tokenizer.load(made), folder / "looping")


def rate(llm: LLM, prompts: Prompts, params: SamplingParams) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    found = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    return sum(map(len, found)) / (time.perf_counter() - start), found


def compare(name: str, plain: LLM, other: LLM, prompts: Prompts, params: SamplingParams) -> None:
    """Run both in turns and print the median rates and their ratio."""
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS + 1):
        first, wanted = rate(plain, prompts, params)
        second, found = rate(other, prompts, params)
        assert found == wanted, "speculation changed the answer"
        rates[0].append(first)
        rates[1].append(second)
    before, after = (statistics.median(column[1:]) for column in rates)
    kept = other.engine.speculator.acceptance_rate if other.engine.speculator else 0.0
    print(f"{name}: plain {before:,.0f} tokens/s, with guesses {after:,.0f}, ", end="")
    print(f"ratio {after / before:.2f}, {kept:.0%} of guesses kept")


def constrained(llm: LLM, prompts: list[str]) -> None:
    """Print what a grammar that allows everything costs."""
    free = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    anything = StructuredOutputsParams(regex="(?s:.*)")
    bound = SamplingParams(temperature=0, max_tokens=TOKENS, structured_outputs=anything)
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS + 1):
        for params, column in zip((free, bound), rates, strict=True):
            column.append(rate(llm, prompts, params)[0])
    before, after = (statistics.median(column[1:]) for column in rates)
    print(f"grammar: free {before:,.0f} tokens/s, constrained {after:,.0f}, ", end="")
    print(f"ratio {after / before:.2f}")


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("model")
    flags.add_argument("--text", type=Path, help="a text that the prompts repeat")
    flags.add_argument("--quantization", choices=("int8",))
    flags.add_argument("--threads", type=int, default=2)
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    settings = {"device": "cpu", "quantization": args.quantization}
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    with tempfile.TemporaryDirectory() as temporary:
        looping = args.model in SHAPES
        folder = looping_model(args.model, Path(temporary)) if looping else args.model
        plain = LLM(folder, **settings)
        lookup = LLM(folder, speculative=SpeculativeConfig(method="lookup"), **settings)
        text = args.text.read_text()[:300] if args.text else REPEATED.format(n=1)
        for batch in (1, 4):
            if looping:
                own = dataclasses.replace(params, max_tokens=200)
                found = plain.generate([[1000 + n] for n in range(batch)], own)
                prompts = [output.outputs[0].token_ids for output in found]
            else:
                prompts = [(text.replace("1", str(n + 1)) * 3)[:240] for n in range(batch)]
            compare(f"lookup, batch {batch}", plain, lookup, prompts, params)
        constrained(plain, [REPEATED.format(n=1)])


if __name__ == "__main__":
    main()
