"""What else runs through the engine: vectors, labels, scores, and requests that await."""

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from groundup.core.errors import ConfigError
from groundup.core.types import SamplingParams
from groundup.generate import LLM, AsyncLLM
from groundup.generate.config import BeamSearchParams
from groundup.model import save_model
from groundup.model.heads import HeadedDecoder

PROMPTS = [[5, 9, 31], list(range(40, 61)), [7], list(range(100, 140)), list(range(100, 145))]
PARAMS = SamplingParams(temperature=1.0, seed=4, max_tokens=12, ignore_eos=True)


def test_importing_the_engine_does_not_import_torchs_compiler():
    code = "import sys, groundup.generate.llm; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 8, "max_num_seqs": 2}])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_pooled_hidden_states(tiny, tok, settings, pooling):
    llm = LLM(tiny, tok, block_size=4, **settings)
    for _ in range(2):  # the second time with shared beginnings, where they may be shared
        found = llm.embed(PROMPTS, pooling=pooling)
        for vector, prompt in zip(found, PROMPTS, strict=True):
            states = tiny(torch.tensor([prompt]), want="hidden")[0].detach()
            wanted = states.mean(0) if pooling == "mean" else states[-1]
            torch.testing.assert_close(vector, wanted / wanted.norm(), atol=1e-5, rtol=1e-4)


def test_pooling_and_writing_share_a_step(tiny, tok):
    llm = LLM(tiny, tok)
    alone = llm.generate([PROMPTS[1]], PARAMS)[0].outputs[0].token_ids
    [writing] = llm.engine.add(PROMPTS[1], PARAMS)
    [pooled] = llm.engine.add(PROMPTS[3], PARAMS, pooling="last")
    while llm.engine.busy:
        llm.engine.step()
    assert writing.output.token_ids == alone
    assert pooled.output.token_ids == []
    assert pooled.pooled.shape == (tiny.config.hidden_size,)


def test_scores_are_sums_of_log_probabilities(tiny, tok):
    llm = LLM(tiny, tok)
    answers = [[8, 9], [10], list(range(20, 29))]
    found = llm.score([PROMPTS[3]], answers)
    for score, answer in zip(found, answers, strict=True):
        ids = torch.tensor([PROMPTS[3] + answer])
        logps = tiny(ids).log_softmax(-1)[0].detach()
        at = len(PROMPTS[3]) - 1
        wanted = sum(float(logps[at + n, i]) for n, i in enumerate(answer))
        assert score == pytest.approx(wanted, abs=1e-3)
    with pytest.raises(ConfigError, match="2 prompts and 1 answers"):
        llm.score(PROMPTS[:2], [[4]])


def test_a_head_for_labels_classifies_through_the_engine(tiny, tok, tmp_path):
    torch.manual_seed(0)
    model = HeadedDecoder(tiny.config, task="sequence", num_labels=3).eval()
    model.labels = ("bad", "fair", "good")
    save_model(model, tok, tmp_path / "m")
    llm = LLM(tmp_path / "m", device="cpu")
    found = llm.classify(PROMPTS)
    assert llm.labels == model.labels
    for row, prompt in zip(found, PROMPTS, strict=True):
        wanted = model(torch.tensor([prompt]))[0].log_softmax(-1).detach()
        torch.testing.assert_close(row, wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="writes no text"):
        llm.generate(PROMPTS)
    with pytest.raises(ConfigError, match="has no head for labels"):
        LLM(tiny, tok).classify(PROMPTS)


def test_awaited_requests_share_the_batch_and_cancel(tiny, tok):
    wanted = [o.outputs[0].token_ids for o in LLM(tiny, tok).generate(PROMPTS, PARAMS)]

    async def last(llm, prompt):
        async for output in llm.generate(prompt, PARAMS):
            found = output
        assert found.finished
        return found.outputs[0].token_ids

    async def main():
        async with AsyncLLM(tiny, tok) as llm:
            with pytest.raises(ConfigError, match="the prompt has 200 tokens"):
                await last(llm, [1] * 200)
            long = SamplingParams(max_tokens=60, ignore_eos=True)
            left = llm.generate([3], long)
            first = await anext(left)
            await left.aclose()
            found = await asyncio.gather(*(last(llm, prompt) for prompt in PROMPTS))
            assert first.outputs[0].finish_reason == "abort"
            return found

    assert asyncio.run(main()) == wanted


