"""Training runs on any mesh, and the same run on one device to compare with: loss, gradient norm and updated parameters
over five steps, in float32.

Adam divides a gradient by the root of its own square, so where a gradient is nearly zero, as those of weights that
cancel, its rounding error alone decides the sign of a whole update and grows from step to step: that is the
optimizer's, not the mesh's. An eps well above such gradients (and below the others) keeps updates proportional to
gradients there, so that 1e-5 measures what the mesh computes. Matmuls are in full float32 for the same reason.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from tiny import LLAMA, packed_batch, random_params, relative_error

from jaxformers.families import read_config
from jaxformers.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from jaxformers.train.build import Trainer
from jaxformers.train.config import LossConfig, RuntimeConfig, TrainConfig
from jaxformers.train.optimizer_config import OptimizerConfig, ScheduleConfig
from jaxformers.train.state import state_shardings

TOLERANCE = 1e-5
STEPS, ROWS, LENGTH = 5, 32, 32
DENSE = LLAMA | {"vocab_size": 64, "num_attention_heads": 8, "head_dim": 8}
DEEP = DENSE | {"num_hidden_layers": 8, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOWS, SINKS = "windows, soft caps, tied", "sinks and windows"
MODELS = {
    "dense": DENSE,
    "moe": DENSE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "mla": DENSE
    | {
        "model_type": "deepseek_v3",
        "head_dim": 4,  # of the rotated part
        "num_key_value_heads": 8,
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
    },
    WINDOWS: DENSE
    | {"model_type": "gemma2", "sliding_window": 5, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    SINKS: DENSE
    | {
        "model_type": "gpt_oss",
        "sliding_window": 5,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    # Neither the vocabulary, nor heads, nor widths are a multiple of any mesh here.
    "odd": DENSE
    | {
        "model_type": "qwen2",
        "vocab_size": 67,
        "hidden_size": 30,
        "intermediate_size": 45,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "degenerate": DENSE
    | {"model_type": "mixtral", "num_local_experts": 1, "num_experts_per_tok": 1, "sliding_window": 1},
    # Eight layers or more, for stages.
    "deep": DEEP,
    "deep moe": DEEP | {"model_type": "mixtral"} | EXPERTS,
    "deep, tied": DEEP | {"model_type": "qwen2", "tie_word_embeddings": True},
    # A stack of four pairs, global ones at every second layer, then a stack of one.
    "deep, mixed stacks": DEEP
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 9,
        "hidden_size": 32,  # narrower, rounding grows to 1e-5 of the gradient norm in five steps
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 8,
    },
    # A dense layer before the sparse ones that are pipelined.
    "deep mla, dense first": DEEP
    | {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 5,
        "hidden_size": 32,  # narrower, one bit of a weight already moves the gradient norm by 2e-5
        "head_dim": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
    },
}
MODELS["mla, whole queries"] = MODELS["mla"] | {"q_lora_rank": None}
MODELS["mtp"] = MODELS["mla"] | {"num_nextn_predict_layers": 2}
MODELS["deep mtp"] = MODELS["deep mla, dense first"] | {"num_nextn_predict_layers": 1}


@dataclass(frozen=True)
class Run:
    """Objective, cross-entropy and gradient norm [steps, 3] of a run, and its plain parameters at the end."""

    metrics: np.ndarray
    params: Any


class Case:
    """A run: model and mesh sizes, and how it computes; runtime are settings of the `runtime` section."""

    def __init__(
        self,
        model: str,
        mesh: dict[str, int],
        *,
        accumulation: int = 1,
        chunk: int | str = "none",
        loss: tuple[tuple[str, Any], ...] = (),
        packed: bool = True,
        **runtime: Any,
    ):
        self.model, self.mesh, self.accumulation, self.chunk = model, mesh, accumulation, chunk
        self.loss, self.packed, self.runtime = loss, packed, runtime

    def __str__(self) -> str:
        axes = " x ".join(f"{axis}{size}" for axis, size in self.mesh.items() if size > 1) or "one device"
        settings = {"accumulation": self.accumulation, "chunk": self.chunk, **self.runtime, **dict(self.loss)}
        settings |= {} if self.packed else {"packed": False}
        return f"{self.model} on {axes}, {', '.join(f'{name} {value}' for name, value in settings.items())}"

    __repr__ = __str__

    def __hash__(self) -> int:
        return hash(str(self))

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other)


def batches(*, packed: bool = True) -> list[dict[str, np.ndarray]]:
    """One for each step; rows that are not packed are one whole document each."""
    found = [packed_batch(ROWS, LENGTH, seed=seed) for seed in range(STEPS)]
    if packed:
        return found
    ones = np.ones((ROWS, LENGTH))
    whole = {"weights": ones.astype(np.float32), "segment_ids": ones.astype(np.int32)}
    whole["positions"] = whole["segment_ids"].cumsum(axis=1, dtype=np.int32) - 1
    return [batch | whole for batch in found]


def trainer_of(case: Case) -> Trainer:
    config = MeshConfig(**{"fsdp": 1} | case.mesh)
    count = int(np.prod(list(case.mesh.values()), dtype=int))
    return Trainer(
        read_config(MODELS[case.model]),
        make_mesh(config, devices=jax.devices()[:count]),
        LENGTH,
        train=TrainConfig(steps=10, batch_size=ROWS, accumulation=case.accumulation),
        runtime=RuntimeConfig(**{"layers": "scan"} | case.runtime),
        optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-2, clip_norm=0.5),
        schedule=ScheduleConfig(warmup_steps=2),
        loss=LossConfig(chunk=case.chunk, z_loss=1e-3, balance_loss=0.01, router_z_loss=1e-3, **dict(case.loss)),
    )


def placed_state(trainer: Trainer) -> Any:
    """The same start on every mesh."""
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), trainer.plain_state)
    state = state.replace(params=random_params(trainer.cfg))
    return trainer.from_plain(jax.device_put(state, state_shardings(trainer.plain_state)))


def place(batch: dict[str, np.ndarray], trainer: Trainer) -> dict[str, jax.Array]:
    if trainer.column_order is not None:
        batch = {name: a[:, trainer.column_order] for name, a in batch.items()}
    return {name: jax.device_put(a, batch_sharding(a.shape, trainer.mesh)) for name, a in batch.items()}


def compiled_step(trainer: Trainer, state: Any, batch: Any) -> Any:
    """The step, compiled without LLVM's optimisations, which take most of the time and change no partitioning."""
    return trainer.program.step.lower(state, batch).compile(compiler_options={"xla_backend_optimization_level": "0"})


