import json
import shutil

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from jaxformers.data.config import DataConfig, TokenizerConfig
from jaxformers.data.corpus import build_tokenizer
from jaxformers.data.tokenizer import TextStream, byte_tokenizer, check_vocabulary, load_tokenizer, train_tokenizer

SAMPLES = ["", " ", "hello world", " x  =\t1\n\n", "naïve café 東京 🙂👩‍👩‍👧", "a<|eos|>b", "<s>", "\ufffd", "e\u0301"]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(_lessons(), vocab_size=400, special_tokens=["<|user|>"])


def _lessons() -> list[str]:
    return ["".join(chr(97 + i * j % 7) + " the cat sat\n"[j % 13] for j in range(400)) for i in range(1, 40)]


def _sentencepiece_like() -> tokenizers.Tokenizer:
    """A small tokenizer of Llama 2's kind: words begin with ▁, unknown characters fall back to bytes."""
    words = ["▁", "▁the", "▁cat", "a", "b", "e", "h", "l", "o", "▁hello", "é", "\ufffd"]
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words])
    }
    made = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return made


def _word_level() -> tokenizers.Tokenizer:
    vocab = {"[UNK]": 0, "hello": 1, "world": 2, "[END]": 3}
    made = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["[UNK]", "[END]"])
    return made


def _directory(path, made: tokenizers.Tokenizer, **files) -> str:
    path.mkdir(exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return str(path)


def _same_as_transformers(directory, ours) -> None:
    theirs = AutoTokenizer.from_pretrained(directory)
    assert len(theirs) == ours.vocab_size
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(theirs, f"{name}_token_id") == getattr(ours, f"{name}_id"), name
    for text in SAMPLES:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_a_byte_tokenizer_gives_every_byte_its_own_number():
    tokenizer = byte_tokenizer(["<|user|>"])
    assert tokenizer.encode("aé\n", add_special_tokens=False) == list("aé\n".encode())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 257, 258)
    assert tokenizer.encode("<|user|>") == [256, 259]
    assert tokenizer.vocab_size == 260


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives_bytes(bytes_tokenizer, text):
    (ids,) = bytes_tokenizer.encode_batch([text], add_special_tokens=False, parse_special_tokens=False)
    assert ids == list(text.encode())
    assert bytes_tokenizer.decode(ids) == text


@pytest.mark.parametrize("family", [None, "llama", "gpt2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_transformers_opens_what_was_made_here(tmp_path, trained, kind, family):
    ours = byte_tokenizer() if kind == "bytes" else trained
    ours.save(tmp_path)
    if family is not None:  # an exported model has its config beside the tokenizer, and transformers looks at both
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    _same_as_transformers(tmp_path, ours)


@pytest.mark.parametrize(
    "settings",
    [
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        {
            "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False},
            "eos_token": "</s>",
            "pad_token": "<pad>",
        },
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True},
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "add_eos_token": False},
        {
            "eos_token": "</s>",
            "added_tokens_decoder": {
                "272": {"content": "<|tool|>", "special": False, "normalized": False},
                "271": {"content": "<|im_end|>", "special": True},
            },
        },
    ],
)
def test_settings_beside_a_tokenizer_mean_what_they_mean_in_transformers(tmp_path, settings):
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    directory = _directory(tmp_path / "t", _sentencepiece_like(), tokenizer_config=settings)
    _same_as_transformers(directory, load_tokenizer(directory))


@pytest.mark.parametrize(
    "settings",
    [
        {"additional_special_tokens": ["Hello", {"__type": "AddedToken", "content": "wide"}]},
        {"extra_special_tokens": {"image_token": "world"}, "additional_special_tokens": ["wide", "Hello"]},
        {"extra_special_tokens": ["wide"], "mask_token": "world"},
    ],
)
def test_special_tokens_that_only_the_settings_list_are_added_as_in_transformers(tmp_path, settings):
    byte_tokenizer().save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    text, theirs, ours = "Hello world, wide", AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    ids = theirs(text).input_ids
    assert ours.encode(text) == ids
    assert len(ids) < len(byte_tokenizer().encode(text)) - 3
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_padding_and_truncation_kept_in_a_file_do_not_touch_training_text(tmp_path):
    made = _sentencepiece_like()
    made.enable_truncation(4)
    made.enable_padding(length=8)
    directory = _directory(tmp_path / "t", made)
    assert load_tokenizer(directory).encode("aaaaaaaa") == [1, 259, *[262] * 8]
    assert load_tokenizer(directory).encode("a") == [1, 259, 262]


