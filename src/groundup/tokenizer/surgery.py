"""Changing a vocabulary: tokens added or removed, and which old ids each new id stands for.

`rows[new]` are old ids: one for a token that stays, several for a new one (its old pieces, from
whose mean a model's new row starts). `model.remap_vocabulary` applies it to a model.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from groundup.core.errors import TokenizerError
from groundup.tokenizer import spm
from groundup.tokenizer.kinds import BYTES, UNKNOWN, byte_letters
from groundup.tokenizer.tokenizer import Tokenizer

Rows = list[tuple[int, ...]]


def extend(
    tok: Tokenizer, tokens: Sequence[str], *, special: bool = False
) -> tuple[Tokenizer, Rows]:
    """Add tokens that text is cut at before anything else; special ones only templates write."""
    known = tok.backend.get_vocab(with_added_tokens=True)
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    if "" in new:
        raise TokenizerError("an empty token cannot be added")
    rows: Rows = [(i,) for i in range(tok.vocab_size)]
    rows += [tuple(tok.encode(token)) for token in new]
    backend = Backend.from_str(tok.backend.to_str())
    add = backend.add_special_tokens if special else backend.add_tokens
    add([AddedToken(token, normalized=False, special=special) for token in new])
    return tok.with_backend(backend, tok.sentencepiece), rows


def trim(tok: Tokenizer, texts: Iterable[str], *, min_count: int = 1) -> tuple[Tokenizer, Rows]:
    """Keep the tokens that texts use, and those that others are made of; text stays encodable."""
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tok.encode(text))
    used = {i for i, count in counts.items() if count >= min_count}
    content = json.loads(tok.backend.to_str())
    model = content["model"]
    added = {token["id"] for token in content["added_tokens"]}
    vocab: dict[str, int]
    if model["type"] == "Unigram":
        vocab = {piece: i for i, (piece, _) in enumerate(model["vocab"])}
    else:
        vocab = model["vocab"]
    always = {*BYTES, UNKNOWN, "[UNK]", *byte_letters()}
    keep = {i for piece, i in vocab.items() if i in used | added or piece in always}
    if not {BYTES[0], "Ā"} & vocab.keys():  # no bytes to fall back on: letters stay
        keep |= {i for piece, i in vocab.items() if len(piece.removeprefix("##")) == 1}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
    for left, right in reversed(pairs):  # parents of what stays, stay
        if vocab[left + right] in keep:
            keep |= {vocab[left], vocab[right]}
    order = sorted(keep)
    outside = sorted(added - set(vocab.values()))
    new_id = {old: new for new, old in enumerate([*order, *outside])}
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][i] for i in order]
        if model["unk_id"] is not None:
            model["unk_id"] = new_id[model["unk_id"]]
    else:
        model["vocab"] = {piece: new_id[i] for piece, i in vocab.items() if i in keep}
    if "merges" in model:
        model["merges"] = [pair for pair in pairs if vocab["".join(pair)] in keep]
    for token in content["added_tokens"]:
        token["id"] = new_id[token["id"]]
    post = content.get("post_processor") or {}
    for entry in (post.get("special_tokens") or {}).values():
        entry["ids"] = [new_id[i] for i in entry["ids"]]
    pieces = tok.sentencepiece and spm.keep(tok.sentencepiece, order)
    backend = Backend.from_str(json.dumps(content))
    return tok.with_backend(backend, pieces), [(old,) for old in [*order, *outside]]


def old_to_new(rows: Rows) -> dict[int, int]:
    """Return the new id of every old token that stayed."""
    return {row[0]: new for new, row in reversed(list(enumerate(rows))) if len(row) == 1}


__all__ = ["Rows", "extend", "old_to_new", "trim"]
