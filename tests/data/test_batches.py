import json
import os
import socket
import subprocess
import sys

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from jaxformers.data.corpus import open_corpus
from jaxformers.data.pipeline import ProcessShare, process_share, to_global, train_iterator, validation_batches

SPEC = PartitionSpec(("dp", "fsdp", "ep"), "cp")


@pytest.fixture
def corpus(config, bytes_tokenizer):
    return open_corpus(config.model_copy(update={"validation_fraction": 0.3, "epochs": 3}), bytes_tokenizer)


@pytest.fixture
def rows(corpus):
    return corpus.train


def _mesh(**sizes: int) -> jax.sharding.Mesh:
    names = ("pp", "dp", "fsdp", "ep", "cp", "tp")
    return jax.make_mesh([sizes.get(name, 1) for name in names], names, axis_types=(AxisType.Auto,) * 6)


def _stack(rows, numbers) -> dict[str, np.ndarray]:
    return {name: np.stack([rows[n][name] for n in numbers]) for name in rows[0]}


def _same(one, other) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_batch_k_is_rows_kb_to_kb_plus_b(rows):
    for k, batch in zip(range(5), train_iterator(rows, batch_size=4), strict=False):
        _same(batch, _stack(rows, range(4 * k, 4 * k + 4)))


def test_batches_end_with_the_last_whole_one(rows):
    assert len(list(train_iterator(rows, batch_size=7))) == len(rows) // 7


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_shares_of_all_processes_are_the_batch_of_one(rows, count):
    shares = [train_iterator(rows, batch_size=8, process_index=p, process_count=count) for p in range(count)]
    for whole in train_iterator(rows, batch_size=8):
        parts = [next(share) for share in shares]
        _same({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stops=st.lists(st.integers(0, 4), max_size=5), batches=st.lists(st.sampled_from([2, 4, 8]), min_size=6, max_size=6)
)
def test_a_run_that_stops_anywhere_and_changes_its_batch_and_processes_sees_the_same_rows(rows, stops, batches):
    seen, state = 0, None
    for stop, batch_size in zip([*stops, 3], batches, strict=False):
        count = {2: 1, 4: 2, 8: 4}[batch_size]
        shares = [
            train_iterator(rows, batch_size=batch_size, process_index=p, process_count=count) for p in range(count)
        ]
        for share in shares:
            if state is not None:
                share.set_state(json.loads(json.dumps(state)))
        for _ in range(stop):
            parts = [next(share)["tokens"] for share in shares]
            np.testing.assert_array_equal(np.concatenate(parts), _stack(rows, range(seen, seen + batch_size))["tokens"])
            seen += batch_size
        states = [share.get_state() for share in shares]
        assert all(each == states[0] for each in states)
        state = states[0]
        for share in shares:
            share.close()
    assert state["next_row"] == seen


def test_what_is_made_ahead_does_not_move_the_position(rows):
    iterator = train_iterator(rows, batch_size=4)
    iterator.start_prefetch()
    assert iterator.get_state()["next_row"] == 0
    first = next(iterator)
    assert iterator.get_state()["next_row"] == 4
    iterator.set_state({**iterator.get_state(), "next_row": 0})
    _same(next(iterator), first)


def test_a_position_in_other_data_is_refused(rows, config, bytes_tokenizer):
    state = train_iterator(rows, batch_size=4).get_state()
    other = open_corpus(config.model_copy(update={"seed": 1}), bytes_tokenizer).train
    with pytest.raises(ValueError, match=r"the checkpoint's position is in other data: .*seed") as error:
        train_iterator(other, batch_size=4).set_state(state)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [ocp.args.JsonSave, None])
def test_orbax_keeps_the_position(rows, tmp_path, arguments):
    iterator = train_iterator(rows, batch_size=4)
    for _ in range(3):
        next(iterator)
    other = train_iterator(rows, batch_size=4)
    with ocp.CheckpointManager(tmp_path) as manager:
        if arguments is None:
            manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
            manager.wait_until_finished()
            expected = next(iterator)
            manager.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(other)))
        else:
            manager.save(3, args=ocp.args.Composite(data=arguments(iterator.get_state())))
            manager.wait_until_finished()
            expected = next(iterator)
            other.set_state(manager.restore(3, args=ocp.args.Composite(data=ocp.args.JsonRestore())).data)
    _same(next(other), expected)


def test_rows_are_a_grain_source(rows):
    batches = grain.MapDataset.source(rows).batch(4)
    _same(batches[2], _stack(rows, range(8, 12)))


