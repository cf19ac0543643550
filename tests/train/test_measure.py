"""What a measuring step reports, against formulas written out over plain forward passes, and on meshes."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LLAMA, packed_batch, random_params

from jaxformers.data.pipeline import to_global
from jaxformers.families import read_config
from jaxformers.models.attention import dot_product
from jaxformers.models.decoder import block, embed, make_context
from jaxformers.models.layout import unstack
from jaxformers.models.observe import max_logits
from jaxformers.models.runtime import Runtime
from jaxformers.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from jaxformers.train.build import Trainer
from jaxformers.train.config import LossConfig, MonitorConfig, RuntimeConfig, TrainConfig
from jaxformers.train.losses import Totals, lm_loss, token_sums
from jaxformers.train.measure import module_norms
from jaxformers.train.optimizer_config import OptimizerConfig, ScheduleConfig
from jaxformers.train.state import state_shardings

SMALL = LLAMA | {"vocab_size": 64, "num_attention_heads": 8, "head_dim": 8}
# Two kinds of layers in turn, windows, soft caps, norms behind both halves.
WINDOWS = read_config(
    SMALL
    | {"model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": 5, "query_pre_attn_scalar": 8}
    | {"tie_word_embeddings": True}
)
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SPARSE = read_config(SMALL | {"model_type": "mixtral", "num_hidden_layers": 4} | EXPERTS)
LENGTH, ROWS = 32, 16
SOURCES = ("web", "code", "unread")
ALL = ("norms", "activations", "attention_logits", "experts", "sources")
LOSS = LossConfig(chunk=8)
COMPILED_FAST = {"xla_backend_optimization_level": "0"}


def batch_of_sources():
    rows = np.arange(ROWS) % 3 == 0
    ones = np.stack([~rows, rows, np.zeros(ROWS)], axis=1).astype(np.float32)
    return packed_batch(ROWS, LENGTH) | {"sources": ones}


def trainer_on(cfg, axes=None, *, values=ALL, accumulation=1, **runtime):
    axes = {"fsdp": 1} | (axes or {})
    return Trainer(
        cfg,
        make_mesh(MeshConfig(**axes), devices=jax.devices()[: int(np.prod(list(axes.values())))]),
        LENGTH,
        train=TrainConfig(steps=10, batch_size=ROWS, accumulation=accumulation),
        runtime=RuntimeConfig(**{"layers": "scan"} | runtime),
        optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-2, clip_norm=0.5),
        schedule=ScheduleConfig(warmup_steps=2),
        loss=LOSS,
        monitor=MonitorConfig(values=values, every=1),
        sources=SOURCES,
    )


def measured(trainer):
    """The metrics of a first step by name, and the plain parameters behind it."""
    trainer.check()
    with jax.set_mesh(trainer.mesh), jax.default_matmul_precision("highest"):
        state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), trainer.plain_state)
        # Its third step, which is no longer at a rate of zero.
        state = state.replace(params=random_params(trainer.cfg), step=np.int32(2))
        state = trainer.from_plain(jax.device_put(state, state_shardings(trainer.plain_state)))
        spec = batch_sharding((ROWS, LENGTH), trainer.mesh).spec
        batch = to_global(batch_of_sources(), trainer.mesh, spec, columns=trainer.column_order)
        lowered = trainer.program.measured_step.lower(state, batch)
        state, metrics = lowered.compile(compiler_options=COMPILED_FAST)(state, batch)
        return trainer.program.name(jax.device_get(metrics)), jax.device_get(trainer.to_plain(state).params)


@functools.cache
def on_one_device(cfg):
    values = ALL if cfg.moe is not None else tuple(value for value in ALL if value != "experts")
    return measured(trainer_on(cfg, values=values, layers="unroll" if cfg is WINDOWS else "scan"))


def assert_close(found, truth, rtol=1e-5):
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=1e-7, err_msg=name)


def named(prefix, metrics):
    return {name.removeprefix(f"{prefix}/"): value for name, value in metrics.items() if name.startswith(f"{prefix}/")}


def norms_of(plain, cfg):
    """By name: a layer's modules, and what is outside of layers."""
    blocks = jax.tree.map(np.asarray, unstack(plain, cfg))
    modules = {name: leaf for name, leaf in blocks.items() if name != "blocks"}
    for i, layer in enumerate(blocks["blocks"]):
        modules |= {f"layers.{i}.{name}": leaf for name, leaf in layer.items()}
    squares = {
        name: [(np.asarray(a, np.float64) ** 2).sum() for a in jax.tree.leaves(leaf)] for name, leaf in modules.items()
    }
    return {name: np.sqrt(sum(found)) for name, found in squares.items()}


