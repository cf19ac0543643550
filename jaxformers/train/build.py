"""From settings to the compiled functions of a run: states in, programs out.

While it runs, a state's parameters may lie one buffer a layer (`models.layout.unstack`), which is what a step runs
fastest from on CPU; whatever leaves a run (checkpoints, exports, users' models) is the plain tree again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from jaxformers.models.adapters import (
    Adapter,
    adapted_spec,
    add_adapter,
    base_spec,
    combine,
    keep_weight,
    partition,
    trainable,
    with_keys,
)
from jaxformers.models.config import ModelConfig
from jaxformers.models.layout import stack, unstack, unstack_spec
from jaxformers.models.params import Params, ParamSpec, flops_per_token, init_params, model_spec, path_name
from jaxformers.models.quantized import Quantized
from jaxformers.models.runtime import HOST_MEMORY, Runtime
from jaxformers.models.weights import LoRA
from jaxformers.parallel.context import column_order, make_attend
from jaxformers.parallel.distributed import together
from jaxformers.parallel.hardware import peak_flops
from jaxformers.parallel.mesh import (
    SPLIT_REPLICAS,
    batch_shards,
    param_shardings,
    replicated,
)
from jaxformers.parallel.pipeline import Pipeline, plan_pipeline
from jaxformers.train.average import averaged
from jaxformers.train.balance import shift_expert_biases
from jaxformers.train.checks import check_rows, check_settings
from jaxformers.train.columns import look_ahead, number_tokens
from jaxformers.train.config import GuardConfig, LossConfig, MonitorConfig, RuntimeConfig, TrainConfig
from jaxformers.train.losses import Batch, chunk_length, eval_sums, lm_loss
from jaxformers.train.measure import make_measure, name_metrics
from jaxformers.train.optim import make_optimizer, scale_updates, scaled
from jaxformers.train.optimizer_config import OptimizerConfig, ScheduleConfig
from jaxformers.train.qk_clip import qk_clip
from jaxformers.train.reporting import Program
from jaxformers.train.runtimes import make_runtime
from jaxformers.train.schedules import make_schedule
from jaxformers.train.state import TrainState, abstract_state, map_params, new_state, state_shardings
from jaxformers.train.step import make_train_step

# Random numbers of many shapes are much code for one run: compiling it well takes longer than running it.
RUN_ONCE = {"xla_backend_optimization_level": 1}


@dataclass(frozen=True)
class Trainer:
    """One model's training on one mesh: rows of `sequence_length` tokens, settings as the config file names them.

    adapter: what is trained in place of the model's own weights, the learning rate of its second matrices being
    b_rate_ratio times the others' (LoRA+, arXiv:2402.12354). frozen: which entries (bool [layers, experts], as far as a
    weight has them) of weights are not trained, by path name.
    """

    cfg: ModelConfig
    mesh: Mesh
    sequence_length: int
    train: TrainConfig = TrainConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    guard: GuardConfig = GuardConfig()
    adapter: Adapter | None = None
    b_rate_ratio: float = 1.0
    frozen: Mapping[str, np.ndarray] = field(default_factory=dict)
    monitor: MonitorConfig = MonitorConfig()
    sources: tuple[str, ...] = ()  # of the mixture, where batches say which rows are whose

    def check(self) -> None:
        """ValueError for settings that do not fit each other, before anything is compiled."""
        check_rows(self)
        _ = self.learning_rate, self._runtime, self.tx
        check_settings(self)

    @cached_property
    def learning_rate(self) -> optax.Schedule:
        """The rate of each step. ValueError for a schedule that does not fit the run."""
        return make_schedule(self.schedule, peak=self.optimizer.learning_rate, steps=self.train.steps)

    @cached_property
    def tx(self) -> optax.GradientTransformation:
        tx = self._optimizer(self._spec, slots=self._slots)
        factors = self._factors
        return tx if factors is None else optax.chain(tx, scale_updates(self._inward(factors)))

    def _optimizer(self, spec: Params, *, slots: np.ndarray | None = None) -> optax.GradientTransformation:
        steps = self.train.steps
        return make_optimizer(self.optimizer, self.learning_rate, spec, cfg=self.cfg, steps=steps, slots=slots)

    @property
    def _factors(self) -> Params | None:
        """What updates are multiplied by, as the plain tree of the trained parameters; None: by nothing."""
        if self.adapter is None:
            return self._moving
        if self.b_rate_ratio == 1.0:
            return None

        def ratio(path: Any, spec: ParamSpec) -> np.ndarray:
            is_second = path[-1] == jax.tree_util.GetAttrKey("b")
            return np.full(spec.shape[: spec.num_batch], self.b_rate_ratio if is_second else 1.0, np.float32)

        return jax.tree_util.tree_map_with_path(ratio, self._plain[0])

    @cached_property
    def _moving(self) -> Params | None:
        """1 for every entry of the trained parameters that is, 0 for one that is frozen beside others of its leaf, as
        their plain tree; None where there is no such leaf."""
        if self.adapter is not None or all(held.all() for held in self.frozen.values()):
            return None

        def moving(path: Any, spec: ParamSpec) -> np.ndarray:
            held = self.frozen.get(path_name(path), np.zeros(spec.shape[: spec.num_batch], bool))
            return np.where(held, 0.0, 1.0).astype(np.float32)

        return jax.tree_util.tree_map_with_path(moving, self._plain[0])

    @cached_property
    def _runtime(self) -> Runtime:
        kinds = self.runtime.attention, self.runtime.context
        attend = make_attend(*kinds, self.cfg, self.mesh, length=self.sequence_length)
        runtime = make_runtime(self.runtime, self.cfg, self.mesh, pipeline=self.pipeline)
        return replace(runtime, attend=attend)

    @cached_property
    def pipeline(self) -> Pipeline | None:
        """How layers are cut into stages. ValueError for a cut that does not fit the model, the mesh or the batch."""
        plans = [
            plan_pipeline(
                self.cfg,
                self.mesh,
                rows=size // self.train.accumulation // batch_shards(self.mesh.shape),
                schedule=self.runtime.pipeline,
                microbatches=self.runtime.microbatches,
                virtual_stages=self.runtime.virtual_stages,
                stages=self.runtime.stages,
            )
            for size in self.train.batch_sizes.values()
        ]
        return plans[0]  # rows only decide whether there is one

    @cached_property
    def _plain_spec(self) -> Params:
        """Of all parameters, as the plain tree."""
        return model_spec(self.cfg) if self.adapter is None else adapted_spec(self.cfg, self.adapter)

    @cached_property
    def _mask(self) -> Params:
        """Which parameters are trained, as the plain tree."""
        if self.adapter is not None:
            return trainable(self._plain_spec, self.adapter.biases)
        whole = {name for name, held in self.frozen.items() if held.all()}
        return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path) not in whole, self._plain_spec)

    @property
    def splits(self) -> bool:
        """Whether some parameters are not trained."""
        return self.adapter is not None or bool(self.frozen)

    @cached_property
    def _plain(self) -> tuple[Params, Params | None]:
        """The specs of the trained parameters and of the others."""
        return self._cut(self._plain_spec)

    def _cut(self, tree: Params) -> tuple[Params, Params | None]:
        """A plain tree's trained part and the rest."""
        return partition(tree, self._mask) if self.splits else (tree, None)

    @property
    def _spec(self) -> Params:
        return self._specs[0]

    @cached_property
    def _specs(self) -> tuple[Params, Params | None]:
        """The specs of the trained parameters and of the others, as they are laid out in the run."""
        return self._inward_spec(self._plain[0]), None if self._plain[1] is None else self._inward_spec(self._plain[1])

    def _inward_spec(self, spec: Params) -> Params:
        if self._arranged is not None:
            return self._arranged.spec(self.cfg, spec)
        return unstack_spec(spec, self.cfg) if self._unrolled else spec

    @property
    def _is_plain(self) -> bool:
        """Whether the state runs in the form that checkpoints hold."""
        return not self._unrolled and self._arranged is None

    @property
    def _arranged(self) -> Pipeline | None:
        """The pipeline, if its stages want layers in another order than the plain tree's."""
        return None if self.pipeline is None or self.pipeline.is_plain else self.pipeline

    @property
    def _slots(self) -> np.ndarray | None:
        """Which repeats the places of the longest stack hold, where the pipeline has changed their order."""
        return None if self._arranged is None else self._arranged.slots

    @property
    def _unrolled(self) -> bool:
        return self._runtime.layers == "unroll"

    @property
    def _ema(self) -> bool:
        return self.train.averages is not None

    @cached_property
    def plain_state(self) -> TrainState:
        """Shapes and shardings of the state in the form that checkpoints hold: without the base of an adapter, with
        weights that are not trained for another reason."""
        spec, rest = self._plain
        tx = self._optimizer(spec)
        tx = tx if self._factors is None else optax.chain(tx, scale_updates(self._factors))
        if self.adapter is not None or rest is None:
            return self._abstract(spec, tx)
        return self._abstract(spec, tx, rest).completed()

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and shardings of the state as a run holds it."""
        return self._abstract(self._spec, self.tx, self._specs[1])

    @cached_property
    def _places(self) -> TrainState:
        return state_shardings(self.abstract_state)

    def _abstract(self, spec: Params, tx: optax.GradientTransformation, frozen: Params | None = None) -> TrainState:
        memory = HOST_MEMORY if self._offloads_moments else None
        split = self.runtime.zero > 0
        return abstract_state(
            spec,
            tx,
            self.mesh,
            guard=self.guard,
            ema=self._ema,
            split_moments=split,
            moments_memory=memory,
            frozen=frozen,
        )

    @property
    def _offloads_moments(self) -> bool:
        return self.runtime.offload in ("optimizer", "both")

    def _fetch(self, state: TrainState, places: TrainState) -> TrainState:
        """A state that lies in these places with all of it in the memory of devices, where it can be computed on."""
        here = self.mesh.local_devices[0].default_memory().kind

        def fetch(a: jax.Array, place: NamedSharding) -> jax.Array:
            return jax.device_put(a, place.with_memory_kind(here)) if place.memory_kind == HOST_MEMORY else a

        return jax.tree.map(fetch, state, places) if self._offloads_moments else state

    def _place_gradient(self, grads: Params) -> Params:
        """Gradients where the parameters are, or split among replicas; zero for what is frozen."""
        if self._moving is not None:
            grads = jax.tree.map(scaled, grads, self._inward(self._moving))
        if self.runtime.zero < 2:
            return grads
        return jax.lax.with_sharding_constraint(grads, param_shardings(self._spec, self.mesh, SPLIT_REPLICAS))

    @cached_property
    def column_order(self) -> np.ndarray | None:
        """The order in which the tokens of a row go to the devices, int64 [T]; None = as they come."""
        return column_order(self.runtime.context, self.cfg, self.mesh.shape, length=self.sequence_length)

    def init(self, seed: int) -> TrainState:
        """A fresh state with random parameters; every device makes only its own part."""

        def make(key: jax.Array) -> TrainState:
            init_key, run_key = jax.random.split(key)
            return self._begin(init_params(self.cfg, init_key), run_key)

        return jax.jit(make, out_shardings=self._places, compiler_options=RUN_ONCE)(jax.random.key(seed))

    def from_params(self, params: Params, seed: int) -> TrainState:
        """A fresh state around float32 parameters given as the plain tree, which are used up."""

        make = jax.jit(self._begin, out_shardings=self._places, donate_argnums=self._donated)
        return make(params, jax.random.key(seed))

    def _begin(self, params: Params, key: jax.Array) -> TrainState:
        """A fresh state around the plain tree."""
        trained, rest = self._cut(self._with_adapter(params, key))
        frozen = None if rest is None else self._inward(rest)
        return new_state(self._inward(trained), self.tx, key, guard=self.guard, ema=self._ema, frozen=frozen)

    def _with_adapter(self, params: Params, key: jax.Array) -> Params:
        if self.adapter is None:
            return params
        return add_adapter(params, self.cfg, self.adapter, jax.random.fold_in(key, 1))

    @property
    def keep(self) -> Callable[[Any, jax.Array], Any] | None:
        """What turns one float32 parameter, given with its path in the plain tree, into what an adapter's base keeps of
        it, in its place; None where that is itself. `from_params` and `base` take trees of either."""
        if self.adapter is None or self.adapter.base is None:
            return None
        specs = jax.tree.map(base_spec, self._plain_spec, is_leaf=lambda s: isinstance(s, (LoRA, Quantized)))
        at = dict(jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda s: isinstance(s, Quantized))[0])

        def keep(path: Any, w: jax.Array) -> Any:
            spec = at[path]
            if isinstance(spec, ParamSpec) and spec.dtype == w.dtype:
                return w
            return jax.jit(partial(keep_weight, spec=spec), out_shardings=param_shardings(spec, self.mesh))(w)

        return keep

    def base(self, params: Params) -> Params:
        """What a state holds of the model that an adapter is trained on, given as the plain tree, which is used up."""

        def make(params: Params) -> Params:
            frozen = self._cut(self._with_adapter(params, jax.random.key(0)))[1]
            assert frozen is not None
            return self._inward(frozen)

        return jax.jit(make, out_shardings=self._places.frozen, donate_argnums=self._donated)(params)

    def from_plain(self, state: TrainState, base: Params | None = None) -> TrainState:
        """The state to run from, of one in the form that checkpoints hold, which is used up; base: as `base` gives
        it, where there is an adapter."""
        if self.adapter is not None:
            assert base is not None
            return self._inside(state).replace(frozen=base)
        return self._inside(state)

    def _inside(self, state: TrainState) -> TrainState:
        if self._is_plain and not (self.splits and self.adapter is None):
            return state
        before = state_shardings(self.plain_state)

        def inward(state: TrainState) -> TrainState:
            state = self._fetch(state, before)
            if self.splits and self.adapter is None:
                (params, frozen), ema = self._cut(state.params), state.ema
                state = state.replace(params=params, frozen=frozen, ema=None if ema is None else self._cut(ema)[0])
            return map_params(self._inward, state)

        places = self._places if self.adapter is None else self._places.replace(frozen=None)
        return together(jax.jit(inward, out_shardings=places), "compile the way from a checkpoint")(state)

    def to_plain(self, state: TrainState) -> TrainState:
        """The form that checkpoints hold, of a state to run from, which stays."""
        places = self._places
        if self.adapter is not None:
            state, places = state.replace(frozen=None), places.replace(frozen=None)
        if self._is_plain:
            return state.completed()

        def outward(state: TrainState) -> TrainState:
            return map_params(self._outward, self._fetch(state, places)).completed()

        return together(jax.jit(outward, out_shardings=state_shardings(self.plain_state)), "compile the save")(state)

    def whole(self, params: Params, base: Params) -> Params:
        """The plain tree with an adapter: of its parameters in the form that checkpoints hold, and of its base in that
        of a state."""
        if not self._is_plain:
            places = param_shardings(self._plain[1], self.mesh)
            base = jax.jit(self._outward, out_shardings=places)(base)
        return combine(params, base)

    @property
    def _donated(self) -> tuple[int, ...]:
        """Buffers of the plain tree can only be used again where the state keeps its form, and all of its bits."""
        return (0,) if self._is_plain and (self.adapter is None or self.adapter.base is None) else ()

    def _outward(self, params: Params) -> Params:
        return self._arranged.restore(params, self.cfg) if self._arranged else stack(params, self.cfg)

    def _inward(self, params: Params) -> Params:
        if self._arranged is not None:
            return self._arranged.arrange(params, self.cfg)
        return unstack(params, self.cfg) if self._unrolled else params

    @cached_property
    def program(self) -> Program:
        """The compiled step and evaluation, with what the loop needs to know of their cost."""
        rows = max(self.train.batch_sizes.values()) // self.train.accumulation
        peak = peak_flops(self.mesh.devices.flat[0], self.runtime.dtype)
        return Program(
            step=self._compiled_step(rows),
            measured_step=self._compiled_step(rows, measures=True) if self.monitor.measures else None,
            measure_every=self.monitor.every,
            evaluate=together(jax.jit(self._with_settings(eval_sums, rows=rows)), "compile the evaluation"),
            to_plain=self.to_plain,
            name=partial(name_metrics, cfg=self.cfg, sources=self.sources),
            tokens_after=lambda step: self.train.rows_before(step) * self.sequence_length,
            flops_per_token=self._flops_per_token,
            peak_flops=None if peak is None else peak * self.mesh.size,
        )

    def _compiled_step(self, rows: int, *, measures: bool = False) -> Callable[..., Any]:
        """The update, in microbatches of so many rows, compiled when first called. measures: what `monitor` says."""
        observe, measure, limit = frozenset(), None, self.optimizer.qk_clip
        if measures:
            tidy = partial(self._arranged.restore, cfg=self.cfg) if self._arranged else (lambda tree: tree)
            measure, observe = make_measure(self.monitor.values, self.cfg, tidy=tidy), self.monitor.in_layers
        if limit is not None:
            observe |= {"attention_logits"}
        runtime = replace(self._runtime, observe=observe)
        step = make_train_step(
            self._with_settings(lm_loss, rows=rows, runtime=runtime),
            self.tx,
            self.learning_rate,
            guard=self.guard,
            accumulation=self.train.accumulation,
            clip_norm=self.optimizer.clip_norm,
            average=partial(averaged, config=self.train) if self._ema else None,
            balance=self._balance,
            clip_logits=None if limit is None else partial(qk_clip, threshold=limit, cfg=self.cfg),
            place_gradient=self._place_gradient,
            extend=self._extend,
            fetch=partial(self._fetch, places=self._places),
            complete=self._complete,
            measure=measure,
        )
        places = (self._places, replicated(self.mesh))
        return together(jax.jit(step, donate_argnums=0, out_shardings=places), "compile the step")

    @property
    def _flops_per_token(self) -> float:
        """Without the gradient of weights where only their adapter has one."""
        flops = flops_per_token(self.cfg, self.sequence_length, mtp=self.runs_mtp)
        return flops if self.adapter is None else flops * 2 / 3

    @property
    def _drops(self) -> bool:
        """Whether adapters have dropout."""
        return self.adapter is not None and self.adapter.dropout > 0

    def _complete(self, params: Params, state: TrainState) -> Params:
        """The model that the loss sees: all parameters, and a key for each adapter's dropout."""
        if state.frozen is None:
            return params
        whole = combine(params, state.frozen)
        if not self._drops:
            return whole
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        return with_keys(whole, self.cfg, key, slots=self._slots)

    @property
    def runs_mtp(self) -> bool:
        """Whether modules for multi-token prediction are trained."""
        return self.cfg.mtp_modules > 0 and self.loss.mtp_loss > 0

    def _extend(self, batch: Batch) -> Batch:
        """The batch with what adapters with dropout and modules for multi-token prediction need: the tokens' numbers,
        and what comes further on."""
        shard, order = self._runtime.shard, self.column_order
        if self._drops:
            batch = number_tokens(batch, order=order, shard=shard)
        if self.runs_mtp:
            batch = look_ahead(batch, self.cfg.mtp_modules, order=order, shard=shard)
        return batch

    @property
    def _balance(self) -> Callable[[Params, jax.Array], Params] | None:
        rate = self.loss.expert_bias_rate
        return partial(shift_expert_biases, cfg=self.cfg, rate=rate, slots=self._slots) if rate else None

    def _with_settings(
        self, function: Callable[..., Any], *, rows: int, runtime: Runtime | None = None
    ) -> Callable[..., Any]:
        """The function with what this run's settings say, for `rows` at a time."""
        length, vocab = self.sequence_length, self.cfg.vocab_size
        cp = self.mesh.shape["cp"]
        # Every stage computes the head of the same rows.
        devices = self.mesh.size // self.mesh.shape["pp"]
        chunk = chunk_length(self.loss, rows=rows, length=length, vocab_size=vocab, devices=devices, context_shards=cp)
        return partial(function, cfg=self.cfg, runtime=runtime or self._runtime, config=self.loss, chunk=chunk)
