"""The benchmark's figures fit together and mean what they say. Nothing here is about how fast anything is."""

import dataclasses
import io
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from jaxformers import bench, bench_cli
from jaxformers.bench import Seconds, as_dict, bench_decode, bench_train, cache_bytes, step_weight_bytes
from jaxformers.bench_cli import PRESETS, architecture, train_config
from jaxformers.cli import app
from jaxformers.config import load_config
from jaxformers.families import read_config
from jaxformers.models.params import count_params, flops_per_token
from jaxformers.parallel.hardware import measured_bandwidth, measured_matmul_flops
from jaxformers.parallel.mesh import MeshConfig, make_mesh, single_device_mesh
from jaxformers.train.build import Trainer
from jaxformers.train.config import TrainConfig
from jaxformers.train.optimizer_config import ScheduleConfig

ROOT = Path(__file__).parent.parent
TINY = PRESETS["llama-tiny"]
ONE_LAYER = TINY | {"num_hidden_layers": 1}
MIXTURE = TINY | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1}
FLOAT32, BFLOAT16 = 4, 2  # bytes


@pytest.fixture(scope="module", autouse=True)
def _small_hardware_measurements():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "measured_matmul_flops", lambda dtype: measured_matmul_flops(dtype, 256))
        patch.setattr(bench, "measured_bandwidth", lambda: measured_bandwidth(16))
        yield


def trainer_on(mesh: jax.sharding.Mesh) -> Trainer:
    return Trainer(
        read_config(ONE_LAYER),
        mesh,
        16,
        train=TrainConfig(steps=100, batch_size=8),
        schedule=ScheduleConfig(warmup_steps=0),
    )


@pytest.fixture(scope="module")
def train_report():
    return bench_train(lambda: trainer_on(single_device_mesh()), steps=5, name="tiny")


@pytest.fixture(scope="module")
def decode_report():
    return bench_decode(read_config(ONE_LAYER), batch_size=2, prompt_tokens=8, new_tokens=20, rounds=2, name="tiny")


def test_quantiles_are_of_the_repetitions():
    seconds = Seconds.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0])
    assert seconds == Seconds(count=11, median=6.0, p10=2.0, p90=10.0)


def test_training_rates_follow_from_the_median_step(train_report):
    r = train_report
    assert r.tokens_per_second * r.step.median == pytest.approx(8 * 16)
    assert r.flops_per_token == flops_per_token(read_config(ONE_LAYER), 16)
    assert r.flops_per_second == pytest.approx(r.tokens_per_second * r.flops_per_token)
    assert r.mfu * r.machine.matmul_flops == pytest.approx(r.flops_per_second)
    assert r.step.count == 5
    assert 0 < r.step.p10 <= r.step.median <= r.step.p90


def test_training_says_what_was_run(train_report):
    r = train_report
    assert (r.batch_size, r.sequence_length, r.accumulation, r.dtype, r.remat) == (8, 16, 1, "float32", "none")
    assert r.model == bench.Shape(
        "tiny", "llama", count_params(read_config(ONE_LAYER)), count_params(read_config(ONE_LAYER))
    )
    assert (r.machine.platform, r.machine.devices, r.machine.published_flops) == ("cpu", 1, None)
    assert r.published_mfu is None


def test_a_start_from_the_persistent_cache_is_told_beside_a_cold_one(train_report):
    assert 0 < train_report.compile.warm < train_report.compile.cold


def test_the_steps_memory_holds_at_least_the_state_and_the_batch(train_report):
    state = 3 * FLOAT32 * count_params(read_config(ONE_LAYER))  # parameters and AdamW's two moments
    batch = 5 * FLOAT32 * 8 * 16
    assert state + batch <= train_report.memory.arguments < state + batch + 1000
    assert train_report.memory.temporaries > 0
    assert train_report.memory.process_peak > train_report.memory.arguments
    assert train_report.memory.device_peak is None  # CPUs have no memory of their own


