"""`groundup COMMAND ...`: a table of strings, so that `--help` imports no stage and no torch."""

import sys
import traceback
from collections.abc import Sequence

from groundup.core.errors import ConfigError, GroundupError, closest

# command: (what it does, "module:function" that takes the remaining arguments)
COMMANDS = {
    "quickstart": (
        "text on this machine to a model you can talk to",
        "groundup.cli.runs:quickstart",
    ),
    "run": ("run a recipe (YAML); finished stages are skipped", "groundup.cli.runs:run"),
    "data": ("build a corpus, report on it, encode it, plan mixtures", "groundup.cli.data:data"),
    "tokenizer": (
        "train, show, compare, convert, extend and trim tokenizers",
        "groundup.cli.tokenizers:tokenizer",
    ),
    "pretrain": ("train a model on a corpus", "groundup.cli.stages:pretrain"),
    "ngram": ("count an n-gram model: the baseline to beat", "groundup.cli.stages:ngram"),
    "ladder": ("three small runs foretell a large one", "groundup.cli.stages:ladder"),
    "finetune": ("teach a model from conversations", "groundup.cli.stages:finetune"),
    "align": ("teach a model preferences (DPO)", "groundup.cli.stages:align"),
    "evaluate": ("measure bits per byte of a model on text", "groundup.cli.stages:evaluate"),
    "compare": ("lay training runs over each other", "groundup.cli.runs:compare"),
    "classify": (
        "train and compare classifiers on labelled texts",
        "groundup.cli.stages:classify",
    ),
    "export": (
        "write a model as a Hugging Face folder or GGUF file; push it to the hub",
        "groundup.cli.models:export",
    ),
    "inspect": (
        "show what a model is and costs, and what it does with a prompt",
        "groundup.cli.models:inspect",
    ),
    "generate": ("continue prompts; --explain shows how", "groundup.cli.generating:generate"),
    "chat": ("talk to a model in the terminal", "groundup.cli.talk:chat"),
    "serve": ("serve a model: OpenAI's API and a chat page", "groundup.cli.talk:serve"),
}


TOGETHER = ("pretrain", "finetune", "align")  # may run in several processes (torchrun)


def help_text() -> str:
    """Return the overview that `groundup --help` prints."""
    lines = ["usage: groundup COMMAND ...", "", "Build a language model from the ground up.", ""]
    lines += [f"  {name:<11} {what}" for name, (what, _) in COMMANDS.items()]
    lines += [
        "",
        "`groundup COMMAND --help` shows its options. Start with `groundup quickstart`.",
        "--traceback shows where an error came from.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 2 for the user's fault, 1 for ours, 130 when interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in args
    args = [arg for arg in args if arg != "--traceback"]
    try:
        return dispatch(args)
    except GroundupError as err:
        if show_traceback:
            traceback.print_exc()
        print(f"groundup: {str(err).removeprefix('groundup ')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ngroundup: stopped; the same command continues from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except Exception:
        traceback.print_exc()
        print("groundup: this is a bug in groundup, not in your input", file=sys.stderr)
        return 1


def dispatch(args: list[str]) -> int:
    """Look the command up and call it with the remaining arguments."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if args[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"groundup {version('groundup')}")
        return 0
    if args[0] not in COMMANDS:
        raise ConfigError(f"unknown command {args[0]!r}{closest(args[0], COMMANDS)}")
    from groundup.core.device import process, sleep_beside_others
    from groundup.core.run import load_object

    if process()[1] > 1 and args[0] not in TOGETHER:
        raise ConfigError(
            f"groundup {args[0]} runs in one process: start it without torchrun "
            f"({', '.join(TOGETHER)} run in several)"
        )
    sleep_beside_others()
    load_object(COMMANDS[args[0]][1])(args[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
