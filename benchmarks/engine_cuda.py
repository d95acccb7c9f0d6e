"""The engine on one GPU: a random Qwen3-0.6B in bf16, beside transformers' continuous batching.

python benchmarks/engine_cuda.py [--sections one many exact beside peer attention rows cuts]
    [--scale 0.5] [--profile] [--peer-seconds 60]

The model has 28 layers, hidden size 1,024, 16 heads and 8 key/value heads of 128, a gated MLP of
3,072, 151,936 tokens, tied. `one` decodes 512 tokens behind a prompt of 128. `many` is the load of
nano-vllm's benchmark: 256 sequences, prompts of 100 to 1,024 tokens, answers of 100 to 1,024, at
temperature 0.6; `--scale` shrinks all lengths. `peer` is transformers' `generate_batch` on that
load's prompts with answers of one length, cut off when its time is up; with `beside`, ours at the
same, the ratio is printed. `cuts` draws at temperature 0.6 behind Qwen3's top-k of 20 and top-p of
0.95, and behind others, beside the temperature alone. Shares of the roofline are of what memory
gives when it is copied: a step reads the weights once, and the keys and values of all its
sequences.
"""

import argparse
import random
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from groundup.core.types import SamplingParams
from groundup.generate import LLM
from groundup.model import Decoder, ModelConfig
from groundup.tokenizer import Tokenizer

SHAPE = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
}
SEQUENCES, SHORTEST, LONGEST = 256, 100, 1024
HEAT = 0.6
MEMORY = {"kv_cache_memory_bytes": 40 * 10**9}
CUTS: dict[str, dict[str, Any]] = {
    "temperature alone": {},
    "top-k 20, top-p 0.95": {"top_k": 20, "top_p": 0.95},  # Qwen3's own
    "top-p 0.95": {"top_p": 0.95},
    "min-p 0.05": {"min_p": 0.05},
}
Load = tuple[list[list[int]], list[int]]


def make_model() -> Decoder:
    """Return the random model, on the GPU."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return Decoder(ModelConfig(**SHAPE)).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def make_tokenizer() -> Tokenizer:
    """Return a small tokenizer: prompts are ids, and answers' texts do not matter."""
    return Tokenizer.train(["a few words of text, and a few more"], vocab_size=300)


def bandwidth() -> float:
    """Return what a copy of 4 GB moves, bytes read and written a second."""
    source = torch.empty(2**31, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * source.nbytes / (begin.elapsed_time(end) / 1000))
    return best


def load(scale: float) -> Load:
    """Return the many sequences' prompts and how many tokens each answer has."""
    rng = random.Random(0)
    low, high = int(SHORTEST * scale), int(LONGEST * scale)
    ids = SHAPE["vocab_size"] - 1
    prompts = [
        [rng.randint(1000, ids) for _ in range(rng.randint(low, high))] for _ in range(SEQUENCES)
    ]
    return prompts, [rng.randint(low, high) for _ in range(SEQUENCES)]


def weight_bytes() -> int:
    """Return the bytes of all weights, each read once a step; the tied head is the embedding."""
    H, K = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    E, W = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    D = SHAPE["head_dim"]
    a_layer = E * (2 * H + 2 * K) * D + 3 * E * W
    return 2 * (SHAPE["num_hidden_layers"] * a_layer + E * SHAPE["vocab_size"])


def token_bytes() -> int:
    """Return the bytes of one token's keys and values."""
    return 2 * 2 * SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * SHAPE["head_dim"]


def roofline_seconds(work: Load, speed: float) -> float:
    """Return how long decoding takes if memory is all that counts, all sequences together."""
    prompts, counts = work
    moved = 0
    for step in range(1, max(counts)):
        there = [len(p) + step for p, n in zip(prompts, counts, strict=True) if step < n]
        moved += weight_bytes() + token_bytes() * sum(there)
    return moved / speed


def params_for(counts: Sequence[int], heat: float, **cut: Any) -> list[SamplingParams]:
    """Return parameters for answers of given lengths."""
    return [
        SamplingParams(temperature=heat, max_tokens=n, ignore_eos=True, seed=i, **cut)
        for i, n in enumerate(counts)
    ]


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds of a run."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def report(name: str, tokens: int, seconds: float, floor: float) -> None:
    """Print a rate, and its share of the roofline."""
    rate, best = tokens / seconds, tokens / floor
    print(f"{name}: {rate:,.0f} tokens/s, {seconds:.2f} s; roofline {best:,.0f}, {rate / best:.0%}")


