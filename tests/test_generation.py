"""Text generation: a model that is known to spell one text shows what is streamed, held back, cut and decoded."""

import gc
import string
from itertools import pairwise

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiny import LLAMA, random_params

from jaxformers import generation
from jaxformers.api import Model
from jaxformers.data.tokenizer import Tokenizer, byte_tokenizer
from jaxformers.families import read_config
from jaxformers.generation import Settings, StoppableText, generate, prepared, sampling_params, stream
from jaxformers.parallel.mesh import single_device_mesh

BYTES = byte_tokenizer()


pytestmark = pytest.mark.usefixtures("quick_compilation")


def speller(text, *, ending=BYTES.eos_id, **fields):
    """A model that follows each byte of `text`, all of them different, by the next one, and the last by `ending`.

    Its layers add nothing, so the head reads the embedding, which is one-hot.
    """
    ids = [*text.encode(), ending]
    assert len(set(ids)) == len(ids)
    settings = {"hidden_size": 264, "head_dim": 8, "num_hidden_layers": 1, "tie_word_embeddings": False}
    cfg = read_config(LLAMA | settings)
    params = random_params(cfg)
    params["layers"][0][0]["attn"]["o"][:] = 0
    params["layers"][0][0]["ffn"]["down"][:] = 0
    params["embed"][:] = np.eye(*params["embed"].shape)
    params["final_norm"]["w"][:] = 1
    params["lm_head"][:] = 0
    for token, following in pairwise(ids):
        params["lm_head"][token, following] = 1
    return Model(cfg, jax.device_put(params), BYTES, single_device_mesh(), **fields)


def dreamer(**fields):
    """A model with random weights."""
    cfg = read_config(LLAMA)
    return Model(cfg, jax.device_put(random_params(cfg)), BYTES, single_device_mesh(), **fields)


WORLD = speller("hé wжr€ld!🌍")
DREAM = dreamer()


def test_a_text_gives_a_text_and_a_list_a_list_without_the_prompts():
    assert generate(WORLD, "h") == "é wжr€ld!🌍"
    assert generate(WORLD, ["ld", "h"]) == ["!🌍", "é wжr€ld!🌍"]
    assert generate(WORLD, ["h"]) == ["é wжr€ld!🌍"]
    assert generate(WORLD, []) == []


def test_prompts_may_be_ids_and_more_than_a_batch():
    rows = ["ld", list(b"h"), "!", list(b"r")]
    assert generate(WORLD, rows, batch_size=3) == ["!🌍", "é wжr€ld!🌍", "🌍", "€ld!🌍"]


def test_pieces_add_up_to_the_text_and_never_break_a_character():
    pieces = list(stream(WORLD, ["h", "l"]))
    texts = ["", ""]
    for piece in pieces:
        assert "\ufffd" not in piece.text
        texts[piece.row] += piece.text
    assert texts == ["é wжr€ld!🌍", "d!🌍"]
    assert len(pieces) > 4
    assert [piece.finish for piece in pieces if piece.row == 1][-1] == "stop"


def test_a_listener_is_told_what_is_returned():
    heard = []
    text = generate(WORLD, "h", on_text=lambda row, text: heard.append((row, text)))
    assert "".join(text for _, text in heard) == text
    assert {row for row, _ in heard} == {0}


def test_the_number_of_tokens_is_bounded_even_within_a_character():
    assert generate(WORLD, "h", max_new_tokens=3) == "é "
    assert generate(WORLD, "w", max_new_tokens=1) == "\ufffd"
    assert list(stream(WORLD, "h", max_new_tokens=3))[-1].finish == "length"


@pytest.mark.parametrize(
    "stop, text, finish",
    [
        ("r€l", "é wж", "stop"),
        (("zzz", "d!", "€ld"), "é wжr", "stop"),
        ("🌍", "é wжr€ld!", "stop"),
        ("ld!?", "é wжr€ld!🌍", "stop"),
        ("h", "é wжr€ld!🌍", "stop"),
        ("é", "", "stop"),
    ],
)
def test_a_stop_string_cuts_the_text_wherever_tokens_end(stop, text, finish):
    pieces = list(stream(WORLD, "h", stop=stop))
    assert "".join(piece.text for piece in pieces) == text
    assert pieces[-1].finish == finish


def test_a_stop_string_in_the_last_tokens_is_a_stop():
    whole, part = (list(stream(WORLD, "h", stop="wжr", max_new_tokens=tokens)) for tokens in (7, 6))
    assert ("".join(piece.text for piece in whole), whole[-1].finish) == ("é ", "stop")
    assert ("".join(piece.text for piece in part), part[-1].finish) == ("é wж", "length")