def test_special_ids_come_from_the_models_own_files_where_the_tokenizers_say_nothing(tmp_path):
    directory = _directory(
        tmp_path / "t",
        _sentencepiece_like(),
        config={"bos_token_id": 1, "eos_token_id": 0},
        generation_config={"eos_token_id": [2, 262], "pad_token_id": None},
    )
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.stop_ids == (2, 262)


def test_special_tokens_may_come_from_special_tokens_map(tmp_path):
    directory = _directory(tmp_path / "t", _sentencepiece_like(), special_tokens_map={"eos_token": "</s>"})
    assert load_tokenizer(directory).eos_id == 2


def test_named_tokens_make_a_lone_tokenizer_json_complete(tmp_path):
    directory = _directory(tmp_path / "t", _word_level())
    assert load_tokenizer(f"{directory}/tokenizer.json").eos_id is None
    tokenizer = load_tokenizer(f"{directory}/tokenizer.json", eos_token="[END]")
    assert tokenizer.eos_id == 3
    tokenizer.save(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token_id == 3
    with pytest.raises(ValueError, match=r"has no token '\[STOP\]', which eos_token names"):
        load_tokenizer(directory, eos_token="[STOP]")


def test_a_tokenizer_that_was_read_is_saved_byte_for_byte(tmp_path):
    settings = {"eos_token": "</s>", "chat_template": "{{ messages }}", "an_unknown_key": 1}
    directory = _directory(
        tmp_path / "t", _sentencepiece_like(), tokenizer_config=settings, special_tokens_map={"bos_token": "<s>"}
    )
    (tmp_path / "t" / "chat_template.jinja").write_text("{{ bos_token }}\r\n", newline="")
    tokenizer = load_tokenizer(directory)
    before = {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()}
    shutil.rmtree(directory)  # a run may outlive the files it began with
    tokenizer.save(tmp_path / "saved")
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before


@pytest.mark.parametrize(
    "template, kept",
    [
        ("{{ a }}", "{{ a }}"),
        ([{"name": "tool_use", "template": "{{ t }}"}, {"name": "default", "template": "{{ d }}"}], "{{ d }}"),
        (None, None),
    ],
)
def test_the_chat_template_is_kept(tmp_path, template, kept):
    directory = _directory(tmp_path / "t", _word_level(), tokenizer_config={"chat_template": template})
    assert load_tokenizer(directory).chat_template == kept
    (tmp_path / "t" / "chat_template.jinja").write_text("{{ file }}")
    assert load_tokenizer(directory).chat_template == "{{ file }}"


def _no_such_path(path):
    return path / "none"


def _empty_directory(path):
    return path


def _older_tokenizer(path):
    (path / "vocab.json").write_bytes(b"x")
    return path


def _cut_short(path):
    content = _word_level().to_str()
    (path / "tokenizer.json").write_text(content[: len(content) // 2])
    return path


def _empty_file(path):
    (path / "tokenizer.json").write_bytes(b"")
    return path / "tokenizer.json"


def _not_utf8(path):
    (path / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    return path / "tokenizer.json"


def _other_json(path):
    (path / "tokenizer.json").write_text('{"model_type": "llama"}')
    return path


def _bad_settings(path):
    _directory(path, _word_level())
    (path / "tokenizer_config.json").write_text("{")
    return path


def _bad_added_tokens(path):
    return _directory(path, _word_level(), tokenizer_config={"added_tokens_decoder": {"7": "<x>"}})


def _bad_special_tokens(path):
    return _directory(path, _word_level(), tokenizer_config={"additional_special_tokens": 5})


def _settings_of_another_shape(path):
    return _directory(path, _word_level(), tokenizer_config=["eos"])


@pytest.mark.parametrize(
    "make, said",
    [
        (_no_such_path, "no such file or directory"),
        (_empty_directory, "holds no tokenizer.json"),
        (_older_tokenizer, "older tokenizer but no tokenizer.json"),
        (_cut_short, "tokenizer.json is damaged or not a tokenizer"),
        (_empty_file, "tokenizer.json is damaged or not a tokenizer"),
        (_not_utf8, "tokenizer.json is damaged or not a tokenizer"),
        (_other_json, "tokenizer.json is damaged or not a tokenizer"),
        (_bad_settings, "tokenizer_config.json is not JSON"),
        (_bad_added_tokens, "tokenizer_config.json has damaged added tokens"),
        (_bad_special_tokens, "tokenizer_config.json has damaged added tokens"),
        (_settings_of_another_shape, "tokenizer_config.json must hold a JSON object, not list"),
    ],
)
def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path, make, said):
    with pytest.raises(ValueError) as error:
        load_tokenizer(make(tmp_path))
    assert said in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(bytes_tokenizer):
    check_vocabulary(bytes_tokenizer, 259)
    with pytest.raises(ValueError, match="the tokenizer has 259 ids but the model's vocab_size is 258"):
        check_vocabulary(bytes_tokenizer, 258)


def test_the_vocabulary_counts_up_to_the_largest_id_even_with_gaps(tmp_path):
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    assert load_tokenizer(_directory(tmp_path / "t", made)).vocab_size == 10


def test_training_twice_gives_the_same_tokenizer(trained):
    again = train_tokenizer(iter(_lessons()), vocab_size=400, special_tokens=["<|user|>"])
    assert again.fingerprint == trained.fingerprint
    assert trained.vocab_size == 400


def test_fingerprints_tell_tokenizers_apart(tmp_path, trained):
    directory = _directory(tmp_path / "t", _word_level())
    ended, endless = load_tokenizer(directory, eos_token="[END]"), load_tokenizer(directory)
    assert len({each.fingerprint for each in (trained, byte_tokenizer(), ended, endless)}) == 4
    trained.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == trained.fingerprint


def test_special_tokens_spelled_out_in_a_text_can_be_read_as_plain_text(bytes_tokenizer):
    (parsed,) = bytes_tokenizer.encode_batch(["a<|eos|>"], add_special_tokens=False)
    (plain,) = bytes_tokenizer.encode_batch(["a<|eos|>"], add_special_tokens=False, parse_special_tokens=False)
    assert parsed == [97, 257]
    assert plain == list(b"a<|eos|>")


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory, trained):
    folder = tmp_path_factory.mktemp("kinds")
    piece_wise = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "un": 1, "##able": 2, "a": 3, "##\ufffd": 4}))
    piece_wise.decoder = decoders.WordPiece()
    piece_wise.add_special_tokens([AddedToken("[UNK]", special=True)])
    meta = _sentencepiece_like()
    meta.decoder = decoders.Metaspace()
    made = {"sentencepiece": _sentencepiece_like(), "words": _word_level(), "pieces": piece_wise, "meta": meta}
    loaded = [load_tokenizer(_directory(folder / name, each)) for name, each in made.items()]
    return [byte_tokenizer(), trained, *loaded]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), text=st.text("aé🙂 the\n\ufffd", max_size=12))
