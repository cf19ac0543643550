"""Requests with adapters of their own share a batch, and each gets what a model with its adapter merged would make."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from infer.engines import Answer, answers, tokens_of
from tiny import LLAMA, random_params

from jaxformers.adapters import adapter_params
from jaxformers.families import read_config
from jaxformers.hub.peft import detach, write_adapter
from jaxformers.hub.targets import Wish, plan_adapter
from jaxformers.infer.engine import Engine
from jaxformers.infer.generate import prepare_model
from jaxformers.infer.request import EngineConfig, Request
from jaxformers.models.adapters import add_adapter, is_adapted, merge
from jaxformers.models.params import model_spec
from jaxformers.parallel.mesh import MeshConfig, make_mesh, param_shardings, single_device_mesh

VOCAB, NEW = 300, 8
CONFIG = EngineConfig(
    slots=3, page_size=4, prefill_chunk=16, prefill_piece=8, decode_steps=3, adapters=2, adapter_rank=6
)
WISHES = {
    "all": Wish(rank=6),
    "some": Wish(targets=["q_proj", "down_proj"], rank=3, ranks={"model.layers.0.*": 2}),
    "values": Wish(targets=["v_proj", "o_proj", "up_proj"], rank=4),
}


pytestmark = pytest.mark.usefixtures("small_key_blocks")


@functools.cache
def base():
    cfg = read_config(LLAMA | {"hidden_size": 64, "max_position_embeddings": 128})
    return cfg, jax.device_put(random_params(cfg))


@functools.cache
def adapted(name):
    """The base's plain tree with an adapter that does much."""
    cfg, params = base()
    tree = add_adapter(params, cfg, plan_adapter(cfg, WISHES[name]), jax.random.key(1))
    draw = np.random.default_rng(len(name))

    def stronger(w):
        if not is_adapted(w):
            return w
        return w.replace(b=0.3 * draw.standard_normal(w.b.shape, dtype=np.float32))

    return jax.tree.map(stronger, tree, is_leaf=is_adapted)


def prepared(params):
    return prepare_model(params, base()[0], single_device_mesh())


@pytest.fixture(scope="module")
def ready(small_key_blocks):
    engine = Engine(prepared(base()[1]), CONFIG)
    engine.warm_up()
    engine.add_adapter("all", adapted("all"))
    engine.add_adapter("some", adapted("some"))
    return engine


def ids(length, seed=0):
    return np.random.default_rng([length, seed]).integers(3, VOCAB, length).tolist()


def greedy(prompt, adapter=None):
    return Request(prompt=prompt, max_new_tokens=NEW, temperature=0.0, logprobs=0, prompt_logprobs=0, adapter=adapter)


def plain(prompt, adapter=None):
    """One that may find its prompt's beginning."""
    return Request(prompt=prompt, max_new_tokens=NEW, temperature=0.0, logprobs=0, adapter=adapter)


def numbers(answer):
    return [told.logprob for told in [*answer.logprobs, *(answer.prompt_logprobs or ())[1:]]]


PROMPTS = (ids(20), ids(1), ids(33))


@functools.cache
def truth(name):
    """What a model with this adapter, or none, makes of the prompts."""
    params = base()[1] if name is None else merge(adapted(name))
    engine = Engine(prepared(params), EngineConfig(**(vars(CONFIG) | {"adapters": 0})))
    return answers(engine, [greedy(prompt) for prompt in PROMPTS])


def test_each_request_of_a_batch_gets_the_tokens_of_its_own_merged_model(ready):
    names = [None, "all", "some"]
    wanted = [(prompt, name) for name in names for prompt in PROMPTS]
    order = np.random.default_rng(0).permutation(len(wanted))
    found = answers(ready, [greedy(*wanted[i]) for i in order])
    made = {int(i): answer for i, answer in zip(order, found, strict=True)}
    for k, name in enumerate(names):
        for j, expected in enumerate(truth(name)):
            ours = made[k * len(PROMPTS) + j]
            assert ours.tokens == expected.tokens
            np.testing.assert_allclose(numbers(ours), numbers(expected), atol=1e-5, rtol=0)
    assert len({tuple(answer.tokens) for name in names for answer in truth(name)[:1]}) == 3
    assert ready.stats().compilations_after_ready == 0


def test_a_request_without_an_adapter_is_unchanged_to_the_last_bit(ready):
    beside = answers(ready, [greedy(PROMPTS[0]), greedy(PROMPTS[2], "all"), greedy(PROMPTS[1], "some")])[0]
    assert (beside.tokens, numbers(beside)) == (truth(None)[0].tokens, numbers(truth(None)[0]))


