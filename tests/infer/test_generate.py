"""Cached generation makes the tokens that `transformers` makes, whatever the batch, the lengths or the mesh."""

import functools
import logging

import jax
import numpy as np
import pytest
from families.checkpoints import ROWS, VOCAB, assert_close, tokens
from families.foreign import TWINS
from infer.references import EOS, checkpoint, continuation, prepared
from scipy import special
from tiny import LLAMA, random_params

from jaxformers.families import read_config
from jaxformers.infer import generate as module
from jaxformers.infer.generate import CHUNK, Generation, bucket, prepare_model
from jaxformers.infer.sampling import SamplingParams
from jaxformers.models.decoder import forward
from jaxformers.models.params import model_spec
from jaxformers.parallel.mesh import MeshConfig, make_mesh, param_shardings, single_device_mesh

NEW = CHUNK + 5  # the prefill's token, a whole chunk and a part of one


pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def weights():
    """A model of two layers, for what the reference need not see."""
    cfg = read_config(LLAMA | {"vocab_size": VOCAB})
    return cfg, jax.device_put(random_params(cfg))


@functools.cache
def small(dtype="float32"):
    cfg, params = weights()
    return prepare_model(params, cfg, single_device_mesh(), dtype=dtype)


def logits_of(text):
    """Of one text, float32 [T, V], by one pass over all of it."""
    cfg, params = weights()
    return np.asarray(_forward(params, np.array([text], np.int32), cfg)[0])


_forward = jax.jit(lambda params, text, cfg: forward(params, cfg, text), static_argnums=2)


def prompts(*lengths, seed=5):
    return [tokens(length, seed=seed + row).tolist() for row, length in enumerate(lengths)]


def run(model, rows, *, new=NEW, temperature=0.0, logprobs=False, stop_ids=(), end=None, **knobs):
    """Tokens, finish reasons and logprobs of all rows. `end` is (row, after how many steps)."""
    sampling = SamplingParams.create(len(rows), temperature=temperature, **knobs)
    generation = Generation(model, rows, max_new_tokens=new, sampling=sampling, stop_ids=stop_ids, logprobs=logprobs)
    made, chances = [[] for _ in rows], [[] for _ in rows]
    for number, step in enumerate(generation, start=1):
        for row, some in enumerate(step.tokens):
            made[row] += some
            chances[row] += step.logprobs[row] if logprobs else []
        if end and end[1] == number:
            generation.end(end[0])
    return made, step.finish, chances


# One of each kind: positions of several sorts, windows, latents and experts, sinks.
KINDS = ("llama", "llama-linear", "llama-dynamic", "gemma3_text", "deepseek_v3-lite", "gpt2", "gpt_oss")


@pytest.mark.usefixtures("programs_go_with_their_model")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in [*ROWS, *TWINS]]
)
def test_a_ragged_batch_continues_as_the_reference_continues_each_prompt_alone(name):
    # Where a text outgrows the short factors of LongRoPE, the reference reads it anew; others keep what they read.
    rows = prompts(9, 16) if name == "phi3-long" else prompts(9, 5, 16)
    made, finish, _ = run(prepared(name), rows, stop_ids=[EOS])
    truth = [continuation(name, prompt, new=NEW) for prompt in rows]
    assert made == truth
    assert finish == ["length" if len(row) == NEW else "stop" for row in truth]


@pytest.mark.parametrize("length, new", [(15, 1), (15, 17), (16, 16), (17, 15), (1, 15)])
def test_lengths_at_the_edges_of_buckets_change_nothing(length, new):
    (prompt,) = prompts(length)
    (made,), _, _ = run(prepared("gpt2"), [prompt], new=new, stop_ids=[EOS])
    assert made == continuation("gpt2", prompt, new=new)


def test_reading_a_part_of_the_cache_changes_nothing(monkeypatch):
    rows = prompts(9, 5, 16)
    whole, _, _ = run(small(), rows, new=40)
    monkeypatch.setattr(module, "SMALLEST_READ", 16)
    assert run(small(), rows, new=40)[0] == whole


def test_sampled_rows_depend_on_their_seed_and_on_no_other_row():
    rows = prompts(9, 5, 16)
    knobs = {"temperature": 1.5, "top_p": 0.95}
    batch, _, _ = run(small(), rows, seed=[7, 8, 9], **knobs)
    assert run(small(), rows, seed=[7, 8, 9], **knobs)[0] == batch
    assert run(small(), rows[::-1], seed=[9, 8, 7], **knobs)[0] == batch[::-1]
    assert run(small(), rows[1:2], seed=8, **knobs)[0] == batch[1:2]
    other, _, _ = run(small(), rows, seed=[10, 8, 11], **knobs)
    assert (other[0] != batch[0], other[1], other[2] != batch[2]) == (True, batch[1], True)


def test_a_stop_id_ends_its_row_and_leaves_the_others_alone():
    rows = prompts(9, 5, 16)
    free, _, _ = run(small(), rows)
    stop = free[1][4]
    made, finish, _ = run(small(), rows, stop_ids=[stop])
    assert made == [row[: row.index(stop)] if stop in row else row for row in free]
    assert finish == ["stop" if stop in row else "length" for row in free]


def test_a_row_that_the_caller_ends_leaves_the_others_alone():
    rows = prompts(9, 5, 16)
    free, _, _ = run(small(), rows)
    made, finish, _ = run(small(), rows, end=(1, 1))
    assert made == [free[0], free[1][:1], free[2]]
    assert finish == ["length", "stop", "length"]


