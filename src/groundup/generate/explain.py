"""How an answer came about: every step's candidates before and after every parameter.

The answer is the one that `generate` or `beam_search` gives: they are only watched. Shape
suffix: V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from groundup.core.errors import GroundupError
from groundup.core.files import write_text
from groundup.core.types import SamplingParams
from groundup.figure import decoding
from groundup.figure import page as html
from groundup.generate import logits as fn
from groundup.generate.beam import Candidate
from groundup.generate.config import BeamSearchParams
from groundup.generate.contrastive import Weighed
from groundup.generate.llm import LLM
from groundup.generate.request import Request

SHOWN = 8  # candidates a step
DRAWN = 12  # candidates in pictures
TREE_STEPS = 8  # of a beam search, the steps that fit a page


@dataclass
class Step:
    """One token: the model's logits, and probabilities after each parameter in turn."""

    logits_V: Tensor
    written: list[int]
    stages: dict[str, Tensor]
    weighed: dict[int, Weighed] = field(default_factory=dict)  # by contrastive search
    token: int | None = None

    def candidates(self, count: int) -> list[int]:
        """Return the likeliest ids before and after the parameters, and the chosen one."""
        first, last = next(iter(self.stages.values())), list(self.stages.values())[-1]
        ids = first.topk(min(count, len(first))).indices.tolist()
        ids += [i for i in last.topk(min(3, len(last))).indices.tolist() if i not in ids]
        if self.token is not None and self.token not in ids:
            ids.append(self.token)
        return [int(i) for i in ids]


@dataclass
class Story:
    """What was watched while an answer was made."""

    steps: list[Step] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)

    def watch(self, request: Request, logits_V: Tensor) -> None:
        """Keep a step's distributions."""
        logits_V = logits_V.float().clone()
        stages = {"model": logits_V.softmax(-1)}
        written = list(request.output.token_ids)
        weighed: dict[int, Weighed] = {}
        try:
            for name, changed_V in request.processors.trace(logits_V, written):
                if name == "penalty_alpha":  # scores, no logits of a distribution
                    weighed = {w.token: w for w in request.processors.helpers[name].weighed}
                else:
                    stages[name] = changed_V.softmax(-1)
        except Exception:  # choosing the token meets it too, and ends the answer
            return
        self.steps.append(Step(logits_V, written, stages, weighed))


def explain(
    llm: LLM,
    prompt: Sequence[int],
    params: SamplingParams,
    beams: BeamSearchParams | None = None,
    *,
    adapter: str | None = None,
    out: Path,
) -> Iterator[str]:
    """Generate one answer; yield lines that tell of every step, and write a page of pictures."""
    story = Story()
    if beams is not None:
        [output] = llm.beam_search(
            [prompt], beams, params, adapter=adapter, observe=story.candidates.append
        )
        yield from beam_lines(llm, story)
    else:
        one = dataclasses.replace(params, n=1, best_of=None)
        with llm.engine.lock:  # no other thread's requests are watched
            llm.engine.watch = story.watch
            try:
                [output] = llm.generate([prompt], one, adapter=adapter)
            finally:
                llm.engine.watch = None
        for step, token in zip(story.steps, output.outputs[0].token_ids, strict=False):
            step.token = token
            yield from step_lines(llm, step)
    answer = output.outputs[0]
    ending = f"{answer.finish_reason}, {answer.stop_reason}"
    yield f"answer ({ending}): {answer.text!r}"
    sections = [html.section("Answer", html.code(answer.text), html.text(f"Ended by {ending}."))]
    if story.steps:
        sections += step_sections(llm, story, params, prompt)
    if story.candidates:
        sections.append(tree_section(llm, story))
    if llm.engine.speculator and llm.engine.speculator.history:
        sections.append(draft_section(llm))
    title = "How the answer came about"
    write_text(out, html.page(title, shorten(llm.tokenizer.decode(prompt), 300), sections))
    if answer.finish_reason == "error":
        raise GroundupError(str(answer.stop_reason))


def step_lines(llm: LLM, step: Step) -> Iterator[str]:
    """Yield a table: a row a candidate, a column a parameter, probabilities in percent."""
    names = list(step.stages)
    widths = [max(7, len(name)) for name in names]
    header = "  ".join(name.rjust(width) for name, width in zip(names, widths, strict=True))
    header += "   cosine    score" if step.weighed else ""
    yield f"{f'token {len(step.written) + 1}, %':<24}{header}"
    for i in step.candidates(SHOWN):
        cells = [
            percent(float(probs_V[i])).rjust(width)
            for probs_V, width in zip(step.stages.values(), widths, strict=True)
        ]
        if (weighed := step.weighed.get(i)) is not None:
            cells += [f"{weighed.similarity:7.3f}", f"{weighed.score:7.3f}"]
        mark = ">" if i == step.token else " "
        yield f"  {mark} {show(llm, i):<18} {'  '.join(cells)}"
    yield ""


def beam_lines(llm: LLM, story: Story) -> Iterator[str]:
    """Yield every step's candidates of a beam search with their sums of log-probabilities."""
    step = -1
    for candidate in story.candidates:
        if candidate.step != step:
            step = candidate.step
            yield f"token {step + 1}"
        before = shorten(llm.tokenizer.decode(candidate.parent), 40)
        line = f"{candidate.total:9.3f}  {before!r} + {show(llm, candidate.token)}"
        yield f"  {candidate.fate:<9}{line}"
    yield ""