def one(llm: LLM, speed: float, name: str = "batch 1") -> None:
    """Measure one sequence, its prompt's reading subtracted, twice."""
    rng = random.Random(1)
    for _ in range(2):
        prompt = [rng.randint(1000, 150_000) for _ in range(128)]
        first = timed(lambda p=prompt: llm.generate([p], params_for([1], 0.0)))
        llm.engine.pool.forget()
        whole = timed(lambda p=prompt: llm.generate([p], params_for([512], 0.0)))
        llm.engine.pool.forget()
        floor = roofline_seconds(([prompt], [512]), speed)
        report(f"{name}, decode of 511 tokens (prompt {first:.3f} s)", 511, whole - first, floor)


def many(llm: LLM, speed: float, scale: float, name: str = "batch 256") -> None:
    """Measure the load of many sequences; the second run has its graphs."""
    work = load(scale)
    tokens = sum(work[1])
    floor = roofline_seconds(work, speed)
    for turn in ("first run", "second run"):
        llm.engine.pool.forget()
        reading = timed(lambda: llm.generate(work[0], params_for([1] * SEQUENCES, HEAT)))
        llm.engine.pool.forget()
        whole = timed(lambda: llm.generate(work[0], params_for(work[1], HEAT)))
        report(f"{name}, {turn}, prompts and answers", tokens, whole, floor)
        report(f"{name}, {turn}, answers alone", tokens - SEQUENCES, whole - reading, floor)
        read = sum(map(len, work[0]))
        print(f"    reading {read:,} tokens of prompts: {read / reading:,.0f} tokens/s")
    decoding = llm.engine.decoding
    print(f"    {len(decoding.buffers)} graphs took {decoding.seconds:.1f} s, {decoding.captures=}")


