"""Stages on text: tokenizer, token shards, n-gram counts, questions for a reader."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from groundup.core.errors import DataError
from groundup.core.files import write_json
from groundup.core.progress import say, track
from groundup.core.types import Split
from groundup.data import open_shard, read_corpus, read_documents, write_shards
from groundup.data.cloze import ClozeConfig, cloze_questions, squad_file
from groundup.model.ngram import NGram
from groundup.recipe.configs import NGramConfig, ShardsConfig, TokenizerConfig
from groundup.recipe.shared import shards_of
from groundup.tokenizer import Tokenizer, sampling


def train_tokenizer(config: TokenizerConfig, out: Path) -> dict[str, Any]:
    """Train on the training split; report bytes per token on text the trainer never saw.

    Plain files have no validation split: there it is the text of the training.
    """
    chosen = {"dropout": config.dropout, "alpha": config.alpha}
    settings = {name: value for name, value in chosen.items() if value is not None}
    sampling.check(config.kind, settings)
    texts = read_texts(config.paths, "train")
    tok = Tokenizer.train(
        track(texts, "training the tokenizer"),
        kind=config.kind,
        vocab_size=config.vocab_size,
        pattern=config.pattern,
        normalizer=config.normalizer,
        byte_fallback=config.byte_fallback,
        chat_template=config.chat_template,
        special_tokens=config.special_tokens,
        reserved_tokens=config.reserved_tokens,
        sample_bytes=config.sample_bytes,
        seed=config.seed,
    )
    tok.sampling = settings
    tok.save(out)
    held_out = list(read_texts(config.paths, "validation"))
    num_bytes = sum(len(text.encode()) for text in held_out)
    num_tokens = sum(len(ids) for ids in tok.encode_batch(held_out))
    bytes_per_token = num_bytes / max(1, num_tokens)
    split = any((Path(path) / "stats.json").is_file() for path in config.paths)
    fewer = (
        f" of {config.vocab_size:,}: the text has no more"
        if tok.vocab_size < config.vocab_size
        else ""
    )
    say(
        f"  {tok.vocab_size:,} tokens{fewer}; one token stands for {bytes_per_token:.2f} bytes "
        f"of {'validation text' if split else 'the text it was trained on'}"
    )
    return {"vocab_size": tok.vocab_size, "bytes_per_token": bytes_per_token}


def read_texts(paths: Sequence[str], split: Split) -> Iterator[str]:
    """Yield the texts of one split of corpora; files that were never split are read whole."""
    for path in paths:
        if (Path(path) / "stats.json").is_file():
            yield from (document.text for document in read_corpus(Path(path), split))
        else:
            yield from (document.text for document in read_documents([path]))


def tokenize(config: ShardsConfig, out: Path) -> dict[str, Any]:
    """Write memory-mapped ids of every split."""
    tok = Tokenizer.load(config.tokenizer)
    summary = write_shards(config.corpus, tok, out, cache=config.cache)
    for split in ("train", "validation", "test"):
        shard = open_shard(out, split)
        say(f"  {split}: {len(shard.offsets) - 1:,} documents, {len(shard.tokens):,} tokens")
    return summary


def count_ngrams(config: NGramConfig, out: Path) -> dict[str, Any]:
    """Count the training split and measure the model on the validation split."""
    from groundup.evaluate.perplexity import ngram_scores

    tok = Tokenizer.load(config.tokenizer)
    shards = shards_of(config, tok, out)
    train, validation = open_shard(shards, "train"), open_shard(shards, "validation")
    started = time.perf_counter()
    model = NGram.train(
        train.pieces(),
        order=config.order,
        vocab_size=train.vocab_size,
        eos_token_id=train.eos_token_id,
        folder=out,
        memory_mb=config.memory_mb,
    )
    seconds = time.perf_counter() - started
    tok.save(out)
    sizes = [len(table.keys) for table in model.tables]
    say(
        f"  {len(train.tokens):,} tokens counted in {seconds:.1f} s; n-grams of 1 to "
        f"{config.order} tokens: {', '.join(f'{size:,}' for size in sizes)}"
    )
    counts = {"order": config.order, "tokens": len(train.tokens), "ngrams": sizes}
    if not len(validation.tokens):
        say("  no validation text: groundup evaluate measures the model on any other")
        return counts
    score = ngram_scores(model, validation)
    say(
        f"  validation text: {score['bits_per_byte']:.3f} bits per byte, perplexity "
        f"{score['perplexity']:.1f} ({score['perplexity_without_unseen']:.1f} without "
        f"{score['unseen_tokens']:,} tokens that training never saw)"
    )
    return counts | score


def make_cloze(config: ClozeConfig, out: Path) -> dict[str, Any]:
    """Write `questions.json` in SQuAD's form, made out of training text; show a few."""
    counts: Counter[str] = Counter()
    texts = track(read_texts(config.paths, "train"), "making questions")
    questions = list(cloze_questions(texts, config, counts))
    if not questions:
        raise DataError(
            f"no passage of about {config.passage_words} words gave a question: give more English "
            "prose, or fewer --passage-words"
        )
    write_json(out / "questions.json", squad_file(questions))
    for question in questions[:: max(1, len(questions) // 4)][:4]:
        say(f"  {question.question} -> {question.answers[0][0]}")
    say(
        f"  {len(questions):,} questions about {counts['passages']:,} passages "
        f"({counts['passages without a question']:,} gave none): {out / 'questions.json'}"
    )
    return {"questions": len(questions), **counts}
