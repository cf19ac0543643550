"""Which tokens may come next so that a text is JSON, follows a schema, matches a regex or a grammar, or is one of some.

`llguidance` parses and masks; here are the bounds within which strangers' schemas and grammars are taken, and the
error lines. Knows nothing of HTTP and nothing of models.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from jaxformers.data.tokenizer import Tokenizer
from jaxformers.serve.trial import TOO_LARGE, Trials, limits

Kind = Literal["json_object", "json_schema", "regex", "grammar", "choice"]

MAX_CHARACTERS = {"json_schema": 100_000, "regex": 5_000, "grammar": 200_000, "choice": 100_000}
MAX_DEPTH = 48  # of a schema
MAX_CHOICES = 2_000
MAX_REPEATS = 10_000  # in a regex or a schema's pattern
MAX_RULES = 1_000  # lines of a grammar with a colon
_KEPT = 64  # outcomes of compiling

# Spaces between JSON's tokens are bounded, since weak models under a grammar otherwise write nothing else for ever. A
# schema may not loosen what is checked of it.
_JSON = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}", "lenient": False, "coerce_one_of": False}
_REPEAT = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")
_RULE = re.compile(r"^[^\"\n/:]*:", re.MULTILINE)


@dataclass(frozen=True)
class ConstraintSpec:
    """What a text must be.

    kind and value: json_object, any JSON object, no value. json_schema: the schema, a mapping or True; every keyword
    in it is obeyed or refused. regex: a pattern in the syntax of Rust's regex (no look-around, no back references),
    which the whole text matches. grammar: Lark, in llguidance's dialect, from the rule `start`. choice: texts, of
    which it is one.
    """

    kind: Kind
    value: Any = None


class TokenConstraint:
    """One request's way through a grammar; see `infer.request.Constraint`."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, stop_ids: np.ndarray):
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._stop_ids = stop_ids
        self._ended = False

    def allowed(self) -> np.ndarray:
        """bool [V]: the tokens that may come next; those that end a text exactly where the grammar may end.

        ValueError where the grammar has become too costly to follow.
        """
        mask = np.zeros(self._vocab_size, bool)
        if not (self._ended or self._matcher.is_stopped()):
            bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
            mask[: bits.size] = bits[: mask.size]
        self._check()
        mask[self._stop_ids] = self._ended or self._matcher.is_accepting()
        return mask

    def advance(self, token: int) -> None:
        """Takes note of the token that came. ValueError for one that was not allowed."""
        if self._ended or token in self._stop_ids:
            self._ended = True
        else:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the constraint cannot be followed further: {_line(self._matcher.get_error())}")


def compile_constraint(
    spec: ConstraintSpec, tokenizer: Tokenizer, *, vocab_size: int | None = None, stop_ids: Sequence[int] = ()
) -> TokenConstraint:
    """A constraint at its beginning, for one request. Takes milliseconds, or seconds at most for a hostile one: call
    it off the event loop. Equal ones are compiled once.

    vocab_size: V, the model's, None for the tokenizer's; ids past the tokenizer's are never allowed. stop_ids: those
    that end a text besides `tokenizer.stop_ids`.

    Raises:
        ValueError: a schema, regex or grammar that is malformed, cannot be met, asks for what is not supported, or is
            too large; or a tokenizer that cannot be constrained.
    """
    ends = tuple(sorted({*tokenizer.stop_ids, *stop_ids}))
    if not ends:
        raise ValueError("this model names no token that ends a text, so no text of its can be constrained")
    key = (_digest(spec), tokenizer.fingerprint, ends)
    matcher = _COMPILED.get(key, lambda: _compiled(spec, tokenizer, ends))
    size = tokenizer.vocab_size if vocab_size is None else vocab_size
    return TokenConstraint(matcher.deep_copy(), size, np.array([stop for stop in ends if stop < size], int))


def grammar_of(spec: ConstraintSpec) -> str:
    """The spec in llguidance's own form. ValueError for one that is malformed or too large, as far as its text says."""
    if spec.kind not in _GRAMMARS:
        raise ValueError(f"the kind of a constraint must be one of {', '.join(get_args(Kind))}, not {spec.kind!r}")
    try:
        return _GRAMMARS[spec.kind](spec.value)
    except UnicodeError:
        raise ValueError(f"the {spec.kind} is no valid text: it has half a surrogate pair") from None


class _Outcomes:
    """What the latest calls made, or the error they ended in, by key. Threads wait for one another only by key."""

    def __init__(self, size: int):
        self._size = size
        self._lock = threading.Lock()
        self._kept: OrderedDict[Any, tuple[threading.Lock, list[Any]]] = OrderedDict()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        with self._lock:
            lock, outcome = self._kept.setdefault(key, (threading.Lock(), []))
            self._kept.move_to_end(key)
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        with lock:
            if not outcome:
                try:
                    outcome.append(make())
                except ValueError as error:
                    outcome.append(str(error))
        if isinstance(outcome[0], str):
            raise ValueError(outcome[0])
        return outcome[0]