# -- norms


@pytest.mark.parametrize("cfg", [WINDOWS, SPARSE], ids=["patterns", "experts"])
def test_norms_by_module_are_those_of_the_plain_gradient_of_the_parameters_and_of_what_an_update_changed(cfg):
    metrics, after = on_one_device(cfg)
    params, batch = random_params(cfg), packed_batch(ROWS, LENGTH)
    loss = jax.jit(
        jax.grad(lambda p: lm_loss(p, batch, Totals.of(batch), cfg, Runtime(), LOSS)[0]), compiler_options=COMPILED_FAST
    )
    with jax.default_matmul_precision("highest"):
        gradient = jax.device_get(loss(jax.tree.map(jnp.asarray, params)))
    assert_close(named("grad_norm", metrics), norms_of(gradient, cfg))
    assert_close(named("param_norm", metrics), norms_of(params, cfg), rtol=1e-6)
    changed = jax.tree.map(lambda a, b: a.astype(np.float64) - b, after, params)
    assert_close(named("update_norm", metrics), norms_of(changed, cfg), rtol=2e-5)  # after - before is rounded
    whole = np.sqrt(sum(value**2 for value in named("grad_norm", metrics).values()))
    assert metrics["grad_norm"] == pytest.approx(whole, rel=1e-6)


def test_norms_are_the_same_in_both_layouts_of_the_parameters():
    params = jax.tree.map(jnp.asarray, random_params(WINDOWS))
    stacked, unrolled = module_norms(params, WINDOWS), module_norms(unstack(params, WINDOWS), WINDOWS)
    assert stacked["layers.*.attn"].shape == (4,)
    assert_close(jax.device_get(stacked), jax.device_get(unrolled), rtol=1e-6)


# -- the inside of layers


