"""Training on mixtures: every token once, phases in order, exact positions, counted epochs."""

import numpy as np
import pytest
import yaml

from groundup.cli.main import main
from groundup.core.errors import CheckpointError
from groundup.core.files import read_json
from groundup.core.metrics import MetricsLog
from groundup.data import Shard, write_shards
from groundup.data.mix import MixConfig, Phase, phase_order
from groundup.model.loss import IGNORE
from groundup.train.mixture import MixtureStream

CONTEXT, EOS = 8, 0


def shard(first: int, documents: int, seed: int) -> Shard:
    """Return a shard whose tokens tell where they come from."""
    lengths = np.random.default_rng(seed).integers(2, 30, documents)
    tokens = np.arange(first, first + lengths.sum())
    ends = np.cumsum(lengths)
    tokens[ends - 1] = EOS
    return Shard(tokens, np.concatenate(([0], ends)), 1, EOS, 10**6, "t")


SHARDS = {"web": shard(1_000, 40, 1), "code": shard(100_000, 12, 2)}
LENGTHS = {name: np.diff(found.offsets) for name, found in SHARDS.items()}
MIX = MixConfig(
    sources={"web": "w", "code": "c"},
    phases=(
        Phase(name="main", tokens=300, weights={"web": 3, "code": 1}),
        Phase(name="decay", tokens=160, weights={"code": 1}, replay=0.25),
    ),
)
ORDERS = [phase_order(MIX, LENGTHS, n) for n in range(2)]


def stream(seed=1, orders=ORDERS, growth=()):
    return MixtureStream(
        SHARDS,
        orders,
        eos_token_id=EOS,
        context=CONTEXT,
        batch_size=2,
        gradient_accumulation_steps=2,
        seed=seed,
        growth=growth,
    )


def rows_of(source, steps):
    micros = [micro for _ in range(steps) for micro in source.next_step()]
    return [
        (ids.tolist(), targets.tolist())
        for micro in micros
        for ids, targets in zip(micro["ids"], micro["targets"], strict=True)
    ]


def wanted_tokens(order):
    names = order.names
    return [
        int(token)
        for source, document in zip(order.source, order.document, strict=True)
        for token in SHARDS[names[source]].documents()[document]
    ]