def loads(scale: float) -> list[tuple[list[list[int]], int]]:
    """Return what we and the peer are measured at: prompts, and the length of all answers."""
    prompts, counts = load(scale)
    middle = sorted(counts)[SEQUENCES // 2]
    return [(prompts[:rows], n) for rows, n in ((1, 64), (SEQUENCES, 64), (SEQUENCES, middle))]


def beside(llm: LLM, scale: float, speed: float) -> list[float]:
    """Return our rates at the peer's loads, prompts and answers together, the second of two."""
    rates = []
    for some, answer in loads(scale):
        params = params_for([answer] * len(some), HEAT)
        for _ in range(2):
            llm.engine.pool.forget()
            taken = timed(lambda s=some, p=params: llm.generate(s, p))
        floor, tokens = roofline_seconds((some, [answer] * len(some)), speed), len(some) * answer
        report(f"groundup, {len(some)} sequences of {answer} tokens", tokens, taken, floor)
        rates.append(tokens / taken)
    return rates


def peer(scale: float, seconds: float, speed: float, ours: Sequence[float]) -> None:
    """Measure transformers' continuous batching in a process of its own, ended when time is up."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    process = context.Process(target=theirs, args=(scale, speed, ours))
    process.start()
    process.join(seconds)
    if process.is_alive():
        print(f"    cut off after {seconds:.0f} s")
        process.kill()
        process.join()


def theirs(scale: float, speed: float, ours: Sequence[float]) -> None:
    """Measure transformers at each load twice; print how many times its rate our rate is."""
    import transformers
    from transformers import GenerationConfig, Qwen3Config

    config = Qwen3Config(**{k: v for k, v in SHAPE.items() if k != "model_type"})
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    print(f"transformers {transformers.__version__}, attention {model.config._attn_implementation}")
    for number, (some, answer) in enumerate(loads(scale)):
        settings = GenerationConfig(
            max_new_tokens=answer, do_sample=True, temperature=HEAT, eos_token_id=-1, pad_token_id=0
        )
        floor = roofline_seconds((some, [answer] * len(some)), speed)
        for turn in ("first", "second"):
            start = time.perf_counter()
            found = model.generate_batch(some, generation_config=settings, progress_bar=False)
            taken = time.perf_counter() - start
            tokens = sum(len(output.generated_tokens) for output in found.values())
            name = f"generate_batch, {turn} run, {len(some)} sequences of {answer} tokens"
            report(name, tokens, taken, floor)
            if number < len(ours):
                print(f"    groundup is {ours[number] / (tokens / taken):.1f} times as fast")
            sys.stdout.flush()


def attention(speed: float) -> None:
    """Measure the attention of 256 single tokens behind 1,024 under other tiles."""
    from groundup.model import gpu, gpu_attention, gpu_decode, gpu_pages

    device = torch.device("cuda")
    options, plain = gpu.options(device), dict(gpu_decode.TILE)
    shape, length = gpu_pages.Shape(16, 8, 128, 128**-0.5), 1024
    for size in (16, 64):
        per = length // size
        slots = (SEQUENCES * length, 8, 128)
        keys, values = (torch.randn(slots, device=device, dtype=torch.bfloat16) for _ in range(2))
        order = torch.randperm(SEQUENCES * per, device=device).int().view(SEQUENCES, per)
        q = torch.randn(SEQUENCES, 4096, device=device, dtype=torch.bfloat16)
        for splits in (1, 2, 4):
            pages = gpu_pages.Pages(
                table=order,
                size=size,
                seat_T=torch.arange(SEQUENCES, device=device),
                position_T=torch.full((SEQUENCES,), length - 1, device=device),
                singles=SEQUENCES,
                splits=splits,
                counts=torch.zeros(SEQUENCES * 8, dtype=torch.int32, device=device),
            )
            for tile in ((64, 4, 3), (64, 4, 2), (32, 4, 3), (64, 8, 3), (128, 8, 3)):
                names = ("BLOCK_S", "num_warps", "num_stages")
                gpu_decode.TILE.update(zip(names, tile, strict=True))
                run = partial(gpu_attention.attend, q, keys, values, pages, shape, options)
                rate = 2 * keys.nbytes / replayed(run)
                print(f"blocks of {size}, {splits} splits, tile {tile}: {rate / speed:.0%}")
    gpu_decode.TILE.update(plain)


def rows(llm: LLM, speed: float) -> None:
    """Measure the products of a layer for few rows, ours and cuBLAS's, in shares of a read."""
    from groundup.model import gpu, gpu_layers

    options = gpu.options(torch.device("cuda"))
    stack = llm.engine.model.model
    ways = {
        "matvec": lambda x, w: gpu_layers.matvec(x, w, options=options),
        "cuBLAS": torch.nn.functional.linear,
    }
    for M in (1, 4, 8, 16):
        for name in ("qkv", "o", "gate_up", "down"):
            weights = [getattr(of, name) for of in stack.made]  # all: more than the cache holds
            x = torch.randn(M, weights[0].shape[1], device="cuda", dtype=torch.bfloat16)
            best = sum(w.nbytes for w in weights) / speed
            shares = []
            for way, product in ways.items():
                if way != "matvec" or M <= 8:
                    taken = replayed(lambda x=x, w=weights, p=product: [p(x, v) for v in w])
                    shares.append(f"{way} {best / taken:.0%}")
            print(f"{M} rows, {name}: {', '.join(shares)}")


def cuts(llm: LLM) -> None:
    """Measure decoding, and a step's draws by themselves, behind what cuts the distribution."""
    from groundup.model import gpu, gpu_draw

    rng, options = random.Random(2), gpu.options(torch.device("cuda"))
    for rows in (1, SEQUENCES):
        prompts = [[rng.randint(1000, 150_000) for _ in range(128)] for _ in range(rows)]
        logits = torch.randn(rows, SHAPE["vocab_size"], device="cuda", dtype=torch.bfloat16) * 3
        tokens = torch.zeros(rows, dtype=torch.int64, device="cuda")
        plain = None
        for name, cut in CUTS.items():
            seconds = []
            for count in (1, 257, 1, 257):  # the first two make graphs
                llm.engine.pool.forget()
                params = params_for([count] * rows, HEAT, **cut)
                seconds.append(timed(lambda p=prompts, own=params: llm.generate(p, own)))
            step = (seconds[3] - seconds[2]) / 256
            plain = plain or step
            k, p, least = cut.get("top_k", 0), cut.get("top_p", 1.0), cut.get("min_p", 0.0)
            given = torch.tensor([[0.5, HEAT, k, p, least]] * rows, dtype=torch.float64)
            u, heat, k_B, p_B, least_B = given.T.contiguous().cuda()
            made = gpu_draw.Cuts(k_B, p_B, least_B.log()) if cut else None
            alone = replayed(partial(gpu_draw.draw, logits, heat, u, tokens, options, made))
            print(
                f"{rows} sequences, {name}: {rows / step:,.0f} tokens/s, {step * 1000:.3f} ms a "
                f"step, {plain / step:.2f} of the rate without a cut; draws {alone * 1e6:.0f} us"
            )


def replayed(run: Callable[[], Any]) -> float:
    """Return the seconds of a run as a CUDA graph, the best of 5 means over 5."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    best = float("inf")
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(5):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / 5000)
    return best


def profile(llm: LLM, scale: float) -> None:
    """Print which kernels take the time of decoding, and the host's share."""
    from torch.profiler import ProfilerActivity

    for name, work, heat, steps in (
        ("batch 1", ([[5] * 128], [96]), 0.0, 60),
        ("batch 256", load(scale), HEAT, 25),
    ):
        engine = llm.engine
        engine.pool.forget()
        prompts, counts = work
        requests = [
            request
            for prompt, own in zip(prompts, params_for(counts, heat), strict=True)
            for request in engine.add(prompt, own)
        ]
        while engine.flight is None:
            engine.step()
        for _ in range(5):
            engine.step()
        waits: list[float] = []
        waited, torch.cuda.Event.synchronize = torch.cuda.Event.synchronize, noting(waits)
        start = time.perf_counter()
        for _ in range(steps):
            engine.step()
        host = time.perf_counter() - start
        torch.cuda.Event.synchronize = waited
        print(
            f"{name}: {host / steps * 1000:.3f} ms a step, of which the host waits for the GPU "
            f"{sum(waits) / steps * 1000:.3f}"
        )
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(10):
                engine.step()
            torch.cuda.synchronize()
        events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
        total = sum(e.self_device_time_total for e in events)
        print(f"    kernels: {total / 10:,.0f} us a step")
        for event in events[:14]:
            each = event.self_device_time_total / event.count
            print(
                f"    {event.self_device_time_total / total:5.1%} {event.count / 10:6.1f} x "
                f"{each:7.1f} us  {event.key[:90]}"
            )
        engine.abort(requests)
        engine.flight = None


def noting(seconds: list[float]) -> Callable[[Any], None]:
    """Return what waits for an event and notes how long that took."""
    wait = torch.cuda.Event.synchronize

    def waiting(event: Any) -> None:
        start = time.perf_counter()
        wait(event)
        seconds.append(time.perf_counter() - start)

    return waiting


def main() -> None:
    """Measure the sections asked for."""
    known = ("one", "many", "exact", "beside", "peer", "attention", "rows", "cuts")
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument(
        "--sections", nargs="+", choices=known, default=["one", "many", "exact", "beside", "peer"]
    )
    flags.add_argument("--scale", type=float, default=1.0)
    flags.add_argument("--profile", action="store_true")
    flags.add_argument("--peer-seconds", type=float, default=60.0)
    args = flags.parse_args()
    speed = bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: a copy moves "
        f"{speed / 1e12:.2f} TB/s; lengths times {args.scale}"
    )
    torch.cuda.empty_cache()
    model, tokenizer = make_model(), make_tokenizer()
    made: dict[bool, LLM] = {}
    rates: list[float] = []  # ours at the loads of the peer

    def engine(exact: bool) -> LLM:
        if exact not in made:
            made.clear()  # one at a time
            torch.cuda.empty_cache()
            start = time.perf_counter()
            made[exact] = LLM(model, tokenizer, batch_invariant=exact, **MEMORY)
            print(f"an engine took {time.perf_counter() - start:.2f} s to make")
        return made[exact]

    ours, same = partial(engine, False), partial(engine, True)
    sections: dict[str, Callable[[], None]] = {
        "one": lambda: one(ours(), speed),
        "many": lambda: many(ours(), speed, args.scale),
        "profile": lambda: profile(ours(), args.scale),
        "rows": lambda: rows(ours(), speed),
        "cuts": lambda: cuts(ours()),
        "beside": lambda: rates.extend(beside(ours(), args.scale, speed)),
        "exact": lambda: (
            one(same(), speed, "batch_invariant, batch 1"),
            many(same(), speed, args.scale, "batch_invariant, batch 256"),
        )[0],
        "attention": lambda: attention(speed),
        "peer": lambda: peer(args.scale, args.peer_seconds, speed, rates),
    }
    for name, section in sections.items():
        if name in args.sections or (name == "profile" and args.profile):
            start = time.perf_counter()
            if name in ("peer", "attention"):
                made.clear()  # they need its memory
                torch.cuda.empty_cache()
            try:
                section()
            except Exception:
                traceback.print_exc(limit=-6, file=sys.stdout)
            print(f"-- {name}: {time.perf_counter() - start:.1f} s in all", flush=True)


if __name__ == "__main__":
    main()
