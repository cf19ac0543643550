"""Small corpora, written to disk once a test."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxformers.data.cache import open_cache
from jaxformers.data.config import DataConfig
from jaxformers.data.tokenizer import Tokenizer, byte_tokenizer

_WORDS = "the of to and in that is was for with naïve café 東京 🙂 def return x1 == 42 ; \t".split(" ")


def random_texts(count: int, *, longest: int = 60, seed: int = 0) -> list[str]:
    """Texts of 1 to `longest` words, some of them not ASCII."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(_WORDS, k=draw.randint(1, longest))) + "\n" for _ in range(count)]


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture
def make_texts() -> Callable[..., list[str]]:
    return random_texts


@pytest.fixture
def texts() -> list[str]:
    return random_texts(40)


@pytest.fixture
def jsonl(tmp_path: Path, texts: list[str]) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path: Path, jsonl: Path) -> DataConfig:
    return DataConfig(paths=str(jsonl), cache_dir=tmp_path / "cache", sequence_length=32, packing_window=8, workers=1)


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Documents with what a format might lose: quotes, line breaks of three kinds, tabs, commas, non-ASCII."""
    odd = [
        'a "quoted", text\r\nof two lines',
        "tab\there\rand there",
        " spaces around ",
        "'",
        '"',
        "ends in \\",
        "é🙂\0x",
    ]
    return [f"{number}: {text}\n{'word ' * (number % 5)}" for number, text in enumerate(odd * 6)]


@pytest.fixture(scope="session")
def expected(corpus: list[str], bytes_tokenizer: Tokenizer, tmp_path_factory) -> tuple[bytes, bytes]:
    """tokens.bin and documents.bin of that corpus, as JSON lines give them."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus))
    made = DataConfig(paths=f"{folder}/corpus.jsonl", cache_dir=folder / "cache", workers=1)
    directory = open_cache(made, bytes_tokenizer).directory
    return (directory / "tokens.bin").read_bytes(), (directory / "documents.bin").read_bytes()


@pytest.fixture
def run(command, monkeypatch):
    """`run("data", "inspect", path)`, on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    return command