def test_bytes_of_ids_are_those_of_their_text(every_kind, data, text):
    tokenizer = data.draw(st.sampled_from(every_kind))
    ids = np.array(tokenizer.encode(text), np.int64)
    assert tokenizer.count_bytes(ids) == len(tokenizer.decode(ids).encode())


def test_tokens_that_were_added_count_with_their_bytes_unless_they_are_special(tmp_path):
    byte_tokenizer(["<|x|>"]).save(tmp_path)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.add_tokens(["東京"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids = np.array(tokenizer.encode("a東京é<|x|>"))
    assert tokenizer.count_bytes(ids) == len("a東京é".encode())
    assert tokenizer.count_bytes(ids[:0]) == 0


class TestTextStream:
    @staticmethod
    def _streamed(tokenizer, ids, **options) -> list[str]:
        stream = TextStream(tokenizer, **options)
        return [*(stream.push(i) for i in ids), stream.flush()]

    def test_a_character_comes_out_whole_with_its_last_byte(self, bytes_tokenizer):
        assert self._streamed(bytes_tokenizer, list("a🙂b".encode())) == ["a", "", "", "", "🙂", "b", ""]

    def test_a_character_that_never_ends_comes_out_at_the_end(self, bytes_tokenizer):
        assert self._streamed(bytes_tokenizer, list("a🙂".encode())[:-1]) == ["a", "", "", "", "\ufffd"]

    def test_special_tokens_are_shown_on_request(self, bytes_tokenizer):
        assert self._streamed(bytes_tokenizer, [256, 97, 257]) == ["", "a", "", ""]
        assert self._streamed(bytes_tokenizer, [97, 257], skip_special_tokens=False) == ["a", "<|eos|>", ""]

    def test_a_space_after_a_skipped_token_is_not_lost(self, tmp_path):
        tokenizer = load_tokenizer(_directory(tmp_path / "t", _sentencepiece_like()))
        assert self._streamed(tokenizer, [1, 261, 2, 260]) == ["", "cat", "", " the", ""]

    def test_an_id_the_tokenizer_does_not_have_changes_nothing(self, tmp_path):
        tokenizer = load_tokenizer(_directory(tmp_path / "t", _sentencepiece_like()))
        first, second = "é".encode()
        assert "".join(self._streamed(tokenizer, [first + 3, 999, second + 3])) == "é"

    @settings(max_examples=150, deadline=None)
    @given(data=st.data(), skip=st.booleans())
    def test_the_pieces_of_any_ids_add_up_to_their_text(self, every_kind, data, skip):
        tokenizer = data.draw(st.sampled_from(every_kind))
        usual = st.integers(0, tokenizer.vocab_size + 2)  # models may have more ids than their tokenizer
        spelled = st.text("aé🙂 the\ufffd", max_size=8).map(tokenizer.encode)
        ids = [i for part in data.draw(st.lists(spelled | st.lists(usual, max_size=6), max_size=6)) for i in part]
        pieces = self._streamed(tokenizer, ids, skip_special_tokens=skip)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_config_gets_its_tokenizer_by_any_of_the_three_ways(tmp_path, config):
    assert build_tokenizer(TokenizerConfig(kind="bytes"), config).vocab_size == 259
    trained = build_tokenizer(TokenizerConfig(vocab_size=280), config)
    assert trained.vocab_size == 280
    trained.save(tmp_path / "t")
    loaded = build_tokenizer(TokenizerConfig(kind="file", path=str(tmp_path / "t" / "tokenizer.json")), config)
    assert loaded.fingerprint == trained.fingerprint


def test_a_trained_tokenizer_is_kept_and_trained_anew_when_the_files_change(config, jsonl, monkeypatch):
    settings = TokenizerConfig(vocab_size=280)
    first = build_tokenizer(settings, config)
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        return train_tokenizer(*arguments, **options)

    monkeypatch.setattr("jaxformers.data.corpus.train_tokenizer", counted)
    assert build_tokenizer(settings, config).fingerprint == first.fingerprint
    assert not calls
    jsonl.write_text(json.dumps({"text": "entirely other words " * 50}))
    assert build_tokenizer(settings, config).fingerprint != first.fingerprint
    assert calls


def test_learning_stops_at_max_bytes_and_does_not_keep_to_the_first_files(tmp_path, monkeypatch):
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text(f"{number:02}" * 50)
    seen = []

    def looked_at(texts, **options):
        seen.extend(texts)
        return byte_tokenizer()

    monkeypatch.setattr("jaxformers.data.corpus.train_tokenizer", looked_at)
    data = DataConfig(paths=f"{tmp_path}/*.txt", cache_dir=tmp_path / "cache")
    build_tokenizer(TokenizerConfig(max_bytes=350), data)
    assert len(seen) == 4
    assert max(seen) > "10"


def test_no_text_to_learn_from_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    data = DataConfig(paths=f"{tmp_path}/*.txt", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="no text to train a tokenizer on in"):
        build_tokenizer(TokenizerConfig(), data)


def test_the_bytes_of_tokens_add_up_to_the_text():
    trained = train_tokenizer(["naïve 🌍 words, words and more words"] * 3, vocab_size=300)
    for text in ("words and naïve 🌍", " two  spaces", "<|eos|>x"):
        ids = trained.encode(text, add_special_tokens=False)
        assert b"".join(map(trained.token_bytes, ids)).decode() == text
    assert byte_tokenizer().token_bytes(0xE2) == b"\xe2"
    assert byte_tokenizer().token_bytes(10_000) == b""
