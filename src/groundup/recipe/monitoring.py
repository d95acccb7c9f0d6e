"""What watches a pretraining run: held-out scores, benchmarks, trackers."""

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core import config as configs
from groundup.core.device import training_dtype
from groundup.core.errors import DataError, need
from groundup.core.files import write_text
from groundup.core.memory import release_memory
from groundup.core.metrics import MetricsLog
from groundup.core.progress import say
from groundup.data import Shard
from groundup.evaluate.tasks import Task, read_task, run_task
from groundup.model.decoder import Decoder
from groundup.model.lm import NeuralLM
from groundup.recipe.configs import PretrainConfig
from groundup.tokenizer import Tokenizer
from groundup.train import Hook, MaskedLM, NextToken, State
from groundup.train.masked import PAIRS
from groundup.train.ranks import here
from groundup.train.step import DTYPES

EVALUATIONS = 10  # a run, where eval_steps is unset
FEW_BYTES = 20_000
RECENT = 1  # generation of objects made of late, as those of steps and scores are
SCORED = 4096  # tokens at a time, but no more than are trained at a time: that would be the peak


def evaluation_hooks(
    config: PretrainConfig, model: Decoder, tok: Tokenizer, validation: Shard, out: Path
) -> list[Hook]:
    """Return a hook that appends bits per byte and the tasks' scores to `evals.jsonl`.

    The scores also join the step's metrics, as `eval_...`. No hook where there is nothing to score.
    """
    documents = spread(validation, config.eval_tokens)
    tasks = [read_task(path, limit=config.eval_limit, seed=config.seed) for path in config.tasks]
    if validation.num_bytes < FEW_BYTES:
        say(f"  the validation text has {validation.num_bytes:,} bytes: its scores say little")
    if not documents:
        refuse_unscored(config, "eval_bits_per_byte")
    if not documents and not tasks:
        return []
    lm = NeuralLM(
        model,
        tok.eos_token_id,
        batch_tokens=min(SCORED, config.batch_size * config.max_position_embeddings),
        dtype=DTYPES[training_dtype(config.device, config.dtype)],
    )
    num_bytes = bytes_of(documents, tok)

    def score(state: State) -> dict[str, float]:
        scores: dict[str, float] = {}
        if documents:
            nats = -sum(float(values.sum()) for values in lm.token_logprobs(documents))
            scores["bits_per_byte"] = nats / math.log(2) / max(1, num_bytes)
        for task in tasks:
            found = run_task(lm, tok, task, quiet=True)
            scores |= {f"{task.name}_{key}": found[key] for key in task.scores}
        return scores

    return [scoring_hook(config, out, score)]


def refuse_unscored(config: PretrainConfig, *names: str) -> None:
    """Refuse to find the best checkpoint by a score of validation text where none is scored."""
    if config.metric_for_best_model in names:
        raise DataError(
            f"metric_for_best_model = {config.metric_for_best_model}: no validation text is "
            "scored; give a corpus with some and --eval-tokens, or take another metric"
        )


def scoring_hook(
    config: PretrainConfig, out: Path, score: Callable[[State], dict[str, float]]
) -> Hook:
    """Return a hook that appends what `score` finds, of the weights that are saved, to the log.

    It needs less memory than a step, but in other pieces, which find no room among what steps left.
    """
    log = MetricsLog(out / "evals.jsonl")

    def run(state: State) -> None:
        release_memory(RECENT)
        with state.as_saved():
            scores = score(state)
        release_memory(RECENT)
        log.truncate_after(state.step - 1)
        log.write(step=state.step, tokens=state.tokens, **scores)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        say(f"  validation at step {state.step:,}: {shown}")
        state.metrics |= {f"eval_{name}": value for name, value in scores.items()}

    return Hook(steps_between(config), run, looks=True)


def metric_names(config: PretrainConfig, tasks: Sequence[Task]) -> list[str]:
    """Return what the steps of a run will have in their metrics, besides what all steps have.

    A model that is given may have experts: its router's loss is taken to be there.
    """
    if config.objective in PAIRS:
        names = MaskedLM(pairs=PAIRS[config.objective]).metrics
        return [*names, *(f"eval_{name}" for name in names)]
    balance = config.router_aux_loss_coef * (config.num_experts > 0 or config.init is not None)
    names = NextToken(z_loss=config.z_loss, load_balance=balance).metrics
    scores = [f"eval_{task.name}_{score}" for task in tasks for score in task.scores]
    return ["bits_per_byte", "eval_bits_per_byte", *names, *scores]


def steps_between(config: PretrainConfig) -> int:
    """Return the steps from one evaluation to the next.

    Where a score decides on the best checkpoint, every checkpoint has one.
    """
    if config.eval_steps is None and (config.metric_for_best_model or "").startswith("eval_"):
        return config.checkpoint_every
    return config.eval_steps or max(1, math.ceil(config.steps / EVALUATIONS))


def tokens_per_step(config: PretrainConfig) -> int:
    """Return the positions of one optimizer step."""
    rows = config.batch_size * config.gradient_accumulation_steps
    return rows * config.max_position_embeddings


def spread(validation: Shard, most_tokens: int) -> list[NDArray[np.integer]]:
    """Return documents drawn from all over a split, `most_tokens` together; the last may be cut."""
    documents = validation.documents()
    chosen: list[NDArray[np.integer]] = []
    left = most_tokens
    for n in np.random.default_rng(0).permutation(len(documents)).tolist():
        if left > 0 and len(documents[n]):
            chosen.append(documents[n][:left])
            left -= len(chosen[-1])
    return chosen


def bytes_of(documents: Sequence[NDArray[np.integer]], tok: Tokenizer) -> int:
    """Return the bytes of documents' text, without their ends."""
    texts = (tok.decode(ids[ids != tok.eos_token_id].tolist()) for ids in documents)
    return sum(len(text.encode()) for text in texts)


@contextmanager
def tracking(config: PretrainConfig, out: Path) -> Iterator[list[Hook]]:
    """Yield hooks that send each step's metrics to the trackers of `report_to`."""
    chosen = config.report_to if here().first else ()
    trackers = [TRACKERS[name](config, out) for name in chosen]
    try:
        yield [Hook(1, tracker.write) for tracker in trackers]
    finally:
        for tracker in trackers:
            tracker.close()


class TensorBoard:
    """Event files in `out/tensorboard`; a resumed run takes back what came later."""

    def __init__(self, config: PretrainConfig, out: Path) -> None:
        need("tensorboard", extra="tracking", purpose="--report-to tensorboard")
        self.folder = out / "tensorboard"
        self.writer: Any = None

    def write(self, state: State) -> None:
        """Append one step."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.folder, purge_step=state.step)
        for name, value in state.metrics.items():
            self.writer.add_scalar(name, value, state.step)

    def close(self) -> None:
        """Write out what is buffered."""
        if self.writer is not None:
            self.writer.close()


class WeightsAndBiases:
    """A run in the project `groundup`; its network use is the user's choice (WANDB_MODE).

    Its id lies in `out`, so that a resumed run goes on in the same curves.
    """

    def __init__(self, config: PretrainConfig, out: Path) -> None:
        wandb: Any = need("wandb", extra="tracking", purpose="--report-to wandb")
        file = out / "wandb.id"
        if not file.is_file():
            write_text(file, secrets.token_hex(4))
        self.run = wandb.init(
            project="groundup",
            id=file.read_text(),
            resume="allow",
            name=out.name,
            dir=str(out),
            config=configs.dump(config),
        )

    def write(self, state: State) -> None:
        """Log one step."""
        self.run.log(dict(state.metrics), step=state.step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
