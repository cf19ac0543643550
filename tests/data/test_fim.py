"""Fill-in-the-middle, against the arrangement written out token by token."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from jaxformers.data.config import DataConfig, FimConfig
from jaxformers.data.documents import CachedDocuments
from jaxformers.data.fim import Fim, FimDocuments, make_fim
from jaxformers.data.rows import PackedRows
from jaxformers.data.tokenizer import byte_tokenizer

PREFIX, MIDDLE, SUFFIX, BOS, END = 1001, 1002, 1003, 1, 2


def cache_of(documents: list[list[int]], *, seed: int = 0) -> SimpleNamespace:
    lengths = np.array([len(document) for document in documents])
    return SimpleNamespace(
        tokens=np.concatenate(documents).astype(np.uint16),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        hashes=np.random.default_rng(seed).integers(0, 2**64, len(lengths), np.uint64, endpoint=False),
        manifest=SimpleNamespace(tokenizer="tests"),
        settings="tests",
        learned=None,
    )


def random_documents(count: int, *, bos: bool) -> list[list[int]]:
    """Documents whose tokens are all different, so that each can be found again."""
    draw = np.random.default_rng(0)
    return [[*([BOS] if bos else []), *range(10, 10 + draw.integers(0, 40)), END] for _ in range(count)]


def fim(**changed) -> Fim:
    usual = {"rate": 1.0, "spm_rate": 0.5, "seed": 0, "prefix": PREFIX, "middle": MIDDLE, "suffix": SUFFIX, "bos": BOS}
    return Fim(**(usual | changed))


def whole(documents, n: int) -> list[int]:
    return documents.read(np.array([n]), np.array([0]), documents.lengths[[n]]).tolist()


def mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def written_out(document: list[int], content_hash: int, f: Fim) -> list[int]:
    """What a document becomes, from the published hash and the paper's two arrangements."""
    key = mix(mix(0 ^ f.seed) ^ 3)
    draw = [mix((mix(content_hash ^ key) + number) % 2**64) for number in range(4)]
    if draw[0] / 2**64 >= f.rate or len(document) < 3:
        return document
    begin, end = (document[:1], document[-1:]) if document[0] == f.bos else ([], document[-1:])
    inner = document[len(begin) : -1]
    cut, stop = sorted((word >> 32) * (len(inner) + 1) >> 32 for word in draw[2:])
    prefix, middle, suffix = inner[:cut], inner[cut:stop], inner[stop:]
    if draw[1] / 2**64 < f.spm_rate:
        return [*begin, f.prefix, f.suffix, *suffix, f.middle, *prefix, *middle, *end]
    return [*begin, f.prefix, *prefix, f.suffix, *suffix, f.middle, *middle, *end]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("rate, spm_rate", [(1.0, 0.5), (0.4, 0.0), (0.7, 1.0)])
def test_documents_are_rearranged_as_the_paper_says(bos, rate, spm_rate):
    documents, f = random_documents(120, bos=bos), fim(rate=rate, spm_rate=spm_rate, seed=5)
    cache = cache_of(documents)
    rearranged = FimDocuments(CachedDocuments(cache, np.arange(120)), f)
    told = [whole(rearranged, n) for n in range(120)]
    assert told == [written_out(d, int(h), f) for d, h in zip(documents, cache.hashes, strict=True)]
    assert [len(document) for document in told] == rearranged.lengths.tolist()
    changed = sum(ours != document for ours, document in zip(told, documents, strict=True))
    assert changed / sum(len(document) > 2 for document in documents) == pytest.approx(rate, abs=0.15)


def test_every_token_of_a_rearranged_document_is_there_once():
    documents = random_documents(80, bos=True)
    rearranged = FimDocuments(CachedDocuments(cache_of(documents), np.arange(80)), fim())
    for n, document in enumerate(documents):
        sentinels = [PREFIX, MIDDLE, SUFFIX] if len(document) > 2 else []
        assert Counter(whole(rearranged, n)) == Counter([*document, *sentinels])


