"""`groundup data build|classifier|buckets|report|shards|mix|cloze`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from groundup.cli.flags import parse, parser
from groundup.cli.stages import stage_command, subcommand
from groundup.core import config as configs
from groundup.core.progress import say

COMMANDS = {
    "build": "files and folders to a corpus: read, clean, deduplicate, split",
    "classifier": "good and bad texts, or scored ones, to a quality classifier for build",
    "buckets": "an n-gram and a sample to perplexity buckets for build (head, middle, tail)",
    "report": "a page on a corpus: the funnel, and examples of what each rule left out",
    "shards": "a corpus to memory-mapped token ids",
    "mix": "what a mixture (YAML) takes of each source in each phase of training",
    "cloze": "English text to questions about it in SQuAD's form, to train a reader on",
}


def data(argv: Sequence[str]) -> None:
    """Run the subcommand named first."""
    rest = subcommand("data", argv, COMMANDS)
    run: dict[str, Callable[[Sequence[str]], None]] = {
        "build": build,
        "classifier": classifier,
        "buckets": buckets,
        "report": report,
        "shards": shards,
        "mix": mix,
        "cloze": cloze,
    }
    run[argv[0]](rest)


def build(argv: Sequence[str]) -> None:
    """Run `groundup data build PATH... --out DIR`."""
    stage_command("data build", "corpus", argv, positional="paths")


def classifier(argv: Sequence[str]) -> None:
    """Run `groundup data classifier --good PATH... --bad PATH... --out DIR`."""
    stage_command("data classifier", "classifier", argv)


def buckets(argv: Sequence[str]) -> None:
    """Run `groundup data buckets PATH... --ngram DIR --tokenizer DIR --out DIR`."""
    stage_command("data buckets", "buckets", argv, positional="paths")


def report(argv: Sequence[str]) -> None:
    """Run `groundup data report CORPUS`."""
    flags = parser("data report", "A page on a corpus: what went in, came out, was left out.")
    flags.add_argument("corpus", metavar="CORPUS", type=Path, help="corpus folder")
    flags.add_argument("--out", type=Path, metavar="FILE", help="the page (CORPUS/report.html)")
    args = parse(flags, argv)
    from groundup.data.report import report_corpus

    say(f"{report_corpus(args.corpus, args.out)}: open it in a browser")


def shards(argv: Sequence[str]) -> None:
    """Run `groundup data shards CORPUS --tokenizer DIR --out DIR`."""
    stage_command("data shards", "shards", argv, positional="corpus")


def mix(argv: Sequence[str]) -> None:
    """Run `groundup data mix FILE`."""
    flags = parser("data mix", "What a mixture takes of each source in each phase of training.")
    flags.add_argument("recipe", metavar="FILE", type=Path, help="YAML: sources and phases")
    args = parse(flags, argv)
    from groundup.data.mix import MixConfig, read_lengths, show_mixture

    config = configs.load(MixConfig, configs.read_yaml(args.recipe), where=str(args.recipe))
    lengths = read_lengths(config)
    show_mixture(config, {name: int(found.sum()) for name, found in lengths.items()})


def cloze(argv: Sequence[str]) -> None:
    """Run `groundup data cloze PATH... --out DIR`."""
    stage_command("data cloze", "cloze", argv, positional="paths")
