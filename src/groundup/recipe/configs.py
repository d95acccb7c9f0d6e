"""The configs of the stages that join several packages; torch-free, as every config is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from groundup.core.config import field
from groundup.core.errors import ConfigError
from groundup.data.mix import MixConfig
from groundup.train.config import LoopOptions, check_needs, check_numbers

PLANNED = (  # what a plan brings, besides the context
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "batch_size",
    "gradient_accumulation_steps",
    "steps",
    "learning_rate",
    "adam_learning_rate",
    "weight_decay",
    "context_warmup_fraction",
    "dtype",
    "compile",
)
DEVICE_HELP = "cpu, cuda or mps; unset: the best there is"


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Train a tokenizer on the training split of corpora, or on plain files and folders."""

    paths: tuple[str, ...] = field(help="corpus folders, or files and folders", input=True)
    kind: str = field("bpe", help="char, word, bpe, wordpiece, unigram or sentencepiece-bpe")
    vocab_size: int = field(4096, help="number of ids, special tokens included")
    pattern: str = field(
        "gpt4", help="how bpe and word cut text: gpt2, gpt4, gpt4o, llama3, qwen2, code, or a regex"
    )
    normalizer: str = field(
        "none", help="none, nfc, nfkc, lowercase, bert-cased or bert-uncased (wordpiece's default)"
    )
    byte_fallback: bool = field(True, help="char and sentencepiece: unknown letters become bytes")
    chat_template: str = field(
        "chatml",
        help="chatml, qwen2.5, qwen3, qwen3-instruct, llama3, llama3.1, llama3.2, mistral, gemma "
        "or plain",
    )
    special_tokens: tuple[str, ...] = field((), help="more special tokens")
    reserved_tokens: int = field(0, help="unused special tokens, kept for later")
    dropout: float | None = field(None, help="BPE-dropout that `sample` draws with (1910.13267)")
    alpha: float | None = field(None, help="sharpness of unigram sampling (1804.10959)")
    sample_bytes: int = field(100_000_000, help="sentencepiece trains on this much text at most")
    seed: int = field(0, help="seed of that sample")

    def __post_init__(self) -> None:
        """Refuse settings that would change nothing."""
        check_needs(self)


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """Turn a corpus into memory-mapped token ids."""

    corpus: Path = field(help="corpus folder", input=True)
    tokenizer: Path = field(help="tokenizer folder", input=True)
    cache: Path | None = field(
        None, help="folder where encoded files are kept, to be found by content", semantic=False
    )


