"""What a process does whose arrays cannot be written: run by a test, with failing_disk.c loaded before the C library.

    LD_PRELOAD=failing_disk.so python tests/resilience/failing_disk.py RUN ERRNO

Each save, one more of the writes and fsyncs fails that the arrays' database makes; prints how many there were.
"""

import ctypes
import itertools
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from saving import assert_right, save

from jaxformers.train.checkpoint import Checkpointer
from jaxformers.train.config import CheckpointConfig

DATABASE = "/state/ocdbt"  # below it, tensorstore alone writes
SLOW_SECONDS = 1.0


def main(run: Path, code: int) -> None:
    disk, said = ctypes.CDLL(None), []
    config = CheckpointConfig(every_steps=1, keep_last=2, on_error="continue")
    with Checkpointer(run, config, say=said.append) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        for turn in itertools.count(1):
            disk.errs(DATABASE.encode(), turn, code)
            save(checkpoints, turn + 1)
            checkpoints.settle()
            if disk.seen() < turn:
                break
            before = checkpoints.latest_step
            assert before == 1, checkpoints.steps
            where = f"{run / 'checkpoints'} (the newest complete one is step 1)"
            after = "the run goes on and tries again when the next one is due"
            assert said == [f"cannot save step {turn + 1} in {where}: {os.strerror(code)}; {after}"], said
            said.clear()
            assert_right(run, 1)
        disk.errs(b"", 0, 0)
        assert_right(run, turn + 1)
        assert not said, said
        disk.drags(DATABASE.encode(), int(1e6 * SLOW_SECONDS))
        began = time.monotonic()
        save(checkpoints, turn + 2)
        assert checkpoints.latest_step == turn + 1, "the run goes on while a slow disk writes"
        checkpoints.wait()
        assert time.monotonic() - began > SLOW_SECONDS
    assert_right(run, turn + 2)
    print(turn - 1)


main(Path(sys.argv[1]), int(sys.argv[2]))
