"""Layer lists are cut into runs that give the list back, and execution layouts change no number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformers.families import read_config
from jaxformers.models.cache import init_cache
from jaxformers.models.config import LayerKind, plan_stacks
from jaxformers.models.decoder import forward, hidden_states
from jaxformers.models.layout import prepare, stack, unstack, unstack_spec
from jaxformers.models.params import abstract_params, init_params, model_spec
from jaxformers.models.runtime import KEPT, Runtime

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
FULL, LOCAL, WIDE = LayerKind(), LayerKind(window=4), LayerKind(window=8)
TINY = {
    "model_type": "qwen2",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def described(layers):
    return [(len(stack.pattern), stack.repeats) for stack in plan_stacks(tuple(layers))]


@pytest.mark.parametrize(
    "layers, runs",
    [
        (([LOCAL] * 5 + [FULL]) * 4 + [LOCAL] * 2, [(6, 4), (1, 2)]),  # Gemma-3-1B
        ([FULL] * 3 + [LOCAL] * 58, [(1, 3), (1, 58)]),  # DeepSeek-V3's dense and sparse layers
        ([LOCAL, FULL] * 13, [(2, 13)]),
        ([FULL] * 8, [(1, 8)]),
        ([FULL], [(1, 1)]),
        ([LOCAL, FULL, WIDE], [(1, 1)] * 3),
        ([], []),
    ],
)
def test_known_models_are_cut_as_expected(layers, runs):
    assert described(layers) == runs


@given(st.lists(st.sampled_from([FULL, LOCAL, WIDE]), max_size=40))
def test_the_runs_give_the_list_back(layers):
    stacks = plan_stacks(tuple(layers))
    assert [kind for stack in stacks for kind in stack.pattern * stack.repeats] == layers
    numbers = [s.layer(j, r) for s in stacks for r in range(s.repeats) for j in range(len(s.pattern))]
    assert numbers == list(range(len(layers)))


@given(st.lists(st.sampled_from([FULL, LOCAL]), min_size=1, max_size=4), st.integers(2, 10))
def test_a_repeating_list_is_one_run(pattern, repeats):
    assert len(plan_stacks(tuple(pattern * repeats))) == 1


def tiny_model(**changes):
    cfg = read_config(TINY | changes)
    return cfg, jit(lambda key: jax.tree.map(lambda a: a + 0.1, init_params(cfg, key)))(jax.random.key(0))


def test_unstacking_gives_each_layer_its_own_weights():
    cfg, params = tiny_model(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    blocks = jit(unstack, static_argnums=1)(params, cfg)["blocks"]
    assert len(blocks) == cfg.num_layers
    params = jax.tree.map(np.asarray, params)
    for run, layers in zip(plan_stacks(cfg.layers), params["layers"], strict=True):
        for j, r in np.ndindex(len(run.pattern), run.repeats):
            expected = jax.tree.map(lambda a, r=r: a[r], layers[j])
            jax.tree.map(np.testing.assert_array_equal, blocks[run.layer(j, r)], expected)


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_prepared_parameters_compute_the_same(whole, on_cpu):
    cfg, params = tiny_model()
    tokens = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    prepared = jit(functools.partial(prepare, cfg=cfg, dtype=jnp.float32, whole=whole, on_cpu=on_cpu))(params)
    assert ("qkv" in prepared["blocks"][0]["attn"]) == whole
    with jax.default_matmul_precision("highest"):
        decode = jit(lambda params: hidden_states(params, cfg, tokens, cache=init_cache(cfg, 2, 8)).x)
        plain = jit(lambda params: hidden_states(params, cfg, tokens).x)
        np.testing.assert_allclose(decode(prepared), plain(params), rtol=1e-5, atol=1e-5)


def test_stacking_undoes_unstacking_and_specs_follow():
    cfg, params = tiny_model()
    blocks = unstack(params, cfg)
    jax.tree.map(np.testing.assert_array_equal, stack(blocks, cfg), params)
    assert jax.tree.map(lambda spec: spec.shape, unstack_spec(model_spec(cfg), cfg)) == jax.tree.map(
        lambda a: a.shape, blocks
    )


def test_prepared_parameters_have_the_dtype_asked_for():
    cfg, params = tiny_model()
    prepared = jax.eval_shape(functools.partial(prepare, cfg=cfg, dtype=jnp.bfloat16, whole=True, on_cpu=False), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(prepared)} == {jnp.dtype(jnp.bfloat16)}


def test_rematerialization_of_scanned_layers_needs_less_memory():
    cfg = read_config(TINY | {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 256})
    tokens = jax.ShapeDtypeStruct((4, 128), jnp.int32)

    def temporary_bytes(remat):
        runtime = Runtime(layers="scan", remat=remat)
        step = jit(jax.grad(lambda params, tokens: forward(params, cfg, tokens, runtime=runtime).sum()))
        return step.lower(abstract_params(cfg), tokens).compile().memory_analysis().temp_size_in_bytes

    sizes = {remat: temporary_bytes(remat) for remat in ("none", *KEPT)}
    assert sizes["full"] < 0.5 * sizes["none"], sizes
    assert sizes["full"] < sizes["projections"] < 0.7 * sizes["none"], sizes
    assert sizes["full"] < sizes["dots"] < 0.7 * sizes["none"], sizes
