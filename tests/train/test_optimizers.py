"""Every optimizer's first three updates against its paper's algorithm, written out in float64 for one matrix or vector
at a time: what is stacked, split into heads or into experts here is taken apart first."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pydantic import ValidationError
from tiny import assert_bit_equal, relative_error

from jaxformers.models.params import ParamSpec, linear_spec
from jaxformers.train.config import GuardConfig
from jaxformers.train.guard import guarded, new_guard
from jaxformers.train.optim import decay_mask, make_optimizer
from jaxformers.train.optimizer_config import OPTIMIZER_READS, OptimizerConfig

LR, DECAY = 0.5, 0.3
RATES = (LR, LR / 2, LR / 4)
STEPS = 10  # of the run that the updates are the first of
SPEC = {
    "embed": ParamSpec((12, 8), ("vocab", "embed"), "normal", 8),
    "layers": [
        [
            {
                "q": linear_spec((8, 2, 5), ("embed", "heads", None)).stacked(3),
                "o": linear_spec((2, 5, 8), ("heads", None, "embed"), n_in=2, init="residual").stacked(3),
                "up": linear_spec((4, 8, 6), ("experts", "embed", "mlp")).stacked(3),
                "q_b": ParamSpec((2, 5), ("heads", None), "zeros").stacked(3),
                "norm": ParamSpec((8,), (None,), "ones").stacked(3),
            }
        ]
    ],
    "lm_head": linear_spec((8, 12), ("embed", "vocab")),
}
# The dims of each leaf that count matrices or vectors, and the shape of one of those.
ENTRIES = {
    "embed": ((), (12, 8)),
    "q": ((3,), (8, 10)),
    "o": ((3,), (10, 8)),
    "up": ((3, 4), (8, 6)),
    "q_b": ((3,), (10,)),
    "norm": ((3,), (8,)),
    "lm_head": ((), (8, 12)),
}
HIDDEN, DECAYED = ("q", "o", "up"), ("embed", "q", "o", "up", "lm_head")


def adam(g, m, t, b1=0.8, b2=0.9, eps=1e-6):
    m["m"] = b1 * m.get("m", 0) + (1 - b1) * g
    m["v"] = b2 * m.get("v", 0) + (1 - b2) * g**2
    return (m["m"] / (1 - b1**t)) / (np.sqrt(m["v"] / (1 - b2**t)) + eps)


def adopt(g, m, t, b1=0.8, b2=0.9, eps=1e-6):
    """arXiv:2411.02853, Algorithm 2 with clipping: the first gradient is only for the second moment, which is always
    that of the gradients before."""
    if t > 1:
        share = g / np.maximum(np.sqrt(m["v"]), eps)
        limit = (t - 1) ** 0.25
        m["m"] = b1 * m["m"] + (1 - b1) * np.clip(share, -limit, limit)
        m["v"] = b2 * m["v"] + (1 - b2) * g**2
    else:
        m["m"], m["v"] = np.zeros_like(g), g**2
    return m["m"]


def ademamix(g, m, t, b1=0.8, b2=0.9, eps=1e-6, b3=0.9999, alpha=5.0):
    """arXiv:2409.03137, Algorithm 1, both warm-ups over all steps."""
    done = t / STEPS
    slow = np.exp(np.log(b1) * np.log(b3) / ((1 - done) * np.log(b3) + done * np.log(b1)))
    m["slow"] = slow * m.get("slow", 0) + (1 - slow) * g
    m["m"] = b1 * m.get("m", 0) + (1 - b1) * g
    m["v"] = b2 * m.get("v", 0) + (1 - b2) * g**2
    return (m["m"] / (1 - b1**t) + alpha * done * m["slow"]) / (np.sqrt(m["v"] / (1 - b2**t)) + eps)


def lion(g, m, t, b1=0.8, b2=0.9):
    direction = np.sign(b1 * m.get("m", 0) + (1 - b1) * g)
    m["m"] = b2 * m.get("m", 0) + (1 - b2) * g
    return direction


def sgd(g, m, t):
    m["m"] = 0.7 * m.get("m", 0) + g
    return m["m"]


def nesterov(g, m, t):
    return g + 0.7 * sgd(g, m, t)


def plain_sgd(g, m, t):
    return g


def adafactor(g, m, t):
    """Algorithm 4 for matrices and 5 for vectors, without the parameters' scale, and eps1 = 1e-30."""
    beta, square = 1 - t**-0.8, g**2 + 1e-30
    if g.ndim == 2:
        m["r"] = beta * m.get("r", 0) + (1 - beta) * square.sum(axis=1)
        m["c"] = beta * m.get("c", 0) + (1 - beta) * square.sum(axis=0)
        v = np.outer(m["r"], m["c"]) / m["r"].sum()
    else:
        v = m["v"] = beta * m.get("v", 0) + (1 - beta) * square
    u = g / np.sqrt(v)
    return u / max(1.0, np.sqrt((u**2).mean()))


