"""An n-gram by commands: counted, evaluated, mixed with a network, sorted by, decoded from."""

import json

import numpy as np
import pytest
import torch

from groundup.cli.main import main
from groundup.core.types import SamplingParams
from groundup.generate import LLM
from groundup.generate.config import BeamSearchParams
from groundup.generate.statistical import NGramDecoder
from groundup.model import NGram, save_model
from groundup.model.loading import load_lm

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(corpus, tok, tmp_path_factory):
    home = tmp_path_factory.mktemp("statistical")
    tok.save(home / "tok")
    command = ["ngram", str(corpus), "--tokenizer", str(home / "tok"), "--order", "4"]
    assert main([*command, "--out", str(home / "ngram")]) == 0
    return home


@pytest.fixture
def network(folders, tok, tiny):
    tiny.lm_head.weight.data *= 0.1
    save_model(tiny, tok, folders / "network")
    return folders / "network"


def asked(capsys, *words):
    capsys.readouterr()
    assert main([*map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_prints_perplexity_as_kenlm_counts_it(folders, text_folder, tok, capsys):
    files = sorted(text_folder.iterdir())[:3]
    (folders / "odd.txt").write_text("strange things: \x07 and \x0e")
    files.append(folders / "odd.txt")
    found = asked(capsys, "evaluate", folders / "ngram", "--data", *files, "--json")
    model = NGram.load(folders / "ngram")
    ids = [np.array([*tok.encode(file.read_text()), tok.eos_token_id]) for file in files]
    logps = np.concatenate(model.token_logprobs(ids))
    known = np.concatenate([model.known(part) for part in ids])
    assert 0 < found["unseen_tokens"] == (~known).sum()
    assert found["perplexity"] == pytest.approx(np.exp(-logps.mean()))
    assert found["perplexity_without_unseen"] == pytest.approx(np.exp(-logps[known].mean()))
    size = sum(len(file.read_bytes()) for file in files)
    assert found["bits_per_byte"] == pytest.approx(-logps.sum() / np.log(2) / size)


def test_tasks_are_answered(folders, capsys):
    rows = [{"query": "def alpha", "choices": ["_beta", " 7 7 7"], "gold": 0}]
    (folders / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = asked(
        capsys, "evaluate", folders / "ngram", "--tasks", folders / "task.jsonl", "--json"
    )
    assert found["tasks"]["task"]["acc"] == 1


def test_a_mixture_is_a_model_that_gains(folders, network, text_folder, tok, capsys):
    files, out = sorted(text_folder.iterdir()), folders / "mixed"
    more = ["--data", *files[:8], "--ngram", folders / "ngram", "--out", out, "--json"]
    found = asked(capsys, "evaluate", network, *more)
    assert found["gain"]["low"] > 0
    scores = {name: found[name]["bits_per_byte"] for name in ("network", "ngram", "mixture")}
    assert scores["network"] - scores["mixture"] == pytest.approx(found["gain"]["bits_per_byte"])
    assert scores["mixture"] < scores["network"]
    again = asked(capsys, "evaluate", out, "--data", *files[8:10], "--json")
    alone = asked(capsys, "evaluate", network, "--data", *files[8:10], "--json")
    assert again["bits_per_byte"] < alone["bits_per_byte"]
    lm = load_lm(out, tok.eos_token_id)
    context = tok.encode("def alpha_beta")
    every = [np.array([*context, word]) for word in range(tok.vocab_size)]
    assert sum(np.exp(values[-1]) for values in lm.token_logprobs(every)) == pytest.approx(1)


def test_buckets_take_an_ngram_and_a_mixture(folders, network, text_folder, capsys):
    files = sorted(text_folder.iterdir())
    more = ["--ngram", folders / "ngram", "--out", folders / "m", "--json"]
    asked(capsys, "evaluate", network, "--data", *files[:4], *more)
    for kind in ("ngram", "m"):
        more = ["--ngram", folders / kind, "--tokenizer", folders / "tok"]
        found = asked(
            capsys, "data", "buckets", *files, *more, "--out", folders / f"b-{kind}", "--json"
        )
        low, high = found["bounds"]
        assert 1 < low < high
        build = ["data", "build", *files, "--buckets", folders / f"b-{kind}", "--json"]
        asked(capsys, *build, "--out", folders / f"sorted-{kind}")


def test_an_ngram_decodes_like_any_model(folders, tok):
    """Greedy is the likeliest token each time; batches, prefixes and beams change nothing."""
    model, llm = NGram.load(folders / "ngram"), LLM(folders / "ngram")
    prompts = ["def alpha", "def alpha_beta(", "    return", ""]
    outputs = llm.generate(prompts, GREEDY)
    for prompt, output in zip(prompts, outputs, strict=True):
        [beam] = llm.beam_search(prompt, BeamSearchParams(beam_width=1), GREEDY)
        for written in (output, beam):  # of equally likely tokens they may take different ones
            ids = [tok.eos_token_id, *tok.encode(prompt)]
            for token in written.outputs[0].token_ids:
                probs = model.next_probs(ids)
                assert probs[token] == pytest.approx(probs.max(), rel=1e-6)
                ids.append(token)
        [alone] = LLM(folders / "ngram", enable_prefix_caching=False).generate(prompt, GREEDY)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
    scored = llm.score("def alpha", ["_beta("])
    ids = np.array([*tok.encode("def alpha"), *tok.encode("_beta(")])
    [logps] = model.token_logprobs([ids])
    assert scored[0] == pytest.approx(logps[len(tok.encode("def alpha")) :].sum(), rel=1e-5)


def test_an_ngrams_logits_are_its_log_probabilities(folders, tok):
    model = NGram.load(folders / "ngram")
    decoder = NGramDecoder(model, tok.bos_token_id)
    ids = [tok.bos_token_id, *tok.encode("def alpha_beta(gamma)")]
    logits_TV = decoder(torch.tensor([ids]))[0]
    torch.testing.assert_close(logits_TV.logsumexp(-1), torch.zeros(len(ids)), atol=1e-5, rtol=0)
    [logps] = model.token_logprobs([np.array(ids[1:])])
    found = logits_TV[range(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(found.numpy(), logps, rtol=1e-5)


def test_faults_are_one_line(folders, network, tok, text_folder, capsys, tmp_path):
    files = [str(file) for file in sorted(text_folder.iterdir())[:2]]
    other = tok.__class__.train(["another text altogether " * 9], vocab_size=400)
    other.save(tmp_path / "other")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text((folders / "ngram/config.json").read_text())
    tok.save(tmp_path / "broken")
    ngram, net = str(folders / "ngram"), str(network)
    for words, message in (
        (["ngram", files[0], "--tokenizer", str(folders / "tok")], "is no corpus"),
        (["ngram", ngram, "--tokenizer", ngram, "--order", "0"], "is no corpus"),
        (["evaluate", str(tmp_path / "broken"), "--data", *files], "is damaged"),
        (["evaluate", net, "--data", files[0], "--ngram", ngram], "give two or more"),
        (["evaluate", net, "--data", *files, "--out", "x"], "--out needs --ngram"),
        (["evaluate", net, "--data", *files, "--ngram", net], "holds no n-gram model"),
        (["export", ngram], "this needs a network"),
        (["generate", ngram, "--prompt", "x", "--dola-layers", "low"], "no hidden states"),
    ):
        out = [] if words[0] in ("evaluate", "generate") else ["--out", str(tmp_path / "o")]
        assert main([*words, *out]) == 2, words
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in said, said