_COMPILED = _Outcomes(_KEPT)
_TOKENIZERS = _Outcomes(4)


def _compiled(spec: ConstraintSpec, tokenizer: Tokenizer, ends: tuple[int, ...]) -> LLMatcher:
    grammar = grammar_of(spec)
    known, trials = _TOKENIZERS.get((tokenizer.fingerprint, ends), lambda: _prepared(tokenizer, ends))
    fault = trials.fault_of(grammar)
    if fault is None:
        matcher = LLMatcher(known, grammar, log_level=0, limits=limits())
        fault = matcher.get_error()
    if fault:
        raise ValueError(f"the {spec.kind} {fault if fault == TOO_LARGE else f'is refused: {_line(fault)}'}")
    return matcher


def _prepared(tokenizer: Tokenizer, ends: tuple[int, ...]) -> tuple[LLTokenizer, Trials]:
    text, size, stops = tokenizer.to_json(), max(tokenizer.vocab_size, *(end + 1 for end in ends)), list(ends)
    try:
        return LLTokenizer(text, n_vocab=size, eos_token=stops), Trials(text, size, stops)
    except ValueError as error:
        raise ValueError(
            f"this model's tokenizer does not say what bytes its tokens are: {_line(str(error))}"
        ) from None


def _digest(spec: ConstraintSpec) -> bytes:
    """Equal for equal specs. The order of a schema's keys counts: it is the order in which they are written."""
    try:
        return hashlib.sha256(json.dumps([spec.kind, spec.value], allow_nan=False).encode()).digest()
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"the {spec.kind} is not plain JSON data, or nests too deeply") from None


def _json_grammar(schema: Any) -> str:
    if not isinstance(schema, Mapping | bool):
        raise ValueError(f"a json_schema must be an object, not {type(schema).__name__}")
    _check_depth(schema)
    text = _bounded("json_schema", json.dumps(schema, ensure_ascii=False))
    _check_repeats("json_schema", text)
    text.encode()
    return LLMatcher.grammar_from_json_schema(text, overrides=_JSON)


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"the json_schema nests more than {MAX_DEPTH} levels")
        children = [list(v.values()) if isinstance(v, Mapping) else v for v in level if isinstance(v, Mapping | list)]
        level, depth = [item for items in children for item in items], depth + 1


def _regex_grammar(pattern: Any) -> str:
    pattern = _text("regex", pattern)
    _check_repeats("regex", pattern)
    pattern = pattern.removeprefix("^")  # the whole text matches anyway
    if re.search(r"(?<!\\)(\\\\)*\$$", pattern):
        pattern = pattern[:-1]
    return LLMatcher.grammar_from_regex(pattern)


def _lark_grammar(grammar: Any) -> str:
    grammar = _text("grammar", grammar)
    _check_repeats("grammar", grammar)
    if len(_RULE.findall(grammar)) > MAX_RULES:
        raise ValueError(f"the grammar has more than {MAX_RULES} rules")
    return LLMatcher.grammar_from_lark(grammar)


def _choice_grammar(choices: Any) -> str:
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not 0 < len(choices) <= MAX_CHOICES:
        raise ValueError(f"a choice must be a list of 1 to {MAX_CHOICES} texts")
    if not all(isinstance(choice, str) for choice in choices):
        raise ValueError("a choice must be a list of texts alone")
    texts = _bounded("choice", "|".join(re.escape(choice) for choice in dict.fromkeys(choices)))
    texts.encode()
    return LLMatcher.grammar_from_regex(texts)


_GRAMMARS: dict[str, Callable[[Any], str]] = {
    "json_object": lambda _: _json_grammar({"type": "object"}),
    "json_schema": _json_grammar,
    "regex": _regex_grammar,
    "grammar": _lark_grammar,
    "choice": _choice_grammar,
}


def _text(kind: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a {kind} must be a text, not {type(value).__name__}")
    value.encode()
    return _bounded(kind, value)


def _bounded(kind: str, text: str) -> str:
    if len(text) > MAX_CHARACTERS[kind]:
        raise ValueError(f"the {kind} has {len(text)} characters; at most {MAX_CHARACTERS[kind]} are taken")
    return text


def _check_repeats(kind: str, text: str) -> None:
    for found in _REPEAT.finditer(text):
        if any(len(times) > 9 or int(times or 0) > MAX_REPEATS for times in found.groups()):
            raise ValueError(f"the {kind} repeats a part {found[0][:40]} times; at most {MAX_REPEATS} are taken")


@functools.cache
def _noise() -> re.Pattern[str]:
    """What the library adds to its messages: states, backtraces, and the lines of the text around a mistake."""
    return re.compile(r"<state>.*|<non-verbose/>|<backtrace>.*|\n\s*\d+ \| .*", re.DOTALL)


def _line(message: str) -> str:
    text = " ".join(_noise().sub("", message).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
