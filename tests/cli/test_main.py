"""The command line: exit codes, one-line errors, help without torch."""

import json
import subprocess
import sys

import pytest

from groundup.cli.main import COMMANDS, main
from groundup.core.run import load_object


def test_help_imports_no_torch_and_no_stage():
    code = (
        "import sys; from groundup.cli.main import main; main(['--help']);"
        "heavy = {'torch', 'numpy', 'rich', 'pydantic', 'yaml'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_of_the_table_exists(command):
    assert callable(load_object(COMMANDS[command][1]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pretrian"], "did you mean 'pretrain'"),
        (["run", "no-such.yaml"], "no-such.yaml does not exist"),
        (["quickstart", "--budget", "0m"], "leaves no time to train"),
        (["quickstart", "--text", "no-such-folder"], "no-such-folder does not exist"),
        (["quickstart", "--budgte", "2m"], "unknown flag --budgte (did you mean '--budget'"),
        (["quickstart", "--set", "pretrain.stepz=3"], "unknown key 'stepz' (did you mean 'steps'"),
        (["data", "biuld"], "did you mean 'build'"),
        (["finetune", "nowhere", "--data", "x", "--out", "y"], "nowhere does not exist"),
        (["chat", "nowhere"], "nowhere does not exist"),
        (["generate", "nowhere"], "--prompt"),
    ],
)
def test_a_users_fault_is_one_line_and_exit_code_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    complaint = err[err.index("groundup: ") :]
    assert len(complaint.strip().splitlines()) <= 2
    left = [path for path in tmp_path.rglob("*") if path.name != "runs"]
    assert left == [], "something was left behind"


def test_print_recipe_is_the_shipped_file(capsys):
    assert main(["quickstart", "--print-recipe"]) == 0
    assert "stage: corpus" in capsys.readouterr().out


def test_a_bug_of_ours_is_exit_code_1(monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "boom", ("fails", "groundup.cli.main:no_such"))
    assert main(["boom"]) == 2
    monkeypatch.setattr("groundup.cli.main.dispatch", lambda args: 1 / 0)
    assert main([]) == 1
    assert "bug in groundup" in capsys.readouterr().err


def test_a_token_without_a_row_is_one_line(tiny, tok, text_folder, tmp_path, capsys):
    from groundup.model import save_model
    from groundup.tokenizer.surgery import extend

    model, out = str(tmp_path / "m"), str(tmp_path / "out")
    save_model(tiny, tok, tmp_path / "m")
    larger, _ = extend(tok, ["<one>", "<more>"], special=True)
    larger.save(tmp_path / "m")
    chats = tmp_path / "chats.jsonl"
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    chats.write_text(json.dumps({"messages": [question, answer]}) + "\n")
    for argv in (
        ["generate", model, "--prompt", "a"],
        ["finetune", model, "--data", str(chats), "--steps", "1", "--out", out],
        ["evaluate", model, "--data", str(text_folder)],
        ["inspect", model, "--prompt", "a"],
        ["export", model, "--format", "gguf", "--out", out],
    ):
        assert main(argv) == 2, argv
        err = capsys.readouterr().err
        assert "'<more>' has id" in err
        assert "and the embedding has" in err
