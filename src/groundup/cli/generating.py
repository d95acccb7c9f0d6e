"""`groundup generate`: prompts given, in a file, or as JSONL; beams, speculation, explanations."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from groundup.cli.flags import Parser, add_config, config_values, parse, parser
from groundup.cli.sampling import add_all, sampling
from groundup.cli.talk import find_model, load_llm
from groundup.core.errors import ConfigError, DataError
from groundup.core.progress import say
from groundup.core.types import SamplingParams
from groundup.generate.config import EngineConfig

BEAM_FLAGS: dict[str, tuple[Any, str]] = {
    "length_penalty": (float, "scores are divided by length to this power (1)"),
    "early_stopping": (str, "false, true or never"),
    "num_beam_groups": (int, "groups that keep apart"),
    "diversity_penalty": (float, "taken from tokens that earlier groups chose"),
}
EARLY = {"true": True, "false": False}


def generate(argv: Sequence[str]) -> None:
    """Run `groundup generate MODEL --prompt TEXT | --prompts FILE | --data FILE --out FILE`."""
    args = parse(generate_flags(), argv)
    params = sampling(args)
    check_together(args)
    search, guesses = beams(args), speculation(args)
    folder = find_model(args.model)
    settings = config_values(args, EngineConfig)
    llm, line = load_llm(folder, device=args.device, speculative=guesses, **settings)
    adapter = load_adapters(llm, args)
    if args.data:
        from groundup.recipe.completions import complete_file

        say(line)
        summary = complete_file(
            llm, args.data, args.out, params, model=str(folder), adapter=adapter
        )
        if args.json:
            print(json.dumps(summary))
    elif args.explain:
        show_explanation(llm, args, params, search, adapter)
    else:
        answer(llm, args, params, search, adapter)
    if not args.data:
        say(line)  # behind the answers: what is wrong with them is one line
    if llm.engine.speculator and not args.explain:
        rate = llm.engine.speculator
        say(
            f"speculation: {rate.num_accepted_tokens:,} of {rate.num_draft_tokens:,} guesses "
            f"kept ({rate.acceptance_rate:.0%})"
        )


def check_together(args: Any) -> None:
    """Raise where flags exclude each other, so that none is passed over."""
    given = [name for name in ("prompt", "prompts", "data") if getattr(args, name)]
    if len(given) != 1:
        raise ConfigError("groundup generate: give one of --prompt, --prompts and --data")
    if bool(args.data) != bool(args.out):
        raise ConfigError("groundup generate: --data and --out go together")
    for name in ("explain", "beam_width", "chat") if args.data else ():
        if getattr(args, name):
            hint = ': give rows "messages"' if name == "chat" else ""
            raise ConfigError(f"--{name.replace('_', '-')} does not go with --data{hint}")
    if args.explain and (args.json or (args.beam_width is None and (args.n or args.best_of))):
        raise ConfigError(
            "--explain tells of one answer in words: leave out --json, --n, --best-of"
        )
    for name, what in (("beam_width", "beams"), ("penalty_alpha", "contrastive search")):
        if args.speculative and getattr(args, name):
            raise ConfigError(
                f"--speculative guesses for sampled and greedy answers, not for {what}"
            )


def load_adapters(llm: Any, args: Any) -> str | None:
    """Load the adapters given; return the name of the one for all prompts, if there is one."""
    for entry in args.lora_modules or ():
        name, _, folder = entry.partition("=")
        if not name or not folder:
            raise ConfigError(f"--lora-modules {entry!r}: write NAME=FOLDER")
        llm.load_adapter(name, folder)
    if args.adapter and args.adapter not in llm.engine.adapters:
        llm.load_adapter(args.adapter, args.adapter)
    return str(args.adapter) if args.adapter else None


def generate_flags() -> Parser:
    """Return the command's parser."""
    flags = parser("generate", "Continue prompts, or answer them with --chat.")
    flags.add_argument("model", metavar="MODEL", help="model folder or run folder")
    flags.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more prompts")
    flags.add_argument("--prompts", type=Path, metavar="FILE", help="a file of prompts, one a line")
    flags.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help='JSONL with "prompt" or "messages", and "params" and "adapter" of its own',
    )
    flags.add_argument("--out", type=Path, metavar="FILE", help="JSONL of answers to --data")
    flags.add_argument("--chat", action="store_true", help="treat each prompt as a user's message")
    flags.add_argument("--json", action="store_true", help="one JSON object a prompt")
    flags.add_argument(
        "--explain",
        nargs="?",
        const=Path("explained.html"),
        type=Path,
        metavar="FILE",
        help="print every step's candidates; write pictures to FILE (explained.html)",
    )
    flags.add_argument("--device", help="cpu, cuda or mps; unset: the best there is")
    flags.add_argument(
        "--lora-modules", nargs="+", metavar="NAME=FOLDER", help="LoRA adapters that rows may name"
    )
    flags.add_argument(
        "--adapter", metavar="NAME", help="adapter for all prompts: one of those, or a folder"
    )
    add_all(flags)
    search = flags.add_argument_group("beam search")
    search.add_argument("--beam-width", type=int, metavar="N", help="search with so many beams")
    for name, (kind, help_text) in BEAM_FLAGS.items():
        flag = "--" + name.replace("_", "-")
        search.add_argument(flag, type=kind, metavar="N", help=help_text)
    guesses = flags.add_argument_group("speculation")
    guesses.add_argument(
        "--speculative", metavar="HOW", help="guess ahead: lookup, draft:MODEL or ngram:FOLDER"
    )
    guesses.add_argument(
        "--num-speculative-tokens", type=int, default=8, metavar="N", help="guesses a step"
    )
    add_config(flags.add_argument_group("the engine"), EngineConfig)
    return flags


