"""The whole quickstart, small: runs, skips, and ends the same when it is killed on the way."""

import html
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import transformers

from groundup.cli.main import main

SMALL = [
    "--set",
    "tokenizer.vocab_size=400",
    "--set",
    "preferences.sampled_prompts=10",
    "--set",
    "evaluate.questions=16",
    "--set",
    "evaluate.max_tokens=8",
    "--set",
    "preferences.max_tokens=8",
    "--set",
    "data.duplicate_similarity=0.95",
    "--set",
    "data.validation_fraction=0.2",
]
FIXED = {  # a plan as a slow machine would have written it, so that runs can be compared
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 128,
    "context": 256,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "steps": 20,
    "learning_rate": 0.02,
    "adam_learning_rate": 0.003,
    "weight_decay": 0.0,
    "context_warmup_fraction": 0.5,
    "dtype": "fp32",
    "compile": False,
    "tokens_per_s": 20000.0,
    "device": "cpu",
    "reasons": {"steps": "fixed"},
}


def arguments(text_folder, out):
    fixed = [
        "--set",
        "finetune.checkpoint_every=5",
        "--set",
        "pretrain.checkpoint_every=5",
        "--set",
        "align.checkpoint_every=3",
        "--set",
        "finetune.steps=12",
        "--set",
        "finetune.seconds=null",
        "--set",
        "align.seconds=null",
        "--set",
        "align.steps=8",
        "--set",
        f"pretrain.plan={text_folder.parent / 'plan.json'}",
        "--set",
        f"finetune.plan={text_folder.parent / 'plan.json'}",
        "--set",
        f"align.plan={text_folder.parent / 'plan.json'}",
    ]
    return ["quickstart", "--text", str(text_folder), "--out", str(out), *SMALL, *fixed]


@pytest.fixture(scope="module")
def finished(text_folder, tmp_path_factory):
    (text_folder.parent / "plan.json").write_text(json.dumps(FIXED))
    out = tmp_path_factory.mktemp("runs") / "the whole"
    assert main(arguments(text_folder, out)) == 0
    return out


def weights(out):
    return {
        stage: (out / stage / "model" / "model.safetensors").read_bytes()
        for stage in ("pretrain", "finetune", "align")
    }


def test_every_stage_is_finished_and_the_report_is_one_file(finished):
    report = (finished / "report.html").read_text()
    assert "Three models" in report
    assert "<script" not in report
    assert f"groundup serve '{finished}'\n" in html.unescape(report)
    for stage in ["data", "pretrain", "align", "evaluate", "report"]:
        record = json.loads((finished / stage / "stage.json").read_text())
        assert record["seconds"] > 0
        assert record["peak_memory_bytes"] > 0
    metrics = json.loads((finished / "evaluate" / "metrics.json").read_text())
    three = metrics["bits_per_byte"]
    assert three["mixture"]["bits_per_byte"] < three["network"]["bits_per_byte"]
    kept = metrics["text_kept"]  # the validation text is short: all of it
    assert kept["base"] == pytest.approx(three["network"]["bits_per_byte"], rel=1e-3)
    assert len(set(kept.values())) == 3


def test_transformers_opens_every_model_with_the_same_template(finished):
    from groundup.tokenizer import Tokenizer

    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    folders = [finished / stage / "model" for stage in ("pretrain", "finetune", "align")]
    folders += sorted((finished / "pretrain" / "checkpoints").glob("step-*"))
    assert len(folders) >= 4
    for folder in folders:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours = Tokenizer.load(folder).render(chat)
        found = theirs.apply_chat_template(chat, tokenize=True, return_dict=True)
        assert found["input_ids"] == ours.ids


def test_again_it_skips_everything(finished, text_folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("stage.json")}
    assert main(arguments(text_folder, finished)) == 0
    assert capsys.readouterr().err.count("skipped: config and inputs are unchanged") == 12
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("stage.json")}


def test_the_commands_of_the_readme_work_on_a_run(finished, capsys):
    assert main(["generate", str(finished), "--prompt", "def ", "--max-tokens", "5", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["outputs"][0]["token_ids"]) <= 5
    data = str(finished / "data" / "validation.parquet")
    assert main(["evaluate", str(finished), "--data", data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_random_moments_it_ends_the_same(finished, text_folder, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "groundup.cli.main", *arguments(text_folder, out)]
    rng = random.Random(4)
    kills = 0
    for _ in range(10):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
        )
        time.sleep(rng.uniform(2, 14))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        for folder in out.rglob("model"):
            assert (folder / "config.json").exists(), "a model folder is half-written"
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert kills >= 1
    assert weights(out) == weights(finished)
    wanted = json.loads((finished / "evaluate" / "metrics.json").read_text())
    assert json.loads((out / "evaluate" / "metrics.json").read_text()) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["char", "word", "wordpiece", "unigram", "sentencepiece-bpe"])
def test_every_kind_of_tokenizer_goes_through_by_one_word(finished, text_folder, tmp_path, kind):
    assert finished
    size = ["--set", "tokenizer.vocab_size=600"]
    args = [*arguments(text_folder, tmp_path / "run"), *size, "--set", f"tokenizer.kind={kind}"]
    assert main(args) == 0
    folder = tmp_path / "run" / "align" / "model"
    assert transformers.AutoTokenizer.from_pretrained(folder)("def alpha")["input_ids"]
