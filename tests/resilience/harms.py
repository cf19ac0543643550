"""Harm to the files of a checkpoint, drawn at random, as disks and people do it; and to arrays, as memory does it."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tiny import flip

from jaxformers.train.checkpoint import FOLDER, Checkpointer
from jaxformers.train.integrity import CHECKSUMS

GOOD, NEWEST = 4, 8  # the steps that a run of `run_config` saves


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def flip_a_bit(draw, files):
    path = draw.choice([path for path in files if path.stat().st_size])
    flip(path, draw.randrange(8 * path.stat().st_size))
    return [path]


def truncate(draw, files):
    path = draw.choice([path for path in files if path.stat().st_size])
    os.truncate(path, draw.randrange(path.stat().st_size))
    return [path]


def remove(draw, files):
    path = draw.choice(files)
    path.unlink()
    return [path]


def swap(draw, files):
    while True:
        one, other = draw.sample(files, 2)
        if (contents := (one.read_bytes(), other.read_bytes()))[0] != contents[1]:
            break
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    return [one, other]


HARMS = (flip_a_bit, flip_a_bit, truncate, remove, swap)  # half of them bits, which are the hardest to see


def harmed_again_and_again(run: Path, count: int, *, seed: int) -> int:
    """How many of so many random harms to the newest checkpoint were found, named, and passed over."""
    draw, checkpoint, found = random.Random(seed), run / FOLDER / str(NEWEST), 0
    whole = {path: path.read_bytes() for path in files_of(checkpoint)}
    with Checkpointer(run) as checkpoints:
        for _ in range(count):
            harm, said = draw.choice(HARMS), []
            touched = harm(draw, list(whole))
            assert checkpoints.newest_good(said.append) == GOOD, (harm, touched)
            [line] = said
            assert line.startswith(f"the checkpoint {checkpoint} is damaged: ")
            assert line.endswith("; going back to the one before")
            names = {path.relative_to(checkpoint).as_posix() for path in touched}
            assert CHECKSUMS in names or all(name in line for name in names), (harm, touched, line)
            assert CHECKSUMS not in names or CHECKSUMS in line, line
            found += 1
            for path in touched:
                path.write_bytes(whole[path])
        assert checkpoints.newest_good(said.append) == NEWEST
    return found


def flip_on_a_device(array: jax.Array, shard: int, bit: int) -> jax.Array:
    """The array with one bit of one device's part of it turned over, of which the other devices do not know."""
    parts = [np.array(part.data) for part in array.addressable_shards]
    parts[shard].view(np.uint8).reshape(-1)[bit // 8] ^= np.uint8(1 << bit % 8)
    devices = [part.device for part in array.addressable_shards]
    arrays = [jax.device_put(part, device) for part, device in zip(parts, devices, strict=True)]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, arrays)


def flipping_once(copy: Callable[[Any], Any], draw: random.Random) -> Callable[[Any], Any]:
    """What copies a state, made to turn over one random bit of its parameters the first time."""
    done = []

    def flipped(state: Any) -> Any:
        state = copy(state)
        if done:
            return state
        done.append(True)
        leaves, tree = jax.tree.flatten(state.params)
        chosen = draw.randrange(len(leaves))
        shards = leaves[chosen].addressable_shards
        shard = draw.randrange(len(shards))
        leaves[chosen] = flip_on_a_device(leaves[chosen], shard, draw.randrange(8 * shards[shard].data.nbytes))
        return state.replace(params=jax.tree.unflatten(tree, leaves))

    return flipped
