"""Other libraries' tokenizer files, both ways: the ids stay the same.

Each reader returns (backend, SentencePiece model or None, settings as in tokenizer_config.json).
"""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from groundup.core.errors import DataError, TokenizerError
from groundup.core.files import write_text
from groundup.tokenizer import spm
from groundup.tokenizer.encoders import NEVER_IN_UTF8
from groundup.tokenizer.kinds import END_OF_TEXT, byte_letters, byte_level
from groundup.tokenizer.patterns import PATTERNS

Loaded = tuple[Backend, spm.SentencePiece | None, dict[str, Any]]

# What the published rank files leave out: pattern and special tokens, by the file's name.
RANK_FILES = {
    "r50k_base": ("gpt2", {END_OF_TEXT: 50256}),
    "gpt2": ("gpt2", {END_OF_TEXT: 50256}),
    "p50k_base": ("gpt2", {END_OF_TEXT: 50256}),
    "cl100k_base": (
        "gpt4",
        {
            END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": ("gpt4o", {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
    "multilingual": ("gpt2", {END_OF_TEXT: 50257}),  # Whisper's
}


def load_any(path: Path) -> Loaded | None:
    """Read a file or folder of any known format; None where there is none."""
    if path.is_dir():
        for names in FOLDER_FILES:
            if all((path / name).is_file() for name in names):
                return load_any(path / names[0])
        return None
    if path.name == "tokenizer.json" or (path.suffix == ".json" and is_tokenizer_json(path)):
        return load_json(path)
    if path.suffix == ".model":
        return load_sentencepiece(path)
    if path.suffix == ".tiktoken":
        return load_ranks(path)
    if path.name in MERGES:
        return load_merges(path.parent / MERGES[path.name])
    if path.suffix == ".txt":
        return load_wordpiece(path)
    if path.name in MERGES.values():
        return load_merges(path)
    return None


MERGES = {"merges.txt": "vocab.json", "vocab.bpe": "encoder.json"}
FOLDER_FILES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
    ("vocab.txt",),
)


def is_tokenizer_json(path: Path) -> bool:
    """Return whether a JSON file is one of the tokenizers library."""
    with path.open("rb") as file:
        head = file.read(4096)
    return b'"added_tokens"' in head or b'"version"' in head


def load_json(path: Path) -> Loaded:
    """Read `tokenizer.json`, and `tokenizer.model` beside it where the two agree."""
    try:
        backend = Backend.from_file(str(path))
    except Exception as err:  # the library raises bare Exception
        raise TokenizerError(f"{path} cannot be read ({err}): copy or train it again") from err
    backend.no_truncation()  # that is done when asked for, not because a file says so
    backend.no_padding()
    model = None
    beside = path.parent / "tokenizer.model"
    if beside.is_file():
        model = spm.read(beside.read_bytes(), str(beside))
        if any(backend.id_to_token(n) != piece.text for n, piece in enumerate(model.pieces)):
            model = None  # trimmed or of another model: the JSON decides
    return backend, model, {}


def load_sentencepiece(path: Path) -> Loaded:
    """Read a SentencePiece `.model`."""
    model = spm.read(path.read_bytes(), str(path))
    names = {piece.text for piece in model.pieces if piece.type == spm.CONTROL}
    settings = {}
    for key, wanted in (("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>")):
        if wanted in names:
            settings[key] = wanted
    unknown = model.ids_of(spm.UNKNOWN)
    if unknown:
        settings["unk_token"] = model.pieces[unknown[0]].text
    return spm.to_backend(model), model, settings


def load_ranks(path: Path) -> Loaded:
    """Read tiktoken ranks: lines of base64 and rank. Unknown names get the gpt4 pattern."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            if token != b"=":  # an empty token: Whisper's files end in one
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as err:
            raise TokenizerError(f"{path}, line {number}: no base64 token and rank") from err
    if set(ranks.values()) != set(range(len(ranks))):
        raise TokenizerError(f"{path}: the ranks are not 0 to {len(ranks) - 1:,}: copy it again")
    if lost := {bytes([byte]) for byte in range(256)} - ranks.keys() - NEVER_IN_UTF8:
        raise TokenizerError(f"{path}: {len(lost)} of the 256 bytes have no rank: copy it again")
    name, specials = RANK_FILES.get(path.stem, ("gpt4", {END_OF_TEXT: len(ranks)}))
    try:
        backend = byte_level(ranks, PATTERNS[name])
    except DataError as err:
        raise TokenizerError(f"{path}: {err}") from err
    return add_at(backend, specials), None, {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}


def add_at(backend: Backend, specials: dict[str, int]) -> Backend:
    """Add special tokens at given ids above the vocabulary; gaps are filled with reserved ones."""
    size = backend.get_vocab_size()
    by_id = {i: name for name, i in specials.items()}
    for i in range(size, max(by_id, default=-1) + 1):
        backend.add_special_tokens([by_id.get(i, f"<|reserved_{i}|>")])
    return backend


def load_merges(path: Path) -> Loaded:
    """Read GPT-2's vocab.json and merges.txt (or encoder.json and vocab.bpe)."""
    other = path.parent / {vocab: merges for merges, vocab in MERGES.items()}[path.name]
    try:
        vocab = json.loads(path.read_text(encoding="utf-8"))
        lines = other.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as err:
        raise TokenizerError(f"{path} and {other.name} cannot be read: {err}") from err
    pairs = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not (number == 1 and line.startswith("#version")):
            pair = line.split()
            if len(pair) != 2:
                raise TokenizerError(f"{other}, line {number}: a merge is two tokens")
            pairs.append((pair[0], pair[1]))
    try:
        backend = Backend(models.BPE(vocab=vocab, merges=pairs))
    except Exception as err:  # the library raises bare Exception
        reason = str(err).splitlines()[0]
        raise TokenizerError(f"{path} and {other.name} do not belong together: {reason}") from err
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS["gpt2"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    letters = byte_letters()
    made = {left + right for left, right in pairs} | set(letters)
    specials = [token for token in vocab if token not in made]
    backend.add_special_tokens(specials)
    settings = {}
    if "</s>" in specials:
        settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    elif END_OF_TEXT in specials:
        settings = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    return backend, None, settings


def load_wordpiece(path: Path) -> Loaded:
    """Read BERT's vocab.txt; cased where it holds capital letters."""
    try:
        words = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as err:
        raise TokenizerError(f"{path} is not UTF-8 ({err}): copy it again") from err
    words = [word.removesuffix("\r") for word in words]
    vocab = {word: n for n, word in enumerate(words)}
    names = {}  # as the file spells them: [CLS], or [cls]
    for role in ("pad", "unk", "cls", "sep", "mask"):
        found = [name for name in (f"[{role.upper()}]", f"[{role}]") if name in vocab]
        if found:
            names[role] = found[0]
    missing = [role for role in ("unk", "cls", "sep") if role not in names]
    if missing:
        wanted = ", ".join(f"[{role.upper()}]" for role in missing)
        raise TokenizerError(f"{path} is no WordPiece vocabulary: {wanted} is missing")
    cased = any(len(word) == 1 and "A" <= word <= "Z" for word in words)
    backend = Backend(models.WordPiece(vocab, unk_token=names["unk"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    backend.add_special_tokens(list(names.values()))
    backend.post_processor = frame(backend, vocab[names["cls"]], vocab[names["sep"]])
    return backend, None, {f"{role}_token": name for role, name in names.items()}


def frame(backend: Backend, first_id: int, last_id: int) -> processors.TemplateProcessing:
    """Return what puts special tokens around a text, or a pair of texts, as BERT has them."""
    first, last = backend.id_to_token(first_id), backend.id_to_token(last_id)
    assert first is not None
    assert last is not None
    return processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(first, first_id), (last, last_id)],
    )


def export_sentencepiece(tokenizer: Any, path: Path) -> None:
    """Write a SentencePiece `.model`."""
    if tokenizer.sentencepiece is None or tokenizer.lossy_normalizer:
        raise TokenizerError(
            f"a {tokenizer.kind} tokenizer cannot be written as {path.name}: only unigram and "
            "sentencepiece-bpe without a normalizer of their own"
        )
    path.write_bytes(spm.write(tokenizer.sentencepiece))


def export_ranks(tokenizer: Any, path: Path) -> None:
    """Write tiktoken ranks; pattern and special tokens go into no rank file and are lost."""
    ranks = tokenizer.ranks
    if ranks is None:
        raise TokenizerError(
            f"a {tokenizer.kind} tokenizer cannot be written as {path.name}: only byte-level BPE"
        )
    lines = [
        f"{base64.b64encode(token).decode()} {rank}\n"
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    write_text(path, "".join(lines))


def export_merges(tokenizer: Any, path: Path) -> None:
    """Write vocab.json, and merges.txt beside it."""
    content = json.loads(tokenizer.backend.to_str())["model"]
    if content["type"] != "BPE" or tokenizer.ranks is None:
        raise TokenizerError(f"a {tokenizer.kind} tokenizer has no merges to write")
    vocab = dict(content["vocab"])
    vocab |= {name: i for name, i in tokenizer.specials.items() if name not in vocab}
    write_text(path, json.dumps(vocab, ensure_ascii=False))
    pairs = [m if isinstance(m, str) else " ".join(m) for m in content["merges"]]
    write_text(path.parent / "merges.txt", "\n".join(["#version: 0.2", *pairs]) + "\n")


def export_wordpiece(tokenizer: Any, path: Path) -> None:
    """Write BERT's vocab.txt."""
    if tokenizer.kind != "wordpiece":
        raise TokenizerError(f"a {tokenizer.kind} tokenizer has no vocab.txt: only wordpiece")
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    write_text(path, "".join(f"{word}\n" for word in sorted(vocab, key=vocab.__getitem__)))


EXPORTS: dict[str, Callable[[Any, Path], None]] = {
    ".model": export_sentencepiece,
    ".tiktoken": export_ranks,
    ".json": export_merges,
    ".txt": export_wordpiece,
}
