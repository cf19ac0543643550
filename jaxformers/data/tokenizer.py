"""Text to ids and back: reading, making, saving and streaming a tokenizer. Knows no file of data and no model.

A tokenizer here *is* the files that describe it, in Hugging Face's layout: whatever is read is written back unchanged,
and whatever is made here opens in `transformers` and in the `tokenizers` library alike.
"""

import copy
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"  # the special tokens of every tokenizer made here

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_OLDER_SUFFIXES = (".model", ".tiktoken")
_MORE_TEMPLATES = "additional_chat_templates/"
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """Ids from text and text from ids, the same ones that `transformers` gives for the same files.

    Attributes:
        bos_id, eos_id, pad_id, unk_id: ids of the tokens that begin, end, pad a text or stand for the unknown, or None.
        stop_ids: every id that ends a generated text: `eos_id` and those the model's generation settings add.
        named_tokens: how the tokens that begin, end or pad a text, and others with a name, are spelled, by name.
        chat_templates: Jinja templates that render a conversation, by name; most models have a "default" or none.
        vocab_size: the largest id + 1, which is what a model's embedding must cover.
        fingerprint: a hash of everything that decides ids; equal for tokenizers that encode alike.
    """

    def __init__(self, files: Mapping[str, bytes], *, origin: str, stop_ids: Sequence[int] = ()):
        """A tokenizer from the contents of its files, by name; `origin` is what error lines call it.

        Raises:
            ValueError: a file that is not JSON, or not a tokenizer.
        """
        self._files = dict(files)
        config = _read_json(self._files, "tokenizer_config.json", origin)
        named = {**_read_json(self._files, "special_tokens_map.json", origin), **config}
        tokens = {name: _content(named[name]) for name in _NAMED_TOKENS if named.get(name) is not None}
        self._text = _parse_tokenizer(self._files["tokenizer.json"], origin)
        self._text.no_truncation()
        self._text.no_padding()
        try:
            _add_missing_tokens(self._text, tokens, config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{origin}: tokenizer_config.json has damaged added tokens") from error
        self.bos_id = self._id_of(tokens.get("bos_token"))
        self.eos_id = self._id_of(tokens.get("eos_token"))
        self.pad_id = self._id_of(tokens.get("pad_token"))
        self.unk_id = self._id_of(tokens.get("unk_token"))
        own_stop = () if self.eos_id is None else (self.eos_id,)
        self.stop_ids = tuple(dict.fromkeys((*own_stop, *stop_ids)))
        self.chat_templates = _chat_templates(self._files, config)
        self.named_tokens = tokens

    @property
    def chat_template(self) -> str | None:
        """The template for a conversation without tools, or None."""
        return self.chat_templates.get("default")

    def chat_template_for(self, *, tools: bool) -> str:
        """The template for a conversation with or without tools. ValueError where there is none."""
        name = "tool_use" if tools and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            named = f" named default, only {', '.join(sorted(self.chat_templates))}" if self.chat_templates else ""
            raise ValueError(f"this model has no chat template{named}, so it does not say how a conversation reads")
        return self.chat_templates[name]

    def with_chat_template(self, template: str) -> "Tokenizer":
        """This tokenizer with that template in place of its own ones."""
        if self.chat_templates == {"default": template}:
            return self
        kept = {name: content for name, content in self._files.items() if not name.startswith(_MORE_TEMPLATES)}
        config = _read_json(kept, "tokenizer_config.json", "tokenizer")
        if config.pop("chat_template", None) is not None:
            kept["tokenizer_config.json"] = _json_bytes(config)
        kept["chat_template.jinja"] = template.encode()
        return Tokenizer(kept, origin="tokenizer", stop_ids=self.stop_ids)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as one text, by the model's own template or another one; see `data.chat.render_chat`.

        Encode it with `add_special_tokens=False`, as templates write those themselves. ValueError where there is no
        template.
        """
        from jaxformers.data.chat import render_chat  # brings jinja, which most runs do not need

        if template is None:
            template = self.chat_template_for(tools=tools is not None)
        values = {**self.named_tokens, **variables}
        return render_chat(template, messages, tools=tools, add_generation_prompt=add_generation_prompt, **values)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its own spelling, None where there is no such token."""
        return self._text.token_to_id(token)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._text.token_to_id(token)

    @functools.cached_property
    def vocab_size(self) -> int:
        return 1 + max(self._text.get_vocab(with_added_tokens=True).values(), default=-1)

    @functools.cached_property
    def fingerprint(self) -> str:
        ends = json.dumps([self.bos_id, self.eos_id])
        return hashlib.sha256((self._text.to_str() + ends).encode()).hexdigest()

    @functools.cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The tokens that text never splits and `skip_special_tokens` leaves out, by id."""
        added = sorted(self._text.get_added_tokens_decoder().items())
        return tuple(token.content for _, token in added if token.special)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out."""
        return frozenset(i for i, token in self._text.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of one text, with the tokens that begin and end a text where this tokenizer adds them."""
        return self._text.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, parse_special_tokens: bool = True
    ) -> list[list[int]]:
        """The ids of many texts. With `parse_special_tokens` off, "<|eos|>" in a text is seven characters, no token."""
        text = self._text if parse_special_tokens else self._plain
        return [encoding.ids for encoding in text.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]

    def encode_with_places(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
        """Ids of many texts that have their special tokens in them, and int64 [tokens, 2]: the characters
        [start, stop) that each token stands for; the tokens of one character, or of its spaces, may share them."""
        found = self._text.encode_batch(texts, add_special_tokens=False)
        return [(each.ids, np.array(each.offsets, np.int64).reshape(-1, 2)) for each in found]

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        plain = copy.deepcopy(self._text)
        plain.encode_special_tokens = True  # the library's name for: encode them as the text they are
        return plain

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """The text of the ids; bytes that are no valid UTF-8 come out as U+FFFD."""
        return self._text.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def count_bytes(self, ids: np.ndarray) -> int:
        """Bytes of the ids' text as UTF-8, special tokens left out; parts of a character count as their bytes."""
        if self._byte_counts is None:
            return len(self.decode(ids).encode())
        return int(self._byte_counts[ids].sum())

    @functools.cached_property
    def _byte_counts(self) -> np.ndarray | None:
        """int64 [vocab_size], where an id's bytes do not depend on the ids around it; that spares decoding a corpus."""
        if not isinstance(self._text.decoder, decoders.ByteLevel):
            return None
        counts = np.zeros(self.vocab_size, np.int64)
        for token, token_id in self._text.get_vocab(with_added_tokens=False).items():
            counts[token_id] = len(token)  # a character stands for a byte
        for token_id, token in self._text.get_added_tokens_decoder().items():
            counts[token_id] = 0 if token.special else len(token.content.encode())
        return counts

    def token(self, token_id: int) -> str | None:
        """How the vocabulary spells an id, or None for an id it does not have."""
        return self._text.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, which may be a part of a character; none for an unknown id."""
        token = self._text.id_to_token(token_id)
        if token is None:
            return b""
        if (added := self._text.get_added_tokens_decoder().get(token_id)) is not None:
            return added.content.encode()
        if isinstance(self._text.decoder, decoders.ByteLevel):
            return bytes(_BYTES[character] for character in token)
        if self.has_byte_fallback and _is_byte(token):
            return bytes([int(token[3:5], 16)])
        before = self._text.decode(self._anchor, skip_special_tokens=False)
        return self._text.decode([*self._anchor, token_id], skip_special_tokens=False)[len(before) :].encode()

    @functools.cached_property
    def _anchor(self) -> list[int]:
        """An ordinary text's ids: decoders may leave out what begins a text, such as a space."""
        return self.encode("a", add_special_tokens=False)[-1:]

    @functools.cached_property
    def has_byte_fallback(self) -> bool:
        """Whether tokens such as <0xE2> stand for bytes, so that a run of them is read as a whole."""
        decoder = self._text.decoder
        return decoder is not None and b"ByteFallback" in decoder.__getstate__()

    def to_json(self) -> str:
        """The whole tokenizer as the text of a tokenizer.json, tokens that only its settings name included."""
        return self._text.to_str()

    def save(self, directory: str | Path) -> None:
        """Writes the files this tokenizer was made from, unchanged, so that `transformers` opens the directory."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)


def load_tokenizer(
    path: str | Path, *, bos_token: str | None = None, eos_token: str | None = None, pad_token: str | None = None
) -> Tokenizer:
    """The tokenizer of a tokenizer.json (with the settings beside it, if any) or of a Hugging Face directory.

    A sentencepiece `.model` and tiktoken's ranks are converted; tokenizer.json comes before them.

    The tokens that begin, end and pad a text come from tokenizer_config.json or special_tokens_map.json, else from the
    ids in generation_config.json or config.json; the ones given here come before all of these.

    Raises:
        ValueError: no tokenizer there, a file that is not what its name says, or a given token it does not have.
    """
    path = Path(path)
    directory, main = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
    files = {name: (directory / name).read_bytes() for name in _FILES if (directory / name).is_file()}
    more = sorted(directory.glob(f"{_MORE_TEMPLATES}*.jinja"))
    files |= {f"{_MORE_TEMPLATES}{file.name}": file.read_bytes() for file in more}
    if main.is_file() and main.suffix not in _OLDER_SUFFIXES:
        files["tokenizer.json"] = main.read_bytes()
    else:
        files = _converted(path, files)
    model = _read_model_settings(directory)
    given = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
    _settle_named_tokens(files, given, model, origin=str(path))
    return Tokenizer(files, origin=str(path), stop_ids=_ids(model.get("eos_token_id")))


def byte_tokenizer(special_tokens: Sequence[str] = ()) -> Tokenizer:
    """One id per UTF-8 byte, equal to the byte; then the begin, end and padding tokens, then `special_tokens`."""
    alphabet = {character: byte for byte, character in enumerate(byte_characters())}
    text = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text.add_special_tokens([BOS, EOS, PAD, *special_tokens])
    return _finish(text, origin="the byte tokenizer")


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, min_frequency: int = 2, special_tokens: Sequence[str] = ()
) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids learnt from the texts; equal texts give an equal tokenizer."""
    text = tokenizers.Tokenizer(models.BPE())
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[BOS, EOS, PAD, *special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text.train_from_iterator(texts, trainer=trainer)
    return _finish(text, origin="the trained tokenizer")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses, with a ValueError, a tokenizer whose ids a model of `vocab_size` cannot look up."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids but the model's vocab_size is {vocab_size}")


class TextStream:
    """Text from ids that arrive one at a time: what `push` and `flush` return adds up to `decode` of all the ids.

    Characters that need further ids are held back, so what comes out is never a broken piece of one.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, keep: Iterable[str] = ()):
        """keep: special tokens that come out all the same, by their spelling."""
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids - set(map(tokenizer.token_id, keep)) if skip_special_tokens else frozenset()
        self._byte_runs = tokenizer.has_byte_fallback
        self._ids: list[int] = []  # decoded together: those of the last piece of text, then the pending ones
        self._emitted = 0  # characters of their text that are out already
        self._last = 0  # how many of the ids the emitted characters come from

    def push(self, token_id: int) -> str:
        """The text that is certain now that this id has come; often "" in the middle of a character."""
        token = self._tokenizer.token(token_id)
        if token is None or token_id in self._skip:  # a model may have more ids than its tokenizer
            return ""
        self._ids.append(token_id)
        if self._byte_runs and _is_byte(token):
            return ""  # one invalid byte later on would change how the whole run reads
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):
            return self._emit(text[:-1])
        piece = self._emit(text)
        self._forget(len(text))
        return piece

    def flush(self) -> str:
        """The rest, where the ids end in the middle of a character."""
        return self._emit(self._decode(self._ids))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _emit(self, text: str) -> str:
        piece, self._emitted = text[self._emitted :], max(self._emitted, len(text))
        return piece

    def _forget(self, length: int) -> None:
        """Drops ids whose text is out; the newest stay, since some decoders treat the first id of a text specially."""
        tail = self._ids[self._last :]
        text = self._decode(tail)
        if text:
            self._ids, self._emitted = tail, len(text)
        else:
            self._emitted = length
        self._last = len(self._ids)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _finish(text: tokenizers.Tokenizer, *, origin: str) -> Tokenizer:
    """A byte-level model as a tokenizer whose texts begin with BOS, in the files `transformers` reads."""
    text.decoder = decoders.ByteLevel()
    text.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, text.token_to_id(BOS))]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": text.to_str(pretty=True).encode(), "tokenizer_config.json": _json_bytes(config)}
    return Tokenizer(files, origin=origin)


def byte_characters() -> Iterator[str]:
    """The printable stand-in that byte-level models use for each byte, in byte order (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return (chr(byte if byte in printable else next(others)) for byte in range(256))


_BYTES = {character: byte for byte, character in enumerate(byte_characters())}


def _parse_tokenizer(content: bytes, origin: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception, and UnicodeDecodeError is as final
        reason = " ".join(str(error).split())
        raise ValueError(f"{origin}: tokenizer.json is damaged or not a tokenizer ({reason})") from error


def _read_json(files: Mapping[str, bytes], name: str, origin: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(f"{origin}: {name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{origin}: {name} must hold a JSON object, not {type(value).__name__}")
    return value


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _add_missing_tokens(text: tokenizers.Tokenizer, named: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Adds the tokens that only the settings name, in the order in which `transformers` gives them ids."""
    listed = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    wanted = [_added(token) for token in (*(dict(token) for _, token in listed), *named.values())]
    for key in ("extra_special_tokens", "additional_special_tokens"):  # of the model's own names, and without one
        tokens = config.get(key) or ()
        wanted += [_added(token) for token in (tokens.values() if isinstance(tokens, Mapping) else tokens)]
    have = {token.content for token in text.get_added_tokens_decoder().values()}
    missing: dict[str, AddedToken] = {}
    for token in wanted:
        if token.content not in have:
            missing.setdefault(token.content, token)
    text.add_tokens(list(missing.values()))


def _added(token: Any) -> AddedToken:
    if isinstance(token, Mapping):
        return AddedToken(**{key: value for key, value in token.items() if key != "__type"})
    return AddedToken(token, special=True)


def _chat_templates(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; files of their own come before what tokenizer_config.json says."""
    value = config.get("chat_template")
    several = {entry["name"]: entry["template"] for entry in value} if isinstance(value, list) else {}
    templates = {"default": value} if isinstance(value, str) else several
    for name, content in files.items():
        if name == "chat_template.jinja":
            templates["default"] = content.decode()
        elif name.startswith(_MORE_TEMPLATES):
            templates[name.removeprefix(_MORE_TEMPLATES).removesuffix(".jinja")] = content.decode()
    return templates


def has_tokenizer(directory: Path) -> bool:
    """Whether `load_tokenizer` finds one there, of whatever kind."""
    from jaxformers.data.older import find_older

    return (directory / "tokenizer.json").is_file() or find_older(directory) is not None


def _converted(path: Path, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a tokenizer that has another form than tokenizer.json, in that form."""
    from jaxformers.data.older import convert, find_older  # builds on this module

    older = find_older(path)
    if older is None:
        raise ValueError(_why_no_tokenizer(path))
    kept = {name: content for name, content in files.items() if name not in ("tokenizer.model", "added_tokens.json")}
    return kept | convert(older, _read_json(kept, "tokenizer_config.json", str(path)))


def _why_no_tokenizer(path: Path) -> str:
    if not path.exists():
        return f"{path}: no such file or directory"
    if any((path / name).is_file() for name in ("vocab.json", "vocab.txt")):
        return f"{path} has an older tokenizer but no tokenizer.json; `transformers` converts one by loading and saving"
    return f"{path} holds no tokenizer.json"


def _read_model_settings(directory: Path) -> dict[str, Any]:
    """What the model's own files say of special ids; generation settings come before the architecture's."""
    settings: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (directory / name).is_file():
            values = _read_json({name: (directory / name).read_bytes()}, name, str(directory))
            settings |= {key: value for key, value in values.items() if value is not None}
    return settings


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _settle_named_tokens(
    files: dict[str, bytes], given: Mapping[str, str | None], model: Mapping[str, Any], *, origin: str
) -> None:
    """Writes into tokenizer_config.json what only the caller or the model's files know of the special tokens.

    Files that already say it all stay as they are, byte for byte.
    """
    config = _read_json(files, "tokenizer_config.json", origin)
    known = {**_read_json(files, "special_tokens_map.json", origin), **config}
    settled = {name: token for name, token in given.items() if token is not None}
    from_model = {name: _ids(model.get(f"{name}_id")) for name in given if name not in known and name not in settled}
    if settled or any(from_model.values()):
        text = _parse_tokenizer(files["tokenizer.json"], origin)
        for name, token in settled.items():
            if text.token_to_id(token) is None:
                raise ValueError(f"{origin} has no token {token!r}, which {name} names")
        spelled = {name: text.id_to_token(ids[0]) for name, ids in from_model.items() if ids}
        settled |= {name: token for name, token in spelled.items() if token is not None}
    if settled or "tokenizer_config.json" not in files:
        base = config or {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        files["tokenizer_config.json"] = _json_bytes({**base, **settled})
