"""`LLM`: a model and its tokenizer behind vLLM's offline interface."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from groundup.core import config as configs
from groundup.core import device as devices
from groundup.core.errors import ConfigError, GroundupError
from groundup.core.run import resolve_model
from groundup.core.types import CompletionOutput, Message, RequestOutput, SamplingParams
from groundup.generate.beam import (
    MOST_BEAMS,
    Beam,
    Observer,
    beam_search,
    completion,
    search_together,
)
from groundup.generate.branches import Branches
from groundup.generate.config import BeamSearchParams, EngineConfig, SpeculativeConfig
from groundup.generate.engine import Engine
from groundup.generate.request import Pooling, Request
from groundup.generate.statistical import NGramDecoder
from groundup.model.decoder import Decoder
from groundup.model.heads import HeadedDecoder
from groundup.model.hf import load_network, need_decoder, read_generation_ends
from groundup.model.ngram import NGram, is_ngram
from groundup.model.view import Move
from groundup.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """Generate with a model folder, a run folder, or a model in memory.

    A model in memory is used as it is, so that a training run can sample from it: its mode is
    restored and the global random state is never touched. `settings` are EngineConfig's fields;
    `speculative` says who guesses ahead.
    """

    def __init__(
        self,
        model: str | Path | Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        device: str | None = None,
        speculative: SpeculativeConfig | None = None,
        **settings: Any,
    ) -> None:
        config = configs.load(EngineConfig, settings, where="LLM")
        self.labels: tuple[str, ...] = ()
        ends: Sequence[int] | None = None
        if isinstance(model, Decoder):
            if tokenizer is None:
                raise ConfigError("a model in memory needs its tokenizer: LLM(model, tokenizer)")
            decoder = model
        else:
            folder = resolve_model(model)
            tokenizer = tokenizer or Tokenizer.load(folder)
            if is_ngram(folder):
                decoder = NGramDecoder(NGram.load(folder), tokenizer.bos_token_id)
            else:
                decoder = self.load_decoder(folder, device)
                ends = read_generation_ends(folder) or None
            tokenizer.need_rows(decoder.config.vocab_size, folder)
        self.tokenizer = tokenizer
        self.engine = Engine(decoder, tokenizer, config, ends=ends, speculative=speculative)
        if decoder is not model and config.quantization is None:  # int8 views have large pages
            self.engine.move = Move(decoder)

    def load_decoder(self, folder: Path, device: str | None) -> Decoder:
        """Return a folder's network; a head for labels names them."""
        devices.route_products()
        place = devices.place(device)
        dtype = devices.fastest_dtype(place) if place.type == "cuda" else torch.float32
        network = load_network(folder, device=place, dtype=dtype)
        if isinstance(network, HeadedDecoder) and network.task == "sequence":
            self.labels = network.labels or tuple(map(str, range(network.num_labels)))
            network = network.as_decoder()
        return need_decoder(network, folder)

    @property
    def context(self) -> int:
        """Return the number of tokens that prompt and answer may have together."""
        return self.engine.context

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Read a LoRA adapter in PEFT's format, which requests may then name."""
        self.engine.load_adapter(name, folder)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts (texts or ids), all of them batched; outputs keep their order.

        `adapter` names a loaded one for all prompts, or one or None for each.
        """
        if self.labels:
            raise ConfigError("this model has a head for labels and writes no text: use classify()")
        many = as_list(prompts)
        named = [adapter] * len(many) if adapter is None or isinstance(adapter, str) else adapter
        each = as_params(params, len(many))
        encoded = [self.encode(prompt) for prompt in many]
        requests: list[list[Request]] = []
        for number, (ids, own, low) in enumerate(zip(encoded, each, named, strict=True), start=1):
            try:
                requests.append(self.engine.add(ids, own, adapter=low))
            except GroundupError as err:
                self.engine.abort([request for group in requests for request in group])
                raise type(err)(f"prompt {number}: {err}" if len(many) > 1 else str(err)) from err
        while self.engine.busy:
            self.engine.step()
        return [
            RequestOutput(
                request_id=str(n),
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_token_ids=ids,
                outputs=best(group),
                prompt_logprobs=group[0].prompt_logprobs,
                finished=True,
            )
            for n, (prompt, ids, group) in enumerate(zip(many, encoded, requests, strict=True))
        ]

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, pooling: Literal["last", "mean"] = "mean"
    ) -> Tensor:
        """Return a unit vector a prompt, [prompts, hidden size]: the mean or last hidden state."""
        states_BE = self.pooled(prompts, pooling)
        return torch.nn.functional.normalize(states_BE, dim=-1)

    def classify(self, prompts: Prompt | Sequence[Prompt]) -> Tensor:
        """Return log-probabilities of the labels, [prompts, labels], of a model with such a head.

        `labels` names the columns.
        """
        if not self.labels:
            raise ConfigError(
                "this model writes text and has no head for labels: score() compares answers, "
                "`groundup classify train` makes such a head"
            )
        return self.pooled(prompts, "logits").log_softmax(-1)

    def pooled(self, prompts: Prompt | Sequence[Prompt], pooling: Pooling) -> Tensor:
        """Return what the engine pools of each prompt, one row each."""
        one = SamplingParams(max_tokens=1)
        ids = [self.encode(prompt) for prompt in as_list(prompts)]
        requests = [self.engine.add(row, one, pooling=pooling)[0] for row in ids]
        while self.engine.busy:
            self.engine.step()
        rows = [request.pooled for request in requests if request.pooled is not None]
        assert len(rows) == len(requests)
        return torch.stack(rows)

    def score(
        self, prompts: Prompt | Sequence[Prompt], answers: Prompt | Sequence[Prompt]
    ) -> list[float]:
        """Return the log-probability of each answer behind its prompt; one prompt serves many.

        What prompts begin with is shared, so that many answers to one prompt cost little more.
        """
        ends = [list(self.answer_ids(answer)) for answer in as_list(answers)]
        starts = [self.encode(prompt) for prompt in as_list(prompts)]
        if len(starts) == 1:
            starts *= len(ends)
        if len(starts) != len(ends) or not all(ends):
            raise ConfigError(
                f"{len(starts)} prompts and {len(ends)} answers: give one prompt, or one for each "
                "answer, and no empty answer"
            )
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        rows = [start + end for start, end in zip(starts, ends, strict=True)]
        outputs = self.generate(rows, params)
        scores = []
        for row, end, output in zip(rows, ends, outputs, strict=True):
            found = (output.prompt_logprobs or [])[-len(end) :]
            scores.append(sum((p or {})[i] for i, p in zip(row[-len(end) :], found, strict=True)))
        return scores

    def answer_ids(self, answer: Prompt) -> Sequence[int]:
        """Return an answer's ids, without the token that begins a document."""
        return self.tokenizer.encode(answer) if isinstance(answer, str) else answer

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        beams: BeamSearchParams,
        params: SamplingParams | None = None,
        *,
        observe: Observer | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt by beam search; the best `params.n` beams, scores included.

        All of `params` hold but those of sampling. `observe` sees every candidate.
        """
        params = params or SamplingParams()
        if params.n > beams.beam_width:
            raise ConfigError(f"n = {params.n} answers need a beam_width of as many")
        self.engine.notice_new_weights()
        many = as_list(prompts)
        ready = [self.engine.prepare(self.encode(prompt), params) for prompt in many]
        rooms = [min(stop.room, params.max_tokens or stop.room) for _, _, stop in ready]
        longest = max(
            (len(i) + room for (i, _, _), room in zip(ready, rooms, strict=True)), default=0
        )
        at_once = max(1, min(self.engine.rows, MOST_BEAMS) // beams.beam_width)
        rows = min(at_once, len(many)) * beams.beam_width
        exact = self.engine.config.batch_invariant
        branches = Branches(self.engine.model, rows, longest, exact=exact)
        searches = [
            beam_search(branches, Beam(stop, rules), ids, beams, most=room, observe=observe)
            for (ids, rules, stop), room in zip(ready, rooms, strict=True)
        ]
        return [
            RequestOutput(
                request_id=str(number),
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_token_ids=ids,
                outputs=[
                    completion(beam, index, beams.length_penalty)
                    for index, beam in enumerate(found[: params.n])
                ],
                finished=True,
            )
            for number, (prompt, (ids, _, _), found) in enumerate(
                zip(many, ready, search_together(branches, searches, at_once), strict=True)
            )
        ]

    def chat(
        self, conversations: Sequence[Message] | Sequence[Sequence[Message]], params: Params = None
    ) -> list[RequestOutput]:
        """Answer one conversation or many."""
        one = bool(conversations) and isinstance(conversations[0], dict)
        many = [conversations] if one else conversations
        return self.generate([self.chat_ids(messages) for messages in many], params)  # type: ignore[arg-type]

    def stream(
        self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[str]:
        """Yield the text of one answer as it comes; together it is what `generate` returns."""
        is_chat = bool(prompt) and isinstance(prompt[0], dict)
        ids = self.chat_ids(prompt) if is_chat else self.encode(prompt)  # type: ignore[arg-type]
        [request] = self.engine.add(ids, params or SamplingParams())
        try:
            while not request.finished:
                self.engine.step()
                if text := request.take_text():
                    yield text
        finally:
            self.engine.abort([request])

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's ids, behind the token that begins a document where it is text."""
        if isinstance(prompt, str):
            return [self.tokenizer.bos_token_id, *self.tokenizer.encode(prompt)]
        return list(prompt)

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return a conversation's ids, ready for the assistant's turn."""
        return self.tokenizer.render(messages, add_generation_prompt=True).ids


def best(group: Sequence[Request]) -> list[CompletionOutput]:
    """Return the answers; of `best_of`, the n likeliest by log-probability a token, as OpenAI's."""
    outputs = [request.output for request in group]
    params = group[0].params
    if params.best_of is None:
        return outputs

    for output in outputs:
        output.score = (output.cumulative_logprob or 0.0) / max(1, len(output.token_ids))
    ranked = sorted(outputs, key=lambda output: -(output.score or 0.0))[: params.n]
    for index, output in enumerate(ranked):
        output.index = index
    return ranked


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return one prompt or many as a list."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def as_params(params: Params, count: int) -> list[SamplingParams]:
    """Return one set of parameters a prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ConfigError(f"{len(params)} sampling parameters were given for {count} prompts")
    return list(params)
