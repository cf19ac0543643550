"""An engine's benchmark asks for what it says, and its figures follow from what came and when."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from infer.foreseeing import DEEPSEEK, foreseeing_params
from tiny import LLAMA

from jaxformers import bench_cli
from jaxformers.bench import as_dict, random_prepared
from jaxformers.bench_engine import Load, bench_engine
from jaxformers.families import read_config
from jaxformers.hub.pretrained import write_pretrained
from jaxformers.infer.engine import Engine
from jaxformers.infer.request import EngineConfig

LOAD = Load(requests=12, concurrency=4, prompt_tokens=40, new_tokens=10, shared=32)


@pytest.fixture(scope="module")
def engine():
    jax.config.update("jax_disable_most_optimizations", True)
    cfg = read_config(LLAMA | {"max_position_embeddings": 128})
    yield Engine(
        random_prepared(cfg, "float32"), EngineConfig(slots=3, page_size=8, prefill_chunk=16, prefill_piece=16)
    )
    jax.config.update("jax_disable_most_optimizations", False)


def test_a_load_is_the_same_each_time_and_as_long_as_it_says():
    first, again = (list(LOAD.draw(300)) for _ in range(2))
    assert first == again
    assert [at for at, _ in first] == [0.0] * 12
    prompts = [request.prompt for _, request in first]
    assert {tuple(prompt[:32]) for prompt in prompts} == {tuple(prompts[0][:32])}
    assert len({tuple(prompt) for prompt in prompts}) == 12
    lengths = [len(request.prompt) + request.max_new_tokens for _, request in first]
    assert max(lengths) <= LOAD.longest


def test_arrivals_of_an_open_loop_are_a_poisson_process():
    times = np.array([at for at, _ in Load(requests=2000, rate=5.0).draw(300)])
    gaps = np.diff(times, prepend=0.0)
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() == pytest.approx(0.2, rel=0.1)  # of an exponential distribution, the mean


@pytest.mark.parametrize("rate", [None, 200.0])
def test_every_request_is_answered_and_every_figure_is_of_this_load(engine, rate):
    load = Load(**{**vars(LOAD), "rate": rate})
    report, asked = bench_engine(engine, load), [request for _, request in load.draw(300)]
    assert report.new_tokens == sum(request.max_new_tokens for request in asked)
    assert report.tokens_per_second * report.seconds == pytest.approx(report.new_tokens)
    assert report.hit_rate > 0.3
    assert report.compilations == 0
    assert 0 < report.first_token.median <= report.whole.median <= report.whole.p99 <= report.seconds
    assert 0 < report.between_tokens.median <= report.between_tokens.p90 <= report.between_tokens.p99
    rows = dict(row for row in bench_cli._engine_rows(report, load, 3) if row)
    assert rows["compilations"].startswith("0 after")
    assert report.drafted_tokens == report.accepted_tokens == 0
    assert "guesses" not in rows
    assert as_dict(report)["whole"]["median"] == report.whole.median


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"requests": 0}, "requests is 0; it must be at least 1"),
        ({"rate": 0.0}, "rate is 0.0; it must be above 0"),
        ({"spread": 1.0}, "spread is 1.0; it must be from 0 to below 1"),
        ({"shared": 128}, "shared is 128; it must be from 0 to below prompt_tokens, 128"),
    ],
)
def test_a_load_that_cannot_be_is_refused(settings, line):
    with pytest.raises(ValueError, match=line):
        Load(**settings)


@pytest.mark.usefixtures("quick_compilation")
def test_the_command_says_how_many_guesses_of_a_models_modules_came(tmp_path, command):
    cfg = read_config(DEEPSEEK | {"num_hidden_layers": 1})
    write_pretrained(tmp_path, cfg, foreseeing_params(cfg, doubt=1.0))
    sizes = ("--requests", 3, "--prompt", 9, "--new-tokens", 20, "--slots", 2, "--draft-tokens", 2)
    code, out, _ = command("bench", "engine", tmp_path, "--speculate", "mtp", *sizes, "--json")
    report = json.loads(out)
    assert (code, report["compilations"]) == (0, 0)
    assert 0 <= report["accepted_tokens"] < report["drafted_tokens"] <= 2 * report["new_tokens"]
    rows = dict(bench_cli._guess_rows(SimpleNamespace(drafted_tokens=2000, accepted_tokens=500)))
    assert rows["guesses"] == "2,000 tokens, 25.0% of them accepted"


@pytest.mark.parametrize(
    "options, line",
    [
        (("--speculate", "mtp"), "speculate is 'mtp', but this llama model was loaded without modules"),
        (("--speculate", "draft"), "speculate is 'draft', which names a draft model, but none is given"),
    ],
)
def test_the_command_refuses_guesses_that_nothing_could_make(command, options, line):
    assert line in command("bench", "engine", "--preset", "llama-tiny", *options).mistake


def test_the_command_refuses_such_a_load_in_one_line(command):
    code, _, err = command("bench", "engine", "--preset", "llama-tiny", "--rate", "-1")
    assert code == 2
    assert "rate is -1.0; it must be above 0" in err
