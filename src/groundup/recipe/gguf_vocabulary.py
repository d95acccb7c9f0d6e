"""A tokenizer inside a GGUF file: tokens, scores or merges, types, special ids, the template."""

import json
import re
from collections import Counter
from typing import Any
from unicodedata import category

from groundup.core.errors import CheckpointError
from groundup.core.progress import say
from groundup.tokenizer import PATTERNS, Tokenizer, spm

# Our patterns under the names by which llama.cpp has them built in.
PRE_TOKENIZERS = {"gpt2": "gpt-2", "gpt4": "dbrx", "gpt4o": "gpt-4o", "qwen2": "qwen2"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"


def add_vocabulary(writer: Any, tok: Tokenizer, size: int, *, framed: bool = False) -> None:
    """Add tokens, scores or merges, types and special ids; ids without a token are unused.

    `framed`: llama.cpp is to put an encoder's first and last token around texts by itself.
    """
    names = [f"[PAD{n}]" for n in range(size)]
    types = [UNUSED] * size
    for name, i in tok.backend.get_vocab(with_added_tokens=True).items():
        names[i] = name
        types[i] = (
            CONTROL if name in tok.specials else USER_DEFINED if name in tok.added else NORMAL
        )
    if tok.kind == "bpe":
        add_byte_level(writer, tok)
    elif tok.sentencepiece is not None and not tok.lossy_normalizer:
        types = add_sentencepiece(writer, tok, types)
    elif tok.kind == "wordpiece" and framed:
        names = add_wordpiece(writer, tok, names, types)
    else:
        raise CheckpointError(
            f"llama.cpp has no tokenizer like this {tok.kind} one: bpe, unigram and "
            "sentencepiece-bpe can be written, and an encoder's wordpiece"
        )
    writer.add_token_list([name.encode() for name in names])
    writer.add_token_types(types)
    writer.add_pad_token_id(tok.pad_token_id)
    writer.add_add_bos_token(framed)
    writer.add_add_eos_token(framed)
    if framed:
        add_frame(writer, tok)
        return
    writer.add_bos_token_id(tok.bos_token_id)
    writer.add_eos_token_id(tok.end_of_turn_id)
    writer.add_eot_token_id(tok.end_of_turn_id)
    if tok.chat_template:
        writer.add_chat_template(without_marks(tok.chat_template))


def add_byte_level(writer: Any, tok: Tokenizer) -> None:
    """Add the pattern and the merges of byte-level BPE."""
    if tok.lossy_normalizer:
        raise CheckpointError("llama.cpp has no normalizer for byte-level BPE: not written")
    merges = tok.content["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tok))
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])


def add_sentencepiece(writer: Any, tok: Tokenizer, types: list[int]) -> list[int]:
    """Add scores and how spaces are treated; return the types, those of pieces mended."""
    model = tok.sentencepiece
    assert model is not None
    if tok.kind == "unigram" and model.ids_of(spm.BYTE):
        raise CheckpointError(
            "llama.cpp's unigram tokenizer does not fall back on bytes: train with "
            "--no-byte-fallback, or as sentencepiece-bpe"
        )
    kinds = {spm.BYTE: BYTE, spm.UNKNOWN: UNKNOWN, spm.USER_DEFINED: USER_DEFINED}
    count = len(model.pieces)
    mended = [kinds.get(piece.type, types[i]) for i, piece in enumerate(model.pieces)]
    writer.add_tokenizer_model("t5" if tok.kind == "unigram" else "llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([p.score for p in model.pieces] + [0.0] * (len(types) - count))
    writer.add_add_space_prefix(model.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(model.remove_extra_whitespaces)
    if model.charsmap:
        writer.add_precompiled_charsmap(model.charsmap)
    if unknown := model.ids_of(spm.UNKNOWN):
        writer.add_unk_token_id(unknown[0])
    return mended + types[count:]


def add_frame(writer: Any, tok: Tokenizer) -> None:
    """Add the tokens that an encoder's texts begin and end with, under all their names."""
    first, last = tok.frame_ids()
    writer.add_bos_token_id(first)
    writer.add_eos_token_id(last)
    writer.add_uint32("tokenizer.ggml.cls_token_id", first)
    writer.add_sep_token_id(last)
    writer.add_add_sep_token(True)
    mask = tok.backend.token_to_id("[MASK]")
    if mask is not None:
        writer.add_mask_token_id(mask)


def add_wordpiece(writer: Any, tok: Tokenizer, names: list[str], types: list[int]) -> list[str]:
    """Add what llama.cpp's WordPiece, which cuts words as BERT does, is told; return its tokens."""
    model, unify = tok.content["model"], tok.content.get("normalizer") or {}
    cut = (tok.content.get("pre_tokenizer") or {}).get("type")
    as_bert = unify.get("clean_text") and unify.get("handle_chinese_chars")
    if cut != "BertPreTokenizer" or not as_bert or model["continuing_subword_prefix"] != "##":
        raise CheckpointError(
            "llama.cpp's WordPiece cleans and cuts text as BERT does and knows ## alone, this "
            "tokenizer does otherwise: train one with --kind wordpiece and no --normalizer but "
            "bert-cased or bert-uncased"
        )
    lowercase, strips = unify["lowercase"], unify["strip_accents"]
    strips = lowercase if strips is None else strips
    if strips and any(map(unlike_bert, tok.backend.get_vocab())):
        say(
            "  llama.cpp's WordPiece cuts Hangul and vowel signs such as Hindi's otherwise than "
            "BERT does: texts with them get other tokens there"
        )
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_bool("tokenizer.ggml.normalizer.lowercase", lowercase)
    writer.add_bool("tokenizer.ggml.normalizer.strip_accents", strips)
    writer.add_unk_token_id(tok.backend.token_to_id(model["unk_token"]))
    pairs = zip(names, types, strict=True)
    written = [with_space(name) if kind == NORMAL else name for name, kind in pairs]
    [(twice, count)] = Counter(written).most_common(1)
    if count > 1:
        raise CheckpointError(
            f"llama.cpp writes {SPACE} for the start of a word, and two tokens become {twice!r}: "
            "not written"
        )
    return written


def unlike_bert(token: str) -> bool:
    """Return whether a token has letters that llama.cpp loses when it strips accents."""
    return any("\u1100" <= char <= "\u11ff" or category(char) == "Mc" for char in token)


def with_space(piece: str) -> str:
    """Return a WordPiece token as llama.cpp writes it: marked at a word's start, not inside."""
    return piece.removeprefix("##") if piece.startswith("##") else SPACE + piece


def without_marks(template: str) -> str:
    """Return a chat template without {% generation %}, which llama.cpp does not know."""
    return re.sub(r"{%-?\s*(end)?generation\s*-?%}\n?", "", template)


def pre_tokenizer_name(tok: Tokenizer) -> str:
    """Return llama.cpp's name for how this tokenizer cuts text."""
    found = json.dumps(tok.content.get("pre_tokenizer"))
    for name, llama_name in PRE_TOKENIZERS.items():
        if json.dumps(PATTERNS[name]) in found:
            # Llama 3 takes a word that is a token whole; "dbrx" cuts alike and merges
            whole = llama_name == "dbrx" and tok.content["model"].get("ignore_merges")
            return "llama-bpe" if whole else llama_name
    if '"use_regex": true' in found:
        return "gpt-2"
    known = ", ".join(PRE_TOKENIZERS)
    raise CheckpointError(
        f"llama.cpp cannot cut text as this tokenizer does: train with --pattern {known}"
    )
