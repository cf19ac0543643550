"""Every optimizer on a mesh, in each form that a state may run in, against one device and stacked layers, and its state
through a checkpoint: what is remembered of a parameter goes wherever that parameter goes. Gradients are drawn, so that
nothing but updates is compiled."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from runs import MODELS, TOLERANCE
from tiny import assert_bit_equal, random_params, relative_error

from jaxformers.families import read_config
from jaxformers.models.layout import stack, unstack, unstack_spec
from jaxformers.models.params import model_spec
from jaxformers.parallel.mesh import MeshConfig, make_mesh
from jaxformers.train.checkpoint import Checkpointer
from jaxformers.train.config import GuardConfig
from jaxformers.train.optim import make_optimizer
from jaxformers.train.optimizer_config import GroupConfig, OptimizerConfig, ScheduleConfig
from jaxformers.train.soap import EVERY
from jaxformers.train.state import abstract_state, map_params, new_state, state_shardings

CFG, STEPS = read_config(MODELS["moe"]), 3
QUICKLY = {"xla_backend_optimization_level": 0}  # LLVM's optimisations take most of the time and change no partitioning
GROUPS = {
    "first": GroupConfig(match="layers.0.*", scale=0.5, schedule=ScheduleConfig(name="constant", warmup_steps=0)),
    "experts": GroupConfig(match="*experts*", weight_decay=0.3),
}
OPTIMIZERS = {
    "adafactor": OptimizerConfig(name="adafactor", learning_rate=0.1),
    "lion": OptimizerConfig(name="lion", learning_rate=0.1),
    "sgd": OptimizerConfig(name="sgd", learning_rate=0.1, nesterov=True),
    "muon": OptimizerConfig(name="muon", learning_rate=0.1),
    "adopt": OptimizerConfig(name="adopt", learning_rate=0.1),
    "ademamix": OptimizerConfig(name="ademamix", learning_rate=0.1),
    "adamw in groups": OptimizerConfig(learning_rate=0.1, groups=GROUPS, layer_decay=0.7),
}
SOAP = OptimizerConfig(name="soap", learning_rate=0.1)
CODED = OptimizerConfig(name="muon", learning_rate=0.1, state="int8")
MESH = {"fsdp": 2, "tp": 2}
GUARD = GuardConfig()


class Data:
    """A place in data that does not move."""

    def get_state(self):
        return {"next_row": 0}

    def set_state(self, state):
        del state


class Updates:
    """An optimizer over a model's parameters on a mesh, layers stacked or unrolled."""

    def __init__(self, optimizer, mesh, *, unrolled=False):
        count = int(np.prod(list(mesh.values()), dtype=int))
        self.mesh = make_mesh(MeshConfig(**{"fsdp": 1} | mesh), devices=jax.devices()[:count])
        self.inward = partial(unstack, cfg=CFG) if unrolled else lambda params: params
        self.outward = partial(stack, cfg=CFG) if unrolled else lambda params: params
        self.tx, self.abstract = self._abstract(
            optimizer, unstack_spec(model_spec(CFG), CFG) if unrolled else model_spec(CFG)
        )
        _, self.plain = self._abstract(optimizer, model_spec(CFG))
        self.places = state_shardings(self.abstract)
        self.step = jax.jit(self._step, out_shardings=self.places, compiler_options=QUICKLY)

    def _abstract(self, optimizer, spec):
        rate = optimizer.learning_rate
        tx = make_optimizer(optimizer, lambda step: rate / (1 + step), spec, cfg=CFG, steps=10)
        return tx, abstract_state(spec, tx, self.mesh, guard=GUARD, ema=False)

    def first(self):
        make = partial(new_state, tx=self.tx, key=jax.random.key(0), guard=GUARD, ema=False)
        return jax.jit(make, out_shardings=self.places, compiler_options=QUICKLY)(self.placed(random_params(CFG)))

    def placed(self, params):
        return jax.device_put(self.inward(params), self.places.params)

    def _step(self, state, grads):
        with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
            updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    def states(self):
        """After each step."""
        state, states = self.first(), []
        for seed in range(STEPS):
            state = self.step(state, self.gradient(seed))
            states.append(state)
        return states

    def from_plain(self, state):
        """To run on from a plain state of another mesh."""
        return jax.device_put(map_params(self.inward, state), self.places)

    def gradient(self, seed):
        return self.placed(random_params(CFG, seed=10 + seed))

    def to_plain(self, state):
        return jax.device_get(map_params(self.outward, jax.device_get(state)))

    def through_a_checkpoint(self, state, folder):
        """A state as it comes back from disk."""
        (folder / "checkpoints").mkdir()
        plain = jax.device_put(self.to_plain(state), state_shardings(self.plain))
        with Checkpointer(str(folder)) as checkpoints:
            checkpoints.save(plain, Data(), {})
            checkpoints.wait()
            back = checkpoints.restore(int(state.step), self.plain, None)
        return self.from_plain(jax.device_get(back))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_mesh_with_unrolled_layers_equals_one_device_with_stacked_ones_and_resumes_bit_equal(name, tmp_path):
    truth = Updates(OPTIMIZERS[name], {})
    expected = truth.to_plain(truth.states()[-1])
    run = Updates(OPTIMIZERS[name], MESH, unrolled=True)
    *_, before, last = run.states()
    found = run.to_plain(last)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert relative_error(found.params, expected.params) < TOLERANCE
    assert relative_error(found.opt_state, expected.opt_state) < TOLERANCE
    resumed = run.step(run.through_a_checkpoint(before, tmp_path), run.gradient(STEPS - 1))
    assert_bit_equal(jax.device_get(resumed), jax.device_get(last))