def test_more_rows_in_a_batch_than_there_are_is_refused(rows):
    with pytest.raises(ValueError, match=rf"the data has {len(rows)} rows of 32 tokens, a batch 100000 rows"):
        train_iterator(rows, batch_size=100_000)


@pytest.mark.parametrize("make", [train_iterator, validation_batches])
def test_a_batch_that_processes_cannot_share_evenly_is_refused(rows, make):
    with pytest.raises(ValueError, match="a batch of 6 rows cannot be shared evenly by 4 processes"):
        make(rows, batch_size=6, process_index=0, process_count=4)


@pytest.mark.parametrize("count", [1, 2])
def test_validation_sees_every_row_once_and_pads_the_last_batch_with_no_weight(corpus, count):
    rows, size = corpus.validation, 8
    assert len(rows) % size
    shares = [validation_batches(rows, batch_size=size, process_index=p, process_count=count) for p in range(count)]
    assert all(len(share) == -(-len(rows) // size) for share in shares)
    joined = [{n: np.concatenate([part[n] for part in parts]) for n in parts[0]} for parts in zip(*shares, strict=True)]
    whole = {name: np.concatenate([batch[name] for batch in joined]) for name in joined[0]}
    _same({name: values[: len(rows)] for name, values in whole.items()}, _stack(rows, range(len(rows))))
    for values in whole.values():
        assert not values[len(rows) :].any()
        assert len(values) % size == 0


def test_validation_stops_at_max_batches(corpus):
    assert len(list(validation_batches(corpus.validation, batch_size=2, max_batches=3))) == 3
    assert len(validation_batches(corpus.validation, batch_size=10**6, max_batches=3)) == 1


def test_no_validation_rows_are_no_batches(config, bytes_tokenizer):
    none = open_corpus(config.model_copy(update={"validation_fraction": 0.0}), bytes_tokenizer).validation
    assert list(validation_batches(none, batch_size=4)) == []


@pytest.mark.parametrize(
    "sizes", [{"dp": 8}, {"fsdp": 4, "tp": 2}, {"dp": 2, "fsdp": 2, "cp": 2}, {"ep": 2, "pp": 4}, {"tp": 8}]
)
def test_every_mesh_gets_the_same_global_batch(rows, sizes):
    mesh = _mesh(**sizes)
    batch = next(train_iterator(rows, batch_size=8))
    placed = to_global(batch, mesh, SPEC)
    assert placed["tokens"].sharding.spec == SPEC
    _same({name: np.asarray(values) for name, values in placed.items()}, batch)


def test_tokens_go_to_the_devices_in_the_order_asked_for(rows):
    batch = next(train_iterator(rows, batch_size=8))
    columns = np.random.default_rng(0).permutation(batch["tokens"].shape[1])
    placed = to_global(batch, _mesh(dp=2, fsdp=2, cp=2), SPEC, columns=columns)
    _same({name: np.asarray(values) for name, values in placed.items()}, {n: a[:, columns] for n, a in batch.items()})


def test_one_process_feeds_the_whole_batch():
    assert process_share(_mesh(dp=4, tp=2), SPEC) == ProcessShare(0, 1)
    assert process_share(_mesh(tp=8), PartitionSpec()) == ProcessShare(0, 1)


WORKER = """
import json, os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jax.experimental.multihost_utils import process_allgather
from jaxformers.data.config import DataConfig
from jaxformers.data.corpus import open_corpus
from jaxformers.data.pipeline import process_share, to_global, train_iterator
from jaxformers.data.tokenizer import byte_tokenizer

rows = open_corpus(DataConfig.model_validate_json(sys.argv[3]), byte_tokenizer()).train
names, spec = ("dp", "cp", "tp"), PartitionSpec("dp", "cp")
for shape in ((4, 1, 1), (1, 1, 4), (1, 4, 1), (2, 1, 2)):
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3)
    share = process_share(mesh, spec)
    assert share.count == min(shape[0], 2), (shape, share)
    iterator = train_iterator(rows, batch_size=8, process_index=share.index, process_count=share.count)
    batch = to_global(next(iterator), mesh, spec)
    assert batch["tokens"].shape == (8, rows.sequence_length)
    expected = np.stack([rows[n]["tokens"] for n in range(8)])
    np.testing.assert_array_equal(process_allgather(batch["tokens"], tiled=True), expected)
print("equal")
"""


def test_two_processes_build_the_batch_of_one_on_any_mesh(config, bytes_tokenizer):
    open_corpus(config, bytes_tokenizer)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(process), config.model_dump_json()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for process in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    # The library beneath speaks on standard output, too.
    assert all("equal" in out.splitlines() for out, _ in answers), answers
