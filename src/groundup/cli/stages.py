"""One command a stage: inputs positional, `--out` a folder, one flag a config field."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from groundup.cli.flags import Parser, add_config, config_values, parse, parser
from groundup.core import config as configs
from groundup.core.errors import ConfigError, closest
from groundup.core.progress import say
from groundup.core.run import resolve_model
from groundup.recipe.stages import STAGES
from groundup.recipe.together import run_on_ranks


def stage_command(
    prog: str,
    stage_name: str,
    argv: Sequence[str],
    *,
    positional: str | None = None,
    model: bool = False,
    more: str = "",
) -> None:
    """Parse the stage's config from flags and run it into --out; again: resumes or skips.

    `more` joins what the help says about the command.
    """
    stage = STAGES[stage_name]
    cls = stage.config_class()
    flags = parser(prog, f"{stage.help[0].upper()}{stage.help[1:]}.{more}")
    add_config(flags, cls, positional=positional)
    flags.add_argument("--out", required=True, type=Path, metavar="DIR", help="output folder")
    flags.add_argument("--json", action="store_true", help="print the summary as JSON")
    args = parse(flags, argv)
    values = config_values(args, cls)
    if model and positional:
        values[positional] = resolve_model(values[positional])
        say(f"model: {values[positional]}")
    config = configs.load(cls, values, where=f"groundup {prog}")
    record = run_on_ranks(stage, config, args.out)
    if not record:  # the first rank reports
        return
    if args.json:
        print(json.dumps(record["summary"]))
    else:
        say(f"{args.out}: done in {record['seconds']:.1f} s")


def subcommand(prog: str, argv: Sequence[str], choices: dict[str, str]) -> Sequence[str]:
    """Check the word after a command such as `data`; return the arguments behind it."""
    if not argv or argv[0] in ("-h", "--help"):
        print("\n".join(f"groundup {prog} {name}: {what}" for name, what in choices.items()))
        raise SystemExit(0)
    if argv[0] not in choices:
        raise ConfigError(f"groundup {prog}: unknown {argv[0]!r}{closest(argv[0], choices)}")
    return argv[1:]


def pretrain(argv: Sequence[str]) -> None:
    """Run `groundup pretrain CORPUS --tokenizer DIR --out DIR`."""
    more = " The same command again goes on where it was stopped. Start with --budget 10m."
    stage_command("pretrain", "pretrain", argv, positional="corpus", more=more)


def ngram(argv: Sequence[str]) -> None:
    """Run `groundup ngram CORPUS --tokenizer DIR --out DIR`."""
    stage_command("ngram", "ngram", argv, positional="corpus")


def ladder(argv: Sequence[str]) -> None:
    """Run `groundup ladder CORPUS --tokenizer DIR --budget 2h --out DIR`."""
    stage_command("ladder", "ladder", argv, positional="corpus")


# what `groundup finetune --task` may say: the stage that does it
FINETUNE_TASKS = {"chat": "finetune", "span": "reading"}


def finetune(argv: Sequence[str]) -> None:
    """Run `groundup finetune MODEL --data FILE [--task chat|span] --out DIR`."""
    words, task = list(argv), "chat"
    if "--task" in words:
        at = words.index("--task")
        task = words[at + 1] if at + 1 < len(words) else ""
        del words[at : at + 2]
    if task not in FINETUNE_TASKS:
        raise ConfigError(f"groundup finetune: --task {task!r}{closest(task, FINETUNE_TASKS)}")
    more = "" if task == "span" else " --task span reads questions: --task span --help."
    stage = FINETUNE_TASKS[task]
    stage_command("finetune", stage, words, positional="model", model=True, more=more)


def align(argv: Sequence[str]) -> None:
    """Run `groundup align MODEL --data FILE --out DIR`."""
    stage_command("align", "align", argv, positional="model", model=True)


def evaluate(argv: Sequence[str]) -> None:
    """Run `groundup evaluate MODEL --data FILE --tasks FILE`: bits per byte, and task scores.

    A file in SQuAD's form is answered by a model with a span head, and scored as SQuAD does.
    """
    args = parse(evaluation_flags(), argv)
    if not args.data and not args.tasks:
        raise ConfigError("groundup evaluate: give texts with --data, or tasks with --tasks")
    if args.limit is not None and not args.tasks:
        raise ConfigError("groundup evaluate: --limit needs --tasks, whose rows it counts")
    if (args.ngram and not args.data) or (args.out and not args.ngram):
        raise ConfigError("groundup evaluate: --out needs --ngram, and --ngram needs --data")
    from groundup.data.squad import is_squad
    from groundup.recipe.evaluation import evaluate_mixture, evaluate_tasks, evaluate_texts

    model = resolve_model(args.model)
    scores: dict[str, Any] = {}
    reading = args.data and all(is_squad(Path(path)) for path in args.data)
    if not reading and (args.max_length, args.doc_stride) != (None, None):
        raise ConfigError(
            "groundup evaluate: --max-length and --doc-stride are for questions in SQuAD's form"
        )
    if reading and args.ngram:
        raise ConfigError("groundup evaluate: an n-gram has no answers to questions: drop --ngram")
    if reading:
        from groundup.recipe.reading import evaluate_reading

        scores = evaluate_reading(
            model,
            args.data,
            max_length=args.max_length,
            doc_stride=args.doc_stride,
            device=args.device,
        )
    elif args.ngram:
        ngram = resolve_model(args.ngram)
        scores = evaluate_mixture(model, ngram, args.data, out=args.out, device=args.device)
    elif args.data:
        scores = evaluate_texts(model, args.data, device=args.device)
    if args.tasks:
        scores["tasks"] = evaluate_tasks(model, args.tasks, limit=args.limit, device=args.device)
    if args.json:
        print(json.dumps(scores))
        return
    for name, value in scores.items():
        if name == "low":
            print(f"{'95 % interval':<16} {value:,.4f} to {scores['high']:,.4f}")
        elif name != "high" and not isinstance(value, dict | list):
            shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
            print(f"{name:<16} {shown}")


def evaluation_flags() -> Parser:
    """Return the flags of `groundup evaluate`."""
    flags = parser("evaluate", "A model's bits per byte on texts, and its scores in tasks.")
    flags.add_argument("model", metavar="MODEL", help="model folder or run folder")
    flags.add_argument(
        "--data", nargs="+", metavar="PATH", help="files or folders; or SQuAD's .json"
    )
    flags.add_argument(
        "--tasks", nargs="+", type=Path, default=(), metavar="FILE", help="tasks as .jsonl(.gz)"
    )
    flags.add_argument(
        "--ngram", metavar="FOLDER", help="an n-gram: score it, and both interpolated, on --data"
    )
    flags.add_argument(
        "--out", type=Path, metavar="DIR", help="keep the mixture with --ngram as a model"
    )
    flags.add_argument("--limit", type=int, metavar="N", help="rows of a task; unset: all")
    flags.add_argument(
        "--max-length", type=int, metavar="N", help="tokens a window of a reader; unset: as trained"
    )
    flags.add_argument(
        "--doc-stride", type=int, metavar="N", help="tokens between windows; unset: as trained"
    )
    flags.add_argument("--device", help="cpu, cuda or mps; unset: the best there is")
    flags.add_argument("--json", action="store_true", help="print JSON")
    return flags


def classify(argv: Sequence[str]) -> None:
    """Run `groundup classify FILE --out DIR`."""
    stage_command("classify", "classify", argv, positional="data")
