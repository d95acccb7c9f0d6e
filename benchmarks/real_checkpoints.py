"""What a user does first with a real checkpoint, here and in transformers: the same results?

Logits of a prompt, a greedy continuation (for encoders: the masked words), and a short LoRA run,
on Qwen3-0.6B, SmolLM2-135M, Llama-3.2-1B and ModernBERT-base, or on those that are named: local
folders, or hub ids, which are fetched. The LoRA run starts in both from one adapter folder in
PEFT's format, here in groundup and there in PEFT, on the same rows with the same optimizer.

    python benchmarks/real_checkpoints.py                          # all four, from the hub
    python benchmarks/real_checkpoints.py ~/models/SmolLM2-135M    # a local folder
    python benchmarks/real_checkpoints.py --shrunk                 # random weights, small copies

What cannot be had is named and left out. `--shrunk` writes models of the same kinds (heads,
scalings, ties, norms) with few narrow layers and the vocabulary of a small tokenizer, to see that
the script itself is sound.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from groundup.core.errors import GroundupError
from groundup.core.run import resolve_model
from groundup.core.types import SamplingParams
from groundup.generate import LLM
from groundup.model import Decoder, load_network
from groundup.model.adapter import save_adapter
from groundup.model.lora import LoraConfig, apply_lora
from groundup.tokenizer import Tokenizer

MODELS = (
    "Qwen/Qwen3-0.6B",
    "HuggingFaceTB/SmolLM2-135M",
    "unsloth/Llama-3.2-1B",
    "answerdotai/ModernBERT-base",
)
PROMPT = "The first programmable machine was built to weave cloth. Its patterns were"
ROWS = (
    "A loom reads one card for each row of the cloth, and a hole lifts a thread.",
    "The cards are laced into a chain, so that a pattern may be as long as one likes.",
    "Whoever owns the chain can weave the same cloth again, anywhere, at any time.",
    "It was the first time that a machine was told what to do by something one could copy.",
)
NEW_TOKENS, LORA_STEPS, RATE = 32, 8, 1e-3
SHRUNK = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4}
DECODER = {"num_attention_heads": 8, "num_key_value_heads": 2, "initializer_range": 0.1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def apart(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the median of three runs, and what the last gave."""
    times, result = [], None
    for _ in range(3):
        started = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - started)
    return statistics.median(times), result


def compare(name: str) -> dict[str, Any]:
    """Return one model's row of the table."""
    folder = resolve_model(name)
    tok, model = Tokenizer.load(folder), load_network(folder).eval()
    causal = isinstance(model, Decoder)
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    theirs: Any = kind.from_pretrained(folder, dtype=torch.float32).eval()
    their_tok: Any = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tok.encode(PROMPT)
    row: dict[str, Any] = {"model": name}
    row["parameters"] = sum(weight.numel() for weight in model.parameters())
    row["ids equal"] = ids == their_tok(PROMPT, add_special_tokens=False)["input_ids"]
    ids_BT = torch.tensor([ids])
    with torch.no_grad():
        row["logits apart"] = apart(model(ids_BT), theirs(ids_BT).logits)
    row |= generated(folder, model, theirs, ids) if causal else filled(model, theirs, tok, ids)
    row["lora losses apart"] = lora(folder, model, theirs, [tok.encode(text) for text in ROWS])
    return row


