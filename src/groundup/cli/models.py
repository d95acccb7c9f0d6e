"""`groundup export` and `inspect`: a finished model leaves the house, or shows what it is."""

import json
from collections.abc import Sequence
from pathlib import Path

from groundup.cli.flags import parse, parser
from groundup.core.run import resolve_model


def export(argv: Sequence[str]) -> None:
    """Run `groundup export MODEL --format gguf --out FILE`."""
    flags = parser(
        "export",
        "Write a model as a Hugging Face folder with a model card, or as a GGUF file for "
        "llama.cpp; --push uploads it to the hub.",
    )
    flags.add_argument("model", metavar="MODEL", help="model folder, run folder or hub id")
    flags.add_argument(
        "--format", metavar="{hf,gguf}", help="unset: gguf where --out ends in .gguf, else hf"
    )
    flags.add_argument(
        "--dtype",
        metavar="TYPE",
        help="hf: f32 (default), f16, bf16, int8; gguf: f32, f16, q8_0 (f16)",
    )
    flags.add_argument("--out", type=Path, metavar="PATH", help="a folder, or a .gguf file")
    flags.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (5GB)"
    )
    flags.add_argument(
        "--pooling",
        metavar="KIND",
        help="an encoder's GGUF file embeds texts by mean, cls, last or none (as its folder says, "
        "or mean)",
    )
    flags.add_argument("--push", metavar="ORG/NAME", help="upload to the hub (needs HF_TOKEN)")
    flags.add_argument("--private", action="store_true", help="a new hub model is private")
    flags.add_argument("--json", action="store_true", help="print what was written as JSON")
    args = parse(flags, argv)
    from groundup.recipe.exporting import export_model

    written = export_model(
        args.model,
        resolve_model(args.model),
        format=args.format,
        dtype=args.dtype,
        out=args.out,
        max_shard_size=args.max_shard_size,
        pooling=args.pooling,
        push=args.push,
        private=args.private,
    )
    if args.json:
        print(json.dumps(written))


def inspect(argv: Sequence[str]) -> None:
    """Run `groundup inspect MODEL`."""
    flags = parser(
        "inspect",
        "What a model is and costs: its tree, parameters, FLOPs and bytes a token, memory to "
        "train and to serve; with --prompt, what it does with a text, as pictures.",
    )
    flags.add_argument("model", metavar="MODEL", help="model folder, run folder or hub id")
    flags.add_argument(
        "--lengths", type=int, nargs="+", metavar="N", help="tokens (a quarter and all it reads)"
    )
    flags.add_argument(
        "--batch-sizes", type=int, nargs="+", metavar="N", default=[1, 8], help="rows (1 and 8)"
    )
    flags.add_argument("--lora-r", type=int, default=0, metavar="N", help="train a LoRA adapter")
    flags.add_argument("--prompt", metavar="TEXT", help="draw what the model does with this text")
    flags.add_argument("--out", type=Path, metavar="FILE", help="the page (inspect.html)")
    flags.add_argument("--json", action="store_true", help="print everything as JSON")
    args = parse(flags, argv)
    from groundup.recipe import inspecting

    folder = resolve_model(args.model)
    facts = inspecting.facts(
        folder, lengths=args.lengths, batches=args.batch_sizes, lora_r=args.lora_r
    )
    if args.json:
        print(json.dumps(facts))
    else:
        inspecting.show(facts)
    if args.prompt is not None:
        inspecting.draw(folder, args.prompt, args.out or Path("inspect.html"))
