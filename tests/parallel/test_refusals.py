"""What no mesh can run is refused by `jaxformers train --dry-run` in one line that names the nearest legal values."""

import jax
import pytest
from runs import Case, trainer_of
from tiny import LLAMA, run_config

from jaxformers.config import RunConfig, dump_yaml

DENSE = LLAMA | {"num_hidden_layers": 4}
SPARSE = DENSE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
REFUSALS = [
    (DENSE, "mesh.tp=3", "mesh: dp=auto, tp=3 needs 3 devices, but there are 8; nearest legal: 2 and 4"),
    (DENSE, "mesh.dp=2", "mesh: dp=2 needs 2 devices, but there are 8; nearest legal: 8"),
    (DENSE, "mesh.tp=0", "mesh: tp is 0; an axis size is at least 1, or auto"),
    (DENSE, "mesh.ep=2", "mesh: ep=2 needs a model with experts, which llama is not; use dp or fsdp"),
    (SPARSE, "mesh.ep=8", "mesh: ep=8 does not divide the model's 4 experts; nearest legal: 4"),
    (
        DENSE,
        "mesh.pp=8",
        "mesh.pp: 8 stages do not divide the 4 layers that the pipeline cuts; nearest legal: 4 stages, or 8 layers",
    ),
    (
        DENSE,
        "mesh.pp=2 runtime.microbatches=3",
        "runtime.microbatches is 3, but has to divide the 4 rows that a device has of a step; nearest legal: 2 and 4",
    ),
    (
        DENSE,
        "mesh.pp=2 runtime.stages=[1,2]",
        "runtime.stages is [1, 2]; it has to share the 4 layers that the pipeline cuts among 2 stages, at least one "
        "each",
    ),
    (
        DENSE,
        "train.batch_size=12",
        "train: a microbatch of 12 rows (batch_size 12 / accumulation 1) cannot be split over 8 devices; nearest legal "
        "batch_size: 8 and 16",
    ),
    (
        DENSE,
        "mesh.cp=4 data.sequence_length=36",
        "data.sequence_length is 36, which cp=4 cannot split into 8 equal parts; nearest legal: 32 and 40",
    ),
    (
        DENSE,
        "mesh.cp=8 runtime.context=ulysses",
        "runtime: context=ulysses cannot split 4 heads a device over cp=8; make cp one of 1, 2, 4, or use ring",
    ),
    (
        DENSE,
        "mesh.tp=8 runtime.sequence_parallel=true data.sequence_length=28",
        "runtime: sequence_parallel cannot split rows of 28 tokens over 8 devices; nearest legal: 24 and 32",
    ),
    (
        DENSE,
        "mesh.pp=2 mesh.cp=2 runtime.pipeline=1f1b",
        "runtime.pipeline=1f1b does not go with mesh.cp=2, whose exchanges of both ways could wait for each other; use "
        "gpipe or interleaved",
    ),
    (
        SPARSE,
        "mesh.pp=2 runtime.pipeline=1f1b loss.balance_over=batch",
        "loss: balance_over=batch needs all rows before any gradient, which runtime.pipeline=1f1b has not; use "
        "balance_over=row, or pipeline=gpipe or interleaved",
    ),
    (
        SPARSE,
        "mesh.ep=2 runtime.experts=alltoall",
        "runtime: experts=alltoall without a capacity_factor needs ragged_all_to_all, which cpu does not have; set "
        "runtime.capacity_factor, or experts=allgather",
    ),
    (
        DENSE,
        "runtime.offload=both",
        "runtime: offload=both moves what remat keeps, but remat is none; use remat=full, dots or projections, or "
        "offload=optimizer",
    ),
]


@pytest.mark.parametrize("model, overrides, line", REFUSALS, ids=[overrides for _, overrides, _ in REFUSALS])
def test_a_dry_run_refuses_what_does_not_fit(model, overrides, line, tmp_path, command):
    values = run_config(tmp_path, model=model, mesh={"fsdp": 1, "dp": "auto"}, train={"batch_size": 16})
    config = tmp_path / "config.yaml"
    config.write_text(dump_yaml(RunConfig.model_validate(values)))
    assert command("train", config, "--dry-run", *overrides.split()).mistake == line


def test_offload_is_refused_where_devices_have_no_memory_of_the_host(monkeypatch):
    trainer = trainer_of(Case("dense", {}, offload="optimizer"))
    trainer.check()
    own = [memory for memory in jax.devices()[0].addressable_memories() if memory.kind == "device"]
    monkeypatch.setattr(type(jax.devices()[0]), "addressable_memories", lambda device: own)
    with pytest.raises(ValueError) as caught:
        trainer.check()
    assert str(caught.value) == (
        "runtime: offload=optimizer needs memory of the kind pinned_host, which cpu devices do not have (only device); "
        "use offload=none"
    )