def compiled(case: Case) -> Any:
    trainer = trainer_of(case)
    with jax.set_mesh(trainer.mesh):
        return compiled_step(trainer, placed_state(trainer), place(batches()[0], trainer))


def train(case: Case) -> Run:
    trainer = trainer_of(case)
    with jax.set_mesh(trainer.mesh), jax.default_matmul_precision("highest"):
        state = placed_state(trainer)
        placed = [place(batch, trainer) for batch in batches(packed=case.packed)]
        step, metrics = compiled_step(trainer, state, placed[0]), []
        for batch in placed:
            state, found = step(state, batch)
            metrics.append([float(found[name]) for name in ("objective", "loss", "grad_norm")])
        return Run(np.array(metrics), jax.device_get(trainer.to_plain(state).params))


@functools.cache
def one_device(model: str, loss: tuple[tuple[str, Any], ...] = (), accumulation: int = 1, packed: bool = True) -> Run:
    return train(Case(model, {}, accumulation=accumulation, loss=loss, packed=packed))


def assert_equal_to_one_device(case: Case) -> None:
    over_microbatches = ("balance_over", "batch") in case.loss  # the one loss that accumulation changes
    found = train(case)
    truth = one_device(case.model, case.loss, case.accumulation if over_microbatches else 1, case.packed)
    assert np.isfinite(truth.metrics).all()
    assert np.ptp(truth.metrics[:, -1]) > 0, "the run goes somewhere"
    np.testing.assert_allclose(found.metrics, truth.metrics, rtol=TOLERANCE)
    assert relative_error(found.params, truth.params) < TOLERANCE
