"""An engine on a mesh, and several of them side by side, make the tokens of one engine on one device."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from infer.engines import Answer, answers, tokens_of
from infer.foreseeing import foreseeing_params
from tiny import LLAMA, random_params

from jaxformers.families import read_config
from jaxformers.infer.engine import Engine, Replicas
from jaxformers.infer.request import EngineConfig, QueueFull, Request
from jaxformers.models.params import model_spec
from jaxformers.parallel.mesh import MeshConfig, make_mesh, param_shardings, single_device_mesh

CONFIG = EngineConfig(slots=3, max_length=64, page_size=4, prefill_chunk=16, prefill_piece=8, decode_steps=3)
SHAPES = {
    "llama": LLAMA | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2},
    "experts": {
        "model_type": "qwen3_moe",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 48,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "max_position_embeddings": 64,
    },
    "module": {
        "model_type": "glm4_moe",
        "vocab_size": 60,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": 64,
        "num_nextn_predict_layers": 1,
    },
}


pytestmark = pytest.mark.usefixtures("small_key_blocks")
KEY_BLOCK = 16


@functools.cache
def loaded(name, **sizes):
    """A model as `jf.load` returns it, on a mesh of as many devices as it takes."""
    cfg = read_config(SHAPES[name])
    count = int(np.prod(list(sizes.values()), dtype=int))
    mesh = make_mesh(MeshConfig(**{"fsdp": 1} | sizes), devices=jax.devices()[:count])
    params = foreseeing_params(cfg, doubt=0.06) if cfg.mtp_modules else random_params(cfg)
    params = jax.device_put(params, param_shardings(model_spec(cfg), mesh))
    return SimpleNamespace(config=cfg, params=params, mesh=mesh, dtype="float32")


def requests():
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 300, length).tolist() for length in (1, 9, 30, 17)]
    settings = {"max_new_tokens": 8, "logprobs": 2, "prompt_logprobs": 1}
    return [Request(prompt=p, temperature=0.0, **settings) for p in prompts] + [
        Request(prompt=prompts[2], temperature=1.2, seed=3, max_new_tokens=8, logprobs=0)
    ]


def numbers(answer):
    return [told.logprob for told in [*answer.logprobs, *(answer.prompt_logprobs or ())[1:]]]


@functools.cache
def alone(name):
    return answers(Engine(loaded(name), CONFIG), requests())


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "sizes", "kv_heads"),
    [
        ("llama", {"tp": 4}, 2),  # more devices than kv heads, which all of them hold
        ("experts", {"ep": 2, "tp": 2}, 1),
        slow("llama", {"fsdp": 2, "tp": 2}, 1),
        slow("experts", {"ep": 4}, 2),
    ],
    ids=str,
)
def test_a_mesh_makes_the_tokens_of_one_device_and_compiles_nothing_once_it_is_ready(name, sizes, kv_heads):
    engine = Engine(loaded(name, **sizes), CONFIG)
    engine.warm_up()
    for ours, truth in zip(answers(engine, requests()), alone(name), strict=True):
        assert ours.tokens == truth.tokens
        np.testing.assert_allclose(numbers(ours), numbers(truth), atol=1e-5, rtol=0)
    with jax.set_mesh(single_device_mesh()):  # somebody else's
        tokens_of(engine, *requests()[::-1])
    assert engine.stats().compilations_after_ready == 0
    held = {pool.addressable_shards[0].data.shape[1] for pool in jax.tree.leaves(engine._state.pools)}
    assert held == {kv_heads}


def test_a_module_guesses_on_a_mesh_what_it_guesses_on_one_device_and_changes_no_token():
    config = dataclasses.replace(CONFIG, speculate="mtp", draft_tokens=3)
    draw = np.random.default_rng(0)
    wanted = [
        Request(prompt=draw.integers(0, 60, length).tolist(), max_new_tokens=12, temperature=temperature, seed=3)
        for length, temperature in ((1, 0.0), (30, 0.0), (9, 0.8))
    ]
    single, engine = Engine(loaded("module"), config), Engine(loaded("module", tp=2), config)
    engine.warm_up()
    truth = tokens_of(Engine(loaded("module"), CONFIG), *wanted)
    assert tokens_of(engine, *wanted) == tokens_of(single, *wanted) == truth
    ours, others = engine.stats(), single.stats()
    assert (ours.drafted_tokens, ours.accepted_tokens) == (others.drafted_tokens, others.accepted_tokens)
    assert ours.accepted_tokens > 0
    tokens_of(engine, *wanted[::-1])
    assert engine.stats().compilations_after_ready == 0
    held = {pool.addressable_shards[0].data.shape[1] for pool in jax.tree.leaves(engine._drafter._sight.pools)}
    assert held == {1}


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ({"dp": 2}, "mesh: dp=2 makes as many engines, which Replicas.of makes of a model"),
        ({"cp": 2}, "mesh: cp=2 splits nothing of an engine's work; use tp, ep, fsdp"),
        ({"ep": 2}, "mesh: ep=2 needs a model with experts, which llama is not; use dp or fsdp"),
    ],
    ids=str,
)
def test_meshes_on_which_devices_would_repeat_each_other_are_refused(sizes, line):
    with pytest.raises(ValueError) as refused:
        Engine(loaded("llama", **sizes), CONFIG)
    assert str(refused.value) == line


def test_replicas_answer_side_by_side_what_one_engine_answers():
    replicas = Replicas.of(loaded("llama", dp=2), CONFIG)
    replicas.warm_up()
    assert (tuple(replicas.adapters), replicas.vocab_size) == ((), replicas.engines[0].vocab_size)
    wanted = [*requests(), *requests()]
    places = [replicas.submit(request) for request in wanted]
    assert sorted(place % 2 for place in places) == [0] * 5 + [1] * 5
    gone = replicas.submit(requests()[0])
    replicas.cancel(gone)
    found = {place: Answer() for place in [*places, gone]}
    while replicas.has_work():
        for event in replicas.step():
            found[event.request].take(event)
    assert [found[place].tokens for place in places] == [answer.tokens for answer in alone("llama")] * 2
    assert found[gone].finish == "cancelled"
    stats = replicas.stats()
    assert (stats.finished, stats.cancelled, stats.compilations_after_ready) == (10, 1, 0)


def test_a_draft_on_other_devices_than_the_model_is_refused():
    with pytest.raises(ValueError, match=r"the draft model is on 1 device\(s\), and the model on 2; both must be"):
        Engine(loaded("llama", tp=2), dataclasses.replace(CONFIG, speculate="draft"), draft=loaded("llama", tp=1))


class Full:
    """An engine with so many requests, and room for so many more."""

    def __init__(self, running, room):
        self.running, self.room, self.taken = running, room, 0

    def stats(self):
        return SimpleNamespace(running=self.running + self.taken, waiting=0)

    def submit(self, request):
        if self.taken == self.room:
            raise QueueFull("full")
        self.taken += 1
        return self.taken - 1


def test_a_request_goes_to_the_least_loaded_replica_that_has_room():
    replicas = Replicas([Full(running=2, room=1), Full(running=0, room=2)])
    assert [replicas.submit(None) for _ in range(3)] == [1, 3, 0]
    with pytest.raises(QueueFull):
        replicas.submit(None)
