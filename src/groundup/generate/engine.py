"""Continuous batching: requests join and leave between steps, each with its own parameters.

A step has a budget of tokens. Running requests are served first, the newest token of each or a
chunk of its prompt; waiting ones join while there are rows, blocks of the cache and budget. Where
blocks run out, the request that matters least gives its own back and is computed again later.
There is one forward, the model's; the engine owns the cache, and of the weights only views.
"""

import threading
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import torch

from groundup.core.errors import ConfigError, closest
from groundup.core.types import SamplingParams
from groundup.generate.blocks import BlockPool
from groundup.generate.cache import Feed, KVCache, block_count
from groundup.generate.config import STEP_TOKENS, EngineConfig, SpeculativeConfig
from groundup.generate.decoding import Decoding, Flight
from groundup.generate.paged import make_batch
from groundup.generate.params import check, check_prompt, check_room, tidy
from groundup.generate.processors import LogitsProcessors, looks_of, make_processors
from groundup.generate.request import Pooling, PromptLogprobs, Request
from groundup.generate.sampling import Watch, cuts_hold, sample
from groundup.generate.schedule import Plan, Schedule
from groundup.generate.speculative import Speculator, make_speculator
from groundup.generate.stop import Stopping
from groundup.model.adapter import Adapter
from groundup.model.adapter import load_adapter as read_adapter
from groundup.model.decoder import Decoder
from groundup.model.gpu import GpuStack
from groundup.model.heap import keep_memory
from groundup.model.mixing import Mix, check_mixable, with_adapters
from groundup.model.narrow import numbers_of
from groundup.model.view import Move, stamp, view_of
from groundup.tokenizer import Tokenizer

F = TypeVar("F", bound=Callable[..., Any])