def test_threads_share_an_llm(tiny, tok):
    prompts = [[n, n + 1, n + 2] for n in range(5, 29)]
    kinds = [PARAMS, SamplingParams(seed=3, max_tokens=20, ignore_eos=True, stop="e")]
    asked = [(prompt, params) for prompt in prompts for params in kinds]
    wanted = [LLM(tiny, tok).generate([prompt], own)[0].outputs[0] for prompt, own in asked]
    beams = BeamSearchParams(beam_width=3)
    best = LLM(tiny, tok).beam_search([[5, 9]], beams, PARAMS)[0].outputs
    shared = LLM(tiny, tok)

    def ask(prompt, own):
        if own is PARAMS:
            return shared.generate([prompt], own)[0].outputs[0].text
        return "".join(shared.stream(prompt, own))

    with ThreadPoolExecutor(8) as pool:
        found = pool.map(ask, *zip(*asked, strict=True))
        searched = [pool.submit(shared.beam_search, [[5, 9]], beams, PARAMS) for _ in range(3)]
        assert list(found) == [output.text for output in wanted]
        assert all(search.result()[0].outputs == best for search in searched)
    assert not shared.engine.busy


def test_an_awaited_llm_may_be_used_by_other_threads(tiny, tok):
    llm = LLM(tiny, tok)
    wanted = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS)]

    async def last(served, prompt):
        async for output in served.generate(prompt, PARAMS):
            found = output
        return found.outputs[0].token_ids

    async def main():
        async with AsyncLLM(llm) as served:
            for _ in range(5):
                beside = asyncio.to_thread(llm.generate, PROMPTS, PARAMS)
                outputs, *found = await asyncio.wait_for(
                    asyncio.gather(beside, *(last(served, p) for p in PROMPTS)), 60
                )
                assert found == wanted
                assert [o.outputs[0].token_ids for o in outputs] == wanted

    asyncio.run(main())


def test_a_prompt_of_several_answers_is_scored_once(tiny, tok):
    prompt, fed = list(range(5, 65)), []
    llm = LLM(tiny, tok, block_size=4)
    run = llm.engine.run
    llm.engine.run = lambda plan: fed.append(sum(count for _, count in plan)) or run(plan)
    one, many = (SamplingParams(n=n, max_tokens=1, prompt_logprobs=2, seed=1) for n in (1, 6))
    [wanted] = llm.generate([prompt], one)
    fed.clear()
    llm.engine.pool.forget()
    [found] = llm.generate([prompt], many)
    assert found.prompt_logprobs == wanted.prompt_logprobs
    assert len(found.outputs) == 6
    assert sum(fed) < 2 * len(prompt)


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(tiny, tok, monkeypatch):
    async def main():
        async with AsyncLLM(tiny, tok) as llm:
            engine, run = llm.llm.engine, llm.llm.engine.run
            monkeypatch.setattr(engine, "run", lambda plan: 1 / 0)
            found = [output async for output in llm.generate([5], PARAMS)][-1].outputs[0]
            monkeypatch.setattr(engine, "run", run)
            again = [output async for output in llm.generate([5], PARAMS)][-1].outputs[0]
            return found, again, len(engine.pool.free) == engine.pool.count

    found, again, free = asyncio.run(main())
    assert (found.finish_reason, found.stop_reason) == (
        "error",
        "ZeroDivisionError: division by zero",
    )
    assert len(again.token_ids) == 12
    assert free


def test_settings_are_read_without_torch():
    code = "import sys, groundup.generate.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_texts_that_fill_the_context_are_pooled_and_scored(tiny, tok):
    llm = LLM(tiny, tok)
    full = [5 + n % 80 for n in range(llm.context)]
    states = tiny(torch.tensor([full]), want="hidden")[0, -1].detach()
    found = llm.embed([full], pooling="last")[0]
    torch.testing.assert_close(found, states / states.norm(), atol=1e-5, rtol=1e-4)
    logps = tiny(torch.tensor([full])).log_softmax(-1)[0].detach()
    wanted = sum(float(logps[n - 1, full[n]]) for n in range(90, llm.context))
    assert llm.score([full[:90]], [full[90:]])[0] == pytest.approx(wanted, abs=1e-3)
    with pytest.raises(ConfigError, match="the text has 97 tokens and the model reads 96"):
        llm.embed([[*full, 7]])


def test_answers_to_one_prompt_share_what_it_takes_to_read_it(tiny, tok):
    llm = LLM(tiny, tok, block_size=4)
    fed = []
    inner = llm.engine.run
    llm.engine.run = lambda plan: fed.append(sum(count for _, count in plan)) or inner(plan)
    prompt, answers = PROMPTS[3], [[8, 9], [10], list(range(20, 29)), [8, 10]]
    alone = [LLM(tiny, tok).score([prompt], [answer])[0] for answer in answers]
    assert llm.score([prompt], answers) == pytest.approx(alone, abs=1e-4)
    # Of the prompt's 40 tokens 36 are read once: the last block's logits are needed by each.
    assert sum(fed) == 36 + sum(4 + len(answer) for answer in answers)


