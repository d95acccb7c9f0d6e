"""Speculation beside plain decoding on text that repeats its prompt, and what a grammar costs.

python benchmarks/speculation.py MODEL|25M|125M [--text FILE] [--quantization int8] [--threads N]
python benchmarks/speculation.py copier [--from MODEL] --text FILE --steps N --out FOLDER

Greedy, batches of 1 and 4, alternating rounds, medians; the tokens are asserted to be equal.
25M and 125M are the random Llamas of engine_speed.py with attention's share taken out: a token
depends on the one before alone, so that they come to loop, and prompts are what they wrote
themselves. They cost what others of their size do, and all guesses hold: the most there is to gain.
`copier` trains a model of 256 x 4 to say passages again, half of them ids drawn at random, and asks
it for 16 passages of the last tenth of the text, which it has not seen. `--cpu` counts CPU time,
for a machine that does other work.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from engine_speed import SHAPES, make_model, make_tokenizer

from groundup.core.types import SamplingParams, StructuredOutputsParams
from groundup.generate import LLM
from groundup.generate.config import SpeculativeConfig
from groundup.model import Decoder, ModelConfig, load_model, save_model
from groundup.model.loss import IGNORE
from groundup.tokenizer import Tokenizer

ROUNDS, TOKENS, ROWS = 5, 96, 12
REPEATED = "value_{n} = read(name_{n}, size={n})\nreturn value_{n}\n"
AGAIN = "\n\nAgain: "
Prompts = list[str] | list[list[int]]


def looping_model(size: str, folder: Path) -> Path:
    """Write a random Llama whose attention adds nothing to what it knows."""
    made = make_model(size, folder, make_tokenizer())
    model = load_model(made)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data = torch.zeros_like(layer.self_attn.o_proj.weight)
    return save_model(model, Tokenizer.load(made), folder / "looping")


def new_copier() -> Decoder:
    """Return an untrained model of 256 x 4."""
    config = ModelConfig(
        model_type="llama",
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=672,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=512,
    )
    return Decoder(config)


def train_copier(text: str, steps: int, out: Path, begin: Path | None) -> Path:
    """Teach a model to repeat 12 to 48 tokens; every second step's are drawn at random."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.load(begin) if begin else Tokenizer.train([text], vocab_size=1024)
    model = load_model(begin) if begin else new_copier()
    ids, again = torch.tensor(tokenizer.encode(text)), torch.tensor(tokenizer.encode(AGAIN))
    first = torch.full((ROWS, 1), tokenizer.bos_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        size = int(torch.randint(12, 49, ()))
        starts = torch.randint(len(ids) - size, (ROWS,)).tolist()
        passages = torch.stack([ids[at : at + size] for at in starts])
        if step % 2:
            passages = torch.randint(5, tokenizer.vocab_size, passages.shape)
        rows = torch.cat([first, passages, again.expand(ROWS, -1), passages], 1)
        targets = rows[:, 1:].clone()
        targets[:, : size + len(again)] = IGNORE
        pace = min(1, (step + 1) / 30, (steps - step) / (0.25 * steps))
        optimizer.param_groups[0]["lr"] = 1.5e-3 * pace
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(rows[:, :-1], want="losses", targets=targets)[0] / (ROWS * size)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 < 2:
            print(f"step {step}: {loss.item():.2f} nats a token", flush=True)
    return save_model(model, tokenizer, out)


def repeat_passages(folder: Path, text: str, settings: dict[str, Any], *, cpu: bool) -> None:
    """Compare on passages that are asked for again, batches of 1 and 4 out of 16."""
    tokenizer = Tokenizer.load(folder)
    ids, again = tokenizer.encode(text), tokenizer.encode(AGAIN)
    passages = [ids[at : at + 40] for at in range(0, 16 * 120, 120)]
    prompts = [[tokenizer.bos_token_id, *passage, *again] for passage in passages]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for batch in (1, 4):
        plain = LLM(folder, max_num_seqs=batch, **settings)
        guess = SpeculativeConfig(method="lookup")
        lookup = LLM(folder, max_num_seqs=batch, speculative=guess, **settings)
        compare(f"copier, batch {batch}", plain, lookup, prompts, params, cpu=cpu)
        answers = rate(plain, prompts, params)[1]
        pairs = [
            a == b
            for p, o in zip(passages, answers, strict=True)
            for a, b in zip(p, o, strict=True)
        ]
        print(f"  {sum(pairs) / len(pairs):.0%} of the tokens stand where the passage has them")


def rate(
    llm: LLM, prompts: Prompts, params: SamplingParams, *, cpu: bool = False
) -> tuple[float, list[list[int]]]:
    clock = time.process_time if cpu else time.perf_counter
    start = clock()
    found = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    return sum(map(len, found)) / (clock() - start), found


def compare(
    name: str,
    plain: LLM,
    other: LLM,
    prompts: Prompts,
    params: SamplingParams,
    *,
    cpu: bool = False,
) -> None:
    """Run both in turns and print the median rates and their ratio."""
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS + 1):
        first, wanted = rate(plain, prompts, params, cpu=cpu)
        second, found = rate(other, prompts, params, cpu=cpu)
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
    flags.add_argument("--from", dest="begin", type=Path, help="copier: a model to go on with")
    flags.add_argument("--steps", type=int, default=0, help="copier: of training")
    flags.add_argument("--out", type=Path, help="copier: a folder for the model")
    flags.add_argument("--cpu", action="store_true")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    settings = {"device": "cpu", "quantization": args.quantization}
    if args.model == "copier":
        text = args.text.read_text()
        seen, held = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
        folder = train_copier(seen, args.steps, args.out, args.begin) if args.steps else args.begin
        repeat_passages(folder, held, settings, cpu=args.cpu)
        return
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
            compare(f"lookup, batch {batch}", plain, lookup, prompts, params, cpu=args.cpu)
        constrained(plain, [REPEATED.format(n=1)])


if __name__ == "__main__":
    main()