def test_bases_go_on_upon_a_mesh_with_unrolled_layers_as_on_one_device_and_resume_bit_equal(tmp_path):
    """Behind the first update, whose gradient leaves to rounding what no row or column of it says."""
    truth = Updates(SOAP, {})
    seeds = range(1, EVERY + 2)  # the last but one moves the bases, the last is turned by those
    start = expected = truth.step(truth.first(), truth.gradient(0))
    for seed in seeds:
        expected = truth.step(expected, truth.gradient(seed))
    run = Updates(SOAP, MESH, unrolled=True)
    states = [run.from_plain(truth.to_plain(start))]
    for seed in seeds:
        states.append(run.step(states[-1], run.gradient(seed)))
    found, expected = run.to_plain(states[-1]), truth.to_plain(expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert relative_error(found.params, expected.params) < TOLERANCE
    resumed = run.step(run.through_a_checkpoint(states[-2], tmp_path), run.gradient(seeds[-1]))
    assert_bit_equal(jax.device_get(resumed), jax.device_get(states[-1]))


def test_moments_in_eight_bits_are_split_as_their_parameters_and_resume_bit_equal(tmp_path):
    truth = Updates(CODED, {})
    expected = truth.to_plain(truth.states()[0])
    run = Updates(CODED, MESH, unrolled=True)
    first, before, last = run.states()
    codes = [leaf for leaf in jax.tree.leaves(first.opt_state) if leaf.dtype in (np.int8, np.uint8)]
    assert len(codes) == 2 * 3  # of two layers' experts: gate, up and down
    assert {leaf.size // int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in codes} == {4}
    found = run.to_plain(first)
    # The first update is made of moments that were never coded. Rounding moves few codes, and those by one.
    assert relative_error(found.params, expected.params) < TOLERANCE
    for ours, theirs in zip(jax.tree.leaves(found.opt_state), jax.tree.leaves(expected.opt_state), strict=True):
        if ours.dtype in (np.int8, np.uint8):
            apart = np.abs(ours.astype(int) - theirs)
            assert apart.max() <= 1
            assert (apart > 0).mean() < 1e-3
    resumed = run.step(run.through_a_checkpoint(before, tmp_path), run.gradient(STEPS - 1))
    assert_bit_equal(jax.device_get(resumed), jax.device_get(last))


def test_bases_lie_split_as_the_side_that_they_turn():
    run = Updates(SOAP, MESH)
    layer = run.places.opt_state[0].inner_states["soap"].inner_state.moments["layers"][0][0]
    assert layer["ffn"]["up"].rows.basis.spec == P(None, None, "fsdp", None)
    assert layer["ffn"]["up"].columns.basis.spec == P(None, None, None, "tp")
    assert layer["attn"]["q"].rows.basis.spec == P(None, "fsdp", None)
    assert layer["attn"]["q"].columns.basis.spec == P(None, "tp", None)


def test_factors_lie_as_the_dims_of_the_matrix_that_they_keep():
    run = Updates(OPTIMIZERS["adafactor"], MESH)
    up = run.places.opt_state[0].nu["layers"][0][0]["ffn"]["up"]
    assert run.places.params["layers"][0][0]["ffn"]["up"].spec == P(None, None, "fsdp", "tp")
    assert (up.rows.spec, up.columns.spec) == (P(None, None, "fsdp", None), P(None, None, None, "tp"))
