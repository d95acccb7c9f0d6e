"""Speculative decoding: cheap guesses, checked by the model many at a time, losing nothing.

With a draft model, guess x ~ q is kept with probability min(1, p(x) / q(x)); the first one that
is not is replaced by a draw from max(0, p - q) (Leviathan et al. 2023, arXiv 2211.17192, algorithm
1). p and q are taken after the same processors. Guesses that are certain (prompt look-up, the
n-gram model's likeliest token) are compared with the token that the model would have drawn
anyway, so that with them a seed gives the same tokens as without. Shape suffixes: T guesses and
one more, V vocabulary.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from groundup.core.errors import ConfigError
from groundup.core.run import resolve_model
from groundup.generate.branches import Branches, Reading
from groundup.generate.config import SpeculativeConfig
from groundup.generate.request import Request
from groundup.generate.sampling import Watch, broken_logits, choose
from groundup.model.decoder import Decoder
from groundup.model.hf import load_model
from groundup.model.narrow import numbers_of
from groundup.model.ngram import NGram
from groundup.model.view import view_of
from groundup.tokenizer import Tokenizer

TOKEN_COST = 0.05  # of one more token in a forward of the model, in forwards of one token
HISTORY = 256  # the last checks, kept to be shown: request, guesses, how many held
FORGET = 0.9  # how much of the past counts, a step later
PROBE_EVERY = 16  # steps without guesses, after which one is tried again


class Drafter(Protocol):
    """Guesses how requests go on."""

    cost: float  # of one guess, in forwards of the model
    certain: bool  # a guess has no distribution: how many there are changes no token

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[list[int]]:
        """Return up to so many guesses for each request; `request.draft_probs` where uncertain."""
        ...

    def forget(self, request: Request) -> None:
        """Let go of what is kept for a request."""
        ...


@dataclass
class Pace:
    """How well guesses for one request fared: decayed counts, behind a hopeful beginning."""

    kept: float = 2.1
    checked: float = 3.0
    idle: int = 0  # steps without guesses

    def learn(self, guessed: int, kept: int) -> None:
        """Take in one step: guesses behind the first wrong one were not checked."""
        self.kept = FORGET * self.kept + kept
        self.checked = FORGET * self.checked + min(guessed, kept + 1)

    def length(self, most: int, cost: float) -> int:
        """Return the number of guesses that promises the most tokens for the time; 0 is plain.

        `cost` is that of making and checking a guess, in steps without guesses.
        (1 - a**(n + 1)) / (1 - a) tokens are expected of n guesses (arXiv 2211.17192, eq. 1).
        """
        a = min(self.kept / self.checked, 0.999)

        def rate(n: int) -> float:
            return (1 - a ** (n + 1)) / (1 - a) / (1 + n * cost)

        best = max(range(most + 1), key=rate)
        self.idle = 0 if best else self.idle + 1
        return best if self.idle % PROBE_EVERY else max(best, 1)


class Speculator:
    """Guesses for the running requests of an engine, and the check of what comes back."""

    def __init__(self, config: SpeculativeConfig, drafter: Drafter) -> None:
        self.config, self.drafter = config, drafter
        self.paces: dict[Request, Pace] = {}
        self.num_draft_tokens = self.num_accepted_tokens = 0
        self.history: deque[tuple[Request, list[int], int]] = deque(maxlen=HISTORY)

    @property
    def acceptance_rate(self) -> float:
        """Return the share of guesses that were kept, over all requests so far."""
        return self.num_accepted_tokens / max(1, self.num_draft_tokens)

    def draft(self, running: Sequence[Request]) -> None:
        """Set `request.draft` of every request that only lacks its newest token in the cache."""
        for request in self.paces.keys() - set(running):
            del self.paces[request]
            self.drafter.forget(request)
        ready, counts = [], []
        cost = self.drafter.cost + check_cost(len(running) if self.drafter.certain else 1)
        for request in running:
            request.draft, request.draft_probs = [], None
            most = min(self.config.num_speculative_tokens, request.stopping.left - 1)
            if request.pooling is not None or request.params.penalty_alpha:
                continue  # contrastive search reads candidates at each step, guessed or not
            if request.length - request.holding.computed == 1 and most > 0:
                pace = self.paces.setdefault(request, Pace())
                if count := pace.length(most, cost):
                    ready.append(request)
                    counts.append(count)
        if ready:
            for request, ids in zip(ready, self.drafter.propose(ready, counts), strict=True):
                request.draft = ids

    def verify(
        self,
        request: Request,
        logits_TV: Tensor,
        watch: Watch | None = None,
    ) -> int:
        """Give a request the guesses that hold and one token more; return how many it got."""
        draft, before = request.draft, len(request.output.token_ids)
        likeliest = None
        if request.simple and request.params.temperature == 0:
            likeliest = logits_TV.argmax(-1).tolist()
        on_cpu = logits_TV.device.type == "cpu"  # on a GPU the host would wait for it
        best = logits_TV.amax(-1).tolist() if on_cpu else [0.0] * len(logits_TV)
        for n, logits_V in enumerate(logits_TV):
            if broken := broken_logits(best[n]):
                request.end("error", broken)
                break
            if watch is not None:
                watch(request, logits_V)
            token = likeliest[n] if likeliest else self.next_token(request, n, logits_V)
            if request.finished:  # its processors failed
                break
            if request.output.cumulative_logprob is not None:
                request.note_logprobs(token, logits_V.float().log_softmax(-1))
            request.accept(token)
            if request.finished or n == len(draft) or token != draft[n]:
                break
        got = len(request.output.token_ids) - before
        kept = sum(a == b for a, b in zip(request.output.token_ids[before:], draft, strict=False))
        self.history.append((request, list(draft), kept))
        self.paces[request].learn(len(draft), kept)
        self.num_draft_tokens += len(draft)
        self.num_accepted_tokens += kept
        request.output.num_draft_tokens += len(draft)
        request.output.num_accepted_tokens += kept
        request.draft = []
        return got

    def next_token(self, request: Request, n: int, logits_V: Tensor) -> int:
        """Return the n-th token behind those accepted before this step."""
        q_TV, guess = request.draft_probs, request.draft[n] if n < len(request.draft) else None
        if q_TV is None or guess is None or request.params.temperature == 0:
            return choose(logits_V[None], [request])[0]
        try:
            p_V = request.processed(logits_V).softmax(-1).cpu()
        except Exception as err:  # a user's own processor may raise anything
            request.end("error", str(err) or type(err).__name__)
            return guess
        return keep_or_replace(p_V, q_TV[n], guess, request.generator)


def check_cost(together: int) -> float:
    """Return what checking a guess of each of so many requests costs, in steps without guesses."""
    return TOKEN_COST * together / (1 + TOKEN_COST * (together - 1))


def keep_or_replace(p_V: Tensor, q_V: Tensor, guess: int, generator: torch.Generator) -> int:
    """Return a draw from p, made of a guess that was drawn from q (algorithm 1)."""
    u = torch.rand(1, generator=generator, dtype=torch.float64)
    if u * q_V[guess] <= p_V[guess]:
        return guess
    left_V = (p_V - q_V).clamp(min=0)
    return int(torch.multinomial(left_V if left_V.sum() > 0 else p_V, 1, generator=generator))


class PromptLookup:
    """Guess what followed the last n-gram where it stood last before; longer n-grams first."""

    cost, certain = 0.0, True

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.known: dict[Request, tuple[int, dict[tuple[int, ...], int]]] = {}

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[list[int]]:
        """Copy from the text so far; a copy may run on into itself."""
        return [self.copy(r, count) for r, count in zip(requests, counts, strict=True)]

    def copy(self, request: Request, count: int) -> list[int]:
        """Return guesses for one request, none where no n-gram was seen before."""
        ids = request.tokens(0, request.length)
        read, followed = self.known.get(request, (1, {}))
        for end in range(read, len(ids)):  # n-grams that end before `end`, which follows them
            for size in range(1, min(self.longest, end) + 1):
                followed[tuple(ids[end - size : end])] = end
        self.known[request] = len(ids), followed
        for size in range(min(self.longest, len(ids)), 0, -1):
            at = followed.get(tuple(ids[-size:]))
            if at is not None:
                for n in range(count):
                    ids.append(ids[at + n])
                return ids[-count:]
        return []

    def forget(self, request: Request) -> None:
        """Drop a request's n-grams."""
        self.known.pop(request, None)


