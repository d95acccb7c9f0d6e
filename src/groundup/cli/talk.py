"""`groundup chat` and `serve`: talking to a finished model."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundup.cli.flags import add_config, config_values, parse, parser
from groundup.cli.sampling import add_common, sampling
from groundup.core.progress import say
from groundup.core.run import resolve_model
from groundup.generate.config import EngineConfig

if TYPE_CHECKING:
    from groundup.generate import LLM


def find_model(path: str) -> Path:
    """Resolve MODEL and say which folder was chosen."""
    folder = resolve_model(path)
    if folder != Path(path):
        say(f"model: {folder}")
    return folder


def load_llm(folder: Path, **settings: Any) -> tuple["LLM", str]:
    """Return a folder's model behind an engine, and a line that says where, and after how long."""
    start = time.perf_counter()
    import torch  # noqa: F401 (timed: it takes longer than all the rest)

    imported = time.perf_counter()
    from groundup.generate import LLM

    llm = LLM(folder, **settings)
    done = time.perf_counter()
    seconds = f"{done - imported:.2f} s, after {imported - start:.2f} s of importing torch"
    return llm, f"{llm.engine.device}: ready in {seconds}"


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
    llm, line = load_llm(folder, device=args.device)
    from groundup.serve import chat as talk
    from groundup.serve import read_card

    say(line)
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
    add_config(flags, EngineConfig)
    args = parse(flags, argv)
    folder = find_model(args.model)
    llm, line = load_llm(folder, device=args.device, **config_values(args, EngineConfig))
    from groundup.serve import model_name, read_card
    from groundup.serve import serve as run_server

    say(line)
    card = read_card(Path(args.model), folder)
    run_server(llm, model_name(args.model), card, host=args.host, port=args.port)
