"""What a run says about itself, and that nothing which listens can harm it."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from jaxformers.train.monitor import Display, MetricsFile, Trackers, describe


def lines(path) -> list[str]:
    return (path / "metrics.jsonl").read_text().splitlines()


def write(path, steps, *, resume_step=0):
    file = MetricsFile(path, resume_step=resume_step)
    for step in steps:
        file.log(step, {"loss": 1 / step})
    file.close()


def test_each_line_is_one_json_object_with_its_step_first(tmp_path):
    write(tmp_path, [1, 2])
    assert lines(tmp_path) == ['{"step": 1, "loss": 1.0}', '{"step": 2, "loss": 0.5}']


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    file = MetricsFile(tmp_path, resume_step=0)
    file.log(1, {"loss": 2.5})
    assert json.loads(lines(tmp_path)[0])["loss"] == 2.5
    file.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_json_has_no_number_for_becomes_null(tmp_path, value):
    file = MetricsFile(tmp_path, resume_step=0)
    file.log(1, {"loss": value, "mfu": None})
    file.close()
    assert lines(tmp_path) == ['{"step": 1, "loss": null, "mfu": null}']


def test_a_resume_drops_the_steps_that_are_taken_again_and_keeps_the_others_bytes(tmp_path):
    write(tmp_path, [1, 2, 3, 4, 5])
    before = lines(tmp_path)
    write(tmp_path, [4], resume_step=3)
    assert lines(tmp_path) == [*before[:3], '{"step": 4, "loss": 0.25}']


def test_a_fresh_start_begins_a_new_file(tmp_path):
    write(tmp_path, [1, 2, 3])
    write(tmp_path, [1])
    assert lines(tmp_path) == ['{"step": 1, "loss": 1.0}']


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "lo', "", "{", "null", "7", '{"loss": 1}', '{"step": null}', '\ufffd{"step"']
)
def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path, torn):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write(tmp_path, [3], resume_step=2)
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_whole_line_without_its_end_stays_a_line_of_its_own(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().removesuffix("\n"))
    write(tmp_path, [3], resume_step=2)
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_bytes_that_are_no_text_are_dropped(tmp_path):
    write(tmp_path, [1])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 1, "x": "\xff\xfe\n\x00\x00\x00')
    write(tmp_path, [2], resume_step=1)
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2]


class Recorder:
    def __init__(self):
        self.seen, self.closed = [], False

    def log(self, step, metrics):
        self.seen.append((step, dict(metrics)))

    def close(self):
        self.closed = True


class Broken(Recorder):
    def log(self, step, metrics):
        super().log(step, metrics)
        raise ConnectionError("no route to the server")

    def close(self):
        super().close()
        raise OSError("still no route")


def test_a_tracker_that_raises_is_named_once_and_left_out_and_the_others_go_on(caplog):
    broken, recorder = Broken(), Recorder()
    trackers = Trackers([broken, recorder])
    for step in (1, 2):
        trackers.log(step, {"loss": 3.0})
    trackers.close()
    assert recorder.seen == [(1, {"loss": 3.0}), (2, {"loss": 3.0})]
    assert recorder.closed
    assert len(broken.seen) == 1
    assert broken.closed
    assert caplog.messages == [
        "Broken failed at step 1 and is off from now on: no route to the server",
        "Broken failed to close: still no route",
    ]


def test_a_tracker_that_cannot_close_does_not_keep_the_others_from_it(caplog):
    class BadEnd(Recorder):
        def close(self):
            raise OSError("no")

    recorder = Recorder()
    Trackers([BadEnd(), recorder]).close()
    assert recorder.closed


METRICS = {"loss": 2.34567, "tokens_per_second": 12345.6, "mfu": 0.4321}


def test_the_few_watched_numbers_are_one_line():
    assert describe(METRICS) == "loss 2.346  12,346 tok/s  MFU 43%"
    assert describe(METRICS | {"mfu": None, "loss": np.nan}) == "loss nan  12,346 tok/s"


def test_where_output_is_no_terminal_a_line_comes_now_and_then_and_at_the_end(monkeypatch):
    out = io.StringIO()
    display = Display(first_step=0, steps=5, console=Console(file=out, width=200))
    clock = iter([100.0, 100.0, 101.0, 112.0, 112.0, 113.0, 114.0, 114.0])
    monkeypatch.setattr("jaxformers.train.monitor.time.monotonic", lambda: next(clock))
    for step in range(1, 6):
        display.update(step, METRICS, seconds_left=5.0 - step)
    display.close()
    shown = [line for line in out.getvalue().splitlines() if line]
    assert shown == [f"step {step}/5  {describe(METRICS)}  {5 - step}s left" for step in (1, 3, 5)]


def test_a_terminal_gets_a_bar_and_lines_stay_above_it():
    out = io.StringIO()
    display = Display(first_step=2, steps=4, console=Console(file=out, width=160, force_terminal=True))
    display.update(3, METRICS, seconds_left=1)
    display.say("step 3: validation loss [2] nats")
    display.close()
    assert "3/4" in out.getvalue()
    assert "loss 2.346" in out.getvalue()
    assert "step 3: validation loss [2] nats" in out.getvalue(), "brackets are text, not markup"
