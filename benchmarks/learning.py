"""Is something learned? Three experiments over three seeds, each a row of command lines.

python benchmarks/learning.py DATA OUT pretrained   an encoder pretrained here, and random weights
python benchmarks/learning.py DATA OUT reading      spans of answers, and trivial answers
python benchmarks/learning.py DATA OUT middle       fill-in-the-middle, and left to right

DATA holds real text in folders (banking77, xquad, gsm8k, ...; what each experiment reads stands
in its function). OUT keeps every stage: run again, and what is finished is skipped. Two seeds less
with --seeds 1.
"""

import argparse
import csv
import difflib
import json
import re
import statistics
from collections.abc import Iterable, Iterator
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
from groundup.tokenizer import Tokenizer

GAUNTLET = "llmfoundry-gauntlet/scripts/eval/local_data/reading_comprehension"
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


def corpus_of(texts: Iterable[str], out: Path, *tokenizer: object) -> None:
    """Build `corpus`, `tok` and `shards` in a folder, once."""
    if not (out / "texts.jsonl").is_file():
        out.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": text}) + "\n" for text in dict.fromkeys(texts)]
        (out / "texts.jsonl").write_text("".join(lines))
    command("data", "build", out / "texts.jsonl", "--out", out / "corpus")
    command("tokenizer", "train", out / "corpus", *tokenizer, "--out", out / "tok")
    words = ["data", "shards", out / "corpus", "--tokenizer", out / "tok"]
    command(*words, "--out", out / "shards")


def show(name: str, values: list[float], digits: int = 3) -> None:
    """Print the mean over seeds, the standard error behind it, and each."""
    mean = statistics.mean(values)
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    print(f"{name:<52} {mean:.{digits}f} +- {error:.{digits}f}   ({each})", flush=True)


# ---------------------------------------------------------------------------------------------
# Encoders: masked words on prose and on the task's texts without their labels, then 77 intents
# ---------------------------------------------------------------------------------------------

SHAPE = ["--hidden-size", 128, "--num-hidden-layers", 2, "--max-position-embeddings", 64]
EXAMPLES = 770  # ten texts a class
# the best of those tried for random weights (docs/decisions/0040)
RATES = ["--learning-rate", 0.02, "--adam-learning-rate", 0.003]


def pretrained(data: Path, out: Path, seeds: list[int], steps: int) -> None:
    """ModernBERT pretrained on masked words against the same network from random weights."""
    texts = [*everyday_prose(data), *banking_texts(data)]
    corpus_of(texts, out, "--kind", "wordpiece", "--vocab-size", 3000)
    found: dict[str, list[float]] = {}
    for seed in seeds:
        words = ["pretrain", out / "shards", "--tokenizer", out / "tok", *SHAPE, "--seed", seed]
        words += ["--objective", "mlm", "--model-type", "modernbert", "--intermediate-size", 256]
        words += ["--mlm-probability", 0.3, "--batch-size", 32, "--steps", steps, *DTYPE, *KEEP]
        command(*words, "--out", out / f"encoder-{seed}")
        trained, blank = out / f"encoder-{seed}/model", out / f"random-{seed}"
        if not blank.is_dir():
            torch.manual_seed(seed)
            save_model(Encoder(load_network(trained).config), Tokenizer.load(out / "tok"), blank)
        for name, start in (("pretrained", trained), ("random weights", blank)):
            folder = out / f"classes-{name.split()[0]}-{seed}"
            words = ["classify", data / "banking77/train.csv", "--methods", "encoder"]
            words += ["--test", data / "banking77/test.csv", "--max-test-rows", 3080]
            words += ["--encoder", start, "--sizes", EXAMPLES, "--seed", seed, *RATES, *DTYPE]
            command(*words, "--out", folder)
            scores = json.loads((folder / "classify.json").read_text())["scores"]["encoder"]
            found.setdefault(name, []).append(scores[-1]["accuracy"])
    for name, values in found.items():
        show(f"banking77, {EXAMPLES} texts, {name}: accuracy", values)
    if "random weights" in found:
        pairs = zip(found["pretrained"], found["random weights"], strict=True)
        show("gained by pretraining", [one - other for one, other in pairs])


