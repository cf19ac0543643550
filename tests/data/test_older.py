"""Sentencepiece models and tiktoken's ranks give the ids that their own libraries give."""

import base64
import itertools
import json
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxformers
from jaxformers.data import tiktoken as ranks_format
from jaxformers.data.sentencepiece import build, parse_model
from jaxformers.data.tokenizer import load_tokenizer
from jaxformers.data.vocabularies import GPT4O, LLAMA3, QWEN2

MULTILINGUAL = "Straße und Größe, naïve café; 你好世界。 Привет, мир! ひらがな 😀👩‍🚀 １２３ ﬁ ½ x1 == 42; it's we'LL"
CORPUS = [path.read_text(encoding="utf-8") for path in sorted(Path(jaxformers.__file__).parent.glob("*.py"))[:5]]
CORPUS = [line for text in CORPUS for line in text.splitlines() if line.strip()] + [MULTILINGUAL] * 30
TEXTS = [
    "Hello world",
    "  two leading, two  inside, two trailing  ",
    MULTILINGUAL,
    "def f(x):\n\treturn x  # tab\r\n",
    "unseen 龘 𝔘 ☃ é (composed) é (decomposed)",
    "DON'T don't I'll 1234567 3.14",
    " ",
    "",
    "\u200bzero width and a no-break space",
]
KINDS = {
    "Llama's BPE": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "Gemma's BPE": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "a BPE with NFKC": {"model_type": "bpe"},
    "T5's unigram": {"model_type": "unigram"},
    "a unigram with bytes": {
        "model_type": "unigram",
        "byte_fallback": True,
        "normalization_rule_name": "nfkc",
        "remove_extra_whitespaces": False,
    },
    "a BPE with symbols of its own": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<think>", "[INST]"],
        "control_symbols": ["<turn>"],
    },
}
text_of_any_kind = st.text("aé ß世😀1'\n\tDef_(龘", max_size=24)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The file of each kind."""
    folder = tmp_path_factory.mktemp("spm")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(CORPUS), encoding="utf-8")
    for name, options in KINDS.items():
        (folder / name).mkdir()
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=str(folder / name / "tokenizer"), vocab_size=800, minloglevel=2, **options
        )
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_a_sentencepiece_model_gives_the_ids_of_sentencepiece(name, models):
    file = models / name / "tokenizer.model"
    truth = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ours = load_tokenizer(models / name)
    for text in [*TEXTS, *CORPUS[::7]]:
        assert ours.encode(text, add_special_tokens=False) == truth.encode(text), repr(text)
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (truth.bos_id(), truth.eos_id(), truth.unk_id())
    assert ours.encode("a")[0] == truth.bos_id()
    assert ours.vocab_size == truth.vocab_size()


@pytest.mark.parametrize("name", KINDS)
def test_its_ids_read_as_sentencepiece_reads_them(name, models):
    truth = sentencepiece.SentencePieceProcessor(model_file=str(models / name / "tokenizer.model"))
    ours = load_tokenizer(models / name)
    for text in TEXTS:
        ids = [i for i in truth.encode(text) if i != truth.unk_id()]
        assert ours.decode(ids) == truth.decode(ids)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=text_of_any_kind)
def test_any_text_gives_the_same_ids(name, models, text):
    file = models / name / "tokenizer.model"
    truth = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert build(parse_model(file.read_bytes())).encode(text).ids == truth.encode(text)


def test_settings_beside_a_model_say_what_begins_a_text_and_which_tokens_come_after_its_own(models, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((models / "Llama's BPE" / "tokenizer.model").read_bytes())
    added = {"800": {"content": "<|user|>", "special": True}, "801": {"content": "<|end|>", "special": True}}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "eos_token": "<|end|>",
        "added_tokens_decoder": added,
        "chat_template": "{{ messages[0].content }}{{ eos_token }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    assert ours.eos_id == 801
    assert ours.encode("<|user|>")[0] == 800
    assert ours.render_chat([{"role": "user", "content": "hi"}]) == "hi<|end|>"
    ours.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in [*TEXTS, "<|user|>hi<|end|>"]:
        assert theirs.encode(text) == ours.encode(text)


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda content: b"", "no sentencepiece model"),
        (lambda content: content[: len(content) // 2], "no sentencepiece model, or a damaged one"),
        (lambda content: b"\xff" * 100, "no sentencepiece model, or a damaged one"),
        (lambda content: b"x", "no sentencepiece model, or a damaged one"),
        (lambda content: content + b"\x12\x02\x18\x03", "a sentencepiece model of type word cannot be read"),
    ],
)
def test_a_damaged_model_is_refused_in_one_line(damage, told, models, tmp_path):
    content = (models / "T5's unigram" / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(damage(content))
    with pytest.raises(ValueError, match=rf"tokenizer\.model: {told}") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def tokens():
    """A byte-level vocabulary in rank order, learnt by merging the commonest pair of neighbours again and again."""
    words = [text.encode() for text in CORPUS[:150]] + [MULTILINGUAL.encode()] * 5
    parts = [[bytes([byte]) for byte in word] for word in words]
    found = [bytes([byte]) for byte in range(256)]
    for _ in range(300):
        counts = {}
        for word in parts:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=counts.get)
        if b"".join(best) not in found:
            found.append(b"".join(best))
        for at, word in enumerate(parts):
            merged, i = [], 0
            while i < len(word):
                step = 2 if tuple(word[i : i + 2]) == best else 1
                merged.append(b"".join(word[i : i + step]))
                i += step
            parts[at] = merged
    return found


def written(tokens):
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.mark.parametrize("split", [LLAMA3, QWEN2, GPT4O])
def test_ranks_give_the_ids_of_tiktoken(split, tokens):
    ranks = {token: rank for rank, token in enumerate(tokens)}
    truth = tiktoken.Encoding("tiny", pat_str=split.pattern, mergeable_ranks=ranks, special_tokens={})
    ours = ranks_format.build(ranks_format.parse_ranks(written(tokens)), split)
    composed = [text for text in TEXTS if "decomposed" not in text]  # Qwen's composes first, which tiktoken does not
    for text in [*composed, *CORPUS]:
        assert ours.encode(text).ids == truth.encode(text), repr(text)

    @settings(max_examples=100, deadline=None)
    @given(text=text_of_any_kind)
    def any_text(text):
        assert ours.encode(text).ids == truth.encode(text)

    any_text()


def test_a_published_vocabulary_has_its_special_tokens(tokens, tmp_path, monkeypatch):
    llama3 = ranks_format.PUBLISHED[128_000]
    assert len(llama3.special) == 256
    assert llama3.special[9] == "<|eot_id|>"
    assert llama3.special[-1] == "<|reserved_special_token_247|>"
    monkeypatch.setitem(ranks_format.PUBLISHED, len(tokens), llama3)
    (tmp_path / "tokenizer.model").write_bytes(written(tokens))
    ours = load_tokenizer(tmp_path)
    assert ours.bos_id == len(tokens)
    assert ours.eos_id == len(tokens) + 1
    assert ours.encode("hi<|eot_id|>")[-1] == len(tokens) + 9
    assert ours.encode("hi")[0] == ours.bos_id
    ours.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text)


@pytest.mark.parametrize(
    "content, told",
    [
        (b"IQ== 0\n!! 1\n", "line 2 of the ranks is not a token in base64 and its rank"),
        (b"IQ== 0\nIg== 5\n", "the ranks are not 0, 1, 2"),
        (b"IQ== 0\nIQ== 1\n", "the ranks are not 0, 1, 2"),
        (b"IQ== 0\nIg== 1\n", "nothing is known of a vocabulary of 2 ranks"),
    ],
)
def test_damaged_ranks_are_refused_in_one_line(content, told, tmp_path):
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=rf"qwen\.tiktoken: {told}") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