@dataclass(frozen=True, kw_only=True)
class NGramConfig:
    """Count a modified Kneser-Ney n-gram model on the training split."""

    corpus: Path = field(help="corpus folder or token shard folder", input=True)
    tokenizer: Path = field(help="tokenizer folder", input=True)
    order: int = field(5, help="longest n-gram in tokens")
    memory_mb: float = field(
        1024, help="memory for counting; the rest lies on the disk of --out", semantic=False
    )


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Time this machine and turn a budget into model size, tokens, batch, rate and steps."""

    shards: Path = field(help="token shard folder", input=True)
    budget: str | None = field(None, help="10m, 2h, 3e18 flops, 5M tokens or $20")
    pretrain_s: float | None = field(None, help="seconds for pretraining, instead of budget")
    usd_per_hour: float | None = field(None, help="price of this machine, for a budget in dollars")
    ladder: Path | None = field(
        None, help="folder of `groundup ladder`: predict the loss from its runs", input=True
    )
    device: str | None = field(None, help=DEVICE_HELP, semantic=False)

    def __post_init__(self) -> None:
        """Refuse two budgets and none, and settings that would change nothing."""
        check_numbers(self)
        check_needs(self)
        if (self.budget is None) == (self.pretrain_s is None):
            raise ConfigError("plan needs either budget or pretrain_s, and not both")


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """Shape of the model: a network that starts from random weights."""

    model_type: str = field(
        "qwen3",
        help="llama, mistral, qwen3, olmo3, smollm3, mixtral, ...; bert or modernbert for mlm",
    )
    num_experts: int = field(0, help="experts a layer (mixtral, qwen3_moe)")
    num_experts_per_tok: int = field(2, help="experts that a token goes through")
    router_aux_loss_coef: float = field(0.01, help="weight of the load-balancing loss")
    hidden_size: int = field(256, help="width")
    num_hidden_layers: int = field(4, help="depth")
    num_attention_heads: int | None = field(None, help="heads; unset: width / 64")
    num_key_value_heads: int | None = field(None, help="key/value heads; unset: as many as heads")
    intermediate_size: int | None = field(None, help="MLP width; unset: 8/3 of the width")
    tie_word_embeddings: bool = field(True, help="one table for embeddings and the head")
    max_position_embeddings: int = field(512, help="context in tokens")


@dataclass(frozen=True, kw_only=True)
class WatchingOptions:
    """Watching: what is scored while a model trains, and where the figures go."""

    sample_every_s: float = field(
        20,
        help="seconds between sample completions; of several processes: with the scores",
        semantic=False,
    )
    eval_steps: int | None = field(
        None, help="steps between scores on validation text; unset: ten a run", semantic=False
    )
    eval_tokens: int = field(32_768, help="validation tokens scored each time", semantic=False)
    tasks: tuple[Path, ...] = field(
        (), help="log-likelihood tasks (.jsonl, .jsonl.gz) scored with them", semantic=False
    )
    eval_limit: int = field(200, help="rows of a task, drawn by seed", semantic=False)
    report_to: tuple[str, ...] = field(
        (), help="also send metrics to: tensorboard, wandb", semantic=False
    )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(ShapeOptions, LoopOptions, WatchingOptions):
    """Train a causal language model; a plan, where given, sets shape, batch, rate and steps."""

    corpus: Path = field(help="corpus folder or token shard folder", input=True)
    tokenizer: Path = field(help="tokenizer folder", input=True)
    init: Path | None = field(
        None, help="model to go on from; it brings its shape; unset: random weights", input=True
    )
    plan: Path | None = field(None, help="plan.json, or a folder that holds it", input=True)
    budget: str | None = field(
        None, help="plan shape, batch, rates and steps: 10m, 2h, 3d, 3e18 flops, 5M tokens, $20"
    )
    usd_per_hour: float | None = field(None, help="price of this machine, for a budget in dollars")
    ngram: Path | None = field(
        None, help="n-gram folder: its level is drawn as the line to beat", input=True
    )
    objective: Literal["causal", "fim", "mlm", "mlm+nsp", "mlm+sop"] = field(
        "causal", help="next tokens, fill-in-the-middle, or masked words with pairs of segments"
    )
    mix: MixConfig | None = field(
        None, help="sources and phases to train on; the corpus is measured on (docs/data.md)"
    )
    packing_strategy: Literal["wrapped", "bfd"] = field(
        "wrapped", help="rows cut from one stream, or whole documents packed by best fit"
    )
    context_warmup_fraction: float = field(
        0.0, help="share of the steps with shorter rows: a quarter of the context, then half"
    )
    allow_overlap: bool = field(
        False, help="train although the validation text is in the training text", semantic=False
    )
    z_loss: float = field(0.0, help="weight of log(Z)^2, which keeps logits small (PaLM: 1e-4)")
    fim_rate: float = field(0.5, help="share of the text that fim rearranges")
    fim_spm_rate: float = field(0.5, help="share of that in SPM order, the others in PSM")
    fim_level: Literal["document", "context"] = field("document", help="what fim cuts")
    whole_word: bool = field(False, help="mlm masks whole words")
    mlm_probability: float | None = field(
        None, help="share of the tokens that mlm masks; unset: 0.15 (bert), 0.3 (modernbert)"
    )
    hidden_dropout_prob: float | None = field(
        None, help="dropout of an encoder, attention included; unset: 0.1 (bert), 0 (modernbert)"
    )
    batch_size: int = field(8, help="rows in a micro-batch")
    gradient_accumulation_steps: int = field(1, help="micro-batches in an optimizer step")
    steps: int = field(500, help="optimizer steps")
    learning_rate: float = field(0.02, help="peak rate of Muon (matrices)")
    adam_learning_rate: float | None = field(
        None,
        help="peak rate of AdamW; unset: 0.003, beside Muon in a new model by its size and tokens",
    )
    dtype: Literal["fp32", "bf16", "fp16"] | None = field(
        None, help="dtype of matrix products; unset: bf16 on a GPU that has it, else fp32"
    )
    compile: bool = field(False, help="use torch.compile")
    seed: int = field(1, help="seed of weights and data order")
    checkpoint_every: int = field(100, help="steps between checkpoints", semantic=False)
    device: str | None = field(None, help=DEVICE_HELP, semantic=False)

    def __post_init__(self) -> None:
        """Check what is known before a plan, or the model to go on from, brings the rest."""
        check_numbers(self)
        brought = PLANNED if self.plan or self.budget else ()
        check_needs(self, brought=(*brought, *(["num_experts"] if self.init else ())))


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """Train three small models and extrapolate the loss of the one that a budget would give."""

    corpus: Path = field(help="corpus folder or token shard folder", input=True)
    tokenizer: Path = field(help="tokenizer folder", input=True)
    budget: str = field(help="of the large run: 2h, 3e18 flops, 5B tokens or $20")
    usd_per_hour: float | None = field(None, help="price of this machine, for a budget in dollars")
    seed: int = field(1, help="seed of weights and data order")
    device: str | None = field(None, help=DEVICE_HELP, semantic=False)


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Low-rank adapter: trained instead of all weights; the names are PEFT's."""

    lora_r: int = field(0, help="rank of a LoRA adapter to train; 0: train all weights")
    lora_alpha: float = field(16, help="the adapter's strength: it is scaled by alpha / r")
    lora_dropout: float = field(0.0, help="dropout on the adapter's input")
    target_modules: tuple[str, ...] = field(
        ("all-linear",), help="layers to adapt, by name (q_proj v_proj ...)"
    )
    use_rslora: bool = field(False, help="scale the adapter by alpha / sqrt(r)")
    use_dora: bool = field(False, help="DoRA: learn the length of every row apart")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(AdapterOptions, LoopOptions):
    """Fine-tune on conversations; the loss counts the assistant's tokens only."""

    model: Path = field(help="model folder", input=True)
    data: Path = field(help="chats.jsonl", input=True)
    plan: Path | None = field(None, help="plan.json, whose dtype is taken", input=True)
    seconds: float | None = field(None, help="time for the whole stage; a few steps are timed")
    steps: int = field(300, help="optimizer steps, where no time is given")
    max_epochs: float = field(4, help="with seconds: never more passes over the data than this")
    batch_size: int = field(16, help="conversations in an optimizer step, or rows with packing")
    packing: bool = field(False, help="pack conversations into full rows; they stay apart")
    max_length: int | None = field(None, help="tokens a row; unset: the model's context")
    learning_rate: float = field(0.0025, help="peak rate of Muon (matrices)")
    adam_learning_rate: float = field(0.0005, help="peak rate of AdamW (embeddings, norms)")
    seed: int = field(1, help="seed of the data order")
    checkpoint_every: int = field(100, help="steps between checkpoints", semantic=False)
    device: str | None = field(None, help=DEVICE_HELP, semantic=False)


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """Fine-tune an encoder to point at the answers in a context, on files in SQuAD's form."""

    model: Path = field(help="encoder folder: bert or modernbert, any head", input=True)
    data: Path = field(help="questions in SQuAD's JSON", input=True)
    test: Path | None = field(None, help="questions to test on; unset: a share", input=True)
    test_share: float = field(0.1, help="share of the articles held out, where --test is unset")
    max_length: int = field(384, help="tokens a window: question, piece of the context, specials")
    doc_stride: int = field(128, help="tokens from one window's start to the next one's")
    epochs: float = field(2, help="passes over the windows")
    steps: int | None = field(None, help="optimizer steps; unset: from --epochs")
    batch_size: int = field(16, help="windows in an optimizer step")
    learning_rate: float = field(0.005, help="peak rate of Muon (matrices)")
    adam_learning_rate: float = field(0.0005, help="peak rate of AdamW (embeddings, norms, head)")
    dtype: Literal["fp32", "bf16"] | None = field(
        None, help="dtype of matrix products; unset: bf16 on a GPU that has it, else fp32"
    )
    seed: int = field(1, help="seed of the new head, the split and the order")
    checkpoint_every: int = field(100, help="steps between checkpoints", semantic=False)
    device: str | None = field(None, help=DEVICE_HELP, semantic=False)

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be, and settings that would change nothing."""
        check_numbers(self)
        check_needs(self)


@dataclass(frozen=True, kw_only=True)
class PreferencesConfig:
    """Make preference pairs: other functions' answers, and the model's own worse samples."""

    model: Path = field(help="fine-tuned model folder", input=True)
    chats: Path = field(help="chats.jsonl", input=True)
    sampled_prompts: int = field(200, help="prompts to sample the model's own answers for")
    max_tokens: int = field(48, help="longest sampled answer in tokens")
    seed: int = field(1, help="seed of pairing and sampling")
    device: str | None = field(None, help=DEVICE_HELP, semantic=False)


@dataclass(frozen=True, kw_only=True)
class AlignConfig(AdapterOptions, LoopOptions):
    """Align to preferences with DPO against the starting model as reference."""

    model: Path = field(help="fine-tuned model folder", input=True)
    data: Path = field(help="preferences.jsonl", input=True)
    method: Literal["dpo"] = field("dpo", help="alignment method")
    beta: float = field(0.1, help="strength of the pull to the reference (DPO's beta)")
    label_smoothing: float = field(0.0, help="share of pairs taken to be mislabelled")
    sft_weight: float = field(0.0, help="weight of an NLL term on the chosen answers")
    plan: Path | None = field(None, help="plan.json, whose dtype is taken", input=True)
    seconds: float | None = field(None, help="time for the whole stage; a few steps are timed")
    steps: int = field(100, help="optimizer steps, where no time is given")
    max_epochs: float = field(2, help="with seconds: never more passes over the pairs than this")
    batch_size: int = field(16, help="pairs in an optimizer step")
    max_length: int | None = field(None, help="tokens a row; unset: the model's context")
    learning_rate: float = field(0.0005, help="peak rate of Muon (matrices)")
    adam_learning_rate: float = field(0.0001, help="peak rate of AdamW (embeddings, norms)")
    seed: int = field(1, help="seed of the data order")
    checkpoint_every: int = field(100, help="steps between checkpoints", semantic=False)
    device: str | None = field(None, help=DEVICE_HELP, semantic=False)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure the n-gram, the network and their mixture, and the answers of each stage."""

    shards: Path = field(help="token shard folder", input=True)
    ngram: Path = field(help="n-gram folder", input=True)
    base: Path = field(help="pretrained model folder", input=True)
    finetuned: Path = field(help="fine-tuned model folder", input=True)
    aligned: Path = field(help="aligned model folder", input=True)
    chats: Path = field(help="chats.jsonl", input=True)
    preferences: Path = field(help="preferences.jsonl", input=True)
    eval_tokens: int = field(2**18, help="most validation tokens scored, drawn from all over it")
    questions: int = field(240, help="held-out questions to answer, all tasks together")
    max_tokens: int = field(48, help="longest answer in tokens")
    seed: int = field(1, help="seed of the choice of questions and of samples")
    device: str | None = field(None, help=DEVICE_HELP, semantic=False)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write the run's report as one HTML file."""

    run: Path = field(help="run folder", semantic=False)
    stages: tuple[Path, ...] = field(help="stage folders to report on", input=True)


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """Train and compare classifiers: naive Bayes, a language model for each label, an encoder."""

    data: Path = field(help="labelled texts: .csv, .tsv or .jsonl", input=True)
    test: Path | None = field(None, help="labelled texts to test on; unset: a share", input=True)
    test_share: float = field(0.2, help="share of every label held out, where --test is unset")
    text_column: str | None = field(None, help="column of texts; unset: by its usual names")
    label_column: str | None = field(None, help="column of labels; unset: by its usual names")
    methods: tuple[str, ...] = field(
        ("naive-bayes", "lm", "encoder"), help="what to compare: naive-bayes, lm, encoder"
    )
    lm: Path | None = field(
        None, help="language model to start from; unset: a small one, random weights", input=True
    )
    encoder: Path | None = field(
        None, help="encoder or decoder to start from; unset: a small one, random", input=True
    )
    sizes: tuple[int, ...] = field((), help="numbers of training texts; unset: n/16, n/4, n")
    hidden_size: int = field(128, help="width of networks with random weights")
    num_hidden_layers: int = field(2, help="depth of networks with random weights")
    vocab_size: int = field(4096, help="vocabulary of their tokenizer")
    max_length: int = field(128, help="tokens a text at most; what is longer is cut and counted")
    batch_size: int = field(32, help="texts in an optimizer step")
    epochs: float = field(6, help="passes over the training texts")
    least_steps: int = field(300, help="optimizer steps at least, for small samples")
    learning_rate: float | None = field(
        None, help="peak rate of Muon (matrices); unset: 0.02 from random weights, else 0.005"
    )
    adam_learning_rate: float | None = field(
        None, help="peak rate of AdamW (the rest); unset: 0.003 from random weights, else 0.0005"
    )
    dtype: Literal["fp32", "bf16"] | None = field(
        None, help="dtype of the networks' matrix products; unset: bf16 on a GPU, else fp32"
    )
    max_test_rows: int = field(1000, help="test texts scored, drawn by seed")
    seed: int = field(1, help="seed of samples, weights and order")
    device: str | None = field(None, help=DEVICE_HELP, semantic=False)

    @property
    def from_random(self) -> bool:
        """Return whether a network starts from random weights."""
        networks = {"lm": self.lm, "encoder": self.encoder}
        return any(networks[name] is None for name in self.methods if name in networks)

    def __post_init__(self) -> None:
        """Refuse settings that would change nothing."""
        check_needs(self)