def test_a_mesh_of_devices_is_measured_as_one_machine():
    mesh = make_mesh(MeshConfig(fsdp=2), devices=jax.devices()[:2])
    report = bench_train(lambda: trainer_on(mesh), steps=1)
    assert report.machine.devices == 2
    assert report.tokens_per_second * report.step.median == pytest.approx(8 * 16)
    state = 3 * FLOAT32 * count_params(read_config(ONE_LAYER))
    assert state / 2 < report.memory.arguments < 0.6 * state  # a half, and what stays whole


def test_the_compilation_cache_of_the_user_is_left_as_it_was(train_report):
    assert jax.config.jax_compilation_cache_dir.endswith("xla")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.5


def test_decoding_rates_follow_from_the_measured_seconds(decode_report):
    r = decode_report
    assert r.tokens_per_second * r.decode.median == pytest.approx(2 * 19)  # the prefill makes the first of 20
    assert r.prefill_tokens_per_second * r.prefill.median == pytest.approx(2 * 8)
    assert r.total_tokens_per_second < 2 * 20 / r.decode.p10
    assert (r.prefill.count, r.decode.count, r.step.count) == (2, 2, 2 * 19)
    assert r.flops_per_second == pytest.approx(r.tokens_per_second * r.flops_per_token)
    assert r.mfu * r.machine.matmul_flops == pytest.approx(r.flops_per_second)


def test_the_share_of_the_bandwidth_is_the_weights_times_the_steps_a_second(decode_report):
    r = decode_report
    steps_per_second = r.tokens_per_second / r.batch_size
    assert r.bytes_per_second == pytest.approx(r.weight_bytes * steps_per_second)
    assert r.bandwidth_share * r.machine.bandwidth == pytest.approx(r.bytes_per_second)


