"""Every feature of training in several processes gives what one process with one device gives.

Processes are started once and train one small model after the other, as starting them takes longer than that.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from several import curve_of, metrics_of, tokens_fed, train_all, validation_of
from tiny import LLAMA, random_params, relative_error, run_config, write_corpus

from jaxformers.api import Model, load, save_pretrained
from jaxformers.families import read_config
from jaxformers.parallel.mesh import single_device_mesh

TOLERANCE = 1e-5
ONE = dict.fromkeys(("pp", "dp", "fsdp", "ep", "cp", "tp"), 1)
DENSE = LLAMA | {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
MOE = {
    "model_type": "deepseek_v3",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 64,
    "head_dim": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}


@dataclass(frozen=True)
class Case:
    """A mesh over all devices and how it is run; `base` names the run on one device that it must equal."""

    base: str
    mesh: dict[str, int | str]
    runtime: dict[str, Any] = field(default_factory=dict)


BASES: dict[str, dict[str, Any]] = {
    # Accumulation, a moving average and evaluation on the way, of a model from random weights.
    "dense": {"model": DENSE, "train": {"steps": 4, "accumulation": 2, "ema_decay": 0.9, "eval_every": 2}},
    "experts": {
        "model": MOE,
        "train": {"steps": 4, "ema_decay": 0.9},
        "loss": {"expert_bias_rate": 0.01, "balance_loss": 0.01, "balance_over": "batch"},
    },
    "pretrained": {"model": "checkpoint", "train": {"steps": 4}},
}
# Axes are laid out over processes from the left, so the leftmost crosses from one process to another.
FOUR_DEVICES = {
    "fsdp": Case("dense", {"fsdp": 4}),
    "tp": Case("dense", {"tp": 4}),
    "tp in sequence": Case("dense", {"tp": 4}, {"sequence_parallel": True}),
    "cp as a ring": Case("dense", {"cp": 4}),
    "cp as ulysses": Case("dense", {"cp": 4}, {"context": "ulysses"}),
    "pp": Case("dense", {"pp": 4}, {"microbatches": 2}),
    "pp interleaved": Case("dense", {"pp": 2, "fsdp": 2}, {"pipeline": "interleaved", "microbatches": 2}),
    "pp 1f1b": Case("dense", {"pp": 2, "tp": 2}, {"pipeline": "1f1b", "microbatches": 2}),
    "dp with zero 1": Case("dense", {"dp": 4}, {"zero": 1}),
    "dp with zero 2": Case("dense", {"dp": 2, "tp": 2}, {"zero": 2}),
    "ep": Case("experts", {"ep": 4}, {"experts": "allgather"}),
    "ep, exchanged": Case("experts", {"ep": 4}, {"experts": "alltoall", "capacity_factor": 8.0}),
    "pretrained": Case("pretrained", {"fsdp": 2, "tp": 2}),
}
EIGHT_DEVICES = {
    "fsdp": Case("dense", {"fsdp": 4, "tp": 2}),
    "tp": Case("dense", {"tp": 8}, {"sequence_parallel": True}),
    "cp": Case("dense", {"cp": 4, "tp": 2}),
    "pp": Case("dense", {"pp": 4, "cp": 2}, {"microbatches": 2}),
    "dp with zero 1": Case("dense", {"dp": 2, "cp": 4}, {"zero": 1}),
    "ep": Case("experts", {"fsdp": 2, "ep": 4}, {"experts": "allgather"}),
    "pretrained": Case("pretrained", {"pp": 2, "fsdp": 2, "tp": 2}, {"microbatches": 2}),
}


def settings(folder: Path, name: str, base: str, **sections: Any) -> dict[str, Any]:
    """A run of its own under `folder`, over the corpus and with the model that all share."""
    values = run_config(
        folder,
        run_dir=str(folder / name),
        **{"mesh": ONE, "checkpoint": {"every_steps": None}} | BASES[base] | sections,
        # An eps above gradients that cancel, whose rounding would decide whole updates: see test_equal_to_one_device.
        optimizer={"eps": 1e-3},
    )
    if values["model"] == "checkpoint":
        values["model"] = str(folder / "checkpoint")
    return values


@pytest.fixture(scope="session")
def alone(tmp_path_factory) -> Path:
    """A folder with a run of every base by one process with one device."""
    folder = tmp_path_factory.mktemp("processes")
    write_corpus(folder / "corpus.jsonl")
    cfg = read_config(DENSE | {"architectures": ["LlamaForCausalLM"]})
    params = jax.tree.map(jax.numpy.asarray, random_params(cfg))
    save_pretrained(Model(cfg, params, None, single_device_mesh()), folder / "checkpoint")
    train_all([settings(folder, f"alone {base}", base) for base in BASES], processes=1, devices=1)
    return folder


def together(folder: Path, cases: dict[str, Case], processes: int) -> None:
    """Trains the cases in processes of two devices each."""
    configs = [
        settings(folder, f"{processes} {name}", case.base, mesh=ONE | case.mesh, runtime=case.runtime)
        for name, case in cases.items()
    ]
    train_all(configs, processes=processes, devices=2)


def assert_equal_runs(run: Path, truth: Path) -> None:
    np.testing.assert_allclose(curve_of(run), curve_of(truth), rtol=TOLERANCE)
    np.testing.assert_allclose(validation_of(run), validation_of(truth), rtol=TOLERANCE)
    for ema in (False, True) if "dense" in truth.name else (False,):
        ours, theirs = (jax.device_get(load(folder, ema=ema).params) for folder in (run, truth))
        assert relative_error(ours, theirs) < TOLERANCE, ema


@pytest.mark.slow
@pytest.mark.parametrize("processes, cases", [(2, FOUR_DEVICES), (4, EIGHT_DEVICES)], ids=["2", "4"])
def test_every_parallelism_across_processes_trains_as_one_device_does(alone, processes, cases):
    together(alone, cases, processes)
    failed = []
    for name, case in cases.items():
        try:
            assert_equal_runs(alone / f"{processes} {name}", alone / f"alone {case.base}")
        except AssertionError as error:
            failed.append(f"{name}: {error}")
    assert not failed, "\n".join(failed)


RESUMES = [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (2, 4)]
HALF, WHOLE = 3, 6


def half(folder: Path, name: str, *, steps: int) -> dict[str, Any]:
    """A run over all devices there are, up to a step."""
    return settings(
        folder,
        name,
        "dense",
        model=LLAMA | {"num_hidden_layers": 1},
        mesh=ONE | {"fsdp": "auto"},
        train={"steps": steps, "eval_batches": 0},
        schedule={"name": "constant", "warmup_steps": 0},
    )


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes_over_the_same_tokens_to_the_same_losses(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    train_all([half(tmp_path, "whole", steps=WHOLE)], processes=1, devices=2)
    for count in (1, 2, 4):
        train_all([half(tmp_path, f"from {count}", steps=HALF)], processes=count, devices=2)
        shards = [tmp_path / f"from {count}/checkpoints/{HALF}/state/ocdbt.process_{i}" for i in range(count)]
        sizes = [sum(file.stat().st_size for file in shard.rglob("*") if file.is_file()) for shard in shards]
        assert min(sizes) > 0.5 * max(sizes) > 10_000, "every process wrote its part"
    for count in (1, 2, 4):
        goes_on = [(before, f"{before} to {count}") for before, after in RESUMES if after == count]
        for before, name in goes_on:
            shutil.copytree(tmp_path / f"from {before}", tmp_path / name)
        train_all([half(tmp_path, name, steps=WHOLE) for _, name in goes_on], processes=count, devices=2)
    truth = tokens_fed(tmp_path / "whole", step=WHOLE, processes=1)
    assert truth.shape == (WHOLE, 8, 32)
    for before, after in RESUMES:
        run = tmp_path / f"{before} to {after}"
        parts = [tokens_fed(run, step=step, processes=n) for step, n in ((HALF, before), (WHOLE, after))]
        np.testing.assert_array_equal(np.concatenate(parts), truth, err_msg=run.name)
        np.testing.assert_allclose(curve_of(run), curve_of(tmp_path / "whole"), rtol=TOLERANCE, err_msg=run.name)
        assert [line["step"] for line in metrics_of(run)] == list(range(1, WHOLE + 1)), "one writer"
