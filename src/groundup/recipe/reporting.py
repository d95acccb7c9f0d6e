"""Stage `report`: one self-contained HTML page about a run."""

import json
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from groundup.core.files import read_json, write_json, write_text
from groundup.core.memory import peak_memory_bytes
from groundup.core.metrics import MetricsLog
from groundup.core.progress import say
from groundup.core.run import FINISHED
from groundup.evaluate import fit_curve
from groundup.figure import Series, bar_plot, histograms, line_plot, page
from groundup.recipe.configs import ReportConfig
from groundup.recipe.curves import (
    Run,
    evaluation_pictures,
    loss_pictures,
    read_run,
    side_pictures,
    smooth,
    speeds,
    width_of,
)

STAGES = ("base", "finetuned", "aligned")
MORE_S = 600.0
SHOWN = 4


def report(config: ReportConfig, out: Path) -> dict[str, Any]:
    """Write report.html here and to the run folder, and card.json for the chat."""
    run = config.run
    records = {path.name: read_json(path / FINISHED) for path in config.stages}
    metrics = read_json(run / "evaluate" / "metrics.json")
    plan = read_json(run / "plan" / "plan.json")
    pretrained = replace(read_run(run), name="training loss")
    logs = {name: MetricsLog.read(run / name / "metrics.jsonl") for name in ("finetune", "align")}
    outlook = what_more_time_gives(pretrained)
    title = f"groundup: {run.name}"
    size = records["pretrain"]["summary"]["parameters"]
    seconds = sum(record["seconds"] for record in records.values())
    subtitle = (
        f"{size / 1e6:.2f} million parameters, trained from nothing on {plan['device']} "
        f"in {seconds / 60:.1f} minutes, data to evaluation."
    )
    sections = [
        page.section("At a glance", glance(metrics, records, outlook)),
        page.section("Text and tokens", *data_blocks(run, records)),
        page.section("Three models on the same held-out text", *three_blocks(metrics)),
        page.section("Training", *training_blocks(pretrained, logs, records, plan)),
        page.section("Answers", *answer_blocks(run, metrics)),
        page.section("Preferences", *preference_blocks(run, metrics)),
        page.section("Samples", *sample_blocks(run)),
        page.section("Stages", stage_table(records)),
        page.section("What to try next", *next_blocks(run, outlook)),
    ]
    content = page.page(title, subtitle, sections)
    write_text(out / "report.html", content)
    write_text(run / "report.html", content)
    write_json(run / "card.json", model_card(run, records, seconds, size))
    say(f"  {run / 'report.html'}: {len(content) / 1e3:.0f} kB")
    return {"bytes": len(content), "seconds": seconds}


def glance(metrics: dict[str, Any], records: dict[str, Any], outlook: str) -> str:
    """Return the cards on top."""
    three, scores = metrics["bits_per_byte"], metrics["answers"]["aligned"]["all"]
    preferred = metrics["preferences"]["aligned"]
    memory = max(record["peak_memory_bytes"] for record in records.values())
    level = three["ngram"]["bits_per_byte"]
    return page.cards(
        [
            ("Network", f"{three['network']['bits_per_byte']:.3f}", "bits per byte, held out"),
            ("With the 5-gram", f"{three['mixture']['bits_per_byte']:.3f}", "bits per byte"),
            ("5-gram alone", f"{level:.3f}", "bits per byte: the line to beat"),
            ("Answers", f"{scores['exact_match']:.0%}", f"exactly right of {scores['rows']}"),
            ("Preferences", f"{preferred['accuracy']:.0%}", "better answer found likelier"),
            ("Memory", f"{memory / 1e9:.2f} GB", "peak of all stages"),
        ]
    ) + page.text(outlook)


def data_blocks(run: Path, records: dict[str, Any]) -> list[str]:
    """Return what went in, out and why."""
    steps = read_json(run / "data" / "stats.json")["steps"]
    rows = [
        (
            row["step"],
            f"{row['documents_in']:,}",
            f"{row['documents_out']:,}",
            f"{row['bytes_out'] / 1e6:.2f}",
            ", ".join(f"{n:,} {why}" for why, n in row["reasons"].items()),
        )
        for row in steps
    ]
    tok = records["tokenizer"]["summary"]
    return [
        page.table(("step", "documents in", "out", "MB out", "left out, and why"), rows),
        page.text(
            f"The tokenizer has {tok['vocab_size']:,} tokens; one stands for "
            f"{tok['bytes_per_token']:.2f} bytes of text that it was not trained on. Files are "
            "split once; every stage keeps to that split."
        ),
    ]


