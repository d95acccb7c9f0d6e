"""`LLM`: a model and its tokenizer behind vLLM's offline interface."""

import dataclasses
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from groundup.core import config as configs
from groundup.core import device as devices
from groundup.core.errors import ConfigError, GroundupError
from groundup.core.run import resolve_model
from groundup.core.types import CompletionOutput, Message, RequestOutput, SamplingParams
from groundup.generate.asked import (
    Adapters,
    Params,
    Prompt,
    as_conversations,
    as_list,
    as_names,
    as_params,
    ids_of,
    naming,
)
from groundup.generate.beam import Observer, completion, search_all
from groundup.generate.config import BeamSearchParams, EngineConfig, SpeculativeConfig
from groundup.generate.engine import Engine
from groundup.generate.request import Pooling, Request
from groundup.generate.statistical import NGramDecoder
from groundup.model import kernels
from groundup.model.decoder import Decoder
from groundup.model.heads import HeadedDecoder
from groundup.model.hf import load_network, need_decoder, read_ends
from groundup.model.ngram import NGram, is_ngram
from groundup.model.quant import StoredInt8
from groundup.model.view import Move
from groundup.tokenizer import Tokenizer


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
        speculative: SpeculativeConfig | Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(speculative, Mapping):
            speculative = configs.load(SpeculativeConfig, speculative, where="speculative")
        if not isinstance(speculative, SpeculativeConfig | None):
            raise ConfigError(f"speculative = {speculative!r} must be a SpeculativeConfig")
        config = configs.load(EngineConfig, settings, where="LLM")
        if not isinstance(tokenizer, Tokenizer | None):
            raise ConfigError(f"tokenizer = {reprlib.repr(tokenizer)} must be a Tokenizer")
        self.labels: tuple[str, ...] = ()
        ends: Sequence[int] | None = None
        if isinstance(model, Decoder):
            if tokenizer is None:
                raise ConfigError("a model in memory needs its tokenizer: LLM(model, tokenizer)")
            if config.dtype is not None:
                raise ConfigError("a model in memory is used as it is: dtype is for folders")
            decoder = model
        else:
            folder = resolve_model(model)
            tokenizer = tokenizer or Tokenizer.load(folder)
            if is_ngram(folder):
                decoder = NGramDecoder(NGram.load(folder), tokenizer.bos_token_id)
            else:
                decoder = self.load_decoder(folder, device, config)
                ends = ends_of(folder, decoder, tokenizer)
                if any(isinstance(module, StoredInt8) for module in decoder.modules()):
                    config = dataclasses.replace(config, quantization="int8")
            tokenizer.need_rows(decoder.config.vocab_size, folder)
        self.tokenizer = tokenizer
        self.engine = Engine(decoder, tokenizer, config, ends=ends, speculative=speculative)
        self.engine.writes = not self.labels
        if decoder is not model and config.quantization is None:  # int8 views have large pages
            self.engine.move = Move(decoder)

    def load_decoder(self, folder: Path, device: str | None, config: EngineConfig) -> Decoder:
        """Return a folder's network; a head for labels names them.

        Matrices that are stored in int8 or bf16 stay so on a CPU, unless a dtype is asked for.
        """
        devices.route_products()
        place = devices.place(device)
        usual = devices.fastest_dtype(place) if place.type == "cuda" else torch.float32
        wanted = usual if config.dtype is None else getattr(torch, config.dtype)
        keep: tuple[torch.dtype, ...] = ()
        if place.type == "cpu" and (config.dtype is None or config.quantization == "int8"):
            keep = (torch.int8, torch.bfloat16) if kernels.available() else (torch.int8,)
        network = load_network(folder, device=place, dtype=wanted, keep=keep)
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
        adapter: Adapters = None,
    ) -> list[RequestOutput]:
        """Complete prompts (texts or ids), all of them batched; outputs keep their order.

        `adapter` names a loaded one for all prompts, or one or None for each.
        """
        many = as_list(prompts)
        encoded = self.encode_all(many)
        requests = self.queue(encoded, as_params(params, len(many)), adapter)
        self.finish([request for group in requests for request in group])
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

    def queue(
        self,
        encoded: Sequence[list[int]],
        each: Sequence[SamplingParams],
        adapter: Adapters = None,
        pooling: Pooling | None = None,
        *,
        first_scored: Sequence[int] | None = None,
    ) -> list[list[Request]]:
        """Queue prompts; one that cannot be answered is named, and takes the others back."""
        add, names = self.engine.add, as_names(adapter, len(encoded))
        firsts = first_scored or [1] * len(encoded)
        requests: list[list[Request]] = []
        try:
            for ids, own, name, first in zip(encoded, each, names, firsts, strict=True):
                with naming(len(requests), len(encoded)):
                    new = add(ids, own, adapter=name, pooling=pooling, first_scored=first)
                    requests.append(new)
        except BaseException:
            self.engine.abort([request for group in requests for request in group])
            raise
        return requests

    def finish(self, requests: Sequence[Request]) -> None:
        """Step until requests have ended; an error or Ctrl-C leaves none of them behind."""
        try:
            for request in requests:
                while not request.finished:
                    self.engine.step()
        finally:
            self.engine.abort(requests)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Literal["last", "mean"] = "mean",
        adapter: Adapters = None,
    ) -> Tensor:
        """Return a unit vector a prompt, [prompts, hidden size]: the mean or last hidden state."""
        states_BE = self.pooled(prompts, pooling, adapter)
        return torch.nn.functional.normalize(states_BE, dim=-1)

    def classify(self, prompts: Prompt | Sequence[Prompt]) -> Tensor:
        """Return log-probabilities of the labels, [prompts, labels], of a model with such a head.

        `labels` names the columns.
        """
        self.need_labels()
        return self.pooled(prompts, "logits").log_softmax(-1)

    def need_labels(self) -> None:
        """Raise unless the model has a head for labels."""
        if not self.labels:
            raise ConfigError(
                "this model writes text and has no head for labels: score() compares answers, "
                "`groundup classify` makes such a head"
            )

    def pooled(
        self, prompts: Prompt | Sequence[Prompt], pooling: Pooling, adapter: Adapters = None
    ) -> Tensor:
        """Return what the engine pools of each prompt, one row each."""
        encoded = self.encode_all(as_list(prompts))
        if not encoded:
            raise ConfigError("no prompts were given: there is nothing to pool")
        groups = self.queue(encoded, [SamplingParams()] * len(encoded), adapter, pooling)
        requests = [request for [request] in groups]
        self.finish(requests)
        rows = [request.pooled for request in requests if request.pooled is not None]
        assert len(rows) == len(requests)
        return torch.stack(rows)

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        answers: Prompt | Sequence[Prompt],
        *,
        adapter: Adapters = None,
    ) -> list[float]:
        """Return the log-probability of each answer behind its prompt; one prompt serves many.

        What prompts begin with is shared, so that many answers to one prompt cost little more.
        """
        ends = [self.answer_ids(answer) for answer in as_list(answers)]
        starts = self.encode_all(as_list(prompts))
        if len(starts) == 1:
            starts *= len(ends)
        if len(starts) != len(ends) or not all(ends):
            raise ConfigError(
                f"{len(starts)} prompts and {len(ends)} answers: give one prompt, or one for each "
                "answer, and no empty answer"
            )
        rows = [start + end for start, end in zip(starts, ends, strict=True)]
        params = [SamplingParams(prompt_logprobs=0)] * len(rows)
        firsts = [len(start) for start in starts]
        groups = self.queue(rows, params, adapter, "logits", first_scored=firsts)
        requests = [request for [request] in groups]
        self.finish(requests)
        return [answer_score(r, end) for r, end in zip(requests, ends, strict=True)]

    def answer_ids(self, answer: Prompt) -> list[int]:
        """Return an answer's ids, without the token that begins a document."""
        return self.tokenizer.encode(answer) if isinstance(answer, str) else ids_of(answer)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        beams: BeamSearchParams,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        observe: Observer | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt by beam search; the best `params.n` beams, scores included.

        All of `params` hold but those of sampling. `observe` sees every candidate.
        """
        if not isinstance(beams, BeamSearchParams):
            raise ConfigError(f"beams = {beams!r} must be BeamSearchParams")
        [params] = as_params(params, 1)
        many, engine = as_list(prompts), self.engine
        with engine.lock:
            engine.check_adapter(adapter, params)
            engine.notice_new_weights()
            ready = []
            for place, ids in enumerate(self.encode_all(many)):
                with naming(place, len(many)):
                    ready.append(engine.prepare(ids, params))
            if params.n > beams.beam_width:
                raise ConfigError(f"n = {params.n} answers need a beam_width of as many")
            (model, told), exact = engine.through(adapter), engine.config.batch_invariant
            found = search_all(
                model, ready, beams, engine.rows, exact=exact, told=told, observe=observe
            )
        return [
            RequestOutput(
                request_id=str(number),
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_token_ids=ids,
                outputs=[
                    completion(beam, index, beams.length_penalty)
                    for index, beam in enumerate(answers[: params.n])
                ],
                finished=True,
            )
            for number, (prompt, (ids, _, _), answers) in enumerate(
                zip(many, ready, found, strict=True)
            )
        ]

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        *,
        adapter: Adapters = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many."""
        ids = [self.chat_ids(messages) for messages in as_conversations(conversations)]
        return self.generate(ids, params, adapter=adapter)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
    ) -> Iterator[str]:
        """Yield the text of one answer as it comes; together it is what `generate` returns.

        An answer that fails on its way is a GroundupError, behind the text that there was.
        """
        [params] = as_params(params, 1)
        if params.n != 1 or params.best_of not in (None, 1):
            raise ConfigError("a stream is of one answer: n and best_of must be 1")
        [[request]] = self.queue([self.prompt_ids(prompt)], [params], adapter)
        try:
            while True:
                with self.engine.lock:  # another thread may be in the middle of a step
                    text, done = request.take_text(), request.finished
                if text:
                    yield text
                if done:  # in a step of someone else's, perhaps
                    break
                self.engine.step()
        finally:
            self.engine.abort([request])
        if request.output.finish_reason == "error":
            raise GroundupError(str(request.output.stop_reason))

    def prompt_ids(self, prompt: Prompt | Sequence[Message]) -> list[int]:
        """Return the ids of a prompt or a conversation."""
        if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], dict):
            return self.chat_ids(prompt)  # type: ignore[arg-type]
        return self.encode(prompt)  # type: ignore[arg-type]

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's ids, behind the token that begins a document where it is text."""
        if isinstance(prompt, str):
            return [self.tokenizer.bos_token_id, *self.tokenizer.encode(prompt)]
        return ids_of(prompt) or [self.tokenizer.bos_token_id]

    def encode_all(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the ids of several prompts; one that has none is named."""
        encoded = []
        for place, prompt in enumerate(prompts):
            with naming(place, len(prompts)):
                encoded.append(self.encode(prompt))
        return encoded

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return a conversation's ids, ready for the assistant's turn."""
        [messages] = as_conversations([messages])
        return self.tokenizer.render(messages, add_generation_prompt=True).ids


def best(group: Sequence[Request]) -> list[CompletionOutput]:
    """Return the answers; of `best_of`, the n likeliest by log-probability a token, as OpenAI's."""
    outputs = [request.output for request in group]
    params = group[0].params
    if params.best_of is None:
        return outputs

    for output in outputs:
        if output.finish_reason not in ("error", "abort"):  # these come last, without a score
            count = max(1, len(output.token_ids))
            output.score = (output.cumulative_logprob or 0.0) / count
    ranked = sorted(outputs, key=lambda o: math.inf if o.score is None else -o.score)[: params.n]
    for index, output in enumerate(ranked):
        output.index = index
    return ranked


def ends_of(folder: Path, model: Decoder, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end answers: generation_config.json's, or config's and tokenizer's."""
    size = model.config.vocab_size
    if found := read_ends(folder / "generation_config.json", size):
        return found
    return list(
        dict.fromkeys((*read_ends(folder / "config.json", size), *tokenizer.stop_token_ids))
    )


def answer_score(request: Request, answer: Sequence[int]) -> float:
    """Return the log-probability of the last ids of a prompt, its answer."""
    found = (request.prompt_logprobs or [])[-len(answer) :]
    return sum((row or {})[i] for i, row in zip(answer, found, strict=True))