def speculation(args: Any) -> Any:
    """Return who guesses ahead, None where nobody does."""
    if args.speculative is None:
        return None
    from groundup.generate.config import SpeculativeConfig

    method, _, folder = args.speculative.partition(":")
    if method not in ("lookup", "draft", "ngram") or (method == "lookup") == bool(folder):
        raise ConfigError(
            f"--speculative {args.speculative!r}: write lookup, draft:MODEL or ngram:FOLDER"
        )
    return SpeculativeConfig(
        method=method,
        model=Path(folder) if folder else None,
        num_speculative_tokens=args.num_speculative_tokens,
    )


def beams(args: Any) -> Any:
    """Return how to search with beams, None where nobody asked to."""
    given = {name: getattr(args, name) for name in BEAM_FLAGS if getattr(args, name) is not None}
    if args.beam_width is None:
        if given:
            first = next(iter(given)).replace("_", "-")
            raise ConfigError(f"--{first} needs --beam-width")
        return None
    from groundup.generate.config import BeamSearchParams

    if "early_stopping" in given:
        given["early_stopping"] = EARLY.get(given["early_stopping"], given["early_stopping"])
    return BeamSearchParams(beam_width=args.beam_width, **given)


def prompts_of(args: Any) -> list[str]:
    """Return the prompts given on the command line or in a file, one a line."""
    if args.prompt:
        return list(args.prompt)
    try:
        lines = args.prompts.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"cannot read {args.prompts}: {err}") from err
    found = [line for line in lines if line.strip()]
    if not found:
        raise DataError(f"{args.prompts} holds no prompts: one a line is read")
    return found


def answer(llm: Any, args: Any, params: SamplingParams, search: Any, adapter: str | None) -> None:
    """Print the answers, each as soon as all before it are there."""
    from groundup.recipe.completions import answer_rows, as_json

    prompts = prompts_of(args)
    if len(prompts) > 1:
        llm.engine.prepare([], params)  # what is wrong for all of them is said once
    answers: Iterator[dict[str, Any]]
    if search is not None:
        ids = [prompt_ids(llm, args, prompt) for prompt in prompts]
        found = llm.beam_search(ids, search, params, adapter=adapter)
        answers = iter([{"outputs": [as_json(o) for o in output.outputs]} for output in found])
    elif args.chat:
        rows = [{"messages": as_message(p)} for p in prompts]
        answers = answer_rows(llm, rows, params, adapter=adapter)
    else:
        answers = answer_rows(llm, [{"prompt": p} for p in prompts], params, adapter=adapter)
    failed = []
    for number, (prompt, row) in enumerate(zip(prompts, answers, strict=True), start=1):
        outputs = row.get("outputs", [])
        errors = [str(o["stop_reason"]) for o in outputs if o["finish_reason"] == "error"]
        for error in [row["error"]] if "error" in row else errors:
            failed.append(f"prompt {number}: {error}" if len(prompts) > 1 else error)
        if args.json:
            shown = {"prompt": prompt} | {k: v for k, v in row.items() if k != "messages"}
            print(json.dumps(shown, ensure_ascii=False), flush=True)
        else:
            for output in outputs:
                print(output["text"] if args.chat else prompt + output["text"], flush=True)
    for complaint in failed[:-1]:
        say(complaint)
    if failed:
        raise ConfigError(failed[-1])


def as_message(prompt: str) -> list[dict[str, str]]:
    """Return a prompt as a conversation of one message."""
    return [{"role": "user", "content": prompt}]


def prompt_ids(llm: Any, args: Any, prompt: str) -> list[int]:
    """Return a prompt's ids, as text or as a user's message."""
    ids: list[int] = llm.chat_ids(as_message(prompt)) if args.chat else llm.encode(prompt)
    return ids


def show_explanation(
    llm: Any, args: Any, params: SamplingParams, search: Any, adapter: str | None
) -> None:
    """Print what every parameter did to every step, and write the page of pictures."""
    from groundup.generate.explain import explain

    prompts = prompts_of(args)
    if len(prompts) > 1:
        raise ConfigError("--explain takes one prompt")
    ids = prompt_ids(llm, args, prompts[0])
    for line in explain(llm, ids, params, search, adapter=adapter, out=args.explain):
        print(line)
    say(f"pictures: {args.explain}")