def test_any_parts_of_documents_read_alone_are_parts_of_the_whole():
    rearranged = FimDocuments(CachedDocuments(cache_of(random_documents(30, bos=True)), np.arange(30)), fim(rate=0.5))
    draw = np.random.default_rng(1)
    for _ in range(50):
        document = draw.integers(0, 30, 6)
        start = draw.integers(0, rearranged.lengths[document] + 1)
        length = draw.integers(0, rearranged.lengths[document] - start + 1)
        parts = zip(document, start, length, strict=True)
        expected = [token for d, s, count in parts for token in whole(rearranged, d)[s : s + count]]
        assert rearranged.read(document, start, length).tolist() == expected


def test_which_documents_and_where_depends_on_the_text_and_the_seed_alone():
    documents = random_documents(60, bos=True)
    cache = cache_of(documents)
    all_of_them = FimDocuments(CachedDocuments(cache, np.arange(60)), fim())
    some = np.array([40, 3, 59])
    alone = FimDocuments(CachedDocuments(cache, some), fim())
    assert [whole(alone, n) for n in range(3)] == [whole(all_of_them, n) for n in some]
    other = FimDocuments(CachedDocuments(cache, np.arange(60)), fim(seed=1))
    assert sum(whole(other, n) != whole(all_of_them, n) for n in range(60)) > 30


@pytest.mark.parametrize("packing", ["first_fit", "best_fit", "concat", "none"])
def test_rows_of_rearranged_documents_hold_each_document_whole_with_its_targets(packing):
    documents = random_documents(50, bos=True)
    cache, f = cache_of(documents), fim(rate=0.5)
    config = DataConfig(paths="*", sequence_length=16, packing=packing, packing_window=8)
    rows = PackedRows(cache, np.arange(50), config, epochs=1, fim=f)
    expected = Counter()
    for document, content_hash in zip(documents, cache.hashes, strict=True):
        told = written_out(document, int(content_hash), f)
        expected.update(itertools.pairwise(told))
    seen = Counter()
    for row in map(rows.__getitem__, range(len(rows))):
        has_target = row["weights"] > 0
        seen.update(zip(row["tokens"][has_target].tolist(), row["targets"][has_target].tolist(), strict=True))
    assert seen == expected
    assert rows.tokens == sum(rows[n]["segment_ids"].astype(bool).sum() for n in range(len(rows)))
    assert rows.fingerprint != PackedRows(cache, np.arange(50), config, fim=fim(rate=0.5, spm_rate=0.1)).fingerprint


@pytest.mark.parametrize("names", [("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"), ("<PRE>", "<MID>", "<SUF>")])
def test_sentinels_of_usual_names_are_found(names):
    tokenizer = byte_tokenizer(names)
    found = make_fim(FimConfig(rate=0.5), tokenizer, seed=3)
    assert (found.prefix, found.middle, found.suffix) == tuple(map(tokenizer.token_id, names))
    assert (found.rate, found.spm_rate, found.seed, found.bos) == (0.5, 0.5, 3, tokenizer.bos_id)


def test_sentinels_may_be_named():
    tokenizer = byte_tokenizer(["<a>", "<b>", "<c>"])
    found = make_fim(FimConfig(rate=1, sentinels=("<b>", "<c>", "<a>")), tokenizer, seed=0)
    assert [tokenizer.token(i) for i in (found.prefix, found.middle, found.suffix)] == ["<b>", "<c>", "<a>"]


def test_a_rate_of_0_asks_for_nothing_of_the_tokenizer():
    assert make_fim(FimConfig(), byte_tokenizer(), seed=0) is None


@pytest.mark.parametrize(
    "config, said",
    [
        (
            {},
            "fim.rate is 0.5, but the tokenizer has no fill-in-the-middle tokens of a usual name: set fim.",
        ),
        ({"sentinels": ("<a>", "<x>", "<a>")}, "fim names '<x>', which is no token; the tokenizer's "),
    ],
)
def test_a_tokenizer_without_the_sentinels_is_refused_in_one_line(config, said):
    with pytest.raises(ValueError) as caught:
        make_fim(FimConfig(rate=0.5, **config), byte_tokenizer(["<a>"]), seed=0)
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith("special tokens are: <|bos|>, <|eos|>, <|pad|>, <a>")
    assert "\n" not in str(caught.value)