def in_turn(method: F) -> F:
    """Let threads that share an engine call a method one after the other."""

    @wraps(method)
    def waits(self: "Engine", *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return cast(F, waits)


class Engine:
    """Run requests over one model; weights may change between calls, never within a request.

    Threads may share it: whoever steps moves the requests of all of them on.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        ends: Sequence[int] | None = None,
        speculative: SpeculativeConfig | None = None,
    ) -> None:
        self.source, self.tokenizer, self.lock = model, tokenizer, threading.RLock()
        self.config = config = config or EngineConfig()
        self.ends = tuple(ends if ends is not None else tokenizer.stop_token_ids)
        weight = numbers_of(model)
        self.device = weight.device
        on_gpu = self.device.type == "cuda"
        many = on_gpu and speculative is None  # those who guess have caches of their own
        self.rows = config.max_num_seqs or (256 if many else 16)
        blocks = block_count(model, config, self.rows)
        self.context = min(model.config.max_position_embeddings, blocks * config.block_size)
        self.cache = KVCache(
            model.config,
            blocks,
            config.block_size,
            self.device,
            weight.dtype,
            exact=config.batch_invariant,
        )
        if not on_gpu:
            keep_memory()  # behind the cache, whose pages are to be given back with it
        self.weights_version: list[float] = []
        self.adapters: dict[str, Adapter] = {}
        self.mix = Mix()
        self.model = self.mixed = self.view(model)
        # Without the kernels, bits depend on what a forward holds: then each request has its own.
        kernels = self.cache.fast or isinstance(self.model.model, GpuStack)
        apart = config.batch_invariant and not kernels
        sharing = config.enable_prefix_caching and not apart
        self.pool = BlockPool(blocks, config.block_size, sharing=sharing)
        budget = config.max_num_batched_tokens or STEP_TOKENS["cuda" if on_gpu else "cpu"]
        self.queue = Schedule(self.rows, budget, self.pool, apart=apart)
        self.decoding: Decoding | None = None
        self.places: list[int] = []
        self.flight: Flight | None = None  # a step on its way: the host has not read its tokens
        self.notice_new_weights()
        self.move: Move | None = None  # the weights of a model just loaded, on their way
        self.watch: Watch | None = None  # sees every token's logits before it is chosen
        self.writes = True  # not where the head gives labels
        self.speculator: Speculator | None = None
        if speculative is not None:
            exact = config.batch_invariant
            self.speculator = make_speculator(
                speculative, model, tokenizer, self.rows, self.context, exact=exact
            )

    @in_turn
    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Read a LoRA adapter that requests may name; one of that name is replaced."""
        if any(r.adapter == name for r in self.queue.all):
            raise ConfigError(f"the adapter {name!r} is in use: wait for its requests to end")
        adapter = read_adapter(folder, self.source)
        check_mixable(name, adapter)
        if self.cache.paged and self.config.batch_invariant:
            self.queue.apart = True  # what mixes adapters is not ours
            self.pool.sharing = False
        self.adapters[name] = adapter
        self.weights_version = []  # the views are made anew before the next step

    @in_turn
    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        adapter: str | None = None,
        pooling: Pooling | None = None,
        first_scored: int = 1,
    ) -> list[Request]:
        """Queue a prompt, `n` times or `best_of`; a bad request is a ConfigError.

        Of two requests, the one with the lower `priority` goes first, then the earlier one.
        `adapter` names one that was loaded. With `pooling` nothing is written: the request ends
        with its prompt, and `pooled` is the last or the mean hidden state, or the last logits.
        `prompt_logprobs` are then those from the prompt's `first_scored` token on.
        """
        self.check_adapter(adapter, params)
        if pooling not in (None, *get_args(Pooling)):
            raise ConfigError(f"pooling = {pooling!r}{closest(str(pooling), get_args(Pooling))}")
        prompt, processors, stopping = self.prepare(prompt, params, writes=pooling is None)
        found: PromptLogprobs | None = None
        if params.prompt_logprobs is not None:
            found = [None] * first_scored
        requests = []
        for n in range(params.best_of or params.n):
            own = (processors.fork(), stopping.fork()) if n else (processors, stopping)
            request = Request(prompt, n, *own, priority=priority, adapter=adapter)
            request.pooling, request.first_scored = pooling, first_scored
            request.prompt_logprobs, request.scorer = found, found is not None and n == 0
            requests.append(request)
        for request in requests:
            self.queue.add(request)
        return requests

    def check_adapter(self, name: str | None, params: SamplingParams) -> None:
        """Raise where an adapter was not loaded, or something looks at the model without it."""
        if name is None:
            return
        if name not in self.adapters:
            hint = closest(name, self.adapters) if self.adapters else ": load_adapter() reads one"
            raise ConfigError(f"no adapter {name!r} is loaded{hint}")
        for look in looks_of(params):
            raise ConfigError(
                f"{look} looks at the model without the adapter {name!r}: "
                "merge the adapter into a model of its own"
            )

    def prepare(
        self, prompt: Sequence[int], params: SamplingParams, *, writes: bool = True
    ) -> tuple[list[int], LogitsProcessors, Stopping]:
        """Check a request; return its prompt, and what shapes and ends its answer."""
        if writes and not self.writes:
            raise ConfigError("this model has a head for labels and writes no text: use classify()")
        vocab_size = self.model.config.vocab_size
        params = tidy(params)
        check(params, vocab_size)
        prompt = list(prompt) or [self.tokenizer.bos_token_id]
        check_prompt(prompt, vocab_size)
        whole = self.model.config.max_position_embeddings
        check_room(prompt, params, self.context, whole, writes=writes)
        stopping = Stopping(
            params,
            prompt_length=len(prompt),
            context=self.context,
            ends=self.ends,
            decoder=self.tokenizer.stream_decoder(behind=prompt),
            specials=self.tokenizer.specials,
        )
        ends = (*stopping.ends, *params.stop_token_ids)
        if looks_of(params) and not self.busy:
            self.notice_new_weights()  # a second look keeps the view that it is given
        processors = make_processors(params, prompt, ends, self.tokenizer, self.model)
        return prompt, processors, stopping

    @in_turn
    def abort(self, requests: Sequence[Request]) -> None:
        """End requests at once."""
        for request in requests:
            if not request.finished:
                request.end("abort")
        self.queue.release()

    @property
    def busy(self) -> bool:
        """Return whether any request is unfinished."""
        return bool(self.queue.running or self.queue.waiting)

    @in_turn
    def step(self) -> list[Request]:
        """Run one step's tokens; return the requests that got a new one or ran out of time."""
        late = self.queue.end_late()
        return [*late, *self.run_step()]

    @torch.inference_mode()
    def run_step(self) -> list[Request]:
        """Run one step's tokens; return the requests that got a new one."""
        if not self.queue.running or not self.weights_version:
            self.flight = None
            self.notice_new_weights()
        if self.flight is None:
            self.queue.make_way()
            if self.speculator and not self.queue.apart:
                self.speculator.draft(self.queue.running)
            plan = self.queue.plan()
            known = self.sample_foreseen(plan)
            if not plan and not known:
                return []
            if known or not self.decodes(plan):
                parts = [[entry] for entry in plan] if self.queue.apart else [plan]
                done = [*known, *(request for part in parts if part for request in self.run(part))]
                self.queue.release()
                self.move_on()
                return done
            assert self.decoding is not None
            requests = [request for request, _ in plan]
            draws = self.watch is None and all(map(self.drawn_there, requests))
            self.flight = self.decoding.launch(requests, draws=draws)
        done = self.land(self.flight)
        self.queue.release()
        return done

    def sample_foreseen(self, plan: Plan) -> list[Request]:
        """Give those their next token that feed none, their logits being foreseen; return them."""
        feeding = {request for request, _ in plan}
        found = {r: r.foreseen for r in self.queue.running if r not in feeding}
        logits = {request: logits_V for request, logits_V in found.items() if logits_V is not None}
        if logits:
            sample(list(logits), torch.stack(list(logits.values())), self.watch)
        return list(logits)

    def decodes(self, plan: Plan) -> bool:
        """Return whether a step only feeds the newest token of each request, all to one model."""
        if self.decoding is None or self.queue.apart:
            return False
        return all(
            request.ahead == count == 1
            and request.adapter is None
            and request.pooling is None
            and not request.scores
            for request, count in plan
        )

    def drawn_there(self, request: Request) -> bool:
        """Return whether the step itself draws a request's token, on the device."""
        dtype = self.cache.keys[0].dtype
        return request.plain and (not request.cuts or cuts_hold(self.device, dtype))

    def land(self, flight: Flight) -> list[Request]:
        """Start the step behind one on its way, if nothing depends on the host; take in its tokens.

        Who ends with this step feeds a token in the next one in vain.
        """
        assert self.decoding is not None
        ahead = self.going_on(flight)
        self.flight = self.decoding.launch(ahead, flight, draws=True) if ahead else None
        tokens = flight.read() if flight.drawn else []
        ready = [request for request in flight.requests if not request.finished]
        for request in ready:
            self.queue.advance(request, 1)
        if not flight.drawn:
            rows = [n for n, request in enumerate(flight.requests) if not request.finished]
            if ready:
                sample(ready, flight.logits_BV[rows], self.watch)
            return ready
        for request, token in zip(flight.requests, tokens, strict=True):
            if not request.finished:
                request.accept(token)
        return ready

    def going_on(self, flight: Flight) -> list[Request]:
        """Return who goes on from a step on its way; none if the host must see its tokens first."""
        if not flight.drawn or self.speculator or len(self.queue.running) != len(flight.requests):
            return []
        if self.queue.waiting:
            first, least = self.queue.waiting[0], self.queue.running[-1]
            if len(self.queue.running) < self.rows or first.priority < least.priority:
                return []
        ahead = [r for r in flight.requests if not r.finished and r.stopping.left > 1]
        for request in ahead:
            if not self.pool.extend(request.holding, request.holding.computed + 2):
                return []
        return ahead

    def notice_new_weights(self) -> None:
        """Make the view anew and forget cached prefixes if the weights have been trained since."""
        version = stamp(self.source)
        if version != self.weights_version:
            self.weights_version = version
            self.model = self.mixed = self.view(self.source)
            if self.adapters:
                self.mixed = self.view(with_adapters(self.source, self.adapters, self.mix))
            self.pool.forget()
            if self.cache.paged:
                self.renew_decoding()

    def move_on(self) -> None:
        """Move a part of the weights while there is work; all change places when it is done."""
        if self.move is not None and self.busy:
            self.move.go_on()
        elif self.move is not None and self.move.arrive():
            self.move = None
            self.notice_new_weights()

    def renew_decoding(self) -> None:
        """Make what decodes anew if weights have moved: graphs read them where they lie."""
        places = [weight.data_ptr() for weight in self.source.parameters()]
        if self.decoding is None or places != self.places:
            self.places = places
            self.decoding = Decoding(self.model, self.cache, self.rows, self.context)

    def view(self, model: Decoder) -> Decoder:
        """Return a model as this engine runs it."""
        return view_of(model, self.config.quantization, exact=self.config.batch_invariant)

    def run(self, plan: Plan) -> list[Request]:
        """Run the model once over all planned tokens, and sample where a request's are all in."""
        feeds = []
        at: list[int] = []  # the places whose logits are needed
        spans: list[tuple[int, int]] = []
        start = 0
        for request, count in plan:
            computed = request.holding.computed
            del request.draft[count - 1 :]  # what the budget leaves
            ids = [*request.tokens(computed, count), *request.draft]
            feeds.append(Feed(request.holding.blocks, computed, ids))
            first = start
            if not request.scores and not request.draft and request.pooling != "mean":
                first = start + count - (computed + count == request.length)
            spans.append((len(at), len(at) + start + count - first))
            at += range(first, start + count)
            start += count
        batch = make_batch(self.cache, feeds)
        chosen = None if len(at) == start else torch.tensor(at, device=self.device).long()
        model = self.model_for(plan)
        states = any(request.pooling in ("last", "mean") for request, _ in plan)
        found_1N = model(
            batch.ids_1T,
            positions=batch.positions_1T,
            cache=batch,
            at=chosen,
            want="hidden" if states else "logits",
        )
        hidden_NE, logits_NV = found_1N[0], model.head(found_1N[0]) if states else found_1N[0]
        ready, rows, done = [], [], []
        for (request, count), (first, last) in zip(plan, spans, strict=True):
            if request.draft and self.speculator:
                self.queue.advance(
                    request, self.speculator.verify(request, logits_NV[first:last], self.watch)
                )
                done.append(request)
                continue
            if request.scores:
                request.score_prompt(logits_NV[first:last])
            self.queue.advance(request, count)
            if request.pooling is not None:
                rows_N = logits_NV if request.pooling == "logits" else hidden_NE
                if request.gather(rows_N[first:last]):
                    done.append(request)
            elif request.holding.computed == request.length:
                ready.append(request)
                rows.append(last - 1)
        if ready:
            logits_BV = logits_NV if len(rows) == len(logits_NV) else logits_NV[rows]
            sample(ready, logits_BV, self.watch)
        return [*ready, *done]

    def through(self, adapter: str | None) -> tuple[Decoder, Callable[[int], None]]:
        """Return a model, and what sends all tokens of its next forward through one adapter."""

        def send(tokens: int) -> None:
            if adapter is not None:
                self.mix.places = {adapter: torch.arange(tokens, device=self.device)}

        return self.model if adapter is None else self.mixed, send

    def model_for(self, plan: Plan) -> Decoder:
        """Return the model for a step, and tell it whose tokens go through which adapter."""
        places: dict[str, list[int]] = {}
        start = 0
        for request, count in plan:
            if request.adapter is not None:
                places.setdefault(request.adapter, []).extend(range(start, start + count))
            start += count
        if not places and not (self.adapters and self.config.batch_invariant):
            return self.model
        self.mix.places = {n: torch.tensor(p, device=self.device) for n, p in places.items()}
        return self.mixed
