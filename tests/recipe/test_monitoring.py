"""Scores while training, trackers, and runs laid over each other."""

import json
import re
from shutil import copytree, rmtree

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from groundup import LLM, Tokenizer, load_model
from groundup.cli.main import main
from groundup.core.metrics import MetricsLog
from groundup.data import open_shard, write_shards
from groundup.evaluate.tasks import read_task
from groundup.model.lm import NeuralLM
from groundup.recipe.configs import PretrainConfig
from groundup.recipe.evaluation import part_of
from groundup.recipe.monitoring import metric_names
from groundup.train.config import MEASURED

STEPS = 12


@pytest.fixture(scope="module")
def place(corpus, tok, tmp_path_factory):
    """Return a folder with a task, a tokenizer and two finished runs, one of them watched."""
    folder = tmp_path_factory.mktemp("monitoring")
    tok.save(folder / "tok")
    task = [{"query": "def alpha_beta", "choices": ["(gamma):", "zzz qq"], "gold": 0}] * 4
    for file in (folder / "names.jsonl", folder / "other" / "names.jsonl"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in task))
    pretrain(corpus, folder, "plain")
    watching = ["--tasks", str(folder / "names.jsonl"), "--report-to", "tensorboard"]
    pretrain(corpus, folder, "watched", *watching, "--eval-steps", "5", "--eval-tokens", "9000")
    return folder


def pretrain(corpus, folder, name, *more):
    shape = ["--hidden-size", "64", "--num-hidden-layers", "1", "--max-position-embeddings", "64"]
    budget = ["--steps", str(STEPS), "--batch-size", "2", "--out", str(folder / name)]
    tok = ["--tokenizer", str(folder / "tok")]
    return main(["pretrain", str(corpus), *tok, *shape, *budget, *more])


def test_scores_come_every_few_steps_and_at_the_end(place):
    rows = MetricsLog.read(place / "watched" / "evals.jsonl")
    assert [row["step"] for row in rows] == [5, 10, STEPS]
    assert [row["tokens"] for row in rows] == [128 * n for n in (5, 10, STEPS)]
    assert 0 <= rows[-1]["names_acc"] <= 1


def test_scores_are_printed_as_they_come_and_in_the_summary(place, corpus, capsys):
    assert pretrain(corpus, place, "told", "--eval-tokens", "900", "--json") == 0
    out, err = capsys.readouterr()
    [last] = [r for r in MetricsLog.read(place / "told" / "evals.jsonl") if r["step"] == STEPS]
    assert f"validation at step {STEPS}: bits_per_byte {last['bits_per_byte']:.3f}" in err
    found = json.loads(out)["metrics"]
    assert found["eval_bits_per_byte"] == last["bits_per_byte"]
    assert set(found) == {"loss", "bits_per_byte", "eval_bits_per_byte"}


def test_an_interval_takes_several_texts(place, text_folder, capsys):
    one, other = sorted(text_folder.iterdir())[:2]
    assert main(["evaluate", str(place / "plain"), "--data", str(one)]) == 0
    assert "interval" not in capsys.readouterr().out
    assert main(["evaluate", str(place / "plain"), "--data", str(one), str(other)]) == 0
    assert re.search(r"95 % interval +[\d.]+ to [\d.]+\n", capsys.readouterr().out)


def test_of_much_validation_text_a_part_is_scored(place, corpus, capsys):
    tok = Tokenizer.load(place / "tok")
    write_shards(corpus, tok, place / "parted")
    whole = open_shard(place / "parted", "validation")
    assert part_of(whole, len(whole.tokens), tok) is whole
    most = len(whole.tokens) // 2
    capsys.readouterr()
    part = part_of(whole, most, tok)
    assert f"{most:,} of {len(whole.tokens):,} tokens" in capsys.readouterr().err
    assert len(part.tokens) == part.offsets[-1] == most
    texts = {tok.decode(ids.tolist()) for ids in whole.documents()}
    found = [tok.decode(ids.tolist()) for ids in part.documents()]
    assert set(found[:-1]) <= texts
    assert any(text.startswith(found[-1]) for text in texts)  # the last may be cut
    texts = [tok.decode(ids[ids != tok.eos_token_id].tolist()) for ids in part.documents()]
    assert part.num_bytes == sum(len(text.encode()) for text in texts)


def test_the_names_of_all_that_is_measured_are_known_before(place, corpus):
    task = place / "names.jsonl"
    config = PretrainConfig(corpus=corpus, tokenizer=place / "tok", tasks=(task,))
    last = MetricsLog.read(place / "watched" / "metrics.jsonl")[-1]
    assert last.keys() == {"step", *MEASURED, *metric_names(config, [read_task(task)])}


