"""The tokenizer in a GGUF file gives the ids that `transformers` gives, and those of the tokenizer it was made from."""

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from hub.gguf_files import random_model, write_gguf
from tokenizers import pre_tokenizers, trainers

from jaxformers.data.gguf_tokenizer import SPLITS, gguf_tokenizer
from jaxformers.hub.gguf import open_gguf

CORPUS = [
    text for path in sorted(Path(pre_tokenizers.__file__).parent.glob("*.py*"))[:4] for text in [path.read_text()]
]
CORPUS += [
    "Straße und Größe, naïve café; 你好世界。 Привет, мир! ひらがな 😀👩‍🚀 １２３ x1 == 42; it's we'LL\r\n\r\n\t tabs"
] * 20
TEXTS = [
    "Hello world, it's a test.",
    "def f(x):\n    return x  # two  spaces\n\n\n",
    "Straße naïve 你好世界。 Привет 😀👩‍🚀 we'LL don't DON'T",
    "camelCase SCREAMING_SNAKE a.b/c//d",
    "trailing space ",
    "<|start|>user\nhi<|end|> <think> x",
    "\t\ttabs\r\nand carriage",
    "",
]
DIGITS = "year 2024 costs 1234567 and 3.14159"


@pytest.fixture(scope="module")
def pieces():
    """A byte-level vocabulary with special tokens in front, and its merges."""
    text = tokenizers.Tokenizer(tokenizers.models.BPE())
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<|start|>", "<|end|>", "<think>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    text.train_from_iterator(CORPUS, trainer)
    vocabulary = sorted(text.get_vocab().items(), key=lambda item: item[1])
    return [piece for piece, _ in vocabulary], [" ".join(pair) for pair in json.loads(text.to_str())["model"]["merges"]]


def keys(pieces, split, **more):
    tokens, merges = pieces
    kinds = {"<|start|>": 3, "<|end|>": 3, "<think>": 4}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


@pytest.fixture(scope="module")
def tiny_model():
    return random_model("llama", num_hidden_layers=1, vocab_size=1000)


def written(path, model, metadata):
    def extra(writer):
        for name, value in metadata.items():
            if isinstance(value, list):
                writer.add_array(name, value)
            elif isinstance(value, bool):
                writer.add_bool(name, value)
            elif isinstance(value, int):
                writer.add_uint32(name, value)
            else:
                writer.add_string(name, value)

    return write_gguf(path, "llama", model, extra=extra)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_a_byte_level_tokenizer_gives_the_ids_of_transformers(pre, pieces, tiny_model, tmp_path):
    path = written(tmp_path / "model.gguf", tiny_model, keys(pieces, pre))
    own = gguf_tokenizer(open_gguf(path).metadata, origin="model.gguf")
    truth = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    # transformers does not know that this one takes each digit as a word.
    for text in TEXTS if pre == "smollm" else [*TEXTS, DIGITS]:
        assert own.encode(text, add_special_tokens=False) == truth.encode(text, add_special_tokens=False), text
        assert own.decode(own.encode(text, add_special_tokens=False), skip_special_tokens=False) == text
    assert own.eos_id == truth.eos_token_id == 1
    assert own.special_tokens == ("<|start|>", "<|end|>")


def test_digits_stand_alone_where_the_file_says_so(pieces):
    own = gguf_tokenizer(keys(pieces, "smollm"), origin="x")
    ids = own.encode("in 1234567", add_special_tokens=False)
    assert [own.decode([i]) for i in ids][-7:] == list("1234567")


@pytest.mark.parametrize("pre, begins", [("gpt-2", False), ("llama-bpe", True)])
def test_a_text_begins_as_the_file_says_or_as_its_kind_does(pre, begins, pieces):
    assert (gguf_tokenizer(keys(pieces, pre), origin="x").encode("a")[0] == 0) == begins
    for told in (True, False):
        own = gguf_tokenizer(keys(pieces, pre, add_bos_token=told), origin="x")
        assert (own.encode("a")[0] == 0) == told


def test_tokens_that_end_a_turn_end_a_text(pieces):
    assert gguf_tokenizer(keys(pieces, "gpt-2", eot_token_id=0), origin="x").stop_ids == (1, 0)


def test_the_tokenizer_saved_opens_in_transformers(pieces, tmp_path):
    metadata = keys(pieces, "llama-bpe") | {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    own = gguf_tokenizer(metadata, origin="x")
    own.save(tmp_path)
    truth = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, DIGITS]:
        assert own.encode(text) == truth.encode(text)
    messages = [{"role": "user", "content": "hi"}]
    assert own.render_chat(messages) == truth.apply_chat_template(messages, tokenize=False) == "<|start|>hi"


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """A sentencepiece BPE as Llama's: byte fallback, a space before every text."""
    folder = tmp_path_factory.mktemp("spm")
    (folder / "corpus.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "m"),
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))


def spm_keys(spm):
    def kind(i):
        return 2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1

    ids = range(spm.vocab_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [spm.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [spm.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_a_sentencepiece_tokenizer_gives_the_ids_of_transformers_and_of_sentencepiece(spm, tiny_model, tmp_path):
    path = written(tmp_path / "model.gguf", tiny_model, spm_keys(spm))
    own = gguf_tokenizer(open_gguf(path).metadata, origin="model.gguf")
    truth = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in [text for text in [*TEXTS, DIGITS] if text]:
        ids = own.encode(text, add_special_tokens=False)
        assert ids == truth.encode(text, add_special_tokens=False) == spm.encode(text), text
        assert own.decode(ids) == text
        assert own.encode(text)[0] == 1
    assert own.encode("  leading", add_special_tokens=False) == spm.encode("  leading")


@pytest.mark.parametrize(
    "change, told",
    [
        ({"model": "rwkv"}, "the tokenizer 'rwkv' is not read from GGUF; known are gpt2, llama"),
        ({"pre": "mystery"}, "the tokenizer's split 'mystery' is not known; known are codeshell, "),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens is of type str; it must be list"),
        ({"bos_token_id": "1"}, "tokenizer.ggml.bos_token_id is of type str; it must be int"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token is of type int; it must be bool"),
        ({"tokens": []}, "without tokenizer.ggml.tokens"),
        ({"token_type": [1]}, "token_type has 1 entries for 900 tokens"),
        ({"eos_token_id": 10_000}, "eos_token_id is 10000, but there are 900 tokens"),
        ({"merges": ["a b c"]}, "an entry that is not two pieces"),
        ({"merges": ["zzz yyy"]}, "its vocabulary is damaged"),
        ({"tokens": ["a"] * 900}, "the piece 'a' comes twice"),
    ],
)
def test_a_damaged_tokenizer_is_refused_in_one_line(change, told, pieces):
    metadata = keys(pieces, "gpt-2", **change)
    with pytest.raises(ValueError, match=r"^model\.gguf") as caught:
        gguf_tokenizer(metadata, origin="model.gguf")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_tokenizer_has_none():
    assert gguf_tokenizer({}, origin="x") is None


def test_every_split_is_a_regular_expression_that_loses_nothing():
    for split in SPLITS.values():
        if split.pattern:
            cut = pre_tokenizers.Split(tokenizers.Regex(split.pattern), behavior="isolated")
            assert "".join(word for word, _ in cut.pre_tokenize_str(TEXTS[2] + DIGITS)) == TEXTS[2] + DIGITS