class NGramDrafter:
    """Guess the token that our n-gram model finds likeliest."""

    cost, certain = 0.01, True

    def __init__(self, model: NGram) -> None:
        self.model = model

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[list[int]]:
        """Continue each request greedily."""
        found = []
        for request, count in zip(requests, counts, strict=True):
            reach = self.model.order - 1
            ids = request.tokens(max(0, request.length - reach), reach)
            for _ in range(count):
                ids.append(int(self.model.next_probs(ids[-reach:] if reach else []).argmax()))
            found.append(ids[-count:])
        return found

    def forget(self, request: Request) -> None:
        """Do nothing: no state is kept."""


class ModelDrafter:
    """Guess with a smaller model over the same vocabulary, all requests in one batch."""

    certain = False  # neighbours must not change how many guesses are drawn

    def __init__(
        self, model: Decoder, target: Decoder, rows: int, context: int, *, exact: bool
    ) -> None:
        self.cost = relative_size(model, target)
        self.context = min(context, model.config.max_position_embeddings)
        self.branches = Branches(view_of(model, exact=exact), rows, self.context, exact=exact)
        self.readings: dict[Request, Reading] = {}

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[list[int]]:
        """Draw guesses from the draft model, after the request's own processors."""
        texts = [request.tokens(0, request.length) for request in requests]
        probs: list[list[Tensor]] = [[] for _ in requests]
        going = list(range(len(requests)))
        while going := [
            r for r in going if len(probs[r]) < counts[r] and len(texts[r]) <= self.context
        ]:
            readings = [self.readings.setdefault(requests[r], Reading()) for r in going]
            new = [
                self.branches.rewind(reading, texts[r])
                for r, reading in zip(going, readings, strict=True)
            ]
            found = self.branches.feed([reading.branch for reading in readings], new)
            for r, logits_V in zip(list(going), found, strict=True):
                try:
                    probs[r].append(self.guess(requests[r], texts[r], logits_V))
                except Exception:  # the check of the next token meets the same error, and tells
                    going.remove(r)
        for request, rows in zip(requests, probs, strict=True):
            if rows and request.params.temperature > 0:
                request.draft_probs = torch.stack(rows)
        return [text[request.length :] for request, text in zip(requests, texts, strict=True)]

    def guess(self, request: Request, text: list[int], logits_V: Tensor) -> Tensor:
        """Add a guess to `text`; return the distribution that it was drawn from."""
        changed_V = request.processors(logits_V, text[len(request.prompt) :])
        probs_V = changed_V.softmax(-1).cpu()
        if request.params.temperature == 0:
            text.append(int(changed_V.argmax()))
        else:
            text.append(int(torch.multinomial(probs_V, 1, generator=request.generator)))
        return probs_V

    def forget(self, request: Request) -> None:
        """Give the request's place in the draft model's cache back."""
        if request in self.readings:
            self.branches.drop(self.readings.pop(request).branch)


