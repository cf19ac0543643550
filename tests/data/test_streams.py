"""One exact stream: the same tokens for any number of processes and any stops, through every packing and mixture."""

import functools
import hashlib
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers.data.cache import open_cache
from jaxformers.data.config import DataConfig, TokenizerConfig
from jaxformers.data.corpus import build_tokenizer, open_corpus, split_documents
from jaxformers.data.mixture import MixedRows
from jaxformers.data.pipeline import train_iterator
from jaxformers.data.tokenizer import byte_tokenizer

PACKINGS = ("first_fit", "best_fit", "concat", "none")
FIM_TOKENS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
BATCH, RAMP, ROWS = 4, {24: 8}, 72  # six batches of 4, then of 8


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(FIM_TOKENS)


@pytest.fixture
def folder(tmp_path, make_texts):
    for seed, name in enumerate("ab"):
        lines = [json.dumps({"text": text}) for text in make_texts(40, seed=seed)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def config_of(folder, **changed) -> DataConfig:
    usual = {"cache_dir": folder / "cache", "sequence_length": 32, "packing_window": 8, "workers": 1}
    return DataConfig(**(usual | changed))


def one_source(folder, **changed) -> DataConfig:
    return config_of(folder, paths=str(folder / "*.jsonl"), **changed)


def mixture(folder, *, sources=None, **changed) -> DataConfig:
    own = {name: {"paths": str(folder / f"{name}.jsonl")} | (sources or {}).get(name, {}) for name in "ab"}
    return config_of(folder, sources=own, **changed)


def made(kind: str, folder, tokenizer, **changed):
    changed |= {"fim": {"rate": 0.5}}
    if kind == "one source":
        return open_corpus(one_source(folder, **changed), tokenizer).train
    own = {"a": {"epochs": 1}, "b": {"fim": {"rate": 0.0}}}
    changing = {"weights_at_token": {20 * 32: {"b": 3.0}}, "when_exhausted": "drop"}
    return open_corpus(mixture(folder, sources=own, **changed, **changing), tokenizer).train


def joined(parts) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def hash_of_stream(rows, *, stops=(), processes=(1,)) -> str:
    """The hash of the first rows as batches bring them, with another number of processes after every stop."""
    digest, state, counts = hashlib.sha256(), None, list(processes)
    for first, stop in zip([0, *stops], [*stops, ROWS], strict=True):
        count = counts[0]
        counts.append(counts.pop(0))
        shares = [
            train_iterator(rows, batch_size=BATCH, batch_ramp=RAMP, process_index=p, process_count=count)
            for p in range(count)
        ]
        for share in shares:
            if state is not None:
                share.set_state(json.loads(json.dumps(state)))
        while first < stop:
            batch = joined([next(share) for share in shares])
            assert len(batch["tokens"]) == (BATCH if first < 24 else 8)
            for name in sorted(batch):
                digest.update(batch[name].tobytes())
            first += len(batch["tokens"])
        states = [share.get_state() for share in shares]
        assert all(each == states[0] for each in states)
        state = states[0]
        for share in shares:
            share.close()
    return digest.hexdigest()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", ["one source", "mixture"])
def test_the_stream_is_one_for_any_processes_and_any_stops(kind, packing, folder, tokenizer):
    open_rows = functools.partial(made, kind, folder, tokenizer, packing=packing)
    truth = hash_of_stream(open_rows())
    ends = [*range(BATCH, 24, BATCH), *range(24, ROWS, 8)]
    draw = random.Random(f"{kind} {packing}")
    for count in (1, 2, 4):
        assert hash_of_stream(open_rows(), processes=[count]) == truth
        stops = sorted(draw.sample(ends, 3))
        assert hash_of_stream(open_rows(), stops=stops, processes=[count, 1, 4, 2]) == truth
    assert hash_of_stream(made(kind, folder, tokenizer, packing=packing, seed=1)) != truth


def test_the_stream_of_a_mixture_does_not_depend_on_the_order_of_its_keys(folder, tokenizer):
    config = mixture(folder, sources={"a": {"weight": 3}, "b": {"epochs": 1}}, when_exhausted="drop")
    data = config.model_dump(mode="json")
    reordered = DataConfig(**data | {"sources": dict(reversed(data["sources"].items()))})
    ours, truth = (open_corpus(c, tokenizer).train for c in (reordered, config))
    assert ours.fingerprint_before(ROWS) == truth.fingerprint_before(ROWS)
    assert hash_of_stream(ours) == hash_of_stream(truth)


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_epoch_of_each_source_of_a_mixture_has_each_token_once(packing, folder, tokenizer, make_texts):
    """Rows of a mixture, sorted by source, are what the source alone would give."""
    config = mixture(folder, sources={"a": {"epochs": 2, "weight": 2}, "b": {"epochs": 1}}, packing=packing)
    corpus = open_corpus(config.model_copy(update={"when_exhausted": "drop"}), tokenizer)
    seen = {"a": [], "b": []}
    for n in range(len(corpus.train)):
        place = corpus.train.place(n)
        seen[place.source].append(place.row)
        alone = corpus.sources[place.source].train[place.row]
        assert all((corpus.train[n][name] == alone[name]).all() for name in alone)
    for name, epochs in (("a", 2), ("b", 1)):
        assert seen[name] == list(range(epochs * corpus.sources[name].train.rows_per_epoch))
    tokens = sum((corpus.train[n]["segment_ids"] > 0).sum() for n in range(len(corpus.train)))
    reports = {name: source.report.train_tokens for name, source in corpus.sources.items()}
    assert tokens == 2 * reports["a"] + reports["b"]


def test_rows_of_a_mixture_that_has_not_changed_yet_go_on_under_changed_weights(folder, tokenizer):
    before = open_corpus(mixture(folder), tokenizer).train
    iterator = train_iterator(before, batch_size=4)
    for _ in range(5):
        next(iterator)
    after = open_corpus(mixture(folder, weights_at_token={20 * 32: {"b": 9.0}}), tokenizer).train
    moved = train_iterator(after, batch_size=4)
    moved.set_state(iterator.get_state())
    assert moved.get_state()["next_row"] == 20
    too_early = open_corpus(mixture(folder, weights_at_token={19 * 32: {"b": 9.0}}), tokenizer).train
    with pytest.raises(
        ValueError, match=r"checkpoint's position is in other data: .*\(before row 20\) the names or weights"
    ):
        train_iterator(too_early, batch_size=4).set_state(iterator.get_state())


def test_weights_at_a_step_are_weights_at_the_row_it_begins_with(folder, tokenizer):
    by_step = mixture(folder, weights_at_step={10: {"a": 0.0}})
    corpus = open_corpus(by_step, tokenizer, rows_before=lambda step: 7 * step)
    sources = [corpus.train.place(n).source for n in range(200)]
    assert set(sources[:70]) == {"a", "b"}
    assert set(sources[70:]) == {"b"}
    with pytest.raises(ValueError, match="weights_at_step counts steps of a run, and there is none here"):
        open_corpus(by_step, tokenizer)


# -- what rows say of their documents


def test_documents_that_see_each_other_share_a_segment_and_one_count_of_positions(folder, tokenizer):
    apart = open_corpus(one_source(folder), tokenizer).train
    together = open_corpus(one_source(folder, attend_across_documents=True, reset_positions=False), tokenizer).train
    assert together.fingerprint != apart.fingerprint
    for n in range(20):
        filled = (apart[n]["segment_ids"] > 0).sum()
        assert together[n]["segment_ids"].tolist() == [1] * filled + [0] * (32 - filled)
        assert together[n]["positions"].tolist() == [*range(filled), *[0] * (32 - filled)]
        assert (together[n]["tokens"] == apart[n]["tokens"]).all()
        assert (together[n]["weights"] == apart[n]["weights"]).all()


def test_positions_may_go_on_through_a_row_of_documents_that_do_not_see_each_other(folder, tokenizer):
    row = open_corpus(one_source(folder, reset_positions=False, packing="concat"), tokenizer).train[3]
    assert row["positions"].tolist() == list(range(32))
    assert row["segment_ids"].max() > 1


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_end_of_text_is_no_target_where_it_is_not_to_be_learned(packing, folder, tokenizer):
    learned = open_corpus(one_source(folder, packing=packing), tokenizer).train
    spared = open_corpus(one_source(folder, packing=packing, end_of_text_loss=False), tokenizer).train
    ends = 0
    for n in range(learned.rows_per_epoch):
        is_end = learned[n]["targets"] == tokenizer.eos_id
        ends += is_end.sum()
        assert (spared[n]["weights"] == np.where(is_end, 0, learned[n]["weights"])).all()
        assert (spared[n]["targets"] == np.where(is_end, 0, learned[n]["targets"])).all()
        assert (spared[n]["tokens"] == learned[n]["tokens"]).all()
    assert ends == learned.documents


# -- sides


def test_validation_and_test_documents_are_never_learned_and_neither_share_moves_the_other(folder, tokenizer):
    config = one_source(folder, validation_fraction=0.2)
    hashes = open_cache(config, tokenizer).hashes
    without = split_documents(hashes, validation=0.2, test=0.0)
    sides = split_documents(hashes, validation=0.2, test=0.3)
    assert sides.validation.tolist() == without.validation.tolist()
    assert sorted([*sides.train, *sides.validation, *sides.test]) == list(range(len(hashes)))
    assert len(sides.test) == (~hashes < int(0.3 * 2**64)).sum() > 0
    twice = split_documents(np.concatenate([hashes, hashes]), validation=0.2, test=0.3)
    assert twice.test.tolist() == [*sides.test, *(sides.test + len(hashes))]


@settings(max_examples=100, deadline=None)
@given(
    hashes=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6),
    validation=st.floats(0, 0.5),
    test=st.floats(0, 0.49),
)
def test_something_is_always_left_to_learn_from(hashes, validation, test):
    sides = split_documents(np.array(hashes, np.uint64), validation=validation, test=test)
    assert len(sides.train) > 0
    kinds = [{hashes[d] for d in side} for side in (sides.train, sides.validation, sides.test)]
    assert sum(map(len, kinds)) == len(set(hashes)), "copies stay together"


