"""`groundup generate`, `chat` and `serve`: what is done with a finished model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from groundup.cli.flags import Parser, parse, parser
from groundup.core import config as configs
from groundup.core.progress import say
from groundup.core.run import resolve_model
from groundup.core.types import Message, SamplingParams

SAMPLING_FLAGS: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "longest answer in tokens"),
    "temperature": (float, "0 is greedy"),
    "top_k": (int, "sample among the k likeliest tokens; 0: all"),
    "top_p": (float, "sample among the likeliest tokens that hold this mass"),
    "min_p": (float, "drop tokens below this share of the likeliest"),
    "repetition_penalty": (float, "above 1 makes repeating less likely"),
    "presence_penalty": (float, "subtracted once from every token already written"),
    "frequency_penalty": (float, "subtracted for every time a token was written"),
    "seed": (int, "seed of sampling"),
}


def model_flags(into: Parser) -> None:
    """Add MODEL, the device and the sampling parameters."""
    into.add_argument("model", metavar="MODEL", help="model folder or run folder")
    into.add_argument("--device", help="cpu, cuda or mps; unset: the best there is")
    for name, (kind, help_text) in SAMPLING_FLAGS.items():
        flag = "--" + name.replace("_", "-")
        into.add_argument(flag, type=kind, metavar="N", help=help_text)
    into.add_argument("--stop", nargs="+", metavar="TEXT", help="strings that end the answer")


def sampling(args: Any, **defaults: Any) -> SamplingParams:
    """Return the sampling parameters given on the command line, over `defaults`."""
    given = {name: getattr(args, name) for name in (*SAMPLING_FLAGS, "stop")}
    values = defaults | {name: value for name, value in given.items() if value is not None}
    return configs.load(SamplingParams, values, where="sampling")


def find_model(path: str) -> Path:
    """Resolve MODEL and say which folder was chosen."""
    folder = resolve_model(path)
    if folder != Path(path):
        say(f"model: {folder}")
    return folder


def generate(argv: Sequence[str]) -> None:
    """Print the continuation of one or more prompts."""
    flags = parser("generate", "Continue a prompt, or answer it with --chat.")
    model_flags(flags)
    flags.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="one or more")
    flags.add_argument("--chat", action="store_true", help="treat each prompt as a user's message")
    flags.add_argument("--n", type=int, help="answers for each prompt")
    flags.add_argument("--json", action="store_true", help="one JSON object a prompt")
    args = parse(flags, argv)
    params = sampling(args, **({"n": args.n} if args.n else {}))
    from groundup.generate import LLM

    llm = LLM(find_model(args.model), device=args.device)
    if args.chat:
        conversations: list[list[Message]] = [
            [{"role": "user", "content": prompt}] for prompt in args.prompt
        ]
        outputs = llm.chat(conversations, params)
    else:
        outputs = llm.generate(list(args.prompt), params)
    for prompt, output in zip(args.prompt, outputs, strict=True):
        if args.json:
            answers = [
                {"text": o.text, "finish_reason": o.finish_reason, "token_ids": o.token_ids}
                for o in output.outputs
            ]
            print(json.dumps({"prompt": prompt, "outputs": answers}, ensure_ascii=False))
        else:
            for answer in output.outputs:
                print(answer.text if args.chat else prompt + answer.text)


def chat(argv: Sequence[str]) -> None:
    """Talk to a model in the terminal."""
    flags = parser("chat", "Talk to a model in the terminal; --complete continues text instead.")
    model_flags(flags)
    flags.add_argument("--complete", action="store_true", help="continue text, without a chat")
    args = parse(flags, argv)
    params = sampling(args, temperature=0.7 if args.complete else 0.0)
    folder = find_model(args.model)
    from groundup.generate import LLM
    from groundup.serve import chat as talk
    from groundup.serve import read_card

    llm = LLM(folder, device=args.device)
    talk(llm, read_card(Path(args.model), folder), params, complete=args.complete)


def serve(argv: Sequence[str]) -> None:
    """Serve a model over HTTP."""
    flags = parser("serve", "OpenAI's chat and completion calls, and a chat page at /.")
    flags.add_argument("model", metavar="MODEL", help="model folder or run folder")
    flags.add_argument(
        "--host", default="127.0.0.1", help="address (default 127.0.0.1: this machine only)"
    )
    flags.add_argument("--port", type=int, default=8000, help="port (default 8000; 0: any)")
    flags.add_argument("--device", help="cpu, cuda or mps; unset: the best there is")
    flags.add_argument("--max-num-seqs", type=int, default=16, help="requests at a time")
    args = parse(flags, argv)
    folder = find_model(args.model)
    from groundup.generate import LLM
    from groundup.serve import model_name, read_card
    from groundup.serve import serve as run_server

    llm = LLM(folder, device=args.device, max_num_seqs=args.max_num_seqs)
    card = read_card(Path(args.model), folder)
    run_server(llm, model_name(args.model), card, host=args.host, port=args.port)
