"""`groundup inspect`: a model's tree, counts and memory as tables or JSON, a prompt as pictures."""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from groundup.core.errors import ConfigError
from groundup.core.files import write_text
from groundup.core.memory import peak_memory_bytes
from groundup.core.progress import say, track
from groundup.figure import page as pages
from groundup.figure.maps import heat_grid, word_grid
from groundup.generate.config import STEP_TOKENS
from groundup.model.decoder import Decoder
from groundup.model.encoder import Encoder
from groundup.model.footprint import serving_step, training_step, twin_of
from groundup.model.hf import (
    Network,
    check_folder,
    config_json,
    empty_network,
    load_network,
    read_config,
)
from groundup.model.inspection import (
    cache_bytes,
    check_length,
    forward_flops,
    serve_memory,
    sizes,
    train_memory,
    tree_of,
)
from groundup.model.lens import look, neighbours
from groundup.model.lora import LoraConfig, apply_lora
from groundup.tokenizer import Tokenizer

BYTES = {"fp32": 4, "bf16": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIMS = ("muon", "adamw")
MOST_TOKENS, MOST_LAYERS, MOST_HEADS, NEAREST = 32, 6, 8, 8


def facts(
    folder: Path, *, lengths: Sequence[int] | None, batches: Sequence[int], lora_r: int = 0
) -> dict[str, Any]:
    """Return all that config.json tells, as JSON values; of weights, shapes alone are read."""
    where = str(folder / "config.json")
    values = read_config(folder)
    process = peak_memory_bytes()
    model = empty_network(values, where)
    check_folder(model, folder)
    most = model.config.max_position_embeddings
    lengths = list(lengths or sorted({max(1, most // 4), most}))
    if min(batches) < 1:
        raise ConfigError(f"batch size {min(batches)} must be at least 1")
    for length in lengths:
        check_length(model, length)
    cached = {name: cache_bytes(model, n) for name, n in BYTES.items()}
    return {
        "model": str(folder),
        "model_type": model.config.model_type,
        "architecture": config_json(model)["architectures"][0],
        "tree": dataclasses.asdict(tree_of(model)),
        "parameters": sizes(model),
        "per_token": [per_token(model, length) for length in lengths],
        "kv_cache_bytes_per_token": cached,
        "serve": serving(model, lengths, batches),
        "process_bytes": process,
        "lora_r": lora_r,
        "train": training(model, lengths, batches, lora_r),
    }


def per_token(model: Network, length: int) -> dict[str, float]:
    """Return what one token of a sequence of `length` costs: FLOPs, and bytes read to decode it."""
    forward = forward_flops(model, length) / length
    counts = sizes(model)
    tied = getattr(model.config, "tie_word_embeddings", True)
    table = model.config.vocab_size * model.config.hidden_size
    read = counts["active"] - (0 if tied else table)  # of the input table one row is read
    return {
        "length": length,
        "forward_flops": forward,
        "train_flops": 3 * forward,
        "weight_bytes_fp32": 4 * read,
        "weight_bytes_bf16": 2 * read,
        "cache_bytes_fp32": length * cache_bytes(model, 4),
        "cache_bytes_bf16": length * cache_bytes(model, 2),
    }


def serving(model: Network, lengths: Sequence[int], batches: Sequence[int]) -> list[dict[str, Any]]:
    """Return the memory of serving on a CPU, for every length, batch and dtype.

    The engine reads all requests' tokens in one row, STEP_TOKENS at a time.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    rows = []
    with FakeTensorMode():
        twin = twin_of(model)
        for length, batch, name in itertools.product(lengths, batches, BYTES):
            in_a_row = isinstance(model, Decoder)
            shape = (1, min(STEP_TOKENS["cpu"], batch * length)) if in_a_row else (batch, length)
            step = serving_step(twin, *shape, DTYPES[name])
            told = serve_memory(model, length, batch, BYTES[name], step)
            rows.append({"length": length, "batch": batch, "dtype": name} | told)
    return rows


def training(
    model: Network, lengths: Sequence[int], batches: Sequence[int], lora_r: int
) -> list[dict[str, Any]]:
    """Return the memory of a training step, for every length, batch, dtype and optimizer."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    adapted: list[str] = []
    if lora_r:
        adapted = apply_lora(model, LoraConfig(r=lora_r))
    rows = []
    with FakeTensorMode():
        twin = twin_of(model)
        if lora_r:
            apply_lora(twin, LoraConfig(r=lora_r, target_modules=tuple(adapted)))
        shapes = list(itertools.product(lengths, batches, BYTES))
        steps = {
            shape: training_step(twin, shape[0], shape[1], DTYPES[shape[2]])
            for shape in track(shapes, "counting activations")
        }
    for (length, batch, name), step in steps.items():
        for optim in OPTIMS:
            told = {"length": length, "batch": batch, "dtype": name, "optim": optim}
            rows.append(told | train_memory(model, optim=optim, step=step))
    return rows


def show(told: dict[str, Any]) -> None:
    """Print the facts: a tree and tables, on stdout."""
    out = Console(file=sys.stdout, highlight=False)
    out.print(branch(told["tree"], Tree("")).children[0], soft_wrap=True)
    counts = told["parameters"]
    rows: list[tuple[str, ...]] = [
        ("parameters", f"{counts['total']:,}"),
        ("of embeddings and heads over the vocabulary", f"{counts['embedding']:,}"),
        ("at work on one token", f"{counts['active']:,}"),
        *(
            (f"keys and values of a token, {name}", size_text(value))
            for name, value in told["kv_cache_bytes_per_token"].items()
            if value  # an encoder keeps none
        ),
    ]
    print_table(out, "", ("", ""), rows)
    cached = ("cache",) if any(told["kv_cache_bytes_per_token"].values()) else ()
    rows = [
        (
            f"{row['length']:,}",
            f"{row['forward_flops'] / 1e6:,.1f}",
            f"{row['train_flops'] / 1e6:,.1f}",
            *(size_text(row[f"{what}_bytes_{t}"]) for t in BYTES for what in ("weight", *cached)),
        )
        for row in told["per_token"]
    ]
    head = [f"{what} {t}" for t in BYTES for what in ("weights", *cached)]
    print_table(out, "One token", ("tokens", "MFLOPs", "MFLOPs to train", *head), rows)
    columns: tuple[str, ...] = ("length", "batch", "dtype", "weights")
    columns += (*(("kv_cache",) if cached else ()), "step", "malloc", "logits", "total")
    print_table(out, "Memory to serve", columns, memory_rows(told["serve"], columns))
    columns = ("length", "batch", "dtype", "optim", "weights", "optimizer", "step")
    columns += ("malloc", "total")
    what = f", LoRA of rank {told['lora_r']}" if told["lora_r"] else ""
    print_table(out, f"Memory to train{what}", columns, memory_rows(told["train"], columns))
    out.print(
        f"  On a CPU, beside what any process here has (Python and torch: "
        f"{size_text(told['process_bytes'])}).\n  On a GPU the step differs, and its allocator "
        "is not in these numbers."
    )


def branch(node: dict[str, Any], into: Tree) -> Tree:
    """Add a node and all below it to a tree; a layer's own parameters stand in its line."""
    own = [child for child in node["children"] if child["kind"] == "Parameter"]
    shapes = " ".join(f"{p['name'] if p['name'] != 'weight' else ''}{p['shape']}" for p in own)
    times = f" x {node['times']}" if node["times"] > 1 else ""
    size = f"{node['times'] * node['parameters']:,}"
    words = " ".join(filter(None, (node["name"], node["kind"] + times, shapes)))
    below = into.add(Text(f"{words}  {size}"))
    for child in node["children"]:
        if child["kind"] != "Parameter":
            branch(child, below)
    return into


def memory_rows(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Return table rows: counts as they are, bytes as sizes."""
    plain = ("length", "batch", "dtype", "optim")
    return [
        tuple(str(row[c]) if c in plain else size_text(row[c]) for c in columns) for row in rows
    ]


def print_table(
    out: Console, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Print a table on stdout, all but the first column right-aligned."""
    made = Table(
        title=title or None,
        title_justify="left",
        show_header=any(headers),
        box=box.SIMPLE,
        collapse_padding=True,
        pad_edge=False,
    )
    for n, name in enumerate(header.replace("_", " ") for header in headers):
        made.add_column(name, justify="left" if n == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    out.print(made)


def size_text(size: float) -> str:
    """Return a number of bytes as people write it."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size:,.0f} B"


def draw(folder: Path, prompt: str, out: Path) -> None:
    """Write a page of pictures: attention, the logit lens, embedding neighbours."""
    model = load_network(folder)
    tok = Tokenizer.load(folder).need_rows(model.config.vocab_size, folder)
    ids = tok.encode(prompt)
    before, after = ends(model, tok)
    if not (before or ids):
        raise ConfigError("the prompt is empty: give some text")
    room = MOST_TOKENS - len(before) - len(after)
    cut = len(ids) - room
    ids = [*before, *ids[:room], *after]
    names = [word_of(tok, i) for i in ids]
    maps, lens = look(model, ids)
    sections = [attention_section(maps, names)]
    if lens:
        sections.append(lens_section(lens, names, tok, causal=isinstance(model, Decoder)))
    sections.append(neighbour_section(model, ids, names, tok))
    note = f"; {cut:,} tokens more were left out" if cut > 0 else ""
    subtitle = f"{folder}, {len(ids)} tokens{note}: {prompt[:200]}"
    write_text(out, pages.page("What a model does with a prompt", subtitle, sections))
    say(f"{out}: attention, {'logit lens, ' if lens else ''}embedding neighbours{note}")


def ends(model: Network, tok: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the special tokens that a model's texts begin and end with."""
    if isinstance(model, Decoder):
        return [tok.bos_token_id], []
    if isinstance(model, Encoder):
        first, last = tok.frame_ids()
        return [first], [last]
    return [], []


def word_of(tok: Tokenizer, i: int) -> str:
    """Return a token as text, or by its name where it is silent or a part of a character."""
    text = tok.decode([i])
    return text if text and "\ufffd" not in text else str(tok.backend.id_to_token(i))


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` numbers below `count`, evenly spread, first and last among them."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(count, most))})


def attention_section(maps: Sequence[torch.Tensor], names: Sequence[str]) -> tuple[str, str]:
    """Draw the attention of some heads of some layers."""
    layers = spread(len(maps), MOST_LAYERS)
    heads = spread(len(maps[0]), MOST_HEADS)
    svg = heat_grid(
        [[maps[layer][head].numpy() for head in heads] for layer in layers],
        rows=[f"layer {layer}" for layer in layers],
        columns=[f"head {head}" for head in heads],
        words=names,
    )
    caption = (
        f"Each square: which token (across) a token (down) reads from; dark is 1. "
        f"{len(layers)} of {len(maps)} layers, {len(heads)} of {len(maps[0])} heads."
    )
    return pages.section("Attention", pages.picture(svg, caption))


def lens_section(
    lens: Sequence[torch.Tensor], names: Sequence[str], tok: Tokenizer, *, causal: bool
) -> tuple[str, str]:
    """Draw the likeliest word of every token behind every layer."""
    best = [probs_TV.max(-1) for probs_TV in lens]
    layers = spread(len(lens), 4 * MOST_LAYERS)
    probs_LT = torch.stack([best[layer].values for layer in layers]).cpu().numpy()
    ids_LT = [best[layer].indices.tolist() for layer in layers]
    svg = word_grid(
        [[word_of(tok, i) for i in ids_L] for ids_L in zip(*ids_LT, strict=True)],
        probs_LT.T,
        rows=names,
        columns=[f"layer {layer}" for layer in layers],
    )
    what = "next word" if causal else "word at this place"
    caption = (
        f"The likeliest {what} if the network ended behind a layer, shaded by its probability; "
        "the last column is the network's own answer."
    )
    return pages.section("Logit lens", pages.picture(svg, caption))


def neighbour_section(
    model: Network, ids: Sequence[int], names: Sequence[str], tok: Tokenizer
) -> tuple[str, str]:
    """Draw the tokens whose embeddings are nearest to each token's."""
    first = list({i: n for n, i in reversed(list(enumerate(ids)))}.values())
    places = sorted(first)
    cosines_TK, ids_TK = neighbours(model, [ids[n] for n in places], NEAREST)
    svg = word_grid(
        [[word_of(tok, i) for i in row] for row in ids_TK.tolist()],
        cosines_TK.cpu().numpy(),
        rows=[names[n] for n in places],
        columns=[f"nearest {k + 1}" for k in range(ids_TK.shape[1])],
    )
    caption = "The tokens whose embeddings are nearest, by cosine; dark is alike."
    return pages.section("Embedding neighbours", pages.picture(svg, caption))
