"""Masked words, pairs of segments, fill-in-the-middle: what batches hold, that they learn."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from groundup.cli.main import main
from groundup.core.errors import DataError
from groundup.model.loss import IGNORE
from groundup.tokenizer import Tokenizer
from groundup.train import MaskedPairs, MiddleStream, MiddleTokens
from groundup.train.masked import DOES_NOT_FOLLOW, FOLLOWS
from groundup.train.middle import joined, parts_of

CLS, SEP, MASK, PAD, EOS, V = 1, 2, 3, 0, 4, 1000
SENTINELS = MiddleTokens(prefix=900, middle=901, suffix=902)


@pytest.fixture(scope="module")
def text():
    """Return documents whose tokens count up, so that a follow-up shows."""
    rng = np.random.default_rng(0)
    documents = [
        np.append(10 + (np.arange(n) + start) % 800, EOS)
        for n, start in zip(rng.integers(20, 200, 40), rng.integers(0, 800, 40), strict=True)
    ]
    offsets = np.cumsum([0, *map(len, documents)])
    return np.concatenate(documents).astype(np.uint16), offsets


def source(text, pairs="nsp", batch_size=16, **options):
    return MaskedPairs(
        *text,
        pairs=pairs,
        context=48,
        batch_size=batch_size,
        gradient_accumulation_steps=1,
        seed=7,
        cls_token_id=CLS,
        sep_token_id=SEP,
        mask_token_id=MASK,
        pad_token_id=PAD,
        vocab_size=V,
        **options,
    )


def rows(text, count=400, **options):
    made = source(text, batch_size=count, **options)
    [batch] = made.next_step()
    return batch


def test_masking_is_80_10_10_of_15_percent(text):
    batch = rows(text, 600, pairs="none")
    original = torch.where(batch["targets"] == IGNORE, batch["ids"], batch["targets"])
    chosen = batch["targets"] != IGNORE
    words = (batch["mask"] == 1) & (original != CLS) & (original != SEP)
    assert not (chosen & ~words).any()
    assert 0.14 < float(chosen.sum() / words.sum()) < 0.16
    seen, wanted = batch["ids"][chosen], batch["targets"][chosen]
    assert 0.78 < float((seen == MASK).float().mean()) < 0.82
    assert 0.085 < float((seen == wanted).float().mean()) < 0.115
    assert (batch["ids"][:, 0] == CLS).all()


@pytest.mark.parametrize("pairs", ["nsp", "sop"])
def test_half_of_the_pairs_follow(text, pairs):
    batch = rows(text, pairs=pairs)
    assert 0.42 < float(batch["label"].float().mean()) < 0.58
    original = torch.where(batch["targets"] == IGNORE, batch["ids"], batch["targets"])
    strangers = 0
    for ids, types, mask, label in zip(
        original, batch["types"], batch["mask"], batch["label"], strict=True
    ):
        length = int(mask.sum())
        ends = (ids[:length] == SEP).nonzero().squeeze(-1).tolist()
        assert len(ends) == 2
        assert ends[1] == length - 1
        assert types[: ends[0] + 1].sum() == 0
        assert (types[ends[0] + 1 : length] == 1).all()
        last, first = int(ids[ends[0] - 1]), int(ids[ends[0] + 1])
        after = 10 + (last - 10 + 1) % 800
        assert label in (FOLLOWS, DOES_NOT_FOLLOW)
        strangers += int(label == DOES_NOT_FOLLOW and first != after)
        if label == FOLLOWS:
            assert first == after
        elif pairs == "sop":
            assert 10 + (int(ids[length - 2]) - 10 + 1) % 800 == int(ids[1])
    assert strangers > 0.97 * int((batch["label"] == DOES_NOT_FOLLOW).sum())


def test_whole_words_are_masked_whole(text):
    starts = np.arange(V) % 3 == 0
    batch = rows(text, 100, pairs="none", word_starts=starts)
    chosen = batch["targets"] != IGNORE
    original = torch.where(chosen, batch["targets"], batch["ids"])
    inside = (~torch.from_numpy(starts)[original]) & (original >= 10)
    follows_text = original.roll(1, 1) >= 10
    assert (chosen == chosen.roll(1, 1))[inside & follows_text].all()


def test_batches_depend_on_seed_and_position_alone(text):
    one, two = source(text), source(text)
    for _ in range(3):
        one.next_step()
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    [first], [second] = one.next_step(), two.next_step()
    for name in ("documents", "tokens"):
        assert first.pop(name) == second.pop(name)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_too_little_text_says_so():
    with pytest.raises(DataError, match="too few documents of 4 tokens"):
        source((np.array([9, 9, EOS], np.uint16), np.array([0, 3])))


def restored(tokens):
    """Return the text of a rearranged document, from its sentinels."""
    tokens = tokens.tolist()
    if SENTINELS.prefix not in tokens:
        return tokens
    pre, mid, suf = (tokens.index(i) for i in (900, 901, 902))
    if suf == pre + 1:  # SPM: suffix, then prefix and middle joined
        return tokens[mid + 1 :] + tokens[suf + 1 : mid]
    return tokens[pre + 1 : suf] + tokens[mid + 1 :] + tokens[suf + 1 : mid]


def test_rearranged_documents_hold_the_same_text():
    text = np.arange(10, 30)
    for spm in (False, True):
        for cuts in ((0, 0), (0, 20), (5, 12), (20, 20)):
            parts = parts_of(text, cuts, SENTINELS, spm=spm)
            made = np.concatenate(parts)
            assert len(made) == len(text) + 3
            assert restored(made) == text.tolist()
            for start, stop in ((0, 23), (0, 1), (4, 19), (22, 23), (7, 7)):
                assert joined(parts, start, stop).tolist() == made[start:stop].tolist()


@pytest.mark.parametrize("level", ["document", "context"])
def test_no_token_is_lost_in_the_middle(text, level):
    stream = MiddleStream(
        *text,
        sentinels=SENTINELS,
        rate=0.6,
        level=level,
        eos_token_id=EOS,
        context=64,
        batch_size=1,
        gradient_accumulation_steps=1,
        seed=3,
    )
    targets = []
    for _ in range(stream.rows_per_epoch):
        ids, wanted = stream.next_row()
        both = (wanted[:-1] != IGNORE) & (wanted[1:] != IGNORE)
        assert (ids[1:] == wanted[:-1])[both].all()
        targets += wanted[wanted != IGNORE].tolist()
    sentinels = [token for token in targets if token >= 900]
    assert len(sentinels) > 20
    assert sorted(token for token in targets if token < 900) == sorted(text[0].tolist())
    if level == "document":
        originals = np.split(text[0], text[1][1:-1])
        now = documents(stream)
        assert [restored(document[:-1]) for document in now] == [o[:-1].tolist() for o in originals]
        stream.next_row()
        later = documents(stream)  # another epoch, other cuts, of other documents
        assert any(a.tolist() != b.tolist() for a, b in zip(now, later, strict=True))


def documents(stream):
    """Return the documents of a stream's epoch as they are laid into rows, in the text's order."""
    bounds = pairwise(stream.offsets.tolist())
    return [stream.piece(n, start, stop) for n, (start, stop) in enumerate(bounds)]


class Mapped:
    """Tokens on a disk: counts what is asked for."""

    def __init__(self, tokens):
        self.tokens, self.read = tokens, 0

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, part):
        self.read += len(self.tokens[part])
        return self.tokens[part]


@pytest.mark.parametrize("level", ["document", "context"])
def test_a_resumed_middle_has_the_same_rows_and_reads_no_others(level):
    """In a later epoch too; starting and going on read nothing at all."""
    lengths = np.random.default_rng(0).integers(2, 60, 2000)
    ids = np.random.default_rng(1).integers(10, 900, lengths.sum()).astype(np.uint16)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ids[offsets[1:] - 1] = EOS
    options = {"sentinels": SENTINELS, "rate": 0.5, "level": level, "eos_token_id": EOS}
    options |= {"context": 64, "batch_size": 4, "gradient_accumulation_steps": 2, "seed": 3}
    whole = MiddleStream(ids, offsets, **options)
    for _ in range(int(whole.rows_per_epoch * 1.5) // 8):
        whole.next_step()
    state = json.loads(json.dumps(whole.state_dict()))
    assert state["epoch"] == 1
    tokens = Mapped(ids)
    again = MiddleStream(tokens, offsets, **options)
    again.load_state_dict(state)
    assert tokens.read == 0
    for mine, other in zip(again.next_step(), whole.next_step(), strict=True):
        assert mine["documents"] == other["documents"]
        assert torch.equal(mine["ids"], other["ids"])
        assert torch.equal(mine["targets"], other["targets"])
    assert 0 < tokens.read < 8 * (64 + 2 * 60)


def test_a_share_of_the_documents_is_rearranged():
    """Cuts are even over a document; half of the orders are SPM."""
    ids = np.tile(np.append(np.full(20, 10, np.uint16), EOS), 6000)
    stream = MiddleStream(
        ids,
        np.arange(0, len(ids) + 1, 21),
        sentinels=SENTINELS,
        rate=0.3,
        level="document",
        eos_token_id=EOS,
        context=64,
        batch_size=1,
        gradient_accumulation_steps=1,
        seed=3,
    )
    cut = [found.tolist() for found in documents(stream) if len(found) > 21]
    assert len(cut) / 6000 == pytest.approx(0.3, abs=0.02)
    psm = [found for found in cut if found[1] != SENTINELS.suffix]
    both = (20 / 21) ** 2  # neither cut is 0: with an empty prefix PSM looks like SPM
    assert len(psm) / len(cut) == pytest.approx(0.5 * both, abs=0.05)
    firsts = [found.index(SENTINELS.suffix) - 1 for found in psm]
    assert np.mean(firsts) == pytest.approx(7.175, abs=0.7)  # the smaller of two from 1 to 20


@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
def test_one_order_alone_can_be_asked_for(text, spm_rate):
    stream = MiddleStream(
        *text,
        sentinels=SENTINELS,
        rate=1.0,
        spm_rate=spm_rate,
        level="document",
        eos_token_id=EOS,
        context=64,
        batch_size=1,
        gradient_accumulation_steps=1,
        seed=3,
    )
    tokens = np.concatenate(documents(stream))
    [at] = np.nonzero(tokens == SENTINELS.prefix)
    spm = tokens[at + 1] == SENTINELS.suffix
    if spm_rate:
        assert spm.all()
    else:
        assert spm.mean() < 0.1  # PSM with an empty prefix looks the same


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("mlm", ["--model-type", "modernbert"]),
        ("mlm+nsp", ["--model-type", "bert", "--whole-word", "--hidden-dropout-prob", "0.2"]),
        ("mlm+sop", ["--model-type", "bert"]),
        ("fim", ["--fim-level", "context"]),
        ("causal", ["--model-type", "mixtral", "--num-experts", "4"]),
        ("causal", ["--context-warmup-fraction", "0.5"]),
    ],
)
def test_every_objective_trains_from_the_command_line(corpus, tmp_path, objective, more):
    import transformers

    kind = "wordpiece" if "mlm" in objective else "bpe"
    specials = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    train = ["tokenizer", "train", str(corpus), "--kind", kind, "--vocab-size", "500"]
    assert main([*train, "--special-tokens", *specials, "--out", str(tmp_path / "tok")]) == 0
    args = ["pretrain", str(corpus), "--tokenizer", str(tmp_path / "tok"), "--objective", objective]
    args += ["--hidden-size", "64", "--num-hidden-layers", "1", "--max-position-embeddings", "64"]
    args += ["--batch-size", "8", "--steps", "12", *more, "--out", str(tmp_path / "run")]
    assert main(args) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    told = {n for row in rows for n in row if n.endswith("_accuracy") and "eval" not in n}
    assert told == {f"{pair}_accuracy" for pair in objective.split("+")[1:]}
    folder = tmp_path / "run" / "model"
    config = json.loads((folder / "config.json").read_text())
    if "--hidden-dropout-prob" in more:
        assert config["hidden_dropout_prob"] == config["attention_probs_dropout_prob"] == 0.2
    [architecture] = config["architectures"]
    assert getattr(transformers, architecture).from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    framed = theirs("alpha", "beta").input_ids
    if "mlm" in objective:  # watched as decoders are
        scores = [json.loads(line) for line in (tmp_path / "run" / "evals.jsonl").open()]
        assert scores[-1]["step"] == 12
        summary = json.loads((tmp_path / "run" / "stage.json").read_text())["summary"]
        assert scores[-1]["mlm_loss"] == pytest.approx(summary["mlm_loss"])
    if "mlm" in objective:  # with the ends that the encoder was trained on
        tok = Tokenizer.load(folder)
        first, last = tok.frame_ids()
        assert framed == [first, *tok.encode("alpha"), last, *tok.encode("beta"), last]
        assert theirs.model_max_length == 64
        assert tok.fingerprint == Tokenizer.load(tmp_path / "tok").fingerprint  # shards still fit
        tok.save(tmp_path / "again")
        assert "framed" not in (tmp_path / "again" / "tokenizer_config.json").read_text()
    else:
        assert not set(framed) & set(theirs.all_special_ids)


def test_objectives_that_do_not_fit_say_what_does(corpus, tok, tmp_path, capsys):
    tok.save(tmp_path / "tok")
    start = ["pretrain", str(corpus), "--tokenizer", str(tmp_path / "tok"), "--steps", "1"]
    start += ["--out", str(tmp_path / "run"), "--objective"]
    for objective, message in (
        (["mlm"], "add --model-type modernbert (sooner on little text) or bert"),
        (["mlm+nsp"], "add --model-type bert (now qwen3)"),
        (["mlm", "--model-type", "bert", "--mlm-probability", "1.5"], "between 0 and 1"),
        (["mlm", "--model-type", "bert", "--hidden-dropout-prob", "1"], "from 0 to below 1"),
        (["causal", "--model-type", "bert"], "bert is an encoder: add --objective mlm"),
        (["mlm", "--model-type", "bert"], r"need the special token [MASK]"),
        (["fim"], "train the tokenizer with --special-tokens '<|fim_prefix|>'"),
        (["causal", "--num-experts", "4"], "qwen3 has no experts: take --model-type mixtral or"),
        (["causal", "--num-attention-heads", "3"], "3 does not divide hidden_size = 256"),
        (["causal", "--whole-word"], "whole_word changes nothing without objective mlm"),
        (["causal", "--fim-rate", "0.1"], "fim_rate changes nothing without objective fim"),
        (
            ["mlm", "--model-type", "bert", "--z-loss", "0.1"],
            "z_loss changes nothing without objective causal or fim",
        ),
        (
            ["mlm", "--model-type", "bert", "--packing-strategy", "bfd"],
            "packing_strategy changes nothing without objective causal",
        ),
        (
            ["fim", "--context-warmup-fraction", "0.5"],
            "context_warmup_fraction changes nothing without objective causal",
        ),
        (
            ["causal", "--context-warmup-fraction", "0.5", "--packing-strategy", "bfd"],
            "packed rows have one length",
        ),
        (
            ["causal", "--context-warmup-fraction", "1", "--max-position-embeddings", "30"],
            "a quarter of 30 tokens",
        ),
    ):
        assert main([*start, *objective]) == 2
        assert message in capsys.readouterr().err
