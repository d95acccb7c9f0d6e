"""Stages `finetune`, `preferences` and `align`: from a base model to an aligned one."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from groundup.align import DPO, Pair, collate_pairs, with_reference
from groundup.core import device as devices
from groundup.core.errors import DataError
from groundup.core.files import read_json, write_json
from groundup.core.progress import console, say, show_table, track
from groundup.core.types import Message, Preference, SamplingParams
from groundup.data import (
    mismatched_pairs,
    pair_of,
    read_chats,
    read_preferences,
    write_preferences,
)
from groundup.figure import LiveTraining
from groundup.generate import LLM
from groundup.model.decoder import Decoder
from groundup.model.hf import load_model
from groundup.recipe.adapters import adapt, checkpoint_files, save_results
from groundup.recipe.configs import AlignConfig, FinetuneConfig, PreferencesConfig
from groundup.recipe.planning import read_plan
from groundup.recipe.shared import fit_settings, last_metrics, rows_for_ranks, tokens_trained, watch
from groundup.tokenizer import Tokenizer
from groundup.train import (
    Examples,
    FitConfig,
    Hook,
    NextToken,
    Objective,
    Row,
    audit,
    collate_packed,
    collate_rows,
    fit,
    pack_rows,
)
from groundup.train.config import check_best
from groundup.train.ranks import here
from groundup.train.timing import TIMED_EXAMPLE_STEPS, seconds_a_step

STEPS = "steps.json"  # how many steps the time was worth; a resumed run has as many
LEAST_STEPS = 10
BESIDE = 0.1  # of the time: checkpoints, the live line, steps slower than those that are timed


def finetune(config: FinetuneConfig, out: Path) -> dict[str, Any]:
    """Fine-tune on conversations; the audit says first what will be learned from."""
    started, objective = time.monotonic(), NextToken()
    check_best(config, objective.metrics)
    tok = Tokenizer.load(config.model)
    device = devices.pick(config.device, planned_dtype(config))
    model = load_model(config.model, device=device.device)
    tok.need_rows(model.config.vocab_size, config.model)
    adapter = adapt(model, config, device)
    longest = row_length(config, model.config.max_position_embeddings)
    chats = list(read_chats(config.data, "train"))
    rendered = (
        row
        for chat in track(chats, "rendering")
        for row in tok.training_rows(chat.messages, tools=chat.tools)
    )
    rows, counts = audit([(r.ids, r.trainable) for r in rendered], longest)
    show_audit(counts)
    if not rows:
        raise DataError(f"no row of {config.data} has anything to learn from (see the audit)")
    source = conversations(rows, config, tok, longest)

    def timed() -> float:
        return seconds_a_step(model, objective, source, settings(config), device.device)

    steps = planned_steps(config, timed, len(source.examples), started, out)
    train(model, objective, source, config, steps, tok, out, device)
    summary = {
        "audit": counts,
        "steps": steps,
        "epochs": steps / source.steps_per_epoch,
        "tokens": tokens_trained(out),
        "metrics": last_metrics(out),
    }
    return summary | adapter


def row_length(config: FinetuneConfig | AlignConfig, positions: int) -> int:
    """Return the most tokens of a row: what is asked for, within the positions that a model has."""
    if config.max_length is not None and config.max_length > positions:
        say(f"  rows of {positions:,} tokens at most: the model has no more positions")
    return min(config.max_length or positions, positions)


def conversations(
    rows: Sequence[Row], config: FinetuneConfig, tok: Tokenizer, longest: int
) -> Examples:
    """Return the batch source: a conversation a row, or several packed into one."""
    options: dict[str, Any] = {
        "batch_size": config.batch_size,
        "micro_batch_size": rows_for_ranks(config.batch_size)[0],
        "seed": config.seed,
    }
    if not config.packing:
        return Examples(
            rows,
            collate=lambda chosen: collate_rows(chosen, tok.pad_token_id),
            length=lambda row: len(row[0]),
            **options,
        )
    groups = pack_rows(rows, longest)
    say(f"  packed into {len(groups):,} rows of {longest} tokens")
    return Examples(
        [[rows[n] for n in group] for group in groups],
        collate=lambda chosen: collate_packed(chosen, longest, tok.pad_token_id),
        length=len,
        **options,
    )


def make_preferences(config: PreferencesConfig, out: Path) -> dict[str, Any]:
    """Write preferences.jsonl: mismatched answers, and the model's own where they are wrong."""
    chats = list(read_chats(config.chats))
    pairs = mismatched_pairs(chats, config.seed)
    tok = Tokenizer.load(config.model)
    llm = LLM(config.model, tok, device=config.device, max_num_seqs=32)
    rng = np.random.default_rng(config.seed)
    own: list[Preference] = []
    asked = too_long = 0
    for split, share in (("train", 0.8), ("validation", 0.2)):
        candidates = [chat for chat in chats if chat.split == split]
        count = min(len(candidates), int(config.sampled_prompts * share))
        chosen = [candidates[n] for n in rng.permutation(len(candidates))[:count]]
        params = [
            SamplingParams(temperature=0.8, top_k=40, max_tokens=config.max_tokens, seed=n)
            for n in range(len(chosen))
        ]
        prompts = [llm.chat_ids(chat.messages[:-1]) for chat in chosen]
        fitting = [len(ids) + config.max_tokens < llm.context for ids in prompts]
        kept = [n for n, fits in enumerate(fitting) if fits]
        outputs = llm.generate([prompts[n] for n in kept], [params[n] for n in kept])
        asked += len(kept)
        too_long += len(prompts) - len(kept)
        for n, output in zip(kept, outputs, strict=True):
            said = output.outputs[0].text.strip()
            if said and said != chosen[n].messages[-1]["content"].strip():
                own.append(pair_of(chosen[n], said, "own sample"))
    write_preferences(out / "preferences.jsonl", [*pairs, *own])
    say(f"  {len(pairs):,} pairs with another answer; {len(own):,} wrong of {asked:,} own answers")
    if too_long:
        say(f"  {too_long:,} prompts not asked: with an answer they are too long for the model")
    counts = {"mismatched": len(pairs), "own_samples": len(own)}
    return counts | {"asked": asked, "too_long": too_long}