def step_sections(
    llm: LLM, story: Story, params: SamplingParams, prompt: Sequence[int]
) -> list[tuple[str, str]]:
    """Return the sections on what the parameters did, and on what they would do."""
    step = max(story.steps, key=lambda s: float(fn.entropy(s.stages["model"].log())))
    ids = step.candidates(DRAWN)
    names = [show(llm, i) for i in ids]
    where = f"token {len(step.written) + 1}, where the model was least certain"
    done = {
        f"after {name}": {
            "before": step.stages[before][ids].tolist(),
            "after": step.stages[name][ids].tolist(),
        }
        for before, name in zip(step.stages, list(step.stages)[1:], strict=False)
    }
    sections = []
    if done:
        caption = f"Probabilities of the candidates for {where}, in the order of {params.order}."
        drawn = html.picture(decoding.distributions(done, names), caption)
        sections.append(html.section("What your parameters did", drawn))
    drawn = html.picture(
        decoding.distributions(what_if(step, ids, prompt), names),
        f"Each parameter alone, at several values, for {where}.",
    )
    sections.append(html.section("What each parameter does", drawn))
    rows = []
    for number, taken in enumerate(story.steps, start=1):
        token = taken.token or 0
        cells = [percent(float(probs_V[token])) for probs_V in taken.stages.values()]
        rows.append((number, show(llm, token), *cells))
    table = html.table(["step", "chosen", *story.steps[0].stages], rows)
    said = html.text("Their probabilities in percent: the model's, and after each parameter.")
    return [*sections, html.section("The chosen tokens", said, table)]


def what_if(
    step: Step, ids: Sequence[int], prompt: Sequence[int]
) -> dict[str, dict[str, list[float]]]:
    """Return the candidates' probabilities under several values of four parameters."""
    logits_V, seen = step.logits_V, [*prompt, *step.written]

    def probs(changed_V: Tensor) -> list[float]:
        return [float(p) for p in changed_V.softmax(-1)[list(ids)]]

    return {
        "temperature": {str(t): probs(fn.temperature(logits_V, t)) for t in (0.5, 1.0, 1.5)},
        "top_k": {str(k): probs(fn.top_k(logits_V, k)) for k in (2, 5)} | {"off": probs(logits_V)},
        "top_p": {str(p): probs(fn.top_p(logits_V, p)) for p in (0.5, 0.9, 1.0)},
        "repetition_penalty": {
            str(r): probs(fn.repetition_penalty(logits_V, seen, r)) for r in (1.0, 1.3, 2.0)
        },
    }


def tree_section(llm: LLM, story: Story) -> tuple[str, str]:
    """Return the section with the tree of a beam search."""
    shown = [c for c in story.candidates if c.step < TREE_STEPS]
    nodes: dict[tuple[int, ...], decoding.Node] = {}
    drawn: list[decoding.Node] = []
    rows = dict.fromkeys(range(TREE_STEPS), 0)
    kept_of_step: dict[int, int] = {}
    for candidate in shown:
        if candidate.fate == "dropped":
            seen = kept_of_step.get(candidate.step, 0)
            kept_of_step[candidate.step] = seen + 1
            if seen >= 2:  # two dropped ones a step show what was left behind
                continue
        row = rows[candidate.step]
        rows[candidate.step] += 1
        node = decoding.Node(
            candidate.step,
            float(row),
            f"{show(llm, candidate.token)} {candidate.total:.2f}",
            candidate.fate,
            nodes.get(candidate.parent),
        )
        drawn.append(node)
        if candidate.fate != "dropped":
            nodes[(*candidate.parent, candidate.token)] = node
    count = max(node.step for node in drawn) + 1
    caption = (
        f"The first {count} tokens: the best candidates of each step, with their sums of "
        "log-probabilities; of the dropped ones two."
    )
    return html.section(
        "The tree of the beam search", html.picture(decoding.tree(drawn), caption, wide=True)
    )


def draft_section(llm: LLM) -> tuple[str, str]:
    """Return the section on guesses: kept ones, and those that were not."""
    speculator = llm.engine.speculator
    assert speculator is not None
    lines = []
    for number, (_, draft, kept) in enumerate(speculator.history, start=1):
        held = [(text_of(llm, i), "good") for i in draft[:kept]]
        lost = [(text_of(llm, i), "bad") for i in draft[kept:]]
        lines.append(html.marked(f"{number}", [*held, *lost]))
    rate = f"{speculator.num_accepted_tokens} of {speculator.num_draft_tokens} guesses were kept"
    body = html.text(f"{rate} ({speculator.acceptance_rate:.0%}); a line is one forward.")
    return html.section("Guesses, kept and rejected", body, *lines)


def show(llm: LLM, token: int) -> str:
    """Return a token's text so that spaces and line ends are seen."""
    return shorten(repr(text_of(llm, token)), 18)


def text_of(llm: LLM, token: int) -> str:
    """Return a token's text, a space at its beginning too."""
    return llm.tokenizer.decode_bytes([token]).decode("utf-8", errors="replace")


def shorten(text: str, size: int) -> str:
    """Return a text of at most `size` characters."""
    return text if len(text) <= size else text[: size - 1] + "\u2026"


def percent(share: float) -> str:
    """Return a probability in percent; a dash where there is none."""
    return f"{100 * share:.2f}" if share > 0 else "-"
