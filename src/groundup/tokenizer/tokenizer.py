"""The tokenizer: text to ids and back, chats to ids with their loss mask.

Text from users never becomes a special token: `encode` knows only bytes and merges, unless
`allow_special=True`. decode(encode(text)) == text for every string of Unicode scalar values.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import Tokenizer as Backend

from groundup.core.errors import ConfigError, TokenizerError, closest
from groundup.core.files import read_json, write_json, write_text
from groundup.core.types import Message
from groundup.tokenizer.chat import CHATML, Rendered, render
from groundup.tokenizer.stream import StreamDecoder
from groundup.tokenizer.train import END_OF_TEXT, END_OF_TURN, KINDS, PATTERN


class Tokenizer:
    """A byte-level BPE tokenizer, kept on disk as a Hugging Face `tokenizer.json`.

    Encoding runs in tiktoken (several times faster, the same ids); the file, and everything
    that reads it, is that of the `tokenizers` library.
    """

    def __init__(self, backend: Backend, chat_template: str | None = CHATML) -> None:
        self.backend = backend
        self.chat_template = chat_template
        content = json.loads(backend.to_str())
        self.specials = {
            token["content"]: token["id"] for token in content["added_tokens"] if token["special"]
        }
        self.core = fast_encoding(content, self.specials)
        self.fingerprint = hashlib.sha256(backend.to_str().encode()).hexdigest()

    @classmethod
    def train(
        cls, texts: Iterable[str], *, kind: str = "bpe", vocab_size: int = 8192
    ) -> "Tokenizer":
        """Train on texts; the same texts in any chunks give the same tokenizer."""
        if kind not in KINDS:
            raise ConfigError(f"unknown tokenizer kind {kind!r}{closest(kind, KINDS)}")
        return cls(KINDS[kind](texts, vocab_size))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a folder with tokenizer.json; a missing or broken file is a TokenizerError."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(
                f"{folder} holds no tokenizer.json: give a tokenizer or model folder"
            )
        try:
            backend = Backend.from_file(str(file))
        except Exception as err:  # the library raises bare Exception
            raise TokenizerError(f"{file} cannot be read ({err}): copy or train it again") from err
        template = None
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        elif (folder / "tokenizer_config.json").is_file():
            template = read_json(folder / "tokenizer_config.json").get("chat_template")
        return cls(backend, template)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template."""
        place = Path(folder)
        write_text(place / "tokenizer.json", self.backend.to_str(pretty=True))
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000_000,
        }
        if self.chat_template:
            settings["chat_template"] = self.chat_template
            write_text(place / "chat_template.jinja", self.chat_template)
        write_json(place / "tokenizer_config.json", settings)

    @property
    def vocab_size(self) -> int:
        """Return the number of ids, special tokens included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_id(self) -> int:
        """Return the id that ends a document, and stands before its first token."""
        return self.specials[END_OF_TEXT]

    bos_token_id = pad_token_id = eos_token_id

    @property
    def end_of_turn_id(self) -> int:
        """Return the id that ends a chat turn."""
        return self.specials[END_OF_TURN]

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer."""
        return (self.end_of_turn_id, self.eos_token_id)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return ids; names of special tokens in the text stay text unless allowed."""
        if allow_special:
            return self.core.encode(text, allowed_special="all")
        return self.core.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts in threads, without the interpreter's lock."""
        return self.core.encode_ordinary_batch(list(texts))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special_tokens=skip_special_tokens).decode(
            "utf-8", errors="replace"
        )

    def decode_bytes(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> bytes:
        """Return the bytes that the ids stand for; ids above the vocabulary stand for none.

        Models have such ids where their embedding is padded to a round size.
        """
        skip = set(self.specials.values()) if skip_special_tokens else set()
        known = len(self.token_bytes)
        return b"".join(self.token_bytes[i] for i in ids if i < known and i not in skip)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """Return the bytes of every id."""
        return [self.core.decode_single_token_bytes(i) for i in range(self.vocab_size)]

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder that takes ids one by one and never emits half a character."""
        return StreamDecoder(self.token_bytes, skip=set(self.specials.values()))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """Return ids, role, trainable and origin of every token of a conversation."""
        if self.chat_template is None:
            raise TokenizerError("this tokenizer has no chat template: fine-tune with one first")
        return render(
            self.chat_template,
            messages,
            encode=self.encode,
            token_bytes=self.token_bytes,
            specials=self.specials,
            variables={"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT},
            tools=tools,
            add_generation_prompt=add_generation_prompt,
        )


def fast_encoding(content: dict[str, Any], specials: dict[str, int]) -> tiktoken.Encoding:
    """Return a tiktoken encoder with the ids of a byte-level BPE `tokenizer.json`.

    tiktoken merges the pair whose joined bytes have the lowest rank; that is BPE's own order
    when ranks are ids and ids were given in the order of the merges, which is checked here.
    """
    model = content["model"]
    if model["type"] != "BPE":
        raise TokenizerError(f"tokenizer.json holds a {model['type']} model; only BPE is supported")
    letters = byte_letters()
    try:
        ranks = {
            bytes(letters[c] for c in token): i
            for token, i in model["vocab"].items()
            if token not in specials
        }
    except KeyError as err:
        raise TokenizerError(f"tokenizer.json is not byte-level BPE: the letter {err}") from err
    pattern = PATTERN
    splits = (content.get("pre_tokenizer") or {}).get("pretokenizers", [])
    for split in splits:
        if split["type"] == "Split":
            pattern = split["pattern"].get("Regex", pattern)
    merged = [ranks[bytes(letters[c] for c in "".join(pair))] for pair in merge_pairs(model)]
    if merged != sorted(merged):
        raise TokenizerError("tokenizer.json: ids are not in the order of the merges")
    return tiktoken.Encoding(
        "groundup", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
    )


def merge_pairs(model: dict[str, Any]) -> list[list[str]]:
    """Return the merges as pairs; older files write them as "left right"."""
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]


def byte_letters() -> dict[str, int]:
    """Return the byte for each printable letter that byte-level BPE writes it as (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + n): byte for n, byte in enumerate(others)}