def three_blocks(metrics: dict[str, Any]) -> list[str]:
    """Return the three-model picture."""
    three = metrics["bits_per_byte"]
    names = {"ngram": "5-gram", "network": "network", "mixture": "interpolated"}
    bars = {
        name: (three[key]["bits_per_byte"], three[key]["low"], three[key]["high"])
        for key, name in names.items()
    }
    gain, kept = three["gain"], metrics["text_kept"]
    return [
        page.picture(
            bar_plot(bars, x_label="bits per byte (lower is better)"),
            f"Validation split, {three['network']['documents']} files, "
            f"{three['network']['bytes']:,} bytes. Lines: 95 % intervals over files.",
        ),
        page.text(
            f"Interpolating takes {gain['bits_per_byte']:.3f} bits per byte off the network "
            f"(95 %: {gain['low']:.3f} to {gain['high']:.3f}, over the same files). Each half of "
            "the files was scored with weights fitted on the other half."
        ),
        page.text(
            "Learning to answer costs some of what a network knows of text: on a part of the same "
            f"files it has {kept['base']:.3f} bits per byte before, {kept['finetuned']:.3f} after "
            f"fine-tuning and {kept['aligned']:.3f} after alignment."
        ),
    ]


def training_blocks(
    pretrained: Run,
    logs: dict[str, list[dict[str, Any]]],
    records: dict[str, Any],
    plan: dict[str, Any],
) -> list[str]:
    """Return the plan and the curves."""
    level = records["pretrain"]["summary"]["ngram_bits_per_byte"]
    levels = [(level, "5-gram on validation text")] if level else []
    blocks = [
        page.table(("choice", "reason"), list(plan["reasons"].items())),
        page.text(
            f"Pretraining: {len(pretrained.rows):,} steps, "
            f"median {np.median(speeds(pretrained)):,.0f} tokens/s."
        ),
        *loss_pictures([pretrained], levels),
        *evaluation_pictures([pretrained]),
        *side_pictures([pretrained]),
    ]
    for name, label in (("finetune", "loss a trained token (nats)"), ("align", "DPO loss")):
        rows = [row for row in logs[name] if "loss" in row]  # a step left out has none
        losses, steps = [row["loss"] for row in rows], [row["step"] for row in rows]
        series = [
            Series("", steps, losses, faint=True),
            Series(name, steps, smooth(losses, max(1, len(losses) // 20))),
        ]
        blocks.append(
            page.picture(
                line_plot(series, x_label="step", y_label=label), f"{name}: {len(steps):,} steps."
            )
        )
    return blocks


def what_more_time_gives(run: Run) -> str:
    """Return, from the fitted curve, what ten more minutes of pretraining would give."""
    tokens, raw = run.column("loss", run.tokens())
    losses = smooth(raw, width_of(raw))
    start = len(raw) // 5  # warm-up and first descent follow another law
    curve = fit_curve(tokens[start:], losses[start:])
    if curve is None:
        return "The loss curve is too short or too flat to say what more time would give."
    more = MORE_S * float(np.median(speeds(run))) / 1e6
    gain = curve.at(tokens[-1]) - curve.at(tokens[-1] + more)
    return (
        f"Ten more minutes of pretraining would take the training loss down by at most "
        f"{gain:.2f} bits per byte, by the power law fitted to this curve. It "
        f"misses the curve by {curve.residual:.3f} on average and flatters: the end of "
        "this curve fell with the learning rate, and more passes over the same text teach less."
    )


def answer_blocks(run: Path, metrics: dict[str, Any]) -> list[str]:
    """Return the scores by task, and the best and worst answers before and after."""
    scores = metrics["answers"]
    rows = [
        (
            task,
            f"{score['rows']}",
            f"{score['baseline_exact_match']:.0%}",
            *(f"{scores[stage][task]['exact_match']:.0%}" for stage in STAGES),
            f"{scores['aligned'][task]['f1']:.2f}",
            f"{score['baseline_f1']:.2f}",
        )
        for task, score in scores["aligned"].items()
    ]
    answers = [json.loads(line) for line in (run / "evaluate/answers.jsonl").open()]
    ranked = sorted(answers, key=lambda row: (-row["f1"], len(row["prompt"])))
    asked = [row for row in ranked if row["task"] not in ("greeting", "refusal")]
    headers = ("task", "rows", "copying", *STAGES, "F1 aligned", "F1 copying")
    blocks = [
        page.text(
            "Exact match on held-out questions, greedy decoding. Copying is what a rule without "
            "a model scores: the text between the parentheses, the words of the name."
        ),
        page.table(headers, rows),
        "<h3>Best</h3>",
    ]
    best = {row["task"]: row for row in reversed(asked)}  # the best of each task
    blocks += [example_of(row) for row in list(best.values())[::-1][:SHOWN]]
    blocks.append("<h3>Worst</h3>")
    blocks += [example_of(row) for row in asked[-SHOWN:]]
    return blocks


def example_of(row: dict[str, Any]) -> str:
    """Return one question with its answers."""
    boxes: list[tuple[str, str, bool | None]] = [("wanted", row["reference"], None)]
    wanted = " ".join(row["reference"].split())
    boxes += [(stage, row[stage][:300], " ".join(row[stage].split()) == wanted) for stage in STAGES]
    return page.example(row["prompt"], boxes)


def preference_blocks(run: Path, metrics: dict[str, Any]) -> list[str]:
    """Return preference accuracy and the lengths of both sides."""
    rows = [
        (
            stage,
            f"{score['pairs']}",
            f"{score['accuracy']:.1%}",
            f"{score['low']:.0%} to {score['high']:.0%}",
            f"{score['shorter_wins']:.1%}",
        )
        for stage, score in metrics["preferences"].items()
    ]
    lengths = read_json(run / "align" / "lengths.json")
    return [
        page.table(("model", "pairs", "better is likelier", "95 %", "better is shorter"), rows),
        page.picture(
            histograms(lengths, x_label="tokens in the answer"),
            "Lengths of chosen and rejected answers in training: they are matched, so that "
            "nothing can be learned from brevity.",
        ),
    ]


def sample_blocks(run: Path) -> list[str]:
    """Return the same beginnings continued after each stage."""
    rows = [json.loads(line) for line in (run / "evaluate/samples.jsonl").open()]
    return [
        page.example(row["prompt"], [(stage, row[stage], None) for stage in STAGES]) for row in rows
    ]


def stage_table(records: dict[str, Any]) -> str:
    """Return seconds and memory of each stage."""
    rows = [
        (name, f"{record['seconds']:.1f}", f"{record['peak_memory_bytes'] / 1e6:,.0f}")
        for name, record in records.items()
    ]
    total = sum(record["seconds"] for record in records.values())
    rows.append(("all", f"{total:.1f}", f"{peak_memory_bytes() / 1e6:,.0f} (report)"))
    return page.table(("stage", "seconds", "peak MB"), rows)


def next_blocks(run: Path, outlook: str) -> list[str]:
    """Return what to do with the run, in words that a shell takes."""
    there, base = quote(str(run)), quote(str(run / "pretrain"))
    mine, hour, own = (quote(str(run.parent / name)) for name in ("mine", "hour", "own"))
    return [
        page.code(
            f"groundup chat {there}\ngroundup serve {there}\n"
            f"groundup quickstart --text FOLDER --out {mine}\n"
            f"groundup quickstart --budget 1h --out {hour}"
        ),
        page.text(
            "A longer budget gives a larger model more tokens. For other answers, change the "
            "recipe (groundup quickstart --print-recipe), or fine-tune on your own chats.jsonl: "
            f"groundup finetune {base} --data chats.jsonl --out {own}"
        ),
    ]


def model_card(run: Path, records: dict[str, Any], seconds: float, size: int) -> dict[str, Any]:
    """Return what `chat` and `serve` say of the model."""
    found = read_json(run / "evaluate" / "card.json")
    trained = records["pretrain"]["seconds"]
    return {
        "title": f"{run.name}: {size / 1e6:.2f} million parameters",
        "lines": [
            f"Pretrained for {trained / 60:.1f} minutes, {seconds / 60:.1f} minutes in all, "
            f"on {records['pretrain']['summary']['device']}.",
            f"Held out: {found['score']} ({', '.join(found['tasks'])}).",
            "It knows only what it was shown: ask about a piece of text that you paste.",
        ],
        "questions": found["questions"],
    }