def test_vectors_labels_and_scores_are_awaited(tiny, tok, tmp_path):
    torch.manual_seed(0)
    model = HeadedDecoder(tiny.config, task="sequence", num_labels=3).eval()
    save_model(model, tok, tmp_path / "m")
    plain, labels = LLM(tiny, tok), LLM(tmp_path / "m", device="cpu")
    rows, wanted = plain.embed(PROMPTS), labels.classify(PROMPTS)
    scores = plain.score([PROMPTS[3]], PROMPTS[:3])

    async def main():
        async with AsyncLLM(plain) as llm, AsyncLLM(labels) as head:
            found = await asyncio.gather(*(llm.embed(prompt) for prompt in PROMPTS))
            torch.testing.assert_close(torch.stack(found), rows)
            found = await asyncio.gather(*(head.classify(prompt) for prompt in PROMPTS))
            torch.testing.assert_close(torch.stack(found), wanted)
            found = await asyncio.gather(*(llm.score(PROMPTS[3], a) for a in PROMPTS[:3]))
            assert found == pytest.approx(scores, abs=1e-4)
            with pytest.raises(ConfigError, match="has no head for labels"):
                await llm.classify(PROMPTS[0])
            with pytest.raises(ConfigError, match="the text has 97 tokens"):
                await llm.embed([5] * 97)

    asyncio.run(main())


def test_a_head_for_labels_writes_nothing_in_any_way(tiny, tok, tmp_path):
    model = HeadedDecoder(tiny.config, task="sequence", num_labels=3).eval()
    save_model(model, tok, tmp_path / "m")
    llm = LLM(tmp_path / "m", device="cpu")
    for call in (
        lambda: next(llm.stream([5])),
        lambda: llm.beam_search([[5]], BeamSearchParams()),
        lambda: llm.engine.add([5], PARAMS),
    ):
        with pytest.raises(ConfigError, match="writes no text"):
            call()


def test_an_awaited_best_of_gives_the_best(tiny, tok):
    params = SamplingParams(n=2, best_of=5, seed=3, max_tokens=6, ignore_eos=True)
    [wanted] = LLM(tiny, tok).generate([[5]], params)

    async def main():
        async with AsyncLLM(tiny, tok) as llm:
            return [output async for output in llm.generate([5], params)]

    [found] = asyncio.run(main())
    assert found.finished
    assert [o.token_ids for o in found.outputs] == [o.token_ids for o in wanted.outputs]


def test_leaving_the_block_ends_what_is_unfinished(tiny, tok):
    long = SamplingParams(max_tokens=90, ignore_eos=True)

    async def main():
        llm = AsyncLLM(tiny, tok)
        with pytest.raises(ConfigError, match="async with AsyncLLM"):
            await anext(llm.generate([3], long))
        for _ in range(2):  # it can be entered again
            async with llm:
                stream = llm.generate([3], long)
                await anext(stream)
                rest = asyncio.create_task(collect(stream))
                await asyncio.sleep(0)
            outputs = await asyncio.wait_for(rest, 20)
            assert outputs[-1].finished
            assert outputs[-1].outputs[0].finish_reason in ("abort", "length")
            assert not llm.llm.engine.busy

    async def collect(stream):
        return [output async for output in stream]

    asyncio.run(main())


def test_who_is_cancelled_before_the_engine_answers_leaves_nothing_in_it(tiny, tok, monkeypatch):
    async def main():
        async with AsyncLLM(tiny, tok) as llm:
            engine, entered, go_on = llm.llm.engine, threading.Event(), threading.Event()
            add, made = engine.add, []

            def slow(*args, **more):
                entered.set()
                go_on.wait(10)
                made.extend(add(*args, **more))
                return made

            monkeypatch.setattr(engine, "add", slow)
            long = SamplingParams(max_tokens=90, ignore_eos=True)
            task = asyncio.create_task(anext(llm.generate([3], long)))
            await asyncio.to_thread(entered.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go_on.set()
            monkeypatch.setattr(engine, "add", add)
            [*_, last] = [output async for output in llm.generate([5], PARAMS)]
            assert last.outputs[0].finish_reason == "length"
            assert made[0].output.finish_reason == "abort"

    asyncio.run(main())
