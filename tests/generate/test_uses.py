"""What else runs through the engine: vectors, labels, scores, and requests that await."""

import asyncio
import subprocess
import sys

import pytest
import torch

from groundup.core.errors import ConfigError
from groundup.core.types import SamplingParams
from groundup.generate import LLM, AsyncLLM
from groundup.model import save_model
from groundup.model.heads import HeadedDecoder

PROMPTS = [[5, 9, 31], list(range(40, 61)), [7], list(range(100, 140)), list(range(100, 145))]
PARAMS = SamplingParams(temperature=1.0, seed=4, max_tokens=12, ignore_eos=True)


def test_importing_the_engine_does_not_import_torchs_compiler():
    code = "import sys, groundup.generate; sys.exit('torch._dynamo' in sys.modules)"
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