def test_what_one_adapter_has_read_is_not_found_by_another(ready):
    prompt = ids(30, seed=5)
    cold = answers(ready, [plain(prompt, "all")])[0]
    other = answers(ready, [plain(prompt, "some"), plain(prompt)])
    warm = answers(ready, [plain(prompt, "all")])[0]
    assert [cold.cached_tokens, *(answer.cached_tokens for answer in other), warm.cached_tokens] == [0, 0, 0, 24]
    assert (warm.tokens, warm.logprobs) == (cold.tokens, cold.logprobs)


def test_adapters_come_and_go_while_requests_run_and_compile_nothing(ready):
    before = tokens_of(ready, plain(PROMPTS[2], "some"))
    number, found = ready.submit(plain(PROMPTS[2], "some")), Answer()
    events = ready.step()
    ready.remove_adapter("some")
    with pytest.raises(ValueError, match=r"^there is no adapter 'some'; loaded are all$"):
        ready.submit(plain(PROMPTS[0], "some"))
    told = r"finds no room: there is room for 2, and requests still use one that was removed$"
    with pytest.raises(ValueError, match=told):
        ready.add_adapter("values", adapted("values"))
    while ready.has_work():
        events += ready.step()
    for event in events:
        assert event.request == number
        found.take(event)
    assert [found.tokens] == before
    ready.add_adapter("values", adapted("values"))
    assert ready.adapters == ("all", "values")
    assert answers(ready, [greedy(PROMPTS[0], "values")])[0].tokens == truth("values")[0].tokens
    ready.remove_adapter("values")
    ready.add_adapter("some", adapted("some"))
    assert tokens_of(ready, plain(PROMPTS[2], "some")) == before
    assert ready.stats().compilations_after_ready == 0


def test_an_adapter_of_the_same_name_with_other_weights_finds_nothing_of_the_first(ready):
    prompt = ids(40, seed=9)
    tokens_of(ready, plain(prompt, "some"))
    ready.remove_adapter("some")
    ready.add_adapter("some", adapted("some"))
    assert answers(ready, [plain(prompt, "some")])[0].cached_tokens == 0


def wished(wish):
    cfg, params = base()
    return add_adapter(params, cfg, plan_adapter(cfg, wish), jax.random.key(0))


def test_an_adapter_in_the_format_of_peft_is_read_for_the_engine(ready, tmp_path):
    cfg, _ = base()
    own = detach(adapted("values"), cfg, plan_adapter(cfg, WISHES["values"]))
    write_adapter(tmp_path, own, cfg)
    ready.remove_adapter("some")
    ready.add_adapter("from a file", adapter_params(tmp_path, cfg))
    assert tokens_of(ready, plain(PROMPTS[0], "from a file")) == [truth("values")[0].tokens]
    ready.remove_adapter("from a file")
    ready.add_adapter("some", adapted("some"))
    write_adapter(tmp_path, replace(own, whole={"model.norm.weight": np.ones(64, np.float32)}), cfg)
    with pytest.raises(ValueError, match=r"holds model.norm.weight whole, which cannot be one of several; merge it$"):
        adapter_params(tmp_path, cfg)


@pytest.mark.parametrize(
    ("name", "wish", "line"),
    [
        ("all", Wish(), "there is an adapter 'all' already; remove it first"),
        ("more", Wish(rank=2), "adapter 'more' finds no room: there is room for 2"),
        ("wide", Wish(targets=["k_proj"], rank=7), "has the rank 7 at layers.0.0.attn.k; there is room for 6"),
        ("table", Wish(targets=["embed_tokens"], rank=2), "changes embed, for which there is no room beside others"),
        ("dora", Wish(targets=["k_proj"], rank=2, dora=True), "has magnitudes (dora) of layers.0.0.attn.k"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(ready, name, wish, line):
    with pytest.raises(ValueError) as refused:
        ready.add_adapter(name, wished(wish if wish.rank <= 6 or name == "wide" else Wish(rank=2)))
    assert line in str(refused.value)


@pytest.mark.slow
def test_adapters_on_a_mesh_make_the_tokens_of_one_device():
    cfg, params = base()
    mesh = make_mesh(MeshConfig(fsdp=2, tp=2), devices=jax.devices()[:4])
    sharded = prepare_model(jax.device_put(params, param_shardings(model_spec(cfg), mesh)), cfg, mesh)
    engine = Engine(sharded, CONFIG)
    engine.add_adapter("all", adapted("all"))
    found = answers(engine, [greedy(PROMPTS[0], "all"), greedy(PROMPTS[0])])
    assert [answer.tokens for answer in found] == [truth("all")[0].tokens, truth(None)[0].tokens]
