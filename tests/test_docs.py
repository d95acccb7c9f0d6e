"""The documentation runs: every command and Python block, page by page, in order.

`<!-- not run: reason -->` before a block excludes it; what needs a finished run uses the
small one made here, under the README's name `runs/quickstart`.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: [^>]*-->\n)?```(bash|python)\n(.*?)```", re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a working directory with some text and a finished small run."""
    from inputs import python_file

    place = tmp_path_factory.mktemp("docs")
    (place / "texts").mkdir()
    for n in range(40):
        (place / "texts" / f"module_{n}.py").write_text(python_file(n))
    shutil.copytree(ROOT / "recipes", place / "recipes")
    command = (
        "groundup quickstart --text texts --budget 2m --set tokenizer.vocab_size=400 "
        "--set data.duplicate_similarity=0.95 --set preferences.sampled_prompts=10 "
        "--set evaluate.questions=16 --set evaluate.max_tokens=8 --set plan.pretrain_s=8 "
        "--set finetune.seconds=3 --set align.seconds=2 --set data.validation_fraction=0.2"
    )
    run(command, place)
    return place


def run(script, place):
    """Run a shell script; a failure shows what it printed."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", script], cwd=place, env=env, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page, folder):
    for excluded, language, body in BLOCK.findall(page.read_text()):
        if excluded:
            continue
        if language == "bash":
            run(body, folder)
        else:
            (folder / "block.py").write_text(body)
            run(f"{sys.executable} block.py", folder)