def test_generation_is_over_once_every_row_has_stopped():
    (prompt,) = prompts(9)
    free, _, _ = run(small(), [prompt], new=40)
    generation = Generation(small(), [prompt], max_new_tokens=40, stop_ids=[free[0][0]])
    assert [step.tokens for step in generation] == [[[]]]


def test_logprobs_are_those_of_the_forward_pass():
    rows = prompts(9, 5, 16)
    made, _, logprobs = run(small(), rows, logprobs=True)
    for prompt, new, chances in zip(rows, made, logprobs, strict=True):
        logits = logits_of(prompt + new)[len(prompt) - 1 : -1]
        assert_close(chances, special.log_softmax(logits, axis=-1)[np.arange(len(new)), new])


def test_the_repetition_penalty_is_the_references():
    rows = prompts(9, 5)
    made, _, _ = run(prepared("gpt2"), rows, repetition_penalty=1.4, stop_ids=[EOS])
    assert made == [continuation("gpt2", prompt, new=NEW, repetition_penalty=1.4) for prompt in rows]
    assert made != [continuation("gpt2", prompt, new=NEW) for prompt in rows]


def test_presence_and_frequency_penalties_count_generated_tokens():
    rows = prompts(9, 5, 16)
    made, _, _ = run(small(), rows, presence_penalty=0.5, frequency_penalty=0.7)
    for prompt, new in zip(rows, made, strict=True):
        logits = logits_of(prompt + new)
        for n, token in enumerate(new):
            counts = np.bincount(new[:n], minlength=VOCAB)
            assert token == np.argmax(logits[len(prompt) + n - 1] - 0.5 * (counts > 0) - 0.7 * counts)
    assert made != run(small(), rows)[0]


# More tensor shards than kv heads, and rows that the data axes do not divide, are among these.
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"dp": 2, "tp": 4}])
def test_a_mesh_makes_the_tokens_of_one_device(sizes):
    (cfg, params), mesh = weights(), make_mesh(MeshConfig(**{"fsdp": 1} | sizes))
    sharded = prepare_model(jax.device_put(params, param_shardings(model_spec(cfg), mesh)), cfg, mesh)
    rows, knobs = prompts(9, 5, 16), {"temperature": [0.0, 1.0, 1.0], "repetition_penalty": 1.1}
    assert run(sharded, rows, **knobs)[0] == run(small(), rows, **knobs)[0]
    weight = sharded.params["blocks"][1]["attn"]["o"]
    assert weight.addressable_shards[0].data.size < weight.size


def test_a_mesh_splits_latent_attention_and_experts_too():
    c, mesh = checkpoint("deepseek_v3-lite"), make_mesh(MeshConfig(fsdp=2, tp=4))
    params = jax.device_put(c.ours.params, param_shardings(model_spec(c.ours.config), mesh))
    rows = prompts(9, 5, 16)
    made, _, _ = run(prepare_model(params, c.ours.config, mesh), rows, stop_ids=[EOS])
    assert made == [continuation("deepseek_v3-lite", prompt, new=NEW) for prompt in rows]


def test_other_prompts_of_the_same_buckets_compile_nothing():
    def compiled():
        return module._prefill._cache_size(), module._decode._cache_size()

    run(small(), prompts(9, 5), new=20, stop_ids=[EOS])
    before = compiled()
    run(small(), prompts(3, 12, seed=9), new=19, stop_ids=[EOS, 7])
    cfg, params = weights()
    again = prepare_model(params, cfg, single_device_mesh())
    run(again, prompts(16, 1, seed=9), new=16)
    assert compiled() == before


@pytest.mark.parametrize("size", [1, 16, 17, 128, 129, 1000, 4097])
def test_a_bucket_holds_its_size_and_wastes_a_quarter_at_most(size):
    assert size <= bucket(size) <= max(size + 15, 1.25 * size)
    assert bucket(bucket(size)) == bucket(size) <= bucket(size + 1)


def test_bfloat16_tokens_are_about_as_likely_in_float32():
    rows = prompts(9, 5, 16)
    made, _, logprobs = run(small("bfloat16"), rows, logprobs=True)
    for prompt, new, chances in zip(rows, made, logprobs, strict=True):
        logits = logits_of(prompt + new)[len(prompt) - 1 : -1]
        truth = special.log_softmax(logits, axis=-1)
        np.testing.assert_allclose(chances, truth[np.arange(len(new)), new], atol=0.05)
        np.testing.assert_allclose(chances, truth.max(axis=-1), atol=0.05)


@pytest.mark.parametrize(
    "rows, new, line",
    [
        ([], 4, "there is no prompt"),
        ([[5], []], 4, "prompt 1 has no tokens"),
        ([[5, VOCAB]], 4, f"prompt 0 has the id {VOCAB}, but the model's ids are 0 to {VOCAB - 1}"),
        ([[5, -1]], 4, "prompt 0 has the id -1"),
        ([[5]], 0, "max_new_tokens is 0; it must be at least 1"),
        ([[5] * 60], 5, "60 tokens and 5 new ones pass the context length of 64"),
    ],
)
def test_what_cannot_be_continued_is_refused(rows, new, line):
    with pytest.raises(ValueError, match=line):
        Generation(prepared("gpt2"), rows, max_new_tokens=new)


def test_models_without_learned_positions_may_pass_their_context_which_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        Generation(small(), [[5] * 60], max_new_tokens=8)
    assert "60 tokens and 8 new ones pass the context length of 64" in caplog.text