def align(config: AlignConfig, out: Path) -> dict[str, Any]:
    """Run DPO against the starting model; its log-probabilities are computed once, up front."""
    started = time.monotonic()
    objective = DPO(
        beta=config.beta, label_smoothing=config.label_smoothing, sft_weight=config.sft_weight
    )
    check_best(config, objective.metrics)
    tok = Tokenizer.load(config.model)
    device = devices.pick(config.device, planned_dtype(config))
    model = load_model(config.model, device=device.device)
    tok.need_rows(model.config.vocab_size, config.model)
    adapter = adapt(model, config, device)
    longest = row_length(config, model.config.max_position_embeddings)
    preferences = list(read_preferences(config.data, "train"))
    pairs, cut = pair_rows(preferences, tok, longest)
    say(f"  {len(pairs):,} pairs; {cut:,} left out, longer than {longest} tokens")
    if not pairs:
        raise DataError(f"{config.data} holds no pair for training that fits {longest} tokens")
    rows = rows_for_ranks(config.batch_size)[0]

    def referred(chosen: Sequence[Pair]) -> Examples:
        found = with_reference(chosen, model, tok.pad_token_id, lambda s: track(s, "reference"))
        return Examples(
            found,
            collate=lambda some: collate_pairs(some, tok.pad_token_id),
            length=lambda pair: pair.length,
            batch_size=config.batch_size,
            micro_batch_size=rows,
            seed=config.seed,
        )

    def timed() -> float:
        before = time.perf_counter()
        few = referred(pairs[: TIMED_EXAMPLE_STEPS * config.batch_size])
        reference_s = (time.perf_counter() - before) / len(few.examples) * config.batch_size
        step_s = seconds_a_step(model, objective, few, settings(config), device.device)
        return reference_s + step_s

    steps = planned_steps(config, timed, len(pairs), started, out)
    source = referred(pairs[: steps * config.batch_size])
    metrics = train(model, objective, source, config, steps, tok, out, device)
    lengths = {
        "chosen": [sum(pair.chosen[1]) for pair in pairs],
        "rejected": [sum(pair.rejected[1]) for pair in pairs],
    }
    if here().first:
        write_json(out / "lengths.json", lengths)
    shown = {name: value for name, value in metrics.items() if name.startswith("rewards/")}
    tokens = tokens_trained(out)
    found = {"pairs": len(pairs), "cut": cut, "steps": steps, "tokens": tokens, "metrics": shown}
    return found | adapter