def muon(g, m, t):
    """Algorithm 2 of the optimizer's write-up, scaled as in arXiv:2502.16982, equation 4."""
    m["m"] = 0.95 * m.get("m", 0) + g
    x = g + 0.95 * m["m"]
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return 0.2 * np.sqrt(max(g.shape)) * x


BETAS = {"b1": 0.8, "b2": 0.9, "eps": 1e-6}
CASES = {
    "adamw": (BETAS, adam, adam),
    "adopt": (BETAS, adopt, adopt),
    "ademamix": (BETAS, ademamix, ademamix),
    "lion": ({"b1": 0.8, "b2": 0.9}, lion, lion),
    "sgd": ({"momentum": 0.7}, sgd, sgd),
    "sgd, nesterov": ({"momentum": 0.7, "nesterov": True}, nesterov, nesterov),
    "sgd, plain": ({"momentum": 0.0}, plain_sgd, plain_sgd),
    "adafactor": ({}, adafactor, adafactor),
    "muon": (BETAS, muon, adam),
}


def config_of(case: str, **more) -> OptimizerConfig:
    settings = CASES[case][0] | {"learning_rate": LR, "weight_decay": DECAY} | more
    return OptimizerConfig(name=case.partition(",")[0], **settings)


def schedule(step):
    return jnp.asarray(RATES, jnp.float32)[step]


def draw(seed: int):
    numbers = np.random.default_rng(seed)
    return jax.tree.map(lambda s: numbers.standard_normal(s.shape, dtype=np.float32), SPEC)


def name_of(path) -> str:
    return path[-1].key


def updated(case: str, gradients: list, **more):
    """Parameters, and the optimizer's state, after each gradient."""
    tx = make_optimizer(config_of(case, **more), schedule, SPEC, steps=STEPS)
    params = jax.tree.map(jnp.asarray, draw(99))
    state, seen = tx.init(params), []

    @jax.jit
    def step(grads, state, params):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for grads in gradients:
        params, state = step(grads, state, params)
        seen.append(jax.device_get((params, state)))
    return seen


def written_out(case: str, gradients: list):
    """The same by the formula of each matrix or vector."""
    _, matrices, others = CASES[case]

    def leaf(path, w, *grads):
        name = name_of(path)
        batch, shape = ENTRIES[name]
        rule = matrices if name in HIDDEN else others
        entries = w.astype(np.float64).reshape(-1, *shape)
        memories = [{} for _ in entries]
        for t, (g, rate) in enumerate(zip(grads, RATES, strict=True), start=1):
            g = g.astype(np.float64).reshape(-1, *shape)
            for i, memory in enumerate(memories):
                direction = rule(g[i], memory, t) + DECAY * (name in DECAYED) * entries[i]
                entries[i] = entries[i] - rate * direction
        assert len(entries) == int(np.prod(batch))
        return entries.reshape(w.shape)

    return jax.tree_util.tree_map_with_path(leaf, draw(99), *gradients)