def test_a_corpus_has_the_test_rows_of_each_source_and_of_all(folder, tokenizer):
    shares = {"a": {"test_fraction": 0.5}, "b": {"validation_fraction": 0.5}}
    corpus = open_corpus(mixture(folder, sources=shares), tokenizer)
    a, b = corpus.sources["a"], corpus.sources["b"]
    assert a.report.test_documents > 5
    assert b.report.test_documents == 0
    assert len(corpus.test) == len(a.test)
    assert len(corpus.validation) == len(a.validation) + len(b.validation)
    for n in range(len(corpus.validation)):
        own = a.validation[n] if n < len(a.validation) else b.validation[n - len(a.validation)]
        assert (corpus.validation[n]["tokens"] == own["tokens"]).all()
    with pytest.raises(IndexError):
        corpus.validation[len(corpus.validation)]
    assert corpus.report.train_tokens == a.report.train_tokens + b.report.train_tokens
    assert corpus.report.files == 2


def test_one_tokenizer_is_trained_on_all_sources(folder):
    (folder / "b.jsonl").write_text('{"content": "' + "zyzzyva " * 400 + '"}')
    config = mixture(folder, sources={"b": {"text_field": "content"}})
    trained = build_tokenizer(TokenizerConfig(vocab_size=300), config)
    assert len(trained.encode("zyzzyva zyzzyva", add_special_tokens=False)) <= 4


