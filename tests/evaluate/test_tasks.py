"""Log-likelihood tasks: forms, requests, scores, and networks beside transformers."""

import gzip
import json

import numpy as np
import pytest
import torch

from groundup.core.errors import DataError
from groundup.evaluate.tasks import encode_pair, read_task, run_task, score
from groundup.model.lm import NeuralLM
from inputs import real_data

ROWS = {
    "context": {"context": "a b", "continuation": " c"},
    "choices": {"query": "a", "choices": ["b", "cc", "d"], "gold": 1},
    "solutions": {"goal": "a", "sol1": "b", "sol2": "c", "label": 1},
    "contexts": {"context_options": ["a", "b"], "continuation": "c d", "gold": 0},
    "pair": {"sentence_good": "a b", "sentence_bad": "b a"},
}
REQUESTS = {
    "context": [("a b", " c")],
    "choices": [("a", " b"), ("a", " cc"), ("a", " d")],
    "solutions": [("a", " b"), ("a", " c")],
    "contexts": [("a", " c d"), ("b", " c d")],
    "pair": [("", "a b"), ("", "b a")],
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ROWS)
def test_forms_become_requests(form, tmp_path):
    [item] = read_task(write(tmp_path / "t.jsonl", [ROWS[form]])).items
    assert item.requests == REQUESTS[form]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "no known form"),
        ([1], "holds a list"),
        ({"query": "a", "choices": ["b", "c"]}, "right choice"),
        ({"query": "a", "choices": ["b", "c"], "gold": 2}, "is 2, of 2"),
        ({"goal": "a", "sol1": "b", "sol2": "c"}, "right choice"),
        ({"context": 3, "continuation": "b"}, "texts"),
    ],
)
def test_bad_rows_are_named(row, said, tmp_path):
    path = write(tmp_path / "t.jsonl", [ROWS["context"], row])
    with pytest.raises(DataError, match=rf"line 2.*{said}"):
        read_task(path)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_task(tmp_path / "none.jsonl")
    (tmp_path / "text.jsonl").write_text("{")
    (tmp_path / "fake.jsonl.gz").write_text("{}")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("text.jsonl", "fake.jsonl.gz", "empty.jsonl"):
        with pytest.raises(DataError, match=name):
            read_task(tmp_path / name)


def test_gzip_and_limit(tmp_path):
    rows = [{"context": f"{n}", "continuation": "x"} for n in range(50)]
    with gzip.open(tmp_path / "t.jsonl.gz", "wt") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
    task = read_task(tmp_path / "t.jsonl.gz", limit=7, seed=3)
    assert task.name == "t"
    assert len(task.items) == 7
    assert task.items == read_task(tmp_path / "t.jsonl.gz", limit=7, seed=3).items


def test_scores_by_hand(tmp_path):
    task = read_task(write(tmp_path / "t.jsonl", [ROWS["choices"], ROWS["choices"]]))
    # first: the right one is likeliest; second: only per character
    answers = [(-5.0, None), (-3.0, None), (-9.0, None), (-3.0, None), (-4.0, None), (-9.0, None)]
    found = score(task, answers)
    assert found["acc"] == 0.5
    assert found["acc_norm"] == 1.0
    assert found["chance"] == pytest.approx(1 / 3)
    one = read_task(write(tmp_path / "u.jsonl", [ROWS["context"]] * 2))
    found = score(one, [(-1.0, True), (-3.0, False)])
    assert (found["acc"], found["perplexity"]) == (0.5, pytest.approx(np.exp(2.0)))
    assert "acc" not in score(one, [(-1.0, None), (-3.0, None)])


def test_white_space_at_the_contexts_end_goes_with_the_continuation(tok):
    context, continuation = encode_pair(tok, "def alpha ", "beta")
    assert context == tok.encode("def alpha")
    assert [*context, *continuation] == tok.encode("def alpha beta")


def test_a_network_answers_as_transformers_does(tiny, tok, tmp_path):
    from transformers import AutoModelForCausalLM

    from groundup.model.hf import save_model

    save_model(tiny, tok, tmp_path / "model")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    texts = [("def alpha_beta", "(gamma):"), ("", "return omega"), ("return alpha " * 40, "- 3")]
    pairs = [encode_pair(tok, *text) for text in texts]
    found = NeuralLM(tiny, tok.eos_token_id, batch_tokens=64).loglikelihood(pairs)
    for (before, behind), (value, greedy) in zip(pairs, found, strict=True):
        ids = [*(before or [tok.eos_token_id]), *behind][-tiny.config.max_position_embeddings - 1 :]
        with torch.inference_mode():
            logits = peer(torch.tensor([ids[:-1]])).logits[0, -len(behind) :]
        wanted = torch.tensor(ids[-len(behind) :])
        logps = logits.log_softmax(-1).gather(-1, wanted[:, None]).sum()
        assert value == pytest.approx(float(logps), rel=1e-5)
        assert greedy == bool((logits.argmax(-1) == wanted).all())


def test_greedy_is_what_the_model_writes(tiny, tok):
    from groundup import LLM, SamplingParams

    ids = tok.encode("def alpha")
    [output] = LLM(tiny, tok).generate([ids], SamplingParams(temperature=0, max_tokens=5))
    written = output.outputs[0].token_ids
    lm = NeuralLM(tiny, tok.eos_token_id)
    assert lm.loglikelihood([(ids, written)])[0][1]
    assert not lm.loglikelihood([(ids, [*written[:-1], (written[-1] + 1) % 400])])[0][1]


def test_any_lm_answers(tok, tmp_path):
    class Short:
        """Every token costs one nat."""

        def token_logprobs(self, documents):
            return [-np.ones(len(document)) for document in documents]

    rows = [{"query": "a", "choices": ["value", "value value index"], "gold": 0}] * 3
    found = run_task(Short(), tok, read_task(write(tmp_path / "t.jsonl", rows)), quiet=True)
    assert found["acc"] == 1.0


def test_real_benchmarks_are_read():
    folder = real_data("llmfoundry-gauntlet")
    names = ("piqa", "lambada_openai", "winograd_wsc", "arc_easy")
    for name in names:
        [path] = folder.rglob(f"{name}.jsonl")
        assert len(read_task(path).items) > 250
    blimp = sorted(real_data("blimp").glob("*.jsonl.gz"))
    assert {len(read_task(path).items) for path in blimp[:3]} == {1000}