def test_stop_ids_and_special_tokens_end_a_text():
    assert generate(WORLD, "h", stop_ids=[ord("l"), ord("!")]) == "é wжr€"
    padded = speller("abcd", ending=BYTES.pad_id)
    assert generate(padded, "a", stop=[BYTES.token(BYTES.pad_id), "zz"]) == "bcd"
    assert generate(speller("abcd", ending=BYTES.pad_id, generation={"eos_token_id": [BYTES.pad_id]}), "b") == "cd"
    assert generate(speller("abcd", ending=BYTES.pad_id, generation={"eos_token_id": ord("d")}), "b") == "c"


def first_to_end(text, stops):
    """The text before the stop string that completes first, read one character at a time."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(
    st.text(alphabet="abé🌍", max_size=24),
    st.lists(st.text(alphabet="abé🌍", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 9), max_size=24),
)
def test_streamed_text_is_the_text_cut_as_a_whole(text, stops, sizes):
    ids, row, out = list(text.encode()), StoppableText(BYTES, stops, prompt=[]), ""
    expected, stopped = first_to_end(text, stops)
    while row.finish is None:
        size = sizes.pop() if sizes else 3
        some, ids = ids[:size], ids[size:]
        out += row.push(some, None if ids else "length")
        assert expected.startswith(out)
    assert (out, row.finish) == (expected, "stop" if stopped else "length")


def test_the_space_that_begins_a_continuation_is_kept():
    vocab = {"▁hello": 0, "▁world": 1, "?": 2}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?"))
    words.decoder = tokenizers.decoders.Metaspace()
    words = Tokenizer({"tokenizer.json": words.to_str().encode()}, origin="words")
    assert words.decode([1]) == "world"
    assert StoppableText(words, [], prompt=[0]).push([1, 1], "length") == " world world"


def test_seeds_make_rows_differ_and_repeat_whatever_the_batch():
    settings = {"temperature": 1.0, "max_new_tokens": 12, "seed": 5}
    texts = generate(DREAM, ["a"] * 4, **settings)
    assert len(set(texts)) == 4
    assert generate(DREAM, ["a"] * 4, **settings) == texts
    assert generate(DREAM, ["a"] * 4, batch_size=3, **settings) == texts
    assert generate(DREAM, "a", **settings | {"seed": 7}) == texts[2]


def test_without_a_seed_every_call_draws_anew():
    assert generate(DREAM, "a", temperature=1.0) != generate(DREAM, "a", temperature=1.0)


def knobs(own, **settings):
    """One row's temperature, top-k, top-p and repetition penalty under a model's generation_config.json."""
    p = sampling_params(Settings(**settings), own, 1)
    values = (p.temperature, p.top_k, p.top_p, p.repetition_penalty)
    return tuple(np.round(float(value[0]), 6) for value in values)


def test_settings_come_before_the_models_own():
    own = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    assert knobs({}) == (0, 0, 1, 1)
    assert knobs(own) == (0.6, 20, 0.95, 1.05)
    assert knobs(own, temperature=0.9, top_k=0, top_p=1.0) == (0.9, 0, 1, 1.05)
    assert knobs(own | {"do_sample": False}) == (0, 20, 0.95, 1.05)
    assert knobs({"do_sample": True, "top_p": None}) == (1, 0, 1, 1)
    assert generate(speller(string.ascii_letters, generation={"max_new_tokens": 4}), "a") == "bcde"


def test_an_empty_prompt_begins_with_the_token_that_begins_texts():
    assert generate(DREAM, "") == generate(DREAM, [[BYTES.bos_id]])[0] == generate(DREAM, [[]])[0]


def test_a_model_is_prepared_once_and_forgotten_with_the_model():
    model = dreamer()
    first = prepared(model)
    assert prepared(model) is first
    count = len(generation._PREPARED)
    del model
    gc.collect()
    assert len(generation._PREPARED) == count - 1


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"temperature": -1.0}, "temperature is -1, but must be finite and at least 0"),
        ({"top_p": 2.0}, "top_p is 2, but must be above 0 and at most 1"),
        ({"stop": ""}, "stop is ''; it must be a text, or several, none of them empty"),
        ({"stop": ["a", ""]}, "none of them empty"),
        ({"stop": [5]}, "stop is .5.; it must be a text"),
        ({"seed": -1}, "seed is -1; it must be from 0 to 2\\*\\*32 - 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
    ],
)
def test_settings_that_are_not_allowed_are_refused_before_anything_runs(settings, line):
    with pytest.raises(ValueError, match=line):
        stream(DREAM, "a", **settings)


def test_models_that_cannot_read_or_begin_a_text_say_so():
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        generate(Model(DREAM.config, DREAM.params, None, DREAM.mesh), "a")
    plain = Tokenizer({"tokenizer.json": tokenizers.Tokenizer(tokenizers.models.BPE()).to_str().encode()}, origin="it")
    with pytest.raises(ValueError, match="a prompt is empty, and this model has no token that begins a text"):
        generate(Model(DREAM.config, DREAM.params, plain, DREAM.mesh), "")
