"""`groundup tokenizer train|show|report|convert|extend|trim`."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from groundup.cli.flags import parse, parser
from groundup.cli.stages import stage_command, subcommand

COMMANDS = {
    "train": "corpora or files to a tokenizer",
    "show": "a text's tokens in colour, with their ids",
    "report": "compare tokenizers on files: a table, and a page with plots",
    "convert": "write a tokenizer of any format as a folder, .model, .tiktoken, .json or .txt",
    "extend": "add tokens; a model's embeddings follow",
    "trim": "keep the tokens that texts use; a model's embeddings follow",
}
TOKENIZER = "tokenizer folder or file, or a model folder"


def tokenizer(argv: Sequence[str]) -> None:
    """Run the subcommand named first."""
    rest = subcommand("tokenizer", argv, COMMANDS)
    run: dict[str, Callable[[Sequence[str]], None]] = {
        "train": train,
        "show": show,
        "report": report,
        "convert": convert,
        "extend": extend,
        "trim": trim,
    }
    run[argv[0]](rest)


def train(argv: Sequence[str]) -> None:
    """Run `groundup tokenizer train PATH... --out DIR`, on a corpus or on files."""
    stage_command("tokenizer train", "tokenizer", argv, positional="paths")


def show(argv: Sequence[str]) -> None:
    """Print a text's tokens in colour, and their ids."""
    flags = parser("tokenizer show", "A text's tokens in colour, with their ids.")
    flags.add_argument("text", metavar="TEXT", help="the text; - reads standard input")
    flags.add_argument("--tokenizer", required=True, metavar="PATH", help=TOKENIZER)
    flags.add_argument(
        "--allow-special", action="store_true", help="names of special tokens become these tokens"
    )
    flags.add_argument("--json", action="store_true", help="print ids and pieces as JSON")
    args = parse(flags, argv)
    from groundup.tokenizer import Tokenizer

    tok = Tokenizer.load(args.tokenizer)
    text = sys.stdin.read() if args.text == "-" else args.text
    ids = tok.encode(text, allow_special=args.allow_special)
    pieces = [tok.token_bytes[i].decode("utf-8", errors="backslashreplace") for i in ids]
    if args.json:
        print(json.dumps({"ids": ids, "pieces": pieces}, ensure_ascii=False))
        return
    print_tokens(ids, pieces)
    size = len(text.encode())
    print(f"{len(ids):,} tokens, {size:,} bytes: {size / max(1, len(ids)):.2f} bytes per token")


def print_tokens(ids: Sequence[int], pieces: Sequence[str]) -> None:
    """Print pieces on alternating grounds, and their ids on the same grounds."""
    from rich.console import Console
    from rich.text import Text

    grounds = ("black on #a8d5ff", "black on #ffd59e", "black on #b9e8c0", "black on #f4c2dc")
    signs = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})
    text, numbers = Text(), Text()
    for n, (i, piece) in enumerate(zip(ids, pieces, strict=True)):
        text.append(piece.translate(signs) or "∅", grounds[n % len(grounds)])
        text.append("\n" * piece.count("\n"))
        numbers.append(f" {i} ", grounds[n % len(grounds)])
        numbers.append(" ")
    console = Console(highlight=False)
    console.print(text)
    console.print(numbers)


def report(argv: Sequence[str]) -> None:
    """Compare tokenizers on files."""
    flags = parser("tokenizer report", "Compare tokenizers on files.")
    flags.add_argument("tokenizers", nargs="+", metavar="TOKENIZER", help=TOKENIZER)
    flags.add_argument("--data", required=True, nargs="+", metavar="PATH", help="files or folders")
    flags.add_argument(
        "--out", type=Path, default=Path("tokenizers.html"), metavar="FILE", help="the page"
    )
    args = parse(flags, argv)
    from groundup.recipe.tokenizers import report as compare

    compare(args.tokenizers, args.data, args.out)


def convert(argv: Sequence[str]) -> None:
    """Write a tokenizer in another format."""
    flags = parser("tokenizer convert", "Write a tokenizer in another format.")
    flags.add_argument("tokenizer", metavar="TOKENIZER", help=TOKENIZER)
    flags.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="PATH",
        help="a folder, or a file ending in .model, .tiktoken, .json (with merges.txt) or .txt",
    )
    args = parse(flags, argv)
    from groundup.recipe.tokenizers import convert as write

    write(args.tokenizer, args.out)


def extend(argv: Sequence[str]) -> None:
    """Add tokens."""
    flags = parser("tokenizer extend", "Add tokens; a model's embeddings follow.")
    flags.add_argument("tokenizer", metavar="TOKENIZER", help=TOKENIZER)
    flags.add_argument("--tokens", required=True, nargs="+", metavar="TEXT", help="new tokens")
    flags.add_argument("--special", action="store_true", help="only templates may write them")
    flags.add_argument("--out", required=True, type=Path, metavar="DIR", help="output folder")
    args = parse(flags, argv)
    from groundup.recipe.tokenizers import change_vocabulary

    change_vocabulary(
        args.tokenizer, args.out, add=args.tokens, special=args.special, texts=(), least=1
    )


def trim(argv: Sequence[str]) -> None:
    """Keep the tokens that texts use."""
    flags = parser("tokenizer trim", "Keep the tokens that texts use; embeddings follow.")
    flags.add_argument("tokenizer", metavar="TOKENIZER", help=TOKENIZER)
    flags.add_argument("--data", required=True, nargs="+", metavar="PATH", help="files or folders")
    flags.add_argument("--min-count", type=int, default=1, metavar="N", help="uses that keep one")
    flags.add_argument("--out", required=True, type=Path, metavar="DIR", help="output folder")
    args = parse(flags, argv)
    from groundup.recipe.tokenizers import change_vocabulary

    change_vocabulary(
        args.tokenizer, args.out, add=(), special=False, texts=args.data, least=args.min_count
    )