def everyday_prose(data: Path) -> Iterator[str]:
    """Yield questions and answers, and web pages, about 4 MB."""
    for row in rows(data / "halueval-general/data/general_data.json"):
        yield f"{row['user_query'].strip()}\n{row['chatgpt_response'].strip()}"
    for row in rows(data / "dolly-hhrlhf-small/dolly_hhrlhf_train_small.jsonl"):
        asked = row["prompt"].split("### Instruction:")[-1].split("### Response:")[0]
        yield f"{asked.strip()}\n{row['response'].strip()}"
    for row in rows(data / "llamafactory-demos/c4_demo.jsonl"):
        yield row["text"]


def banking_texts(data: Path) -> Iterator[str]:
    """Yield the training texts of banking77 without their labels."""
    with open(data / "banking77/train.csv", newline="") as file:
        yield from (row["text"] for row in csv.DictReader(file))


# ---------------------------------------------------------------------------------------------
# Reading: masked words, then questions made of text, then a few hundred real ones
# ---------------------------------------------------------------------------------------------

READER = ["--hidden-size", 128, "--num-hidden-layers", 3, "--max-position-embeddings", 384]
HELD_OUT = 0.2  # of the articles


def reading(data: Path, out: Path, seeds: list[int], steps: int) -> None:
    """ModernBERT on masked words, on cloze questions and on XQuAD; each seed its own split."""
    corpus_of(encyclopedic(data), out, "--kind", "wordpiece", "--vocab-size", 4000)
    command("data", "cloze", out / "corpus", "--passage-words", 40, "--out", out / "cloze")
    found: dict[str, list[float]] = {}
    for seed in seeds:
        train, test = split_questions(data / "xquad/xquad.en.json", out, seed)
        words = ["pretrain", out / "shards", "--tokenizer", out / "tok", *READER, "--seed", seed]
        words += ["--objective", "mlm", "--model-type", "modernbert", "--intermediate-size", 256]
        words += ["--mlm-probability", 0.3, "--batch-size", 6, "--steps", steps, *DTYPE, *KEEP]
        command(*words, "--out", out / f"encoder-{seed}")
        start, asked = out / f"encoder-{seed}/model", ["--task", "span", "--test", test, *DTYPE]
        asked += [*RATES, "--seed", seed, *KEEP]
        made = ["--data", out / "cloze/questions.json", "--steps", steps, "--batch-size", 24]
        command("finetune", start, *asked, *made, "--out", out / f"cloze-{seed}")
        real = ["--data", train, "--epochs", 4, "--batch-size", 16]
        for name, model in (("masked words", start), ("and cloze", out / f"cloze-{seed}/model")):
            folder = out / f"reader-{name.split()[-1]}-{seed}"
            command("finetune", model, *asked, *real, "--out", folder)
            add_scores(found, name, read_json(folder / "stage.json")["summary"])
        add_scores(found, "cloze alone", read_json(out / f"cloze-{seed}/stage.json")["summary"])
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
    return " ".join(max(runs, key=len))


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


def encyclopedic(data: Path) -> Iterator[str]:
    """Yield passages of encyclopedias and abstracts, about 5 MB; none of XQuAD."""
    for row in rows(data / GAUNTLET / "boolq.jsonl"):
        yield row["query"].removeprefix("Passage: ").rsplit("\nQuestion: ", 1)[0]
    for row in rows(data / GAUNTLET / "pubmed_qa_labeled.jsonl"):
        yield row["context"].removeprefix("Context: ").rsplit("\nAnswer", 1)[0]
    yield from (data / "llamafactory-demos/wiki_demo.txt").read_text().splitlines()


# ---------------------------------------------------------------------------------------------
# Fill-in-the-middle: word problems of gsm8k with their solutions
# ---------------------------------------------------------------------------------------------

SENTINELS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
LENGTHS = (4, 16)  # tokens of the middles that are asked for
CONTEXT = 256


