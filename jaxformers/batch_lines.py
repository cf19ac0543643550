"""The files of batch generation: lines of prompts in, lines of answers out, and what a killed run left behind.

An answer names the prompt it is for by `index`, its number among the prompts from 0, and carries a digest of the line
and the settings it was made from, so that a run goes on only behind answers that it would have made itself. This module
knows no model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jaxformers.generation import Settings

SETTINGS = tuple(field.name for field in fields(Settings) if field.name != "batch_size")
KEYS = ("prompt", "messages", "id", *SETTINGS)


@dataclass(frozen=True)
class Line:
    """One line that is not blank. index: its number among them from 0; number: in the file, from 1."""

    index: int
    number: int
    text: str

    def digest(self, settings: Settings) -> str:
        """Of all that its answer depends on besides the model."""
        told = {name: getattr(settings, name) for name in SETTINGS}
        return hashlib.blake2b(json.dumps([self.text, told]).encode(), digest_size=8).hexdigest()

    @property
    def id(self) -> Any:
        """What it calls itself; its index where it does not."""
        try:
            value = json.loads(self.text)
        except (ValueError, RecursionError):
            return self.index
        return value.get("id", self.index) if isinstance(value, dict) else self.index


@dataclass(frozen=True)
class Task:
    """A prompt, as a text, as token ids, or as the `messages` of a conversation, and its own settings."""

    index: int
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    settings: dict[str, Any]


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file of prompts. ValueError for one that is not UTF-8."""
    with path.open(encoding="utf-8-sig") as file:  # some editors put a mark at its beginning
        try:
            lines = ((number, line.strip()) for number, line in enumerate(file, start=1))
            for index, (number, text) in enumerate((number, text) for number, text in lines if text):
                yield Line(index, number, text)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def parse(line: Line) -> Task:
    """What a line asks for. ValueError that says what is wrong with it."""
    try:
        value = json.loads(line.text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise ValueError("it is neither a JSON object nor a JSON string")
    if unknown := sorted(value.keys() - set(KEYS)):
        raise ValueError(f"{unknown[0]!r} is no key; the keys are {', '.join(KEYS)}")
    prompt, messages = value.get("prompt"), value.get("messages")
    if (prompt is None) == (messages is None):
        raise ValueError("it needs either a prompt or messages")
    if prompt is not None and not isinstance(prompt, str) and not _are_ids(prompt):
        raise ValueError("its prompt is neither a text nor a list of token ids")
    if messages is not None and not _is_conversation(messages):
        raise ValueError("its messages are no list of objects that have a role")
    own = {name: value[name] for name in SETTINGS if value.get(name) is not None}
    return Task(line.index, prompt, messages, own)


def _are_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(type(token) is int for token in prompt)


def _is_conversation(messages: Any) -> bool:
    return isinstance(messages, list) and bool(messages) and all(isinstance(m, dict) and "role" in m for m in messages)


@dataclass(frozen=True)
class Progress:
    """total: lines of prompts; done: indices of those that have an answer."""

    total: int
    done: frozenset[int]


def resume(source: Path, target: Path, settings: Settings) -> Progress:
    """What is left to do. A cut last line of the answers goes, as do errors, whose prompts are tried again.

    ValueError for answers to other prompts or by other settings than these, which are left as they are.
    """
    if target.exists() and source.resolve() == target.resolve():
        raise ValueError(f"{source} cannot be both the prompts and the answers")
    answers = dict(_answers(target)) if target.exists() else {}
    total = 0
    for line in read_lines(source):
        total += 1
        found = answers.pop(line.index, None)
        if found is not None and found != line.digest(settings):
            told = f"{target} answers another line, or by other settings, than line {line.number} of {source}"
            raise ValueError(f"{told}; name another output")
    if answers:
        raise ValueError(f"{target} answers prompt {min(answers)}, but {source} has {total}; name another output")
    return Progress(total, frozenset(_keep_good_answers(target)) if target.exists() else frozenset())


def _answers(path: Path) -> Iterator[tuple[int, str]]:
    """Index and digest of each answer that counts."""
    for number, value in _whole_lines(path):
        if not (isinstance(value, dict) and type(value.get("index")) is int and "request" in value):
            raise ValueError(f"line {number} of {path} is no answer of this command; name another output")
        if "error" not in value:
            yield value["index"], value["request"]


def _whole_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of lines that were written to their end; None for what is not JSON."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                try:
                    yield number, json.loads(line)
                except ValueError:
                    yield number, None


def _keep_good_answers(path: Path) -> list[int]:
    """Rewrites the answers without a cut line and without errors, where there are some; the indices of what stays."""
    kept, size = [], 0
    beside = path.with_name(path.name + ".tmp")
    with path.open("rb") as file, beside.open("wb") as good:
        for line in file:
            if line.endswith(b"\n") and "error" not in (value := json.loads(line)):
                kept.append(value["index"])
                size += good.write(line)
        good.flush()
        os.fsync(good.fileno())
    if size == path.stat().st_size:
        beside.unlink()
    else:
        os.replace(beside, path)
    return kept