def test_a_new_tokens_cost_counts_the_keys_it_sees(decode_report):
    """2 FLOPs a weight, and 4 a key, head dim, head and layer: token i of 20 after 8 sees 8 + i keys, itself one."""
    cfg = read_config(ONE_LAYER)
    weights = cfg.vocab_size * 64 + (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
    keys = np.mean([8 + i for i in range(1, 21)])
    assert decode_report.flops_per_token == pytest.approx(2 * weights + 4 * keys * 16 * 4)


def test_a_step_reads_all_weights_but_tables_that_are_looked_up_in():
    cfg = read_config(TINY)
    assert step_weight_bytes(cfg, 1, "float32") == FLOAT32 * count_params(cfg)
    untied = read_config(TINY | {"tie_word_embeddings": False})
    assert step_weight_bytes(untied, 1, "bfloat16") == BFLOAT16 * count_params(cfg)


def test_a_step_of_a_mixture_reads_the_experts_its_rows_visit():
    cfg = read_config(MIXTURE)
    everything = FLOAT32 * count_params(cfg)
    assert step_weight_bytes(cfg, 1, "float32") == FLOAT32 * (count_params(cfg, active=True))
    assert step_weight_bytes(cfg, 1, "float32") < step_weight_bytes(cfg, 3, "float32") < everything
    assert step_weight_bytes(cfg, 100, "float32") == pytest.approx(everything)


def test_the_cache_holds_keys_and_values_of_every_layer_and_slot(decode_report):
    layers, kv_heads, head_dim = 2, 2, 16
    assert cache_bytes(read_config(TINY), 3, 40, "bfloat16") == BFLOAT16 * 3 * 40 * 2 * layers * kv_heads * head_dim
    assert decode_report.cache_bytes >= cache_bytes(read_config(ONE_LAYER), 2, 8 + 20, "float32")


def test_reports_are_plain_numbers(train_report, decode_report):
    for report in (train_report, decode_report):
        assert json.loads(json.dumps(as_dict(report))) == dataclasses.asdict(report)


@pytest.mark.parametrize(
    "sizes, told",
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0; it must be at least 1"),
        ({"new_tokens": 1}, "new_tokens is 1; it must be at least 2"),
        ({"rounds": 0}, "rounds is 0; it must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_decoded_are_refused(sizes, told):
    with pytest.raises(ValueError, match=told):
        bench_decode(read_config(TINY), **sizes)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps is 0; it must be at least 1"):
        bench_train(lambda: trainer_on(single_device_mesh()), steps=0)


def test_presets_are_the_shapes_they_are_named_after():
    sizes = {name: count_params(read_config(values)) for name, values in PRESETS.items()}
    assert sizes["llama-tiny"] < 1e6
    assert sizes["llama-100m"] == pytest.approx(100e6, rel=0.01)
    assert sizes["llama-110m"] == count_params(read_config(load_config(ROOT / "configs/llama-110m.yaml").model))
    assert sizes["llama-1b"] == pytest.approx(1.1e9, rel=0.01)


def test_a_config_is_measured_as_it_stands_but_for_what_options_say():
    path = str(ROOT / "configs/moe-small.yaml")
    config = train_config(path, None, [])
    assert (config.train.batch_size, config.train.accumulation, config.runtime.remat) == (256, 8, "full")
    config = train_config(path, None, ["train.batch_size=2", "train.accumulation=1", "runtime.dtype=float32"])
    assert (config.train.batch_size, config.train.accumulation) == (2, 1)
    assert (config.runtime.dtype, config.runtime.remat) == ("float32", "full")


def test_a_reference_gives_its_architecture_without_its_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert architecture(str(tmp_path), None) == read_config(TINY)
    assert train_config(str(tmp_path), None, []).model == TINY
    of_config = {"run_dir": "unused", "model": str(tmp_path), "data": {"paths": "unused", "sequence_length": 32}}
    (tmp_path / "tune.yaml").write_text(json.dumps(of_config))
    config = train_config(str(tmp_path / "tune.yaml"), None, [])
    assert (config.model, config.data.sequence_length) == (TINY, 32)


def test_a_target_and_a_preset_together_are_refused():
    with pytest.raises(ValueError, match="both somewhere and --preset llama-1b are given; choose one"):
        architecture("somewhere", "llama-1b")


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        architecture(str(tmp_path), None)


def shown(rows) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(bench_cli._table(rows))
    return console.file.getvalue()


def test_the_tables_show_what_was_run_and_every_figure_in_a_readable_unit(train_report, decode_report):
    for rows in (bench_cli._train_rows(train_report), bench_cli._decode_rows(decode_report)):
        table = shown(rows)
        for told in (
            "tiny: llama, 69,824",
            "parameters, float32",
            "measured matmul peak",
            "FLOP/s",
            "p90",
            "process peak",
        ):
            assert told in table
    assert f"{train_report.tokens_per_second:,.1f}" in shown(bench_cli._train_rows(train_report))
    assert f"{decode_report.bandwidth_share:.1%}" in shown(bench_cli._decode_rows(decode_report))


def test_the_command_prints_one_json_object():
    sizes = ["--batch", "2", "--prompt", "4", "--new-tokens", "3", "--rounds", "1"]
    result = CliRunner().invoke(bench_cli.bench_app, ["decode", "--preset", "llama-tiny", *sizes, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["model"] == {
        "name": "llama-tiny",
        "family": "llama",
        "parameters": 106816,
        "active_parameters": 106816,
    }
    assert (report["batch_size"], report["prompt_tokens"], report["new_tokens"]) == (2, 4, 3)
    assert all(math.isfinite(report[name]) and report[name] > 0 for name in ("tokens_per_second", "mfu"))


def test_the_verb_is_part_of_the_command_line():
    result = CliRunner().invoke(app, ["bench", "train", "--preset", "nosuch"])
    assert result.exit_code == 2
    assert "llama-100m" in result.output