@pytest.mark.parametrize("case", CASES)
def test_three_updates_are_those_of_the_written_out_algorithm(case):
    gradients = [draw(seed) for seed in range(3)]
    params, _ = updated(case, gradients)[-1]
    ours, truth = (jax.tree.map(np.subtract, found, draw(99)) for found in (params, written_out(case, gradients)))
    assert relative_error(ours, truth) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_an_update_left_out_leaves_every_bit_of_an_optimizers_state(case):
    """As the step does it: `guarded` chooses between the state before and the one that a gradient of NaN made."""
    bad = jax.tree.map(lambda a: a * np.float32(np.nan), draw(1))
    more = {} if case in ("adafactor", "ademamix", "sgd, plain") else {"state": "int8"}
    for settings in ({}, more):
        good, poisoned = updated(case, [draw(0), bad], **settings)
        nan, guard = jnp.float32(jnp.nan), GuardConfig()
        kept, _, _ = guarded(new_guard(guard), guard, loss=nan, norm=nan, before=good, after=poisoned)
        assert_bit_equal(jax.device_get(kept), good)


def test_muons_matrices_come_out_orthogonal_up_to_the_iterations_slack():
    """The directions of updates without decay have singular values of 0.2 sqrt(max(m, n)) times 0.7 to 1.2."""
    gradient = draw(0)
    (params, _), *_ = updated("muon", [gradient], weight_decay=0.0)
    up = (draw(99)["layers"][0][0]["up"] - params["layers"][0][0]["up"]) / LR
    values = np.linalg.svd(up, compute_uv=False) / (0.2 * np.sqrt(8))
    assert values.shape == (3, 4, 6)
    assert 0.6 < values.min() <= values.max() < 1.3


def test_adafactor_keeps_a_row_and_a_column_of_a_matrix():
    _, (core, *_) = updated("adafactor", [draw(0)])[-1]
    shapes = jax.tree.map(np.shape, core.nu["layers"][0][0], is_leaf=lambda a: isinstance(a, np.ndarray))
    assert (shapes["q"].rows, shapes["q"].columns) == ((3, 8, 1, 1), (3, 1, 2, 5))
    assert (shapes["o"].rows, shapes["o"].columns) == ((3, 2, 5, 1), (3, 1, 1, 8))
    assert (shapes["up"].rows, shapes["up"].columns) == ((3, 4, 8, 1), (3, 4, 1, 6))
    assert shapes["q_b"] == (3, 2, 5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "adafactor", "b1": 0.5}, "adafactor does not read b1 (here 0.5); it is for adamw, ademamix, adopt"),
        ({"name": "lion", "eps": 1e-6}, "lion does not read eps (here 1e-06); it is for adamw, ademamix, adopt, mu"),
        ({"name": "adamw", "momentum": 0.5}, "adamw does not read momentum (here 0.5); it is for sgd, muon"),
        ({"name": "lion", "nesterov": False}, "lion does not read nesterov (here False); it is for sgd, muon"),
        ({"name": "adafactor", "state": "int8"}, "adafactor does not read state (here int8); it is for adamw, adopt"),
        ({"name": "ademamix", "state": "int8"}, "ademamix does not read state (here int8); it is for adamw, adopt"),
        ({"name": "sgd", "momentum": 0.0, "state": "int8"}, "state=int8 needs moments, which sgd without momentum has"),
    ],
)
def test_a_key_that_the_optimizer_does_not_read_is_refused(settings, message):
    with pytest.raises(ValidationError) as caught:
        OptimizerConfig(**settings)
    assert message in str(caught.value)


def test_every_default_written_out_is_accepted_for_every_optimizer():
    for case in CASES:
        config = config_of(case)
        assert OptimizerConfig(**config.model_dump()) == config


def test_every_optimizer_is_described_and_says_which_keys_it_reads():
    field = OptimizerConfig.model_fields["name"]
    names = get_args(field.annotation)
    assert set(names) == set(OPTIMIZER_READS)
    assert all(name in field.description.lower() for name in names)


def test_adamw_keeps_the_state_that_optax_keeps_so_that_checkpoints_stay_readable():
    theirs = optax.adamw(schedule, mask=decay_mask(SPEC))
    ours = make_optimizer(config_of("adamw"), schedule, SPEC)
    params = draw(0)
    assert jax.tree.structure(ours.init(params)) == jax.tree.structure(theirs.init(params))