# -- refused


@pytest.mark.parametrize(
    "sources, changed, said",
    [
        ({"a": {"weight": -1}}, {}, "greater than or equal to 0"),
        ({"a": {"weight": float("nan")}}, {}, "finite number|greater than or equal to 0"),
        ({"a": {"weight": 0}}, {}, "sources.a.weight is 0 and weights_at_token never raises it: leave the source out"),
        ({"a": {"weight": 0}, "b": {"weight": 0}}, {}, "all sources have weight 0 from the start on"),
        ({}, {"weights_at_step": {5: {"a": 0, "b": 0}}}, "all sources have weight 0 from weights_at_step 5 on"),
        ({}, {"weights_at_step": {5: {"c": 1}}}, "weights_at_step.5 names the source 'c'; sources are: a, b"),
        (
            {},
            {"weights_at_token": {5: {"a": float("inf")}}},
            "weights_at_token.5.a is inf; a weight is a finite",
        ),
        ({}, {"weights_at_step": {0: {"a": 2}}}, "weights_at_step has 0; marks are at least 1"),
        ({}, {"weights_at_step": {5: {"a": 2}}, "weights_at_token": {5: {"a": 2}}}, "or weights_at_token, not both"),
        ({}, {"when_exhausted": "stop"}, "when_exhausted is stop, but no source has epochs, so none ever ends"),
        ({}, {"when_exhausted": "drop"}, "when_exhausted is drop, but no source has epochs, so none ever ends"),
        ({"a": {"validation_fraction": 0.7, "test_fraction": 0.3}}, {}, "0.7 and test_fraction 0.3 leave nothing to"),
        ({}, {"attend_across_documents": True}, "attend_across_documents needs reset_positions=false"),
    ],
)
def test_what_cannot_be_mixed_is_refused(sources, changed, said, folder):
    with pytest.raises(ValueError, match=said):
        mixture(folder, sources=sources, **changed)


def test_an_error_of_a_source_names_it(folder, tokenizer):
    config = mixture(folder, sources={"b": {"paths": str(folder / "none.jsonl")}})
    with pytest.raises(ValueError, match=r"^data.sources.b: .*none.jsonl") as caught:
        open_corpus(config, tokenizer)
    assert "\n" not in str(caught.value)


def test_a_source_takes_the_shared_keys_that_it_does_not_set(folder):
    fim = {"rate": 0.5, "sentinels": ["<a>", "<b>", "<c>"]}
    config = mixture(folder, sources={"b": {"epochs": 2, "fim": {"rate": 0.1}}}, epochs=5, test_fraction=0.1, fim=fim)
    a, b = config.sources["a"], config.sources["b"]
    assert (a.epochs, a.test_fraction, a.fim.rate) == (5, 0.1, 0.5)
    assert (b.epochs, b.test_fraction, b.fim.rate, b.fim.sentinels) == (2, 0.1, 0.1, ("<a>", "<b>", "<c>"))
    assert DataConfig(**config.model_dump(mode="json")) == config


def test_one_corpus_is_no_mixture(folder, tokenizer):
    corpus = open_corpus(one_source(folder), tokenizer)
    assert not isinstance(corpus.train, MixedRows)
    assert corpus.sources == {}
