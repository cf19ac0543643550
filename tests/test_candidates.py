"""Of several continuations the best are kept, and what does not go together is refused."""

import jax
import numpy as np
import pytest
from tiny import LLAMA, random_params

import jaxformers as jf
from jaxformers.api import Model
from jaxformers.data.tokenizer import byte_tokenizer
from jaxformers.families import read_config
from jaxformers.generation import prepared
from jaxformers.infer.beam import BeamSettings, beam_search
from jaxformers.infer.generate import Generation
from jaxformers.infer.sampling import SamplingParams
from jaxformers.models.decoder import forward
from jaxformers.parallel.mesh import single_device_mesh

BYTES = byte_tokenizer()
DRAWN = {"max_new_tokens": 6, "temperature": 0.8, "seed": 5}


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model():
    cfg = read_config(LLAMA)
    return Model(cfg, jax.device_put(random_params(cfg)), BYTES, single_device_mesh())


def test_beams_are_told_as_texts_the_best_first(model):
    prompts = ["ab", "a longer one"]
    texts = jf.generate(model, prompts, num_beams=3, num_return_sequences=2, max_new_tokens=6)
    ids = [BYTES.encode(prompt) for prompt in prompts]
    found = beam_search(
        prepared(model), ids, BeamSettings(num_beams=3), max_new_tokens=6, stop_ids=list(BYTES.stop_ids)
    )
    assert texts == [[BYTES.decode(beam.tokens) for beam in beams[:2]] for beams in found]
    assert jf.generate(model, "ab", num_beams=3, max_new_tokens=6) == texts[0][0]
    assert jf.generate(model, prompts, num_beams=3, max_new_tokens=6, batch_size=3) == [texts[0][0], texts[1][0]]


def test_the_best_draw_has_the_highest_mean_log_probability(model):
    """Of four draws, which are those of four seeds, by one pass over each text."""
    draws = jf.generate(model, ["ab"] * 4, **DRAWN)
    prompt = BYTES.encode("ab")
    worth = [_mean_logprob(model, prompt, row) for row in _tokens(model, prompt)]
    expected = [draws[i] for i in np.argsort(-np.array(worth), kind="stable")]
    assert jf.generate(model, "ab", best_of=4, num_return_sequences=4, **DRAWN) == expected
    assert jf.generate(model, "ab", best_of=4, **DRAWN) == expected[0]
    assert jf.generate(model, "ab", num_return_sequences=4, **DRAWN) == expected


def _tokens(model, prompt):
    """The tokens of four seeds."""
    sampling = SamplingParams.create(4, temperature=0.8, seed=[5, 6, 7, 8])
    stops = list(BYTES.stop_ids)
    made = [[] for _ in range(4)]
    for step in Generation(prepared(model), [prompt] * 4, max_new_tokens=6, sampling=sampling, stop_ids=stops):
        for row, some in zip(made, step.tokens, strict=True):
            row += some
    return made


def _mean_logprob(model, prompt, row):
    text = np.array([prompt + row], np.int32)
    logprobs = np.asarray(jax.nn.log_softmax(forward(model.params, model.config, text)))[0, len(prompt) - 1 : -1]
    return logprobs[np.arange(len(row)), row].mean()


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"num_beams": 0}, "num_beams is 0; it must be at least 1"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3, but num_beams is 2"),
        ({"best_of": 2, "num_return_sequences": 3}, "num_return_sequences is 3, but best_of is 2"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0; it must be at least 1"),
        ({"best_of": 0}, "num_return_sequences is 1, but best_of is 0"),
        ({"best_of": 2, "num_beams": 2}, "best_of is 2 and num_beams 2; there are draws or beams, not both"),
        ({"length_penalty": 2.0}, "length_penalty and early_stopping are for beams, but num_beams is 1"),
        ({"best_of": 2}, "2 draws of a prompt need a temperature above 0"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams goes with neither a temperature nor penalties"),
        ({"num_beams": 2, "repetition_penalty": 1.1}, "num_beams goes with neither a temperature nor penalties"),
        ({"num_beams": 2, "stop": "x"}, "stop is 'x'; beams end at special tokens and stop_ids alone"),
        ({"num_beams": 2, "on_text": print}, "on_text hears of one continuation as it grows"),
    ],
)
def test_what_does_not_go_together_is_refused(model, settings, line):
    with pytest.raises(ValueError, match=line):
        jf.generate(model, "a", **settings)


def test_the_command_prints_each_of_the_best(model, tmp_path, command):
    jf.save_pretrained(model, tmp_path / "model")
    beams = ("--num-beams", 3, "--num-return-sequences", 2, "--length-penalty", 0.5, "--max-new-tokens", 6)
    done = command("generate", tmp_path / "model", "ab", *beams)
    settings = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "max_new_tokens": 6}
    assert done.out == "".join(f"ab{text}\n\n" for text in jf.generate(model, "ab", **settings))
    files = ("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert "are for prompts that are no file's" in command("generate", tmp_path / "model", *files, *beams).mistake