def test_tokens_are_those_of_the_text(place, corpus, capsys):
    """Not padding, in whatever counts them; a resumed run goes on counting."""
    more = ["--packing-strategy", "bfd", "--max-position-embeddings", "256", "--eval-steps", "5"]
    assert pretrain(corpus, place, "packed", *more, "--checkpoint-every", "7") == 0
    place_of = place / "packed"
    [*whole] = MetricsLog.read(place_of / "evals.jsonl")
    counts = np.cumsum([row["tokens"] for row in MetricsLog.read(place_of / "metrics.jsonl")])
    assert counts[-1] < STEPS * 2 * 256
    assert [row["tokens"] for row in whole] == [counts[n - 1] for n in (5, 10, STEPS)]
    record = json.loads((place_of / "stage.json").read_text())
    assert record["summary"]["tokens"] == counts[-1]
    (place_of / "stage.json").rename(place / ".packed.partial.json")
    rmtree(place_of / "checkpoints" / f"step-{STEPS}")
    assert pretrain(corpus, place, "packed", *more, "--checkpoint-every", "7") == 0
    assert [row["tokens"] for row in MetricsLog.read(place_of / "evals.jsonl")] == [
        row["tokens"] for row in whole
    ]


def test_the_last_score_is_the_saved_models(place, corpus):
    folder = place / "watched"
    tok = Tokenizer.load(folder / "model")
    write_shards(corpus, tok, place / "shards")
    documents = open_shard(place / "shards", "validation").documents()
    nats = -sum(
        float(values.sum())
        for values in NeuralLM(load_model(folder / "model"), tok.eos_token_id).token_logprobs(
            documents
        )
    )
    num_bytes = sum(len(tok.decode(document[:-1].tolist()).encode()) for document in documents)
    assert sum(map(len, documents)) <= 9000  # every document was scored
    last = MetricsLog.read(folder / "evals.jsonl")[-1]
    assert last["bits_per_byte"] == pytest.approx(nats / np.log(2) / num_bytes, rel=1e-5)


def test_samples_are_the_saved_models(place, corpus, monkeypatch):
    """Of averaged weights too; what the engine made of earlier weights is forgotten."""
    said, generate = [], LLM.generate

    def listen(self, prompts, params):
        said.append((prompts, params, generate(self, prompts, params)))
        return said[-1][2]

    monkeypatch.setattr(LLM, "generate", listen)
    often = ["--sample-every-s", "0", "--ema-decay", "0.9", "--learning-rate", "0.05"]
    pretrain(corpus, place, "averaged", *often)
    assert len(said) == STEPS
    prompts, params, outputs = said[-1]
    again = generate(LLM(place / "averaged" / "model"), prompts, params)
    written = [[o.outputs[0].token_ids for o in found] for found in (outputs, again)]
    assert written[0] == written[1]


def test_watching_changes_nothing(place):
    losses = [
        [row["loss"] for row in MetricsLog.read(place / name / "metrics.jsonl")]
        for name in ("plain", "watched")
    ]
    assert losses[0] == losses[1]


def test_tensorboard_has_every_step(place):
    events = EventAccumulator(str(place / "watched" / "tensorboard"))
    events.Reload()
    losses = [row["loss"] for row in MetricsLog.read(place / "watched" / "metrics.jsonl")]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses, rel=1e-6)
    assert [event.step for event in events.Scalars("eval_bits_per_byte")] == [5, 10, STEPS]


