"""Quality classifier and perplexity buckets: learned, saved, told apart, named when wrong."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest

from groundup.cli.main import main
from groundup.core.errors import DataError
from groundup.core.files import read_json
from groundup.core.types import SPLITS, Document
from groundup.data import read_corpus
from groundup.data.classifier import area_under_curve, pieces
from groundup.data.perplexity import Perplexity, bucket, perplexities, tercile_bounds
from groundup.data.scoring import QualityModel, train_quality
from groundup.data.steps import make_step
from inputs import WORDS, real_data

COMMON = ["the", "of", "and", "is"] * 3


def text(rng, words, count=60):
    return " ".join(str(word) for word in rng.choice(words, count))


def write_rows(file, texts, **more):
    rows = [{"text": t} | {key: values[n] for key, values in more.items()} for n, t in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def good_and_bad(rng, count):
    good = [text(rng, [*COMMON, "theorem", "cell", "history"]) for _ in range(count)]
    return good, [text(rng, [*COMMON, "casino", "buy", "click"]) for _ in range(count)]


def document(words):
    return Document(id="a", text=words, source="a")


def test_a_classifier_learns_what_is_good_and_survives_its_folder(tmp_path):
    good, bad = good_and_bad(np.random.default_rng(0), 60)
    model = train_quality([*good[:40], *bad[:20]], [1] * 40 + [0] * 20)
    model.save(tmp_path / "m")
    loaded = QualityModel.load(tmp_path / "m")
    log_probs = loaded.log_probs([*good[40:], *bad[20:]])
    assert (log_probs.argmax(1) == [1] * 20 + [0] * 40).all()
    assert np.allclose(np.exp(log_probs).sum(1), 1)
    assert np.allclose(log_probs, model.log_probs([*good[40:], *bad[20:]]), atol=1e-5)
    step = pickle.loads(pickle.dumps(make_step("quality", {"model": str(tmp_path / "m")})))
    assert 0.5 < step(document(good[50]), Counter()).meta["quality"] <= 1
    assert step(document(bad[30]), Counter()).startswith("low quality: 0.")


def test_scores_from_0_to_5_are_learned_and_cut_at_3(tmp_path, capsys):
    rng = np.random.default_rng(2)
    scores = rng.integers(0, 6, 400).tolist()
    texts = [text(rng, [*COMMON, *["theorem"] * s, *["casino"] * (5 - s)], 200) for s in scores]
    write_rows(tmp_path / "a.jsonl", enumerate(texts), score=scores)
    arguments = ["--scored", str(tmp_path / "a.jsonl"), "--held-out", "0.25", "--json"]
    assert main(["data", "classifier", *arguments, "--out", str(tmp_path / "m")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["held-out examples"] == 100
    assert found["correlation"] > 0.9
    assert found["mean absolute error"] < 0.6
    step = make_step("quality", {"model": str(tmp_path / "m")})
    kept = step(document(text(rng, [*COMMON, *["theorem"] * 5], 200)), Counter())
    assert kept.meta["quality"] > 4
    low = step(document(text(rng, [*COMMON, *["casino"] * 5], 200)), Counter())
    assert low.startswith("low quality: ")
    assert low.endswith(" of 5, 3 are needed")


def test_a_build_sorts_by_classifier_and_perplexity(tok, tmp_path, capsys):
    """The commands of a user: a classifier, an n-gram, its buckets, and a corpus by both."""
    rng = np.random.default_rng(3)
    good, bad = good_and_bad(rng, 150)
    for name, texts in (("good", good), ("bad", bad)):
        write_rows(tmp_path / f"{name}.jsonl", enumerate(texts))
    good, bad = good_and_bad(rng, 150)
    strange = ["zq xj vk ! 99 @@ zzz " + t for t in good[:50]]
    everything = enumerate([*good[50:], *bad, *strange])
    write_rows(tmp_path / "all.jsonl", everything, language=["en"] * 200 + ["de"] * 100)
    known = [np.array([*tok.encode(t), tok.eos_token_id]) for t in good]
    from groundup.model import NGram

    lm = NGram.train(known, vocab_size=tok.vocab_size, eos_token_id=tok.eos_token_id, order=3)
    lm.save(tmp_path / "ngram")
    tok.save(tmp_path / "tok")
    at = {name: str(tmp_path / name) for name in ("good.jsonl", "bad.jsonl", "all.jsonl")}
    quality, buckets = str(tmp_path / "quality"), str(tmp_path / "buckets")
    trained = ["--good", at["good.jsonl"], "--bad", at["bad.jsonl"], "--out", quality]
    assert main(["data", "classifier", *trained]) == 0
    assert read_json(tmp_path / "quality" / "quality.json")["area under the curve"] > 0.99
    judge = ["--ngram", str(tmp_path / "ngram"), "--tokenizer", str(tmp_path / "tok")]
    judge += ["--language", "en", "--out", buckets]
    assert main(["data", "buckets", at["all.jsonl"], *judge]) == 0
    build = ["data", "build", at["all.jsonl"], "--near-duplicates", "keep", "--steps", "tidy"]
    build += ["--classifier", quality, "--buckets", buckets]
    build += ["--settings", "quality.threshold=0", "perplexity.keep=[head, tail]"]
    assert main([*build, "--out", str(tmp_path / "c")]) == 0
    kept = [d for split in SPLITS for d in read_corpus(tmp_path / "c", split)]
    rows = {row["step"]: row for row in read_json(tmp_path / "c" / "stats.json")["steps"]}
    low, _ = read_json(tmp_path / "buckets" / "buckets.json")["bounds"]
    english = [d.meta for d in kept if d.meta["language"] == "en"]
    assert rows["perplexity"]["notes"]["no model of the language"] == 100
    assert rows["perplexity"]["reasons"] == {"perplexity in the middle": 200 - len(english)}
    assert {m["bucket"] for m in english} == {"head", "tail"}
    assert all((m["perplexity"] <= low) == (m["bucket"] == "head") for m in english)
    scores = [d.meta["quality"] for d in kept if "casino" in d.text]
    assert max(scores) < 0.5
    # another model would make another corpus: its content is an input
    assert main(["data", "classifier", *trained[:-1], quality + "2", "--held-out", "0"]) == 0
    build[build.index(quality)] += "2"
    assert main([*build, "--out", str(tmp_path / "c")]) == 2
    assert "the input classifier has other content" in capsys.readouterr().err


def test_faults_are_named_in_one_line(tok, tmp_path, capsys):
    with pytest.raises(DataError, match="give --classifier"):
        make_step("quality")(document("x"), Counter())
    with pytest.raises(DataError, match="is no quality classifier"):
        make_step("quality", {"model": str(tmp_path)})(document("x"), Counter())
    with pytest.raises(DataError, match="good and bad texts"):
        train_quality(["x"], [1])
    (tmp_path / "a.jsonl").write_text('{"text": "a b c", "score": 6}\n')
    rows = str(tmp_path / "a.jsonl")
    for arguments, message in (
        (["--good", rows], "give --good and --bad texts"),
        (["--scored", rows], "a.jsonl:1 has the score 6: every row needs"),
        (["--scored", rows, "--held-out", "1"], "held_out is 1.0: give a share"),
    ):
        assert main(["data", "classifier", *arguments, "--out", str(tmp_path / "m")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "m").exists()
    command = ["data", "build", rows, "--buckets", str(tmp_path), "--out", str(tmp_path / "c")]
    assert main(command) == 2
    assert "holds no buckets" in capsys.readouterr().err


def test_the_rest_of_a_real_article_is_better_than_a_real_menu(tmp_path):
    pair, crawl = real_data("cs336-data-fixtures"), real_data("dolma-pipeline")
    article = (pair / "high_quality_wiki_reference.txt").read_text()
    middle = article.index("\n", len(article) // 2)
    (tmp_path / "good.txt").write_text(article[:middle])
    command = ["data", "classifier", "--good", str(tmp_path / "good.txt"), "--bad"]
    command += [str(crawl / "multiple_files"), str(crawl / "warc")]
    assert main([*command, "--out", str(tmp_path / "m")]) == 0
    model = QualityModel.load(tmp_path / "m")
    good = [model.score(piece) for piece in pieces(article[middle:], 1000)]
    assert model.score((pair / "low_quality_cc.txt").read_text()) < 0.5 < np.median(good)


def test_pieces_are_the_whole_text_cut_between_words():
    words = text(np.random.default_rng(0), WORDS, 2000)
    found = list(pieces(words, 500))
    assert " ".join(found) == words
    assert max(map(len, found)) <= 750
    assert list(pieces("x" * 2000, 500)) == ["x" * 500] * 3 + ["x" * 500]
    assert list(pieces(" \n ", 500)) == []


def test_the_area_under_the_curve_is_that_of_all_pairs():
    rng = np.random.default_rng(1)
    scores, good = rng.integers(0, 9, 80).astype(float), rng.uniform(size=80) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in scores[good] for b in scores[~good]]
    assert area_under_curve(scores, good) == pytest.approx(np.mean(pairs))


def shout(found, counts):
    return "too loud" if found.text.isupper() else found


def test_a_step_of_ones_own_is_named_by_module_and_function():
    step = pickle.loads(pickle.dumps(make_step(f"{__name__}:shout")))
    assert step(document("LOUD"), Counter()) == "too loud"
    assert step(document("calm"), Counter()).text == "calm"


def test_buckets_are_terciles_of_the_models_perplexity(tok):
    from groundup.model import NGram

    rng = np.random.default_rng(1)
    known = [text(rng, WORDS) for _ in range(60)]
    ids = [np.array([*tok.encode(t), tok.eos_token_id]) for t in known]
    lm = NGram.train(ids, vocab_size=tok.vocab_size, eos_token_id=tok.eos_token_id, order=3)
    sample = [text(rng, WORDS) for _ in range(30)]
    bounds = tercile_bounds(lm, tok, sample)
    judge = Perplexity(lm, tok, bounds, keep=("head", "middle"))
    counts = Counter()
    results = [bucket(judge, document(t), counts) for t in sample]
    assert counts == {"bucket: head": 10, "bucket: middle": 10, "bucket: tail": 10}
    assert sum(str(found).startswith("perplexity in the tail: ") for found in results) == 10
    (strange,) = perplexities(lm, tok, ["zq xj vk ! 99 @@ zzz"])
    assert strange > bounds[1]
