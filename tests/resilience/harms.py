"""Harm to the files of a checkpoint, drawn at random, as disks and people do it."""

import os
import random
from pathlib import Path

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
