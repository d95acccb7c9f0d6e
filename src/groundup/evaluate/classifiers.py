"""Networks as classifiers: an encoder's own head, and a language model that reads for each label.

Shape suffixes: N texts, T positions, L labels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.core.errors import CheckpointError
from groundup.core.files import read_json
from groundup.core.progress import track
from groundup.core.types import Classifier
from groundup.model.bayes import NaiveBayes
from groundup.model.decoder import Decoder
from groundup.model.encoder import Encoder
from groundup.model.heads import HeadedDecoder
from groundup.model.hf import load_network
from groundup.model.lm import NeuralLM
from groundup.tokenizer import Tokenizer
from groundup.train.supervised import LabelledRow, collate_labelled

Floats = NDArray[np.float64]
LABELS = "labels.json"  # beside a language model: its labels and their share in training
BATCH = 64
TEXTS_AT_A_TIME = 256


class NetworkClassifier:
    """Discriminative: p(label | text) by a network with a head for classes."""

    def __init__(
        self,
        model: Encoder | HeadedDecoder,
        tok: Tokenizer,
        labels: Sequence[str],
        *,
        max_length: int | None = None,
    ) -> None:
        self.model, self.tok, self.labels = model, tok, tuple(labels)
        positions = model.config.max_position_embeddings
        self.longest = min(max_length or positions, positions)
        self.cut = 0  # texts that were longer

    def ids(self, text: str) -> list[int]:
        """Return ids with the special tokens that the body expects, cut to the longest length."""
        longest = self.longest
        ids = self.tok.encode(text)
        if isinstance(self.model, Encoder):
            self.cut += len(ids) > longest - 2
            first = self.tok.token_id("cls_token", "bos_token")
            return [first, *ids[: longest - 2], self.tok.token_id("sep_token", "eos_token")]
        self.cut += len(ids) > longest - 1
        return [*ids[: longest - 1], self.tok.eos_token_id]

    @torch.inference_mode()
    def log_probs(self, texts: Sequence[str]) -> Floats:
        """Return log p(label | text) [N, L]."""
        device = next(self.model.parameters()).device
        rows = [LabelledRow(self.ids(text), 0) for text in texts]
        order = sorted(range(len(rows)), key=lambda n: (len(rows[n].ids), n))
        result_NL = np.zeros((len(rows), len(self.labels)))
        self.model.eval()
        for first in track(range(0, len(order), BATCH), "classifying"):
            chosen = order[first : first + BATCH]
            batch = collate_labelled(
                [rows[n] for n in chosen], self.tok.pad_token_id, most=self.longest
            )
            logits_BL = self.model(batch["ids"].to(device), batch["mask"].to(device))
            result_NL[chosen] = logits_BL.double().log_softmax(-1).cpu().numpy()
        return result_NL


class LMClassifier:
    """Generative: p(label) times p(text | label) by a language model that reads the label first.

    Yogatama et al. 2017, arXiv 1703.01898, sec. 2.2, with the label as text in front.
    """

    def __init__(
        self, model: Decoder, tok: Tokenizer, labels: Sequence[str], log_prior_L: Floats
    ) -> None:
        self.model, self.tok, self.labels = model, tok, tuple(labels)
        self.log_prior_L = log_prior_L
        self.lm = NeuralLM(model, tok.eos_token_id, batch_tokens=8_192)

    @staticmethod
    def parts(tok: Tokenizer, label: str, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of a label, and of the text behind it with its end."""
        name = label.replace("_", " ")
        return tok.encode(f"{name}:"), [*tok.encode(f" {text}"), tok.eos_token_id]

    def log_probs(self, texts: Sequence[str]) -> Floats:
        """Return log p(label | text) [N, L]; every text is read once for each label."""
        L = len(self.labels)
        result_NL = np.tile(self.log_prior_L, (len(texts), 1))
        for first in track(range(0, len(texts), TEXTS_AT_A_TIME), "reading for each label"):
            part = texts[first : first + TEXTS_AT_A_TIME]
            pairs = [self.parts(self.tok, label, text) for text in part for label in self.labels]
            documents = [np.array(name + rest) for name, rest in pairs]
            scores = self.lm.token_logprobs(documents)
            sums = [
                float(values[len(name) :].sum())
                for values, (name, _) in zip(scores, pairs, strict=True)
            ]
            result_NL[first : first + len(part)] += np.array(sums).reshape(-1, L)
        return result_NL - np.logaddexp.reduce(result_NL, axis=1, keepdims=True)


def load_classifier(path: str | Path, *, device: str | torch.device = "cpu") -> Classifier:
    """Load what `groundup classify` trained, or any Hugging Face folder with a head for classes."""
    folder = Path(path)
    if (folder / "bayes.json").is_file():
        return NaiveBayes.load(folder)
    model = load_network(folder, device=device)
    tok = Tokenizer.load(folder).need_rows(model.config.vocab_size, folder)
    if isinstance(model, Decoder):
        if not (folder / LABELS).is_file():
            raise CheckpointError(
                f"{folder} is a language model without {LABELS}: train it with groundup classify"
            )
        found = read_json(folder / LABELS)
        return LMClassifier(model, tok, found["labels"], np.array(found["log_prior"]))
    task = model.config.task if isinstance(model, Encoder) else model.task
    if task != "sequence":
        raise CheckpointError(f"{folder} has a head for {task}, not for classes")
    labels = model.config.labels if isinstance(model, Encoder) else model.labels
    return NetworkClassifier(model, tok, labels)
