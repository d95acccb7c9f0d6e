"""`groundup generate`: prompts, files, JSONL that survives a kill, explanations, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from groundup.cli.main import main
from groundup.model import save_model

CONTRASTIVE = ("--temperature", "0", "--penalty-alpha", "0.6", "--top-k", "3")


@pytest.fixture(scope="module")
def model(tok, tmp_path_factory):
    import torch

    from groundup.model import Decoder, ModelConfig

    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=tok.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=96,
        initializer_range=0.5,
        eos_token_id=tok.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("cli") / "model"
    save_model(Decoder(config), tok, folder)
    return folder


def run(capsys, *args):
    code = main(["generate", *map(str, args)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_in_place_in_a_file_and_as_rows_get_the_same_answers(model, tmp_path, capsys):
    prompts = ["def alpha(", "x = ", "return"]
    common = ("--temperature", "0", "--max-tokens", "8", "--device", "cpu")
    code, placed, _ = run(capsys, model, "--prompt", *prompts, *common, "--json")
    assert code == 0
    (tmp_path / "p.txt").write_text("\n\n".join(prompts) + "\n")
    _, filed, _ = run(capsys, model, "--prompts", tmp_path / "p.txt", *common, "--json")
    assert filed == placed
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    out = tmp_path / "out.jsonl"
    code, summary, _ = run(
        capsys, model, "--data", tmp_path / "in.jsonl", "--out", out, *common, "--json"
    )
    assert (code, json.loads(summary)["rows"]) == (0, 3)
    assert rows_of(out) == [json.loads(line) for line in placed.splitlines()]
    code, _, error = run(capsys, model, "--data", tmp_path / "in.jsonl", "--out", out, *common)
    assert code == 2
    assert "exists: choose another --out" in error


def test_rows_bring_parameters_and_a_bad_row_disturbs_no_other(model, tmp_path, capsys):
    rows = [
        {"prompt": "def alpha(", "id": "a"},
        {"prompt": "def alpha(", "params": {"temprature": 1}},
        {"text": "no prompt"},
        {"prompt": "word " * 200},
        {"messages": [{"role": "user", "content": "Hi"}], "params": {"max_tokens": 3}},
        {"prompt": "def alpha(", "params": {"stop": [1]}},
        {"messages": [{"role": "user"}]},
        {"messages": [5]},
        {"prompt": "half a pair: \ud83d"},
        {"prompt": "def alpha(", "params": {"bad_words": ["\ud83d"], "logit_bias": {"7": 99}}},
        {"prompt": "def alpha(", "adapter": "none"},
        {"prompt": "def alpha(", "params": {"seed": 10**30}},
        {"prompt": "def alpha("},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    code, _, _ = run(
        capsys, model, "--data", tmp_path / "in.jsonl", "--out", out, "--temperature", "0",
        "--max-tokens", "8", "--ignore-eos",
    )  # fmt: skip
    assert code == 0
    found = rows_of(out)
    assert found[0]["id"] == "a"
    assert len(found[0]["outputs"][0]["token_ids"]) == 8
    assert "unknown key 'temprature' (did you mean 'temperature'?)" in found[1]["error"]
    assert 'needs "prompt"' in found[2]["error"]
    assert "shorten it" in found[3]["error"]
    assert len(found[4]["outputs"][0]["token_ids"]) <= 3
    assert "stop" in found[5]["error"]
    assert all("error" in found[n] for n in (6, 7, 8, 10, 11))
    assert set(found[9]["outputs"][0]["token_ids"]) == {7}
    assert found[8]["prompt"] == rows[8]["prompt"]
    assert "no adapter 'none' is loaded" in found[10]["error"]
    assert found[12]["outputs"] == found[0]["outputs"]


@pytest.mark.slow
def test_a_killed_run_continues_where_it_was(model, tmp_path, capsys):
    rows = [{"prompt": f"value {n} = "} for n in range(60)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [str(model), "--data", str(tmp_path / "in.jsonl"), "--seed", "3", "--max-tokens", "12"]
    common += ["--device", "cpu", "--max-num-seqs", "2", "--ignore-eos"]
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert main(["generate", *common, "--out", str(whole)]) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "groundup.cli.main", "generate", *common, "--out", str(cut)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    partial = tmp_path / ".cut.jsonl.partial"
    while not (partial.exists() and partial.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = partial.read_bytes().count(b"\n")
    assert 5 <= done < 60
    assert not cut.exists()
    with open(partial, "ab") as handle:
        handle.write(b'{"prompt": "torn')
    changed = [*common[:4], "4", *common[5:]]
    assert main(["generate", *changed, "--out", str(cut)]) == 2
    assert "was begun with another params" in capsys.readouterr().err
    assert main(["generate", *common, "--out", str(cut)]) == 0
    assert f"{done} of 60 rows are there" in capsys.readouterr().err
    assert cut.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def test_an_answer_may_go_on_to_the_end_of_the_context(model, capsys):
    args = ("--prompt", "def alpha(", "--max-tokens", "none", "--ignore-eos", "--json")
    code, out, _ = run(capsys, model, *args)
    assert code == 0
    assert json.loads(out)["outputs"][0]["stop_reason"] == "context"


def test_constraints_beams_and_speculation_from_the_command_line(model, tmp_path, capsys):
    code, out, _ = run(capsys, model, "--prompt", "x", "--choice", "yes", "no", "--json")
    assert code == 0
    assert json.loads(out)["outputs"][0]["text"] in ("yes", "no")
    (tmp_path / "s.json").write_text('{"type": "array", "items": {"type": "null"}, "maxItems": 2}')
    code, out, _ = run(
        capsys, model, "--prompt", "x", "--json-schema", tmp_path / "s.json", "--json"
    )
    assert json.loads(json.loads(out)["outputs"][0]["text"]) in ([], [None], [None, None])
    args = ("--prompt", "def alpha(", "--max-tokens", "6", "--json")
    _, out, _ = run(capsys, model, *args, "--beam-width", "3", "--n", "2")
    scores = [output["score"] for output in json.loads(out)["outputs"]]
    assert scores == sorted(scores, reverse=True)
    _, plain, _ = run(capsys, model, *args, "--temperature", "0")
    _, guessed, told = run(capsys, model, *args, "--temperature", "0", "--speculative", "lookup")
    assert guessed == plain
    assert "guesses kept" in told


def test_explanations_tell_the_answer_that_would_be_given(model, tmp_path, capsys):
    args = ("--prompt", "def alpha(", "--max-tokens", "5", "--seed", "3", "--temperature", "0.7")
    args += ("--top-k", "4", "--repetition-penalty", "1.3")
    _, plain, _ = run(capsys, model, *args, "--json")
    page = tmp_path / "e.html"
    code, told, _ = run(capsys, model, *args, "--explain", page)
    assert code == 0
    answer = json.loads(plain)["outputs"][0]["text"]
    assert repr(answer) in told
    assert all(name in told for name in ("model", "repetition_penalty", "temperature", "top_k"))
    assert page.read_text().count("<svg") == 2
    code, told, _ = run(
        capsys, model, "--prompt", "def alpha(", "--max-tokens", "4", "--beam-width", "2",
        "--explain", page,
    )  # fmt: skip
    assert code == 0
    assert "kept" in told
    assert "tree of the beam search" in page.read_text()
    code, told, _ = run(
        capsys, model, "--prompt", "def alpha(", "--max-tokens", "20", "--temperature", "0",
        "--ignore-eos", "--speculative", "lookup", "--explain", page,
    )  # fmt: skip
    assert code == 0
    assert "Guesses, kept and rejected" in page.read_text()


def test_explaining_contrastive_search_shows_what_candidates_are_weighed_by(
    model, tmp_path, capsys
):
    args = ("--prompt", "def alpha(", "--max-tokens", "3", "--ignore-eos", *CONTRASTIVE)
    code, told, _ = run(capsys, model, *args, "--explain", tmp_path / "e.html")
    assert code == 0
    assert told.count("cosine    score") == 3
    for step in told.split("token ")[1:4]:
        weighed = re.findall(r"^  ([> ]) .* (-?\d\.\d{3})$", step, re.MULTILINE)
        assert [mark for mark, _ in weighed].count(">") == 1
        assert max((float(score), mark) for mark, score in weighed)[1] == ">"
        assert len(weighed) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "one of --prompt, --prompts and --data"),
        (("--prompt", "x", "--prompts", "f"), "one of --prompt, --prompts and --data"),
        (("--data", "f"), "--data and --out go together"),
        (("--prompt", "x", "--temperature", "-1"), "temperature = -1.0 must be 0"),
        (("--prompt", "x", "--top-p", "2"), "top_p = 2.0"),
        (("--prompt", "x", "--temprature", "1"), "did you mean '--temperature'"),
        (("--prompt", "x", "--max-tokens", "500"), "does not fit"),
        (("--prompt", "x " * 200), "shorten it"),
        (("--prompt", "x", "--regex", "(a"), "cannot be compiled"),
        (("--prompt", "x", "--logit-bias", "a=b"), "write ID=X"),
        (("--prompt", "x", "--speculative", "magic"), "write lookup, draft:MODEL"),
        (("--prompt", "x", "--speculative", "draft:nowhere"), "does not exist"),
        (("--prompt", "x", "--length-penalty", "2"), "--length-penalty needs --beam-width"),
        (("--prompt", "x", "--order", "sglang"), "order"),
        (("--prompt", "x", "--logits-processors", "nowhere:f"), "cannot import"),
        (
            ("--data", "f", "--out", "o", "--beam-width", "2"),
            "--beam-width does not go with --data",
        ),
        (("--data", "f", "--out", "o", "--explain"), "--explain does not go with --data"),
        (("--data", "f", "--out", "o", "--chat"), 'give rows "messages"'),
        (("--prompt", "x", "--explain", "--n", "3"), "--explain tells of one answer"),
        (("--prompt", "x", "--beam-width", "2", "--speculative", "lookup"), "not for beams"),
        (
            ("--prompt", "x", "--speculative", "lookup", *CONTRASTIVE),
            "not for contrastive search",
        ),
        (("--prompt", "x", "y", "z", "--choice", ""), "must be non-empty strings"),
        (("--prompt", "x", "--beam-width", "2", "--logprobs", "1"), "logprobs has no place"),
        (("--prompt", "x", "--json-schema", "types.jso"), "is no file"),
        (("--prompt", "x", "--repetition-detection", "0"), "repetition_detection"),
        (("--prompt", "x", "--lora-modules", "nowhere"), "write NAME=FOLDER"),
        (("--prompt", "x", "--adapter", "nowhere"), "nowhere"),
        (("--prompt", "x", "--block-size", "0"), "block_size = 0 must be at least 1"),
        (("--prompt", "x", "--block-size", "a"), "block_size = 'a'"),
        (("--prompts", "nowhere.txt"), "cannot read nowhere.txt"),
    ],
)
def test_bad_input_is_one_clear_line(model, capsys, args, message):
    code, _, error = run(capsys, model, *args)
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_number_out_of_range_is_said_without_waiting_for_torch():
    code = (
        "import sys; from groundup.cli.main import main; "
        "code = main(['generate', 'nowhere', '--prompt', 'x', '--top-p', '2']); "
        "sys.exit(code if 'torch' not in sys.modules else 'torch')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "top_p = 2.0 must be above 0 and at most 1" in done.stderr


def test_every_prompt_that_fails_is_named(model, capsys):
    args = ("--prompt", "x " * 200, "x", "y " * 300, "--max-tokens", "4", "--json")
    code, out, error = run(capsys, model, *args)
    assert code == 2
    assert [("error" in json.loads(line)) for line in out.splitlines()] == [True, False, True]
    assert "prompt 1: the prompt has" in error
    assert "prompt 3: the prompt has" in error


def test_prompts_are_split_at_line_ends_alone(model, tmp_path, capsys):
    prompts = ["a\u2028b", "c\x0cd", "e\x85f"]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    _, out, _ = run(capsys, model, "--prompts", tmp_path / "p.txt", "--max-tokens", "2", "--json")
    assert [json.loads(line)["prompt"] for line in out.split("\n") if line] == prompts


def test_a_long_schema_may_be_given_in_place(model, capsys):
    schema = json.dumps({"enum": ["yes"], "description": "a word " * 60})
    code, out, _ = run(capsys, model, "--prompt", "x", "--json-schema", schema, "--json")
    assert code == 0
    assert json.loads(json.loads(out)["outputs"][0]["text"]) == "yes"


def test_adapters_and_settings_of_the_engine(model, tmp_path, capsys):
    import torch

    from groundup.model import load_model
    from groundup.model.adapter import save_adapter
    from groundup.model.lora import LoraConfig, apply_lora

    adapted, config = load_model(model), LoraConfig(r=2)
    torch.manual_seed(2)
    apply_lora(adapted, config)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data += torch.randn_like(weight)
    save_adapter(adapted, config, "base", tmp_path / "low")
    common = ("--temperature", "0", "--max-tokens", "8", "--device", "cpu", "--ignore-eos")
    common += ("--batch-invariant", "--block-size", "8", "--max-num-batched-tokens", "64")

    def answers(*args):
        code, out, _ = run(capsys, model, *args, *common, "--json")
        assert code == 0
        return [json.loads(line)["outputs"] for line in out.splitlines()]

    [plain], [low] = (
        answers("--prompt", "x"),
        answers("--prompt", "x", "--adapter", tmp_path / "low"),
    )
    assert plain != low
    rows = [{"prompt": "x"}, {"prompt": "x", "adapter": "a"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ("--data", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    run(capsys, model, *files, *common, "--lora-modules", f"a={tmp_path / 'low'}")
    assert [row["outputs"] for row in rows_of(tmp_path / "out.jsonl")] == [plain, low]


def test_log_probabilities_of_the_prompt_are_given(model, capsys):
    args = ("--prompt", "def alpha(", "--max-tokens", "2", "--json", "--prompt-logprobs", "1")
    code, out, _ = run(capsys, model, *args)
    found = json.loads(out)["prompt_logprobs"]
    assert code == 0
    assert found[0] is None
    assert all(1 <= len(row) <= 2 for row in found[1:])


def test_explaining_an_answer_that_fails_says_so(model, tmp_path, capsys):
    (tmp_path / "own.py").write_text("def fails(prompt, written, logits_V):\n    return 1 / 0\n")
    args = ("--prompt", "x", "--explain", tmp_path / "e.html")
    named = f"{tmp_path / 'own.py'}:fails"
    code, _, error = run(capsys, model, *args, "--logits-processors", named)
    assert code == 2
    assert "logits processor fails: ZeroDivisionError" in error


def test_rows_behind_a_long_one_are_answered_meanwhile(model):
    from groundup.core.types import SamplingParams
    from groundup.generate import LLM
    from groundup.recipe.completions import answer_rows

    llm, steps = LLM(model, device="cpu", max_num_seqs=2), []
    step = llm.engine.step
    llm.engine.step = lambda: steps.append(1) or step()
    rows = [{"prompt": "x", "params": {"max_tokens": 80}}]
    rows += [{"prompt": f"y{n}", "params": {"max_tokens": 5}} for n in range(16)]
    found = list(answer_rows(llm, rows, SamplingParams(temperature=0, ignore_eos=True)))
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    assert len(steps) < 90  # the others' 80 tokens beside the first one's


def test_rows_that_nobody_waits_for_leave_the_engine(model):
    from groundup.core.types import SamplingParams
    from groundup.generate import LLM
    from groundup.recipe.completions import answer_rows

    llm = LLM(model, device="cpu", max_num_seqs=2)
    rows = [{"prompt": f"y{n}"} for n in range(6)]
    answers = answer_rows(llm, rows, SamplingParams(max_tokens=9, ignore_eos=True))
    next(answers)
    answers.close()
    assert not llm.engine.busy