def generated(folder: Path, model: Decoder, theirs: Any, ids: list[int]) -> dict[str, Any]:
    """Return whether the greedy continuations are equal, and the ratio of the rates."""
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    llm = LLM(folder)
    theirs.generation_config.eos_token_id = None  # both write on
    ours_s, [output] = seconds(lambda: llm.generate([ids], params))
    theirs_s, found = seconds(
        lambda: theirs.generate(
            torch.tensor([ids]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    )
    same = output.outputs[0].token_ids == found[0, len(ids) :].tolist()
    return {"greedy equal": same, "rate": theirs_s / ours_s}


def filled(model: nn.Module, theirs: Any, tok: Tokenizer, ids: list[int]) -> dict[str, Any]:
    """Return whether the likeliest word at every second place is the same."""
    mask = tok.backend.token_to_id("[MASK]")
    assert mask is not None
    hidden = torch.tensor([[mask if n % 2 else i for n, i in enumerate(ids)]])
    with torch.no_grad():
        ours_s, found = seconds(lambda: model(hidden))
        theirs_s, wanted = seconds(lambda: theirs(hidden).logits)
    return {
        "greedy equal": torch.equal(found.argmax(-1), wanted.argmax(-1)),
        "rate": theirs_s / ours_s,
    }


def lora(folder: Path, model: Any, theirs: Any, rows: list[list[int]]) -> float:
    """Return how far the losses of two LoRA runs from the same adapter are apart, at most."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16)
    apply_lora(model, config)
    with tempfile.TemporaryDirectory() as place:
        adapter = save_adapter(model, config, str(folder), Path(place) / "adapter")
        peft: Any = PeftModel.from_pretrained(copy.deepcopy(theirs), adapter, is_trainable=True)
    ours = losses(model, rows, lambda ids_BT: model(ids_BT))
    wanted = losses(peft, rows, lambda ids_BT: peft(input_ids=ids_BT).logits)
    return max(abs(a - b) / abs(b) for a, b in zip(ours, wanted, strict=True))


def losses(
    model: nn.Module, rows: list[list[int]], forward: Callable[[Tensor], Tensor]
) -> list[float]:
    """Train what is trainable on the rows in turn; return the loss of every step."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    model.eval()  # without dropout
    found = []
    for step in range(LORA_STEPS):
        ids_BT = torch.tensor([rows[step % len(rows)]])
        logits_TV = forward(ids_BT)[0, :-1].float()
        loss = nn.functional.cross_entropy(logits_TV, ids_BT[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def shrunk(place: Path) -> list[str]:
    """Write small models of the four kinds with random weights; return their folders."""
    text = Path(__file__).read_text()
    tok = Tokenizer.train([text, *ROWS], vocab_size=500, special_tokens=("[MASK]",))
    size = {"vocab_size": tok.vocab_size, **SHRUNK}
    ends = {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id}
    configs: dict[str, Any] = {
        "qwen3": transformers.Qwen3Config(
            **size, **DECODER, **ends, head_dim=32, tie_word_embeddings=True
        ),
        "smollm2": transformers.LlamaConfig(
            **size, **DECODER | {"num_attention_heads": 4}, **ends, tie_word_embeddings=True
        ),
        "llama-3.2": transformers.LlamaConfig(
            **size,
            **DECODER,
            **ends,
            tie_word_embeddings=True,
            rope_parameters=LLAMA3,
            max_position_embeddings=131072,
        ),
        "modernbert": transformers.ModernBertConfig(
            **size,
            num_attention_heads=4,
            initializer_range=0.1,
            local_attention=8,
            pad_token_id=tok.pad_token_id,
            cls_token_id=tok.bos_token_id,
            sep_token_id=tok.eos_token_id,
            **ends,
        ),
    }
    folders = []
    for name, config in configs.items():
        torch.manual_seed(1)
        if name == "modernbert":
            model: Any = transformers.ModernBertForMaskedLM(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(place / name)
        tok.save(place / name)
        folders.append(str(place / name))
    return folders


def main() -> None:
    """Compare the models that are named, or all."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("models", nargs="*", help="folders or hub ids")
    flags.add_argument("--shrunk", action="store_true", help="small copies with random weights")
    args = flags.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as place:
        names = shrunk(Path(place)) if args.shrunk else args.models or MODELS
        missing = 0
        for name in names:
            try:
                row = compare(name)
            except GroundupError as err:
                print(f"{name}: left out: {err}")
                missing += 1
                continue
            print(f"{Path(name).name}: {row['parameters'] / 1e6:,.1f}M parameters")
            print(f"  text has the same ids: {row['ids equal']}")
            print(f"  logits apart, relative: {row['logits apart']:.1e}")
            print(f"  greedy tokens equal: {row['greedy equal']}; rate {row['rate']:.2f}x")
            print(f"  losses of the LoRA runs apart, relative: {row['lora losses apart']:.1e}")
    if missing:
        print(f"{missing} of {len(names)} models could not be had")


if __name__ == "__main__":
    main()