def pair_rows(
    preferences: Sequence[Preference], tok: Tokenizer, longest: int
) -> tuple[list[Pair], int]:
    """Render pairs in a fixed shuffled order; return them and how many were too long.

    Only the answer's tokens count: those that the prompt's rendering does not have.
    """
    pairs, cut = [], 0
    order = np.random.default_rng(0).permutation(len(preferences))
    for n in track(order.tolist(), "rendering pairs"):
        preference = preferences[n]
        chosen = answer_row(tok, preference.prompt, preference.chosen)
        rejected = answer_row(tok, preference.prompt, preference.rejected)
        if max(len(chosen[0]), len(rejected[0])) > longest:
            cut += 1
            continue
        pairs.append(Pair(chosen, rejected))
    return pairs, cut


def answer_row(tok: Tokenizer, prompt: list[Message], answer: list[Message]) -> Row:
    """Return the row in which only the answer's own tokens are trained."""
    rendered = tok.render([*prompt, *answer])
    start = len(tok.render(prompt, add_generation_prompt=True).ids)
    trainable = [t and n >= start for n, t in enumerate(rendered.trainable)]
    return rendered.ids, trainable


def planned_dtype(config: FinetuneConfig | AlignConfig) -> str:
    """Return the dtype that the plan measured, or what the device trains in by itself."""
    asked = str(read_plan(config.plan)["dtype"]) if config.plan else None
    return devices.training_dtype(config.device, asked)


def planned_steps(
    config: FinetuneConfig | AlignConfig,
    timed: Callable[[], float],
    examples: int,
    started: float,
    out: Path,
) -> int:
    """Return the number of steps: as configured, or as many as fit into the seconds given.

    `timed` returns what a step takes; `started` is when the stage did, by time.monotonic.
    """
    if config.seconds is None:
        return config.steps
    note, ranks = out / STEPS, here()
    if ranks.told(note.is_file()):
        return int(read_json(note)["steps"])
    seconds_a_step = timed()
    left = ranks.told((1 - BESIDE) * (config.seconds - (time.monotonic() - started)))
    at_most = max(1, int(config.max_epochs * -(-examples // config.batch_size)))
    steps = min(max(LEAST_STEPS, int(left / seconds_a_step)), at_most)
    if ranks.first:
        write_json(note, {"steps": steps, "seconds_a_step": seconds_a_step})
    return steps


def settings(config: FinetuneConfig | AlignConfig, steps: int = LEAST_STEPS) -> FitConfig:
    """Return what the loop is given."""
    return fit_settings(config, steps=steps, dtype=planned_dtype(config))


def show_audit(counts: dict[str, int]) -> None:
    """Print what will be learned from, before it is."""
    share = counts["tokens_trained"] / max(1, counts["tokens"])
    rows = [
        ("rows", f"{counts['rows']:,}"),
        ("rows trained on", f"{counts['rows_trained']:,}"),
        ("rows with nothing to learn", f"{counts['rows_untrained']:,}"),
        ("rows cut to fit the context", f"{counts['rows_cut']:,}"),
        ("rows whose end of turn is not trained", f"{counts['rows_without_end']:,}"),
        ("tokens", f"{counts['tokens']:,}"),
        ("tokens trained on", f"{counts['tokens_trained']:,} ({share:.0%})"),
    ]
    show_table("Supervision audit", ("what", "count"), rows)


def train(
    model: Decoder,
    objective: Objective,
    source: Examples,
    config: FinetuneConfig | AlignConfig,
    steps: int,
    tok: Tokenizer,
    out: Path,
    device: devices.Device,
) -> dict[str, float]:
    """Run the one loop with a live curve; write `model/`, and `adapter/` where one is trained."""
    say(f"  device: {device.line}; {steps:,} steps, {steps / source.steps_per_epoch:.2f} epochs")
    write, read = checkpoint_files(model, tok, config)
    with LiveTraining(console(), steps=steps, unit="loss") as live:
        metrics = fit(
            model,
            objective,
            source,
            settings(config, steps),
            out,
            device=device.device,
            hooks=[Hook(1, watch(live))],
            write_model=write,
            read_weights=read,
        )
    if here().first:
        save_results(model, tok, config, out)
    return metrics