@pytest.mark.slow
def test_wandb_offline(place, corpus, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    pretrain(corpus, place, "wandb", "--report-to", "wandb")
    (place / "wandb" / "stage.json").rename(place / "wandb" / "old.json")
    (place / ".wandb.partial.json").write_text((place / "wandb" / "old.json").read_text())
    pretrain(corpus, place, "wandb", "--report-to", "wandb", "--checkpoint-every", "7")
    [*files] = (place / "wandb").rglob("*.wandb")
    assert len({file.stem for file in files}) == 1
    assert len(files) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--report-to", "tensorbord"], "did you mean 'tensorboard'"),
        (["--tasks", "none.jsonl"], "does not exist"),
        (["--tasks", "names.jsonl", "--objective", "mlm"], "left to right"),
        (
            ["--metric-for-best-model", "eval_bits_per_byte", "--eval-steps", "70"],
            "let --eval-steps divide --checkpoint-every",
        ),
        (["--tasks", "names.jsonl", "other/names.jsonl"], "two tasks have one name"),
        (
            ["--metric-for-best-model", "eval_bits_per_bite"],
            "no step has 'eval_bits_per_bite' (did you mean 'eval_bits_per_byte'",
        ),
        (
            ["--metric-for-best-model", "eval_names_perplexity", "--tasks", "names.jsonl"],
            "did you mean 'eval_names_acc",
        ),
        (["--metric-for-best-model", "nll"], "choose from bits_per_byte, eval_bits_per_byte, grad"),
        (
            ["--metric-for-best-model", "eval_bits_per_byte", "--eval-tokens", "0"],
            "no validation text is scored",
        ),
    ],
)
def test_what_cannot_be_watched_is_refused(flags, said, place, corpus, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert pretrain(corpus, place, "bad", *flags) == 2
    assert said in capsys.readouterr().err
    assert not (place / "bad").exists()


def test_runs_beside_each_other(place, capsys):
    page = place / "compare.html"
    runs = [str(place / name) for name in ("plain", "watched")]
    main(["compare", *runs, "--out", str(page), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(runs)
    assert found[runs[1]]["validation bits per byte"]
    assert found[runs[0]]["steps"] == found[runs[1]]["steps"] == STEPS
    content = page.read_text()
    assert content.count("<svg") == 7  # loss twice, held out twice, rate, gradient, speed
    assert "Settings that differ" not in content  # watching is no setting


def test_a_run_that_breaks_off_keeps_what_its_message_names(place, corpus, capsys):
    rates = ["--learning-rate", "1e30", "--adam-learning-rate", "1e30"]
    assert pretrain(corpus, place, "broken", *rates) == 2
    assert str(place / "broken" / "bad_steps.jsonl") in capsys.readouterr().err
    [bad] = MetricsLog.read(place / "broken" / "bad_steps.jsonl")
    assert bad["documents"]


def test_a_context_shorter_than_a_sample_trains(place, corpus):
    assert pretrain(corpus, place, "short", "--max-position-embeddings", "8") == 0
    assert pretrain(corpus, place, "shortest", "--max-position-embeddings", "1") == 0


def test_every_checkpoint_is_scored_where_the_score_decides(place, corpus):
    best = ["--metric-for-best-model", "eval_bits_per_byte", "--checkpoint-every", "5"]
    pretrain(corpus, place, "best", *best, "--load-best-model-at-end")
    rows = MetricsLog.read(place / "best" / "evals.jsonl")
    assert [row["step"] for row in rows] == [5, 10, STEPS]


def test_steps_without_a_loss_or_a_norm_leave_gaps(place, capsys):
    """A step that was left out has no loss, one that overflowed in fp16 no norm."""
    copytree(place / "plain", place / "gaps")
    rows = MetricsLog.read(place / "gaps" / "metrics.jsonl")
    del rows[0]["grad_norm"], rows[3]["loss"], rows[3]["bits_per_byte"], rows[-1]["loss"]
    lines = [json.dumps(row) + "\n" for row in rows]
    (place / "gaps" / "metrics.jsonl").write_text("".join(lines))
    page = place / "gaps.html"
    main(["compare", str(place / "gaps"), "--out", str(page), "--json"])
    [found] = json.loads(capsys.readouterr().out).values()
    assert found["training bits per byte, last 5 %"]
    assert page.read_text().count("<svg") == 6  # loss twice, held out, rate, gradient, speed


def test_bits_per_byte_are_the_texts_alone(place, corpus, capsys):
    """Not what z-loss or a router adds; and an unfinished run has them too."""
    pretrain(corpus, place, "added", "--z-loss", "0.5", "--steps", "2")
    [row, *_] = MetricsLog.read(place / "added" / "metrics.jsonl")
    [plain, *_] = MetricsLog.read(place / "plain" / "metrics.jsonl")
    assert row["loss"] > plain["loss"] + 1
    assert row["bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=1e-5)
    (place / "added" / "stage.json").unlink()
    main(["compare", *(str(place / n) for n in ("plain", "added")), "--out", str(place / "p.html")])
    assert "losses of different kinds" not in capsys.readouterr().err


def test_runs_of_different_stages_beside_each_other(place, tmp_path, capsys):
    """Each has the loss of its kind, and settings that both stages have are told apart."""
    said = {"messages": [{"role": r, "content": "hi"} for r in ("user", "assistant")]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(said | {"split": "train"}) + "\n")
    tuned = ["--data", str(tmp_path / "chats.jsonl"), "--steps", "1", "--out", str(tmp_path / "t")]
    assert main(["finetune", str(place / "plain"), *tuned]) == 0
    page = tmp_path / "p.html"
    runs = [str(place / "plain"), str(tmp_path / "t")]
    assert main(["compare", *runs, "--out", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[runs[0]]["training bits per byte, last 5 %"]
    assert found[runs[1]]["training loss, last 5 %"]
    content = page.read_text()
    assert "batch_size" in content
    assert "hidden_size" not in content


def test_an_unfinished_run_can_be_compared(place, capsys):
    copytree(place / "plain", place / "cut")
    (place / "cut" / "stage.json").unlink()
    main(["compare", str(place / "cut"), "--out", str(place / "cut.html"), "--json"])
    [found] = json.loads(capsys.readouterr().out).values()
    assert found["finished"] is False
