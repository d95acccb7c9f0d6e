"""The tokenizer: text to ids and back, chats to ids with their loss mask.

Text from users never becomes a special token, unless `allow_special=True`. What a round trip
keeps depends on the kind: `docs/tokenizer.md` has the promises.
"""

import hashlib
import json
import random
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from groundup.core.errors import ConfigError, TokenizerError, closest
from groundup.core.files import read_json, write_json, write_text
from groundup.core.types import Message
from groundup.tokenizer import formats, sampling, spm
from groundup.tokenizer.chat import Rendered, Vocabulary, render
from groundup.tokenizer.encoders import ByteLevel, NotFast, Span, TextEncoder, text_encoder
from groundup.tokenizer.kinds import (
    BERT_SPECIALS,
    END_OF_TEXT,
    KINDS,
    UNKNOWN,
    TrainOptions,
    not_empty,
)
from groundup.tokenizer.stream import StreamDecoder, bytes_of_tokens
from groundup.tokenizer.templates import CHATML, ENDS_OF_TURN, template

OWN_KEY = "groundup"  # what tokenizer_config.json keeps for us


class Tokenizer:
    """One tokenizer of any kind, kept on disk as a Hugging Face `tokenizer.json`.

    `backend` is that file's object in the tokenizers library; text is encoded by a faster
    library with the same ids where there is one. `settings` are tokenizer_config.json's.
    """

    def __init__(
        self,
        backend: Backend,
        chat_template: str | None = CHATML,
        *,
        sentencepiece: spm.SentencePiece | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.backend, self.sentencepiece = backend, sentencepiece
        self.chat_template = chat_template
        written = backend.to_str()
        self.content: dict[str, Any] = json.loads(written)
        added = self.content["added_tokens"]
        self.specials: dict[str, int] = {t["content"]: t["id"] for t in added if t["special"]}
        self.added: dict[str, int] = {t["content"]: t["id"] for t in added}
        self.settings: dict[str, Any] = settings or {}
        if settings is None and END_OF_TEXT in self.specials:
            self.settings = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
            own = {f"{name[1:-1].lower()}_token": name for name in BERT_SPECIALS}
            self.settings |= {role: name for role, name in own.items() if name in self.specials}
        self.sampling: dict[str, float] = self.settings.get(OWN_KEY, {}).get("sampling", {})
        unknown = self.content["model"].get("unk_token") or UNKNOWN
        self.silent = {i for name, i in self.specials.items() if name != unknown}
        self.fingerprint = hashlib.sha256(written.encode()).hexdigest()

    @cached_property
    def core(self) -> TextEncoder:
        """Return the fastest encoder with this tokenizer's ids, made when it is first needed."""
        return text_encoder(self.backend, self.sentencepiece, set(self.specials.values()))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        kind: str = "bpe",
        chat_template: str = "chatml",
        special_tokens: Sequence[str] = (),
        reserved_tokens: int = 0,
        **options: Any,
    ) -> "Tokenizer":
        """Train on texts; the same texts in any chunks give the same tokenizer.

        `options` are the fields of TrainOptions. The special tokens are the end of text, those
        of the chat template, `special_tokens`, and `reserved_tokens` unused ones for later.
        """
        if kind not in KINDS:
            raise ConfigError(f"unknown tokenizer kind {kind!r}{closest(kind, KINDS)}")
        form, needed = template(chat_template)
        reserved = [f"<|reserved_{n}|>" for n in range(reserved_tokens)]
        specials = dict.fromkeys((END_OF_TEXT, *needed, *special_tokens, *reserved))
        if "" in specials or reserved_tokens < 0:
            raise ConfigError("special tokens have names, and reserved_tokens is no less than 0")
        chosen = TrainOptions(special_tokens=tuple(specials), **options)
        trained = KINDS[kind](not_empty(texts), chosen)
        return cls(trained.backend, form, sentencepiece=trained.sentencepiece)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a folder or file of any known format; a broken one is a TokenizerError.

        Known are tokenizer.json, SentencePiece's .model, tiktoken's .tiktoken, GPT-2's
        vocab.json with merges.txt (encoder.json with vocab.bpe), and BERT's vocab.txt.
        """
        place = Path(path)
        loaded = formats.load_any(place) if place.exists() else None
        if loaded is None:
            raise TokenizerError(
                f"{place} holds no tokenizer.json (nor .model, .tiktoken, vocab.json with "
                "merges.txt, vocab.txt): give a tokenizer or model folder"
            )
        backend, sentencepiece, settings = loaded
        folder = place if place.is_dir() else place.parent
        if (folder / "tokenizer_config.json").is_file():
            found = read_json(folder / "tokenizer_config.json")
            if not isinstance(found, dict):
                raise TokenizerError(f"{folder / 'tokenizer_config.json'} holds no object")
            settings = settings | found
        if settings.get(OWN_KEY, {}).get("framed"):  # what `save` added beside an encoder goes
            backend.post_processor = None
            settings = {k: v for k, v in settings.items() if k != "model_max_length"}
        form = settings.get("chat_template")
        if isinstance(form, list):  # several, by name
            try:
                named = {entry["name"]: entry["template"] for entry in form}
            except (KeyError, TypeError) as err:
                raise TokenizerError(
                    f"{folder / 'tokenizer_config.json'}: each chat_template of a list has a name "
                    "and a template"
                ) from err
            form = named.get("default", next(iter(named.values()), None))
        if (folder / "chat_template.jinja").is_file():
            form = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        return cls(backend, form, sentencepiece=sentencepiece, settings=settings)

    def with_backend(
        self, backend: Backend, sentencepiece: spm.SentencePiece | None
    ) -> "Tokenizer":
        """Return a tokenizer with this one's template and settings over another vocabulary."""
        return Tokenizer(
            backend,
            self.chat_template,
            sentencepiece=sentencepiece,
            settings=dict(self.settings),
        )

    def with_template(self, name: str) -> "Tokenizer":
        """Return a tokenizer with a chat template by name; its special tokens must be known."""
        form, needed = template(name)
        missing = [token for token in needed if token not in self.specials]
        if missing:
            raise TokenizerError(
                f"the template {name!r} needs the special tokens {', '.join(missing)}, which this "
                "tokenizer lacks: extend it with them first"
            )
        return Tokenizer(
            self.backend, form, sentencepiece=self.sentencepiece, settings=dict(self.settings)
        )

    def save(self, folder: str | Path, *, encoder_positions: int | None = None) -> None:
        """Write tokenizer.json, tokenizer_config.json, the chat template, tokenizer.model.

        Beside an encoder of so many positions, other libraries are to put [CLS] and [SEP] around
        texts, as it was trained; here whoever encodes a text does that.
        """
        place = Path(folder)
        backend, own = self.backend, dict[str, Any]()
        if encoder_positions is not None and backend.post_processor is None:
            backend = Backend.from_str(backend.to_str())
            backend.post_processor = formats.frame(backend, *self.frame_ids())
            own["framed"] = True
        write_text(place / "tokenizer.json", backend.to_str(pretty=True))
        settings: dict[str, Any] = {
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000_000,
            **self.settings,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        if encoder_positions is not None:
            settings["model_max_length"] = min(settings["model_max_length"], encoder_positions)
        settings.pop("chat_template", None)
        settings.pop("auto_map", None)
        if self.sampling:
            own["sampling"] = self.sampling
        settings.pop(OWN_KEY, None)
        if own:
            settings[OWN_KEY] = own
        if self.chat_template:
            settings["chat_template"] = self.chat_template
            write_text(place / "chat_template.jinja", self.chat_template)
        if self.sentencepiece:
            (place / "tokenizer.model").write_bytes(spm.write(self.sentencepiece))
        write_json(place / "tokenizer_config.json", settings)

    def export(self, path: str | Path) -> None:
        """Write another library's file: .model, .tiktoken, vocab.json with merges, vocab.txt."""
        target = Path(path)
        if target.suffix not in formats.EXPORTS:
            raise TokenizerError(
                f"{target}: unknown format{closest(target.suffix, formats.EXPORTS)}"
            )
        if target.name == "tokenizer.json":
            raise TokenizerError(f"{target} is not written alone: give a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        formats.EXPORTS[target.suffix](self, target)

    @cached_property
    def kind(self) -> str:
        """Return the kind, as `train` names it."""
        model = self.content["model"]
        names = {"Unigram": "unigram", "WordPiece": "wordpiece", "WordLevel": "word"}
        if model["type"] in names:
            return names[model["type"]]
        if '"ByteLevel"' in json.dumps(
            [self.content.get("pre_tokenizer"), self.content.get("decoder")]
        ):
            return "bpe"
        return "sentencepiece-bpe" if model["merges"] else "char"

    @property
    def lossy_normalizer(self) -> bool:
        """Return whether text is changed before it is cut, other than by SentencePiece."""
        found = self.content.get("normalizer")
        if self.sentencepiece and found:
            own = json.loads(spm.to_backend(self.sentencepiece).to_str())["normalizer"]
            return bool(found != own)
        return found is not None

    @cached_property
    def ranks(self) -> dict[bytes, int] | None:
        """Return a byte-level BPE's tokens as bytes with their ids; None for other kinds."""
        try:
            return ByteLevel(self.content | {"normalizer": None}).ranks
        except NotFast:
            return None

    @cached_property
    def vocab_size(self) -> int:
        """Return the number of ids, special tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def need_rows(self, rows: int, where: str | Path) -> "Tokenizer":
        """Return the tokenizer; raise where an embedding of `rows` rows has none for a token."""
        if self.vocab_size > rows:
            last = self.backend.id_to_token(self.vocab_size - 1)
            raise TokenizerError(
                f"{where}: the tokenizer's token {last!r} has id {self.vocab_size - 1:,}, and the "
                f"embedding has {rows:,} rows: drop it from tokenizer.json, or give it a row with "
                "`groundup pretrain CORPUS --init MODEL --tokenizer MODEL`"
            )
        return self

    def frame_ids(self) -> tuple[int, int]:
        """Return the tokens that an encoder's texts begin and end with."""
        return self.token_id("cls_token", "bos_token"), self.token_id("sep_token", "eos_token")

    def token_id(self, *keys: str) -> int:
        """Return the id of the first of these special roles that the tokenizer has."""
        for key in keys:
            name = self.settings.get(key)
            name = name.get("content") if isinstance(name, dict) else name
            if not isinstance(name, str | None):
                raise TokenizerError(
                    f"{key} is {name!r} in tokenizer_config.json, which is no text"
                )
            found = self.backend.token_to_id(name) if name else None
            if found is not None:
                return found
            if name:
                raise TokenizerError(
                    f"{key} is {name!r} in tokenizer_config.json, which is no token here: "
                    "extend the tokenizer with it, or name another"
                )
        if END_OF_TEXT in self.specials:
            return self.specials[END_OF_TEXT]
        raise TokenizerError(
            f"this tokenizer has no {keys[0]}: name one in tokenizer_config.json, or extend it"
        )

    @cached_property
    def eos_token_id(self) -> int:
        """Return the id that ends a document."""
        return self.token_id("eos_token", "sep_token", "bos_token")

    @cached_property
    def bos_token_id(self) -> int:
        """Return the id before the first token of a document; the end's, where there is none."""
        return self.token_id("bos_token", "cls_token", "eos_token")

    @cached_property
    def pad_token_id(self) -> int:
        """Return the id that fills rows up; the end's, where there is none."""
        return self.token_id("pad_token", "eos_token", "sep_token", "bos_token")

    @cached_property
    def end_of_turn_id(self) -> int:
        """Return the id that ends a chat turn: the template's, or the end of text."""
        form = self.chat_template or ""
        for name in ENDS_OF_TURN:
            if name in form and name in self.specials:
                return self.specials[name]
        return self.eos_token_id

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer."""
        return tuple(dict.fromkeys((self.end_of_turn_id, self.eos_token_id)))

    def encode(
        self, text: str, *, allow_special: bool = False, max_length: int | None = None
    ) -> list[int]:
        """Return ids; names of special tokens in the text stay text unless allowed.

        `max_length` cuts the ids and warns of how many were cut.
        """
        only_text(text)
        if allow_special:
            ids = self.backend.encode(text, add_special_tokens=False).ids
        else:
            ids = self.core.encode(text)
        if max_length is not None and len(ids) > max_length:
            warnings.warn(f"text cut from {len(ids):,} to {max_length:,} tokens", stacklevel=2)
            return ids[:max_length]
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts in threads, without the interpreter's lock."""
        for text in texts:
            only_text(text)
        return self.core.encode_batch(texts)

    def spans(self, text: str) -> list[Span]:
        """Return (id, first character, character behind the last) for each token of a text."""
        only_text(text)
        return self.core.spans(text)

    def sample(self, text: str, *, seed: int) -> list[int]:
        """Return ids cut at random as `sampling` says: {"dropout": p} or {"alpha": a}.

        BPE kinds take dropout (1910.13267), unigram takes alpha (1804.10959, eq. 4).
        """
        only_text(text)
        rng = random.Random(seed)
        sampling.check(self.kind, self.sampling)
        wanted = sampling.SETTING.get(self.kind)
        if wanted is None:
            raise ConfigError(f"a {self.kind} tokenizer has one way to cut a text: none to sample")
        if wanted not in self.sampling:
            raise ConfigError(f"set tok.sampling = {{{wanted!r}: 0.1}} to sample from {self.kind}")
        value = self.sampling[wanted]
        if self.kind == "bpe" and self.ranks is not None:
            return sampling.sample_bytes(text, self.backend, self.ranks, value, rng)
        if self.sentencepiece is None:
            raise ConfigError(f"sampling from {self.kind} needs the tokenizer.model it came from")
        unified = self.backend.normalizer.normalize_str(text)
        return sampling.sample_pieces(unified, self.sentencepiece, value, rng)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text; bytes that are no UTF-8 become U+FFFD."""
        text = self.decode_bytes(ids, skip_special_tokens=skip_special_tokens).decode(
            "utf-8", errors="replace"
        )
        return text.removeprefix(" ") if self.drops_first_space else text

    def decode_bytes(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> bytes:
        """Return the bytes that the ids stand for; ids above the vocabulary stand for none.

        Models have such ids where their embedding is padded to a round size.
        """
        skip = self.silent if skip_special_tokens else set()
        known = len(self.token_bytes)
        return b"".join(self.token_bytes[i] for i in ids if i < known and i not in skip)

    @cached_property
    def drops_first_space(self) -> bool:
        """Return whether the first token's space is none of the text."""
        prefixed = self.sentencepiece is not None and self.sentencepiece.add_dummy_prefix
        return (
            prefixed
            or self.kind == "wordpiece"
            or '"Prepend"' in json.dumps(self.content.get("normalizer"))
        )

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """Return the bytes that each id stands for in a text."""
        vocab = self.backend.get_vocab(with_added_tokens=True)
        unknown = {UNKNOWN, self.content["model"].get("unk_token")}
        return bytes_of_tokens(vocab, self.vocab_size, self.kind, self.added, unknown)

    def stream_decoder(self, *, behind: Sequence[int] = ()) -> StreamDecoder:
        """Return a decoder that takes ids one by one and never emits half a character.

        `behind` are ids before the first one: where they end in text, its space is of the text.
        """
        begins = not behind or behind[-1] in self.silent
        return StreamDecoder(
            self.token_bytes,
            skip=self.silent,
            drop_first_space=self.drops_first_space and begins,
        )

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Return what rendering needs."""
        return Vocabulary(
            spans=self.spans,
            decode=self.decode,
            specials=self.specials,
            ends=set(self.stop_token_ids),
            strips={
                token["content"]: (token["lstrip"], token["rstrip"])
                for token in self.content["added_tokens"]
                if token["special"] and (token["lstrip"] or token["rstrip"])
            },
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> Rendered:
        """Return ids, role, trainable and origin of every token of a conversation.

        `variables` are the template's own switches, such as `enable_thinking`.
        """
        if self.chat_template is None:
            raise TokenizerError("this tokenizer has no chat template: fine-tune with one first")
        names = {
            key: value.get("content") if isinstance(value, dict) else value
            for key, value in self.settings.items()
            if key.endswith("_token") and value
        }
        switches = {"tools": tools, "add_generation_prompt": add_generation_prompt, **variables}
        return render(self.chat_template, messages, self.vocabulary, {**names, **switches})

    def training_rows(
        self, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] | None = None
    ) -> list[Rendered]:
        """Return what to train on: one row, or one a turn where earlier reasoning is dropped.

        A template such as Qwen3's prints <think> only in the last turn; each turn is then
        trained as it is seen when it is written. A template that does not say what the model
        writes is a TokenizerError with the lines to add.
        """
        whole = self.render(messages, tools=tools)
        if whole.problem:
            raise TokenizerError(whole.problem)
        if not whole.dropped:
            return [whole]
        rows = []
        for n, message in enumerate(messages):
            if message["role"] == "assistant":
                row = self.render(messages[: n + 1], tools=tools)
                if n in row.dropped:
                    raise TokenizerError(
                        f"this chat template never prints the reasoning of message {n}: take one "
                        "that does (qwen3), or leave the reasoning out"
                    )
                last = max(
                    (at for at, origin in enumerate(row.origin) if -1 < origin < n), default=-1
                )
                row.trainable[: last + 1] = [False] * (last + 1)
                rows.append(row)
        return rows


def only_text(text: str) -> None:
    """Refuse half a surrogate pair: UTF-8 has no bytes for it, so it could not come back."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as err:
        code = f"U+{ord(text[err.start]):X}"
        raise TokenizerError(
            f"character {err.start} of a text is {code}, half of a surrogate pair: take it out"
        ) from None