@functools.cache
def plain_pass(cfg):
    """Of each layer, over tokens that are not padding: the activations [tokens, D] at the three places, and the largest
    logit of each head, from products of the queries and keys that attention is given, written out."""
    params, batch = unstack(jax.tree.map(jnp.asarray, random_params(cfg)), cfg), packed_batch(ROWS, LENGTH)
    logits = []

    def attend(q, k, v, visible, scores, **more):
        asked, keys = np.asarray(q, np.float64), np.asarray(k, np.float64)
        keys = np.repeat(keys, q.shape[2] // k.shape[2], axis=2)
        products = scores.scale * np.einsum("bthn,bshn->bhts", asked, keys)
        at, segment = batch["positions"], batch["segment_ids"]
        far = at[:, :, None] - at[:, None, :]
        seen = (far >= 0) & (segment[:, :, None] == segment[:, None, :]) & (segment[:, :, None] > 0)
        if scores.window is not None:
            seen &= far < scores.window
        logits.append(np.where(seen[:, None], products, -np.inf).max(axis=(0, 2, 3)))
        return dot_product(q, k, v, visible, scores, **more)

    runtime, valid, layers = Runtime(attend=attend), batch["segment_ids"] > 0, []
    with jax.default_matmul_precision("highest"):
        ctx = make_context(cfg, runtime, jnp.asarray(batch["positions"]), jnp.asarray(batch["segment_ids"]))
        x = embed(params, cfg, batch["tokens"], batch["positions"], runtime)
        for kind, p in zip(cfg.layers, params["blocks"], strict=True):
            silent = p | {"ffn": p["ffn"] | {"down": jnp.zeros_like(p["ffn"]["down"])}}
            half, _, _ = block(silent, x, ctx, cfg, kind, None)
            logits.pop()
            y, _, _ = block(p, x, ctx, cfg, kind, None)
            layers.append([np.asarray(a, np.float64)[valid] for a in (y, half - x, y - half)])
            x = y
    return layers, logits


@pytest.mark.parametrize("cfg", [WINDOWS, SPARSE], ids=["patterns", "experts"])
def test_activations_are_those_of_a_plain_pass(cfg):
    metrics, _ = on_one_device(cfg)
    layers, _ = plain_pass(cfg)
    places = [
        (f"layers.{i}.{place}", x)
        for i, found in enumerate(layers)
        for place, x in zip(("stream", "attn", "ffn"), found, strict=True)
    ]
    assert_close(named("activation_rms", metrics), {name: np.sqrt((x**2).mean()) for name, x in places})
    assert_close(named("activation_max", metrics), {name: np.abs(x).max() for name, x in places})


@pytest.mark.parametrize("cfg", [WINDOWS, SPARSE], ids=["patterns", "experts"])
def test_the_largest_logit_of_each_head_is_that_of_a_plain_pass(cfg):
    metrics, _ = on_one_device(cfg)
    _, logits = plain_pass(cfg)
    assert_close(named("max_attention_logit", metrics), {f"layers.{i}": found for i, found in enumerate(logits)})


def test_the_largest_logit_is_the_same_a_few_queries_at_a_time(monkeypatch):
    from jaxformers.models.attention import Scores
    from jaxformers.models.masks import Visibility

    draw, batch = np.random.default_rng(0), packed_batch(3, LENGTH)
    q, k = (draw.standard_normal((3, LENGTH, heads, 4), np.float32) for heads in (4, 2))
    where = [jnp.asarray(batch[name]) for name in ("positions", "positions", "segment_ids", "segment_ids")]
    visible, scores = Visibility(*where), Scores(0.5, window=7)
    whole = max_logits(jnp.asarray(q), jnp.asarray(k), visible, scores)
    monkeypatch.setattr("jaxformers.models.observe._QUERIES_AT_ONCE", 5)
    np.testing.assert_allclose(max_logits(jnp.asarray(q), jnp.asarray(k), visible, scores), whole, rtol=1e-6)


def test_each_experts_load_is_relative_to_an_even_one():
    metrics, _ = on_one_device(SPARSE)
    load = named("expert_load", metrics)
    assert list(load) == [f"layers.{i}" for i in range(4)]
    for found in load.values():
        assert np.mean(found) == pytest.approx(1)
        visits = np.array(found) / 4 * 2 * (packed_batch(ROWS, LENGTH)["segment_ids"] > 0).sum()
        np.testing.assert_allclose(visits, np.round(visits), atol=1e-2)
    assert max(max(found) for found in load.values()) == pytest.approx(metrics["expert_load_max"])


# -- loss by source


def test_the_loss_of_each_source_is_that_of_its_rows_and_one_without_targets_has_none():
    metrics, _ = on_one_device(SPARSE)
    batch = batch_of_sources()
    of_source = {}
    for k, name in enumerate(SOURCES[:2]):
        rows = {key: a[batch["sources"][:, k] > 0] for key, a in batch.items() if key != "sources"}
        with jax.default_matmul_precision("highest"):
            _, sums = lm_loss(random_params(SPARSE), rows, Totals.of(rows), SPARSE, Runtime(), LOSS)
        of_source[name] = float(sums.nll / sums.weight)
    assert_close(named("loss", metrics), of_source)
    assert abs(of_source["web"] - of_source["code"]) > 1e-3


def test_sums_by_source_add_up_to_the_sums():
    batch, draw = batch_of_sources(), np.random.default_rng(0)
    logits = draw.standard_normal((ROWS, LENGTH, 64)).astype(np.float32)
    sums = token_sums(logits, batch["targets"], batch["weights"], sources=jnp.asarray(batch["sources"]))
    assert float(sums.source_nll.sum()) == pytest.approx(float(sums.nll), rel=1e-6)
    assert float(sums.source_weight.sum()) == float(sums.weight)
    assert float(sums.source_weight[2]) == 0


# -- on meshes, in microbatches, recomputed


def assert_as_on_one_device(found, cfg, values=ALL):
    truth, _ = on_one_device(cfg)
    dropped = set(ALL) - set(values)
    hidden = {"activations": ("activation_",), "attention_logits": ("max_attention",)}
    truth = {n: v for n, v in truth.items() if not any(n.startswith(h) for d in dropped for h in hidden.get(d, ()))}
    assert_close(found, truth)


def test_fsdp_and_tp_and_microbatches_measure_what_one_device_does():
    found, _ = measured(trainer_on(SPARSE, {"fsdp": 2, "tp": 2}, accumulation=2, remat="full"))
    assert_as_on_one_device(found, SPARSE)


@pytest.mark.slow
def test_a_context_axis_measures_what_one_device_does():
    values = tuple(value for value in ALL if value != "experts")
    found, _ = measured(trainer_on(WINDOWS, {"cp": 2, "tp": 2}, values=values))
    assert_as_on_one_device(found, WINDOWS)


def test_a_pipeline_whose_stages_hold_layers_in_another_order_measures_what_one_device_does():
    values = ("norms", "experts", "sources")
    trainer = trainer_on(SPARSE, {"pp": 2}, values=values, pipeline="interleaved", microbatches=2)
    found, _ = measured(trainer)
    assert_as_on_one_device(found, SPARSE, values)


@pytest.mark.slow
def test_a_pipeline_that_goes_both_ways_measures_what_one_device_does():
    values = ("norms", "experts", "sources")
    found, _ = measured(trainer_on(SPARSE, {"pp": 2}, values=values, pipeline="1f1b", microbatches=2))
    assert_as_on_one_device(found, SPARSE, values)


# -- what is not measured, and what cannot be


def test_a_run_that_measures_nothing_has_one_step_and_no_such_metrics():
    program = trainer_on(WINDOWS, values=("sources",)).program
    assert program.measured_step is None
    assert program.step_at(10) is program.step


def test_the_measuring_step_takes_every_nth_steps_place():
    trainer = trainer_on(WINDOWS, values=("norms",))
    program = replace(trainer, monitor=MonitorConfig(values=("norms",), every=3)).program
    assert [program.step_at(step) is program.measured_step for step in range(1, 7)] == [False, False, True] * 2


@pytest.mark.parametrize(
    "cfg, axes, settings, refusal",
    [
        (
            SPARSE,
            {"pp": 2},
            {"values": ("activations",)},
            "monitor.values has activations, which layers in a pipeline do not show (mesh.pp=2); leave them out",
        ),
        (WINDOWS, {}, {"values": ("experts",)}, "monitor.values has experts, but gemma2 has none"),
    ],
)
def test_values_that_a_model_or_mesh_does_not_have_are_refused(cfg, axes, settings, refusal):
    with pytest.raises(ValueError) as found:
        trainer_on(cfg, axes, **settings).check()
    assert str(found.value) == refusal


def test_measuring_between_lines_of_metrics_is_refused():
    trainer = trainer_on(WINDOWS, values=("norms",))
    train, monitor = TrainConfig(steps=10, batch_size=ROWS, log_every=4), MonitorConfig(values=("norms",), every=6)
    with pytest.raises(ValueError) as found:
        replace(trainer, train=train, monitor=monitor).check()
    assert str(found.value) == (
        "monitor.every is 6, but only every 4 steps there is a line of metrics (train.log_every); "
        "nearest legal: 4 and 8"
    )
