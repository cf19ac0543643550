"""Runs of settings drawn at random that die at steps drawn at random, and go on as if they had not: bit for bit on the
same mesh, in losses to 1e-5 on another one."""

import functools
import random
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tiny import assert_bit_equal, run_config, write_corpus
from whole_runs import KILLED_AT, STEPS, Stopped, act_at, again, process, saved_state, steps_of

import jaxformers as jf

MESH = {"dp": 8, "fsdp": 1}
OTHER_MESHES = (
    {"dp": 2, "fsdp": 4},
    {"dp": 1, "fsdp": 8},
    {"dp": 1, "fsdp": 4, "tp": 2},
    {"dp": 4, "fsdp": 1, "cp": 2},
)


@dataclass(frozen=True)
class Settings:
    """What of a run a resume has to bring back, and may have to bring back differently."""

    packing: str
    accumulation: int
    ema_decay: float | None


@dataclass(frozen=True)
class Case:
    """A run, how often it saves, after which steps it dies, and on which mesh it goes on."""

    settings: Settings
    every_steps: int
    deaths: tuple[int, ...]
    mesh: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        s, mesh = self.settings, ",".join(f"{axis}{size}" for axis, size in self.mesh)
        ema = "ema" if s.ema_decay else "no-ema"
        deaths = "+".join(map(str, self.deaths))
        return f"{s.packing}-{s.accumulation}-{ema}-every{self.every_steps}-dies{deaths}-{mesh}"


def drawn(count: int, *, seed: int, deaths: int) -> list[Case]:
    """Every second case goes on upon the mesh that it was on, and every second dies more than once."""
    draw = random.Random(seed)
    cases = []
    for number in range(count):
        settings = Settings(draw.choice(["first_fit", "concat"]), draw.choice([1, 2]), draw.choice([None, 0.9]))
        times = 1 + (number // 2 % deaths)
        steps = tuple(sorted(draw.sample(range(1, STEPS), times)))
        mesh = draw.choice(OTHER_MESHES) if number % 2 else MESH
        cases.append(Case(settings, draw.randint(1, 4), steps, tuple(sorted(mesh.items()))))
    return cases


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Runs that nothing interrupts, one for each setting: (config, result)."""
    folder = tmp_path_factory.mktemp("truth")
    write_corpus(folder / "corpus.jsonl")

    @functools.cache
    def run(settings: Settings):
        config = run_config(
            folder,
            data={"packing": settings.packing},
            mesh=MESH,
            train={"batch_size": 16, "accumulation": settings.accumulation, "ema_decay": settings.ema_decay},
        )
        config["run_dir"] = str(folder / f"{settings.packing}-{settings.accumulation}-{settings.ema_decay}")
        return config, jf.fit(config)

    return run


def die_here(config, _folder, step: int, monkeypatch) -> None:
    """The run ends between two steps, without the save that ends it in an orderly way."""

    def die():
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("jaxformers.train.monitor.Trackers.log", lambda self, *a: [t.log(*a) for t in self._trackers])
        act_at(patch, step, die)
        with pytest.raises(Stopped):
            jf.fit(config)


def die_by_kill(config, folder: Path, step: int, _monkeypatch) -> None:
    """The process is killed, whatever its threads are about to write."""
    dead = process(config, folder, code=KILLED_AT, extra=("SIGKILL", str(step)))
    _, said = dead.communicate()
    assert dead.returncode == -signal.SIGKILL, said


def goes_on(truth, case: Case, folder: Path, die, monkeypatch) -> None:
    whole_config, whole = truth(case.settings)
    config = again(whole_config, folder, checkpoint={"every_steps": case.every_steps})
    reached = 0
    for step in case.deaths:
        if step > reached:
            die(config, folder, step, monkeypatch)
            reached = step
    mesh = dict(case.mesh)
    result = jf.fit(config | {"mesh": mesh})
    ours, theirs = steps_of(result.run_dir), steps_of(whole.run_dir)
    if mesh != MESH:
        np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-5)
        assert result.validation["validation_loss"] == pytest.approx(whole.validation["validation_loss"], rel=1e-5)
        return
    assert ours == theirs
    assert result.validation == whole.validation
    (state, row), (true_state, true_row) = saved_state(config), saved_state(whole_config)
    assert_bit_equal(state, true_state)
    assert row == true_row


@pytest.mark.parametrize("case", drawn(4, seed=6, deaths=1), ids=str)
def test_a_run_that_died_goes_on_as_if_it_had_not(truth, case, tmp_path, monkeypatch):
    goes_on(truth, case, tmp_path, die_here, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", drawn(24, seed=7, deaths=2), ids=str)
def test_a_process_that_was_killed_goes_on_as_if_it_had_not(truth, case, tmp_path, monkeypatch):
    goes_on(truth, case, tmp_path, die_by_kill, monkeypatch)
