"""`groundup quickstart` and `groundup run`: recipes from the command line."""

import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from groundup.cli.flags import Parser, parse, parser
from groundup.core import config as configs
from groundup.core.progress import say


def recipe_flags(into: Parser) -> None:
    """Add the flags that every recipe run takes."""
    into.add_argument("--out", metavar="DIR", help="run folder (default: the recipe's)")
    into.add_argument("--budget", metavar="TIME", help="90s, 10m or 1h (default: the recipe's)")
    into.add_argument(
        "--set", metavar="STAGE.KEY=VALUE", action="append", default=[], help="change any setting"
    )
    into.add_argument("--dry-run", action="store_true", help="show which stages would run, and why")


def quickstart(argv: Sequence[str]) -> None:
    """Run the quickstart recipe on the installed Python's library or on the user's text."""
    flags = parser("quickstart", "From text on this machine to a model you can talk to.")
    flags.add_argument(
        "--text", nargs="+", metavar="PATH", help="own files or folders instead of Python's library"
    )
    flags.add_argument("--print-recipe", action="store_true", help="print the recipe and stop")
    recipe_flags(flags)
    args = parse(flags, argv)
    source = importlib.resources.files("groundup.recipe").joinpath("quickstart.yaml").read_text()
    if args.print_recipe:
        print(source, end="")
        return
    recipe = yaml.safe_load(source)
    if args.text:
        recipe["text"] = args.text
    finish(start(recipe, args, where="the quickstart recipe"), args.dry_run)


def run(argv: Sequence[str]) -> None:
    """Run a recipe file."""
    flags = parser("run", "Run a recipe; stages that are finished and unchanged are skipped.")
    flags.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file")
    recipe_flags(flags)
    args = parse(flags, argv)
    recipe = configs.read_yaml(args.recipe)
    finish(start(recipe, args, where=str(args.recipe)), args.dry_run)


def start(recipe: dict[str, Any], args: Any, *, where: str) -> Path:
    """Apply the flags to a recipe and run it; return the run folder."""
    from groundup.recipe.engine import override, run_recipe

    if args.out:
        recipe["out"] = args.out
    if args.budget:
        recipe["budget"] = args.budget
    return run_recipe(override(recipe, args.set), where=where, dry_run=args.dry_run)


def finish(out: Path, dry_run: bool) -> None:
    """Say what can be done with the run."""
    if dry_run or not (out / "report.html").exists():
        return
    say()
    say(f"Report:      {out / 'report.html'}")
    run, mine = quote(str(out)), quote(str(out.parent / "mine"))
    say(f"Talk to it:  groundup chat {run}")
    say(f"Serve it:    groundup serve {run}")
    say(f"Your text:   groundup quickstart --text FOLDER --out {mine}")


def compare(argv: Sequence[str]) -> None:
    """Lay training runs over each other."""
    flags = parser("compare", "Training runs beside each other: a table, and a page of curves.")
    flags.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run or stage folders, finished or not"
    )
    flags.add_argument(
        "--out", type=Path, default=Path("compare.html"), metavar="FILE", help="the page"
    )
    flags.add_argument("--json", action="store_true", help="print how the runs ended as JSON")
    args = parse(flags, argv)
    from groundup.recipe.comparing import compare as run_comparison

    found = run_comparison(args.runs, args.out)
    if args.json:
        print(json.dumps(found))