def relative_size(model: Decoder, target: Decoder) -> float:
    """Return a model's parameters as a share of another's: what its forward costs beside it."""
    sizes = [sum(weight.numel() for weight in m.parameters()) for m in (model, target)]
    return sizes[0] / sizes[1]


def make_speculator(
    config: SpeculativeConfig,
    target: Decoder,
    tokenizer: Tokenizer,
    rows: int,
    context: int,
    *,
    exact: bool = False,
) -> Speculator:
    """Return what guesses for an engine; another vocabulary than the model's is a ConfigError.

    `exact`: what a draft model guesses for a request has the same bits whatever else runs.
    """
    if config.method == "lookup":
        return Speculator(config, PromptLookup(config.prompt_lookup_max))
    if config.model is None:
        raise ConfigError(f"speculation by {config.method!r} needs a model folder to guess with")
    if config.method == "ngram":
        ngram = NGram.load(ngram_folder(Path(config.model)))
        check_vocabulary(config, ngram.vocab_size, tokenizer.vocab_size)
        return Speculator(config, NGramDrafter(ngram))
    folder = resolve_model(config.model)
    weight = numbers_of(target)
    draft = load_model(folder, device=weight.device, dtype=weight.dtype)
    check_vocabulary(config, draft.config.vocab_size, target.config.vocab_size)
    if Tokenizer.load(folder).fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"the draft model {config.model} has another tokenizer than the model: its guesses "
            "would mean other text; take a draft model trained with the same tokenizer"
        )
    return Speculator(config, ModelDrafter(draft, target, rows, context, exact=exact))


def ngram_folder(place: Path) -> Path:
    """Return the n-gram folder meant by an n-gram folder or by a run folder."""
    return place / "ngram" if (place / "ngram" / "config.json").is_file() else place


def check_vocabulary(config: SpeculativeConfig, found: int, wanted: int) -> None:
    """Raise where guesses would be ids of another vocabulary."""
    if found != wanted:
        raise ConfigError(
            f"{config.model} has a vocabulary of {found:,}, the model one of {wanted:,}: "
            "guesses must be ids of the same vocabulary"
        )
