"""Speculation beside plain decoding on text that repeats its prompt, and what a grammar costs.

python benchmarks/speculation.py MODEL [--text FILE]

Greedy, batches of 1 and 4, alternating rounds, medians; the tokens are asserted to be equal.
"""

import argparse
import statistics
import time
from pathlib import Path

from groundup.core.types import SamplingParams, StructuredOutputsParams
from groundup.generate import LLM
from groundup.generate.config import SpeculativeConfig

ROUNDS, TOKENS = 5, 96
REPEATED = "value_{n} = read(name_{n}, size={n})\nreturn value_{n}\n"


def rate(llm: LLM, prompts: list[str], params: SamplingParams) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    found = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    return sum(map(len, found)) / (time.perf_counter() - start), found


def compare(name: str, plain: LLM, other: LLM, prompts: list[str], params: SamplingParams) -> None:
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
    args = flags.parse_args()
    plain = LLM(args.model, device="cpu")
    lookup = LLM(args.model, device="cpu", speculative=SpeculativeConfig(method="lookup"))
    text = args.text.read_text()[:300] if args.text else REPEATED.format(n=1)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    for batch in (1, 4):
        prompts = [(text.replace("1", str(n + 1)) * 3)[:240] for n in range(batch)]
        compare(f"lookup, batch {batch}", plain, lookup, prompts, params)
    constrained(plain, [REPEATED.format(n=1)])


if __name__ == "__main__":
    main()
