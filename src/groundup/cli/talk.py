"""`groundup chat` and `serve`: talking to a finished model."""

from collections.abc import Sequence
from pathlib import Path

from groundup.cli.flags import parse, parser
from groundup.cli.sampling import add_common, sampling
from groundup.core.progress import say
from groundup.core.run import resolve_model


def find_model(path: str) -> Path:
    """Resolve MODEL and say which folder was chosen."""
    folder = resolve_model(path)
    if folder != Path(path):
        say(f"model: {folder}")
    return folder


def chat(argv: Sequence[str]) -> None:
    """Talk to a model in the terminal."""
    flags = parser("chat", "Talk to a model in the terminal; --complete continues text instead.")
    flags.add_argument("model", metavar="MODEL", help="model folder or run folder")
    flags.add_argument("--device", help="cpu, cuda or mps; unset: the best there is")
    add_common(flags)
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