def middle(data: Path, out: Path, seeds: list[int], steps: int) -> None:
    """Two decoders of one size on the same tokens: one rearranged for filling in, one not."""
    texts = [f"{row['question']}\n{row['answer']}" for row in rows(data / "gsm8k/train.jsonl")]
    specials = ["--special-tokens", *SENTINELS]
    corpus_of(texts, out, "--kind", "bpe", "--vocab-size", 1024, *specials)
    tok = Tokenizer.load(out / "tok")
    gaps = draw_gaps(out / "shards", 250)
    found: dict[str, list[float]] = {}
    for seed in seeds:
        for objective in ("causal", "fim"):
            words = ["pretrain", out / "shards", "--tokenizer", out / "tok", "--seed", seed]
            words += ["--hidden-size", 128, "--num-hidden-layers", 3, "--steps", steps, *DTYPE]
            words += ["--max-position-embeddings", CONTEXT, "--objective", objective, *KEEP]
            words += ["--eval-steps", steps, "--sample-every-s", 10_000]
            words += ["--fim-rate", 0.9] if objective == "fim" else []
            command(*words, "--out", out / f"{objective}-{seed}")
            score_gaps(out / f"{objective}-{seed}/model", tok, objective, gaps, found)
    print(f"{len(gaps)} gaps in held-out problems; bits a byte of the true middle, and fills")
    for name, values in sorted(found.items()):
        show(name, values)


Gap = tuple[list[int], list[int], list[int]]  # before, the middle, behind


def draw_gaps(shards: Path, documents: int) -> list[Gap]:
    """Return middles of held-out documents with what stands around them."""
    rng = np.random.default_rng(0)
    gaps: list[Gap] = []
    for document in open_shard(shards, "validation").documents():
        ids = [int(i) for i in document[:-1]]
        if max(LENGTHS) + 24 < len(ids) < CONTEXT - 2 * max(LENGTHS) and len(
            gaps
        ) < documents * len(LENGTHS):
            for length in LENGTHS:
                start = int(rng.integers(8, len(ids) - length - 8))
                gaps.append((ids[:start], ids[start : start + length], ids[start + length :]))
    return gaps


def score_gaps(
    folder: Path, tok: Tokenizer, objective: str, gaps: list[Gap], found: dict[str, list[float]]
) -> None:
    """Add bits a byte of the true middles, and how near greedy fills come to them."""
    model, llm = load_model(folder).eval(), LLM(folder)
    pre, mid, suf = (tok.specials[name] for name in SENTINELS)
    eos = tok.eos_token_id
    forms = {
        "PSM": lambda before, behind: [eos, pre, *before, suf, *behind, mid],
        "SPM": lambda before, behind: [eos, pre, suf, *behind, mid, *before],
    }
    if objective == "causal":
        forms = {"left to right": lambda before, behind: [eos, *before]}
    for form, prompt in forms.items():
        for length in LENGTHS:
            chosen = [gap for gap in gaps if len(gap[1]) == length]
            prompts = [prompt(before, behind) for before, _, behind in chosen]
            nats = sum(nll(model, ids, gap[1]) for ids, gap in zip(prompts, chosen, strict=True))
            texts = [tok.decode(gap[1]) for gap in chosen]
            bits = nats / np.log(2) / sum(len(text.encode()) for text in texts)
            # all are told how long the true middle is: left to right would never stop by itself
            params = SamplingParams(temperature=0, max_tokens=length)
            said = [output.outputs[0].text for output in llm.generate(prompts, params)]
            near = [
                difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()
                for a, b in zip(said, texts, strict=True)
            ]
            name = f"{length:>2} tokens, {form}"
            same = [float(a.strip() == b.strip()) for a, b in zip(said, texts, strict=True)]
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


EXPERIMENTS = {
    "pretrained": (pretrained, 1000),
    "reading": (reading, 1000),
    "middle": (middle, 1500),
}


def main() -> None:
    """Run one experiment."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("data", type=Path)
    flags.add_argument("out", type=Path)
    flags.add_argument("experiment", choices=EXPERIMENTS)
    flags.add_argument("--steps", type=int, help="steps of pretraining")
    flags.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = flags.parse_args()
    run, steps = EXPERIMENTS[args.experiment]
    run(args.data, args.out / args.experiment, args.seeds, args.steps or steps)


if __name__ == "__main__":
    main()
