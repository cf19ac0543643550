"""Runs of settings drawn at random that die at steps drawn at random, and go on as if they had not: bit for bit on the
same mesh, in losses to 1e-5 on another one or with another number of processes."""

import functools
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import LLAMA, assert_bit_equal, random_params, run_config, write_corpus
from whole_runs import KILLED_AT, STEPS, Stopped, act_at, again, metrics_of, process, saved_state, steps_of

import jaxformers as jf
from jaxformers.families import read_config
from jaxformers.hub.pretrained import write_pretrained

MODEL = LLAMA | {"hidden_size": 64, "intermediate_size": 96}  # matrices large enough for moments of 8 bits
MESH = {"dp": 8, "fsdp": 1}
OTHER_MESHES = (
    {"dp": 2, "fsdp": 4},
    {"dp": 1, "fsdp": 8},
    {"dp": 1, "fsdp": 4, "tp": 2},
    {"dp": 4, "fsdp": 1, "cp": 2},
)
# What of a run a resume has to bring back, and may have to bring back differently: by name, the config's sections.
MIXTURE = {
    "packing": "best_fit",
    "weights_at_step": {4: {"code": 3.0}},
    "when_exhausted": "drop",
}
DATA: dict[str, dict[str, Any]] = {
    "first_fit": {"packing": "first_fit"},
    "best_fit": {"packing": "best_fit"},
    "concat": {"packing": "concat"},
    "unpacked": {"packing": "none"},
    "mixture": MIXTURE,
}
BATCHES: dict[str, dict[str, Any]] = {"even": {}, "ramp": {"batch_ramp": {3: 32}}}
AVERAGES: dict[str, dict[str, Any]] = {"no-ema": {}, "ema": {"ema_decay": 0.9}}
# The epsilon keeps Adam from making a sign of a gradient that is nothing but rounding.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"eps": 1e-3},
    "adamw8": {"eps": 1e-3, "state": "int8"},
    "adafactor": {"name": "adafactor"},
    "sgd": {"name": "sgd"},
    "lion": {"name": "lion", "learning_rate": 1e-3},
    "muon": {"name": "muon", "eps": 1e-3},
    "muon8": {"name": "muon", "eps": 1e-3, "state": "int8"},
}
# On another mesh, the bases of a first gradient may be others: not one of those that are drawn.
SAME_MESH = {"soap": {"name": "soap", "eps": 1e-3}}
LORA = {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"], "dropout": 0.1}


@dataclass(frozen=True)
class Settings:
    """A choice of each."""

    data: str
    batches: str
    accumulation: int
    average: str
    optimizer: str
    adapter: bool  # with dropout, beside a base that stays

    def __str__(self) -> str:
        chosen = (self.data, self.batches, self.accumulation, self.average, self.optimizer)
        return "-".join(map(str, (*chosen, *["adapter"] * self.adapter)))

    def config(self, folder: Path) -> dict[str, Any]:
        """A run of them over the corpora in a folder."""
        train = {"batch_size": 16, "accumulation": self.accumulation}
        config = run_config(
            folder,
            data=DATA[self.data],
            mesh=MESH,
            train=train | BATCHES[self.batches] | AVERAGES[self.average],
            optimizer=(OPTIMIZERS | SAME_MESH)[self.optimizer],
            **({"model": str(folder / "base"), "lora": LORA} if self.adapter else {"model": MODEL}),
        )
        if self.data == "mixture":
            del config["data"]["paths"]
            prose, code = ({"paths": str(folder / f"{name}.jsonl")} for name in ("corpus", "code"))
            config["data"]["sources"] = {"prose": prose, "code": code | {"epochs": 1, "fim": {"rate": 0.5}}}
            special = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"]
            config["tokenizer"] = {"kind": "bytes", "special_tokens": special}
        return config | {"run_dir": str(folder / str(self))}


@dataclass(frozen=True)
class Case:
    """A run, how often it saves, after which steps it dies, and on which mesh, by how many processes, it goes on."""

    settings: Settings
    every_steps: int
    deaths: tuple[int, ...]
    mesh: tuple[tuple[str, int], ...] = tuple(sorted(MESH.items()))
    processes: int = 1

    def __str__(self) -> str:
        mesh = ",".join(f"{axis}{size}" for axis, size in self.mesh)
        deaths = "+".join(map(str, self.deaths))
        processes = f"-{self.processes}-processes" if self.processes > 1 else ""
        return f"{self.settings}-every{self.every_steps}-dies{deaths}-{mesh}{processes}"


def drawn(count: int, *, seed: int, deaths: int, processes: int = 1) -> list[Case]:
    """Every kind of data and every optimizer in turn. Every second case goes on upon the mesh that it was on, every
    second pair dies more than once, and every third trains an adapter."""
    draw = random.Random(seed)
    kinds, optimizers = (draw.sample(list(choices), len(choices)) for choices in (DATA, OPTIMIZERS))
    cases = []
    for number in range(count):
        chosen = (draw.choice(list(BATCHES)), draw.choice([1, 2]), draw.choice(list(AVERAGES)))
        optimizer = optimizers[number % len(optimizers)]
        settings = Settings(kinds[number % len(kinds)], *chosen, optimizer, adapter=number % 3 == 2)
        times = 1 + (number // 2 % deaths)
        steps = tuple(sorted(draw.sample(range(1, STEPS), times)))
        mesh = draw.choice(OTHER_MESHES) if number % 2 else MESH
        cases.append(Case(settings, draw.randint(1, 4), steps, tuple(sorted(mesh.items())), processes))
    return cases


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Runs that nothing interrupts, one for each setting: (config, result)."""
    folder = tmp_path_factory.mktemp("truth")
    write_corpus(folder / "corpus.jsonl")
    write_corpus(folder / "code.jsonl", documents=60, seed=1)
    cfg = read_config(MODEL)
    write_pretrained(folder / "base", cfg, random_params(cfg))

    @functools.cache
    def run(settings: Settings):
        config = settings.config(folder)
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
    config |= {"mesh": dict(case.mesh)}
    if case.processes > 1:
        several = process(config, folder, processes=case.processes)
        _, said = several.communicate()
        assert several.returncode == 0, said
    else:
        jf.fit(config)
    run, whole_run = Path(config["run_dir"]), whole.run_dir
    ours, theirs = steps_of(run), steps_of(whole_run)
    if config["mesh"] != MESH or case.processes > 1:
        np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-5)
        assert validated(run) == pytest.approx(whole.validation, rel=1e-5)
        return
    assert ours == theirs
    assert validated(run) == whole.validation
    (state, row), (true_state, true_row) = saved_state(config), saved_state(whole_config)
    assert_bit_equal(state, true_state)
    assert row == true_row


def validated(run: Path) -> dict[str, float]:
    """What the last evaluation measured."""
    last = [line for line in metrics_of(run) if "validation_loss" in line][-1]
    return {name: value for name, value in last.items() if name.startswith("validation_loss")}


@pytest.mark.parametrize("case", drawn(4, seed=6, deaths=1), ids=str)
def test_a_run_that_died_goes_on_as_if_it_had_not(truth, case, tmp_path, monkeypatch):
    goes_on(truth, case, tmp_path, die_here, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", drawn(24, seed=7, deaths=2), ids=str)
def test_a_process_that_was_killed_goes_on_as_if_it_had_not(truth, case, tmp_path, monkeypatch):
    goes_on(truth, case, tmp_path, die_by_kill, monkeypatch)


@pytest.mark.slow
def test_a_process_that_was_killed_goes_on_in_the_bases_that_it_had_found(truth, tmp_path, monkeypatch):
    settings = Settings("first_fit", "even", 1, "ema", "soap", adapter=False)
    goes_on(truth, Case(settings, every_steps=2, deaths=(3, 6)), tmp_path, die_by_kill, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", drawn(5, seed=8, deaths=2, processes=2), ids=str)
def test_two_processes_go_on_where_one_was_killed(truth, case, tmp_path, monkeypatch):
    goes_on(truth, case, tmp_path, die_by_kill, monkeypatch)