def test_every_token_is_a_target_once_and_phases_keep_their_order():
    source = stream()
    rows = rows_of(source, -(-len(source.starts) // 4))[: len(source.starts)]
    seen = [t for _, targets in rows for t in targets if t != IGNORE]
    everything = [token for order in ORDERS for token in wanted_tokens(order)]
    assert sorted(seen) == sorted(everything)
    assert seen != everything  # rows come at random within a phase
    boundary = -(-len(wanted_tokens(ORDERS[0])) // CONTEXT)
    assert set(source.starts[:boundary] // CONTEXT) == set(range(boundary))


@pytest.mark.parametrize("growth", [[(3, 2), (4, 4)], [(7, 4)], [(11, 2)], [(0, 2), (100, 4)]])
def test_rows_of_mixtures_grow(growth):
    """By the step, as many positions in each; every token once, phase behind phase."""
    source = stream(growth=growth)
    wanted = [length for steps, length in growth for _ in range(steps)]
    everything = [token for order in ORDERS for token in wanted_tokens(order)]
    seen, counted, steps = [], 0, 0
    while source.row < len(source.starts):
        step = source.next_step()
        length = wanted[steps] if steps < len(wanted) else CONTEXT
        assert {tuple(m["ids"].shape) for m in step} == {(2 * CONTEXT // length, length)}
        seen += [t for m in step for t in m["targets"].flatten().tolist() if t != IGNORE]
        counted += sum(m["tokens"] for m in step)
        steps += 1
    assert counted == len(seen)
    once = seen[: len(everything)]
    assert sorted(once) == sorted(everything)
    first = len(wanted_tokens(ORDERS[0])) + CONTEXT  # the row at the phase's end is of both
    assert set(wanted_tokens(ORDERS[0])) <= set(once[:first])


def test_a_position_among_growing_rows_can_be_restored():
    for steps in (2, 3, 5, 8):
        source, again = stream(growth=[(3, 2), (3, 4)]), stream(growth=[(3, 2), (3, 4)])
        rows_of(source, steps)
        again.load_state_dict(source.state_dict())
        assert rows_of(again, 3) == rows_of(source, 3)


def test_a_row_is_a_stretch_of_the_stream():
    everything = [EOS, *(token for order in ORDERS for token in wanted_tokens(order))]
    source = stream()
    starts = source.starts[:12].tolist()
    for at, (ids, targets) in zip(starts, rows_of(source, 3), strict=True):
        size = min(CONTEXT, len(everything) - 1 - at)
        assert ids[:size] == everything[at : at + size]
        assert targets[:size] == everything[at + 1 : at + 1 + size]


def test_documents_are_named():
    [micro, _] = stream().next_step()
    names = {name.partition(":")[0] for name in micro["documents"]}
    assert names <= {"web", "code"}


def test_a_resumed_stream_goes_on():
    whole, part = stream(), stream()
    rows_of(whole, 3)
    rows_of(part, 3)
    again = stream()
    again.load_state_dict(part.state_dict())
    assert rows_of(whole, 4) == rows_of(again, 4)
    with pytest.raises(CheckpointError, match="other data"):
        stream(seed=2).load_state_dict(part.state_dict())


def test_epochs_are_counted():
    source = stream()
    assert source.epochs() == {"web": 0, "code": 0}
    while source.row < len(source.starts):
        source.next_step()
    source.row = len(source.starts)
    counted = {name: 0 for name in SHARDS}
    for order in ORDERS:
        for number, document in zip(order.source, order.document, strict=True):
            counted[order.names[number]] += len(SHARDS[order.names[number]].documents()[document])
    for name, found in SHARDS.items():
        assert source.epochs()[name] == pytest.approx(counted[name] / len(found.tokens))


@pytest.fixture
def place(corpus, tok, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tok.save(tmp_path / "tok")
    write_shards(corpus, tok, tmp_path / "one")
    write_shards(corpus, tok, tmp_path / "two")
    mix = {
        "sources": {"one": "one", "two": "two"},
        "phases": [
            {"name": "main", "tokens": 2048, "weights": {"one": 0.5, "two": 0.5}},
            {"name": "decay", "tokens": 512, "weights": {"two": 1.0}, "replay": 0.5},
        ],
    }
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mix))
    shape = ["--hidden-size", "64", "--num-hidden-layers", "1", "--max-position-embeddings", "64"]
    budget = ["--batch-size", "2", "--lr-scheduler-type", "wsd", "--mix", "mix.yaml"]
    return ["pretrain", "one", "--tokenizer", "tok", *shape, *budget, "--out", "run"]


def test_pretraining_on_a_mixture(place, tmp_path, capsys):
    assert main(place) == 0
    record = read_json(tmp_path / "run" / "stage.json")
    assert record["summary"]["steps"] == (2048 + 512) // 128
    assert set(record["identity"]["inputs"]) >= {"mix.sources.one", "mix.sources.two"}
    assert record["summary"]["epochs"]["two"] > 0
    rates = [row["lr"] for row in MetricsLog.read(tmp_path / "run" / "metrics.jsonl")]
    assert [rate == max(rates) for rate in rates] == [True] * 16 + [
        False
    ] * 4  # decays with `decay`
    assert main(place) == 0
    assert "is finished" in capsys.readouterr().err
    (tmp_path / "two" / "train.offsets.npy").write_bytes(b"x")
    assert main(place) == 2  # the content of a source has changed
    assert "mix.sources.two" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda mix: mix["phases"][0].update(tokens=10**9), "within their epochs"),
        (lambda mix: mix["phases"][0]["weights"].update(thre=1.0), "no source 'thre'"),
        (lambda mix: mix.update(phase=[]), "did you mean 'phases'"),
        (lambda mix: mix["sources"].update(two="tok"), "no shard folder"),
    ],
)
def test_bad_mixtures(place, change, said, tmp_path, capsys):
    mix = yaml.safe_load((tmp_path / "mix.yaml").read_text())
    change(mix)
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mix))
    assert main(place) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_mixture_has_its_own_budget(place, capsys):
    assert main([*place, "--budget", "1m"]) == 2
    assert "leave plan and budget out" in capsys.readouterr().err


def test_rows_of_a_mixture_grow_from_the_command_line(place, monkeypatch):
    lengths, read = [], MixtureStream.next_row

    def watched(self):
        lengths.append(int(self.lengths[self.number()]))
        return read(self)

    monkeypatch.setattr(MixtureStream, "next_row", watched)
    assert main([*place, "--context-warmup-fraction", "0.5"]) == 0
    assert lengths == [16] * 8 * 5 + [32] * 4 * 5 + [64] * 2 * 10
