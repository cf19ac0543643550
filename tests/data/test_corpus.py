import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers.data.cache import open_cache
from jaxformers.data.corpus import open_corpus, split
from jaxformers.data.rows import PackedRows


def _row_by_hand(
    row: list[list[int]], whole: list[list[int]], starts: list[int], length: int
) -> dict[str, list[float]]:
    """A row from its pieces' ids, one token at a time; `whole` are the documents they come from."""
    made = {name: [] for name in ("tokens", "targets", "weights", "positions", "segment_ids")}
    for segment, (piece, document, start) in enumerate(zip(row, whole, starts, strict=True), 1):
        for position, token in enumerate(piece):
            following = document[start + position + 1 : start + position + 2]
            made["tokens"].append(token)
            made["targets"].append(following[0] if following else 0)
            made["weights"].append(1.0 if following else 0.0)
            made["positions"].append(position)
            made["segment_ids"].append(segment)
    return {name: values + [0] * (length - len(values)) for name, values in made.items()}


@pytest.mark.parametrize("packing", ["first_fit", "concat"])
def test_a_row_is_its_pieces_side_by_side(config, texts, bytes_tokenizer, packing):
    own = config.model_copy(update={"packing": packing, "shuffle": False, "packing_window": 3})
    cache = open_cache(own, bytes_tokenizer)
    documents = [[256, *text.encode(), 257] for text in texts]
    rows = PackedRows(cache, np.array([4, 7, 11]), own, epochs=1)
    pieces = []  # (document, start, stop)
    if packing == "concat":
        stream = [(d, i) for d in (4, 7, 11) for i in range(len(documents[d]))]
        for first in range(0, len(stream), 32):
            for d in (4, 7, 11):
                inside = [i for at, i in stream[first : first + 32] if at == d]
                if inside:
                    pieces.append((first // 32, d, inside[0], inside[-1] + 1))
    else:
        full, rest = [], []
        for d in (4, 7, 11):
            cuts = list(range(0, len(documents[d]), 32))
            full += [(d, cut, cut + 32) for cut in cuts if cut + 32 <= len(documents[d])]
            rest += [(d, cut, len(documents[d])) for cut in cuts if cut + 32 > len(documents[d])]
        assert sum(stop - start for _, start, stop in rest) > 32  # so that first-fit has something to decide
        pieces = [(n, *piece) for n, piece in enumerate(full)]
        room = []
        for d, start, stop in rest:
            fits = [n for n, left in enumerate(room) if left >= stop - start]
            n = fits[0] if fits else len(room)
            room += [] if fits else [32]
            room[n] -= stop - start
            pieces.append((len(full) + n, d, start, stop))
    assert len(rows) == 1 + max(piece[0] for piece in pieces)
    for n in range(len(rows)):
        own_pieces = [piece[1:] for piece in pieces if piece[0] == n]
        expected = _row_by_hand(
            [documents[d][start:stop] for d, start, stop in own_pieces],
            [documents[d] for d, _, _ in own_pieces],
            [start for _, start, _ in own_pieces],
            32,
        )
        row = rows[n]
        assert {name: values.tolist() for name, values in row.items()} == expected
        assert {name: values.dtype for name, values in row.items()} == {
            name: np.float32 if name == "weights" else np.int32 for name in expected
        }


@pytest.mark.parametrize("packing", ["first_fit", "concat"])
def test_an_epoch_teaches_every_token_of_every_training_document_once(config, texts, bytes_tokenizer, packing):
    corpus = open_corpus(config.model_copy(update={"packing": packing, "epochs": 2}), bytes_tokenizer)
    for epoch in range(2):
        numbers = range(epoch * corpus.train.rows_per_epoch, (epoch + 1) * corpus.train.rows_per_epoch)
        rows = [corpus.train[n] for n in numbers]
        tokens = np.concatenate([row["tokens"][row["segment_ids"] > 0] for row in rows])
        assert len(tokens) == corpus.report.train_tokens
        targets = sum(row["weights"].sum() for row in rows)
        assert targets == corpus.report.train_tokens - corpus.report.train_documents
    assert len(corpus.train) == 2 * corpus.train.rows_per_epoch
    held = [corpus.validation[n] for n in range(len(corpus.validation))]
    known = {256, 257, *(byte for text in texts for byte in text.encode())}
    assert set(np.concatenate([row["tokens"] for row in held]).tolist()) <= known | {0}


def test_rows_end_with_the_last_epoch_and_never_without_one(config, bytes_tokenizer):
    finite = open_corpus(config.model_copy(update={"epochs": 1}), bytes_tokenizer).train
    with pytest.raises(IndexError):
        finite[len(finite)]
    with pytest.raises(IndexError):
        finite[-1]
    endless = open_corpus(config, bytes_tokenizer).train
    assert endless[10**15]["tokens"].shape == (32,)


def test_processes_that_tokenize_do_not_wait_for_jax_or_grain():
    program = "import sys, jaxformers.data.corpus; print(*({'jax', 'grain', 'transformers'} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_validation_rows_come_in_file_order_whatever_the_seed(config, bytes_tokenizer):
    half = config.model_copy(update={"validation_fraction": 0.5})
    first = open_corpus(half, bytes_tokenizer).validation
    other = open_corpus(half.model_copy(update={"seed": 5}), bytes_tokenizer).validation
    assert all((first[n]["tokens"] == other[n]["tokens"]).all() for n in range(len(first)))


def test_a_report_counts_what_is_there(config, texts, bytes_tokenizer):
    report = open_corpus(config.model_copy(update={"validation_fraction": 0.25}), bytes_tokenizer).report
    assert report.train_documents + report.validation_documents == len(texts)
    assert report.train_tokens + report.validation_tokens == sum(len(text.encode()) + 2 for text in texts)
    assert report.bytes == sum(len(text.encode()) for text in texts)
    assert (report.files, report.empty, report.skipped, report.skipped_names) == (1, 0, 0, ())
    assert 0.5 < report.train_efficiency <= 1


def test_bytes_per_token_is_of_the_validation_documents(config, jsonl, bytes_tokenizer):
    jsonl.write_text("".join(json.dumps({"text": "é" * n}) + "\n" for n in range(1, 30)))
    half = config.model_copy(update={"validation_fraction": 0.5})
    corpus = open_corpus(half, bytes_tokenizer)
    held_tokens, held_documents = corpus.report.validation_tokens, corpus.report.validation_documents
    assert corpus.bytes_per_token == pytest.approx((held_tokens - 2 * held_documents) / held_tokens)


def test_fingerprints_tell_rows_apart(config, jsonl, bytes_tokenizer):
    same = open_corpus(config, bytes_tokenizer).train.fingerprint
    assert open_corpus(config.model_copy(update={"epochs": 3}), bytes_tokenizer).train.fingerprint == same
    changes = ({"seed": 1}, {"sequence_length": 31}, {"packing": "concat"}, {"packing_window": 9}, {"shuffle": False})
    others = {open_corpus(config.model_copy(update=change), bytes_tokenizer).train.fingerprint for change in changes}
    jsonl.write_text(jsonl.read_text().replace("the", "thy"))
    others.add(open_corpus(config, bytes_tokenizer).train.fingerprint)
    assert len({same, *others}) == 7


def test_copies_of_a_document_stay_on_one_side_and_new_documents_move_none(config, jsonl, texts, bytes_tokenizer):
    def sides(kept):
        jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in kept))
        cache = open_cache(config, bytes_tokenizer)
        return dict(zip(kept, split(cache.hashes, 0.3).tolist(), strict=True)), split(cache.hashes, 0.3)

    once, _ = sides(texts)
    twice, flags = sides(texts + texts)
    assert twice == once
    assert flags[:40].tolist() == flags[40:].tolist()
    fewer, _ = sides(texts[:20])
    assert fewer.items() <= once.items()
    assert 0 < sum(once.values()) < 40


@settings(max_examples=100, deadline=None)
@given(
    hashes=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=8, unique=True), fraction=st.floats(1e-9, 0.999999)
)
def test_no_side_is_empty_where_both_are_wanted(hashes, fraction):
    held_out = split(np.array(hashes, np.uint64), fraction)
    assert 0 < held_out.sum() < len(hashes)


def test_no_document_is_held_out_of_one_or_where_none_is_wanted(config, jsonl, bytes_tokenizer):
    assert not split(np.arange(100, dtype=np.uint64), 0.0).any()
    jsonl.write_text('{"text": "alone"}')
    corpus = open_corpus(config.model_copy(update={"validation_fraction": 1e-9}), bytes_tokenizer)
    assert len(corpus.validation) == 0
    assert len(corpus.train) > 0
    assert corpus.bytes_per_token == pytest.approx(5 / 7)


def test_a_large_sample_is_split_close_to_the_fraction():
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, np.uint64, endpoint=False)
    assert split(hashes, 0.1).mean() == pytest.approx(0.1, abs=0.01)
