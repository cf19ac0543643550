"""What other trackers are given, through stand-ins for their makers' modules: none of them needs a network or a
process here. TensorBoard's own files are read back."""

import sys
from types import SimpleNamespace

import pytest

from jaxformers.train.trackers import TensorBoard, check_trackers, open_trackers, scalars

LINE = {"loss": 2.0, "mfu": None, "max_attention_logit/layers.0": [1.0, 3.0], "loss/we?b": 1.5}


def test_a_line_is_its_numbers_and_the_largest_of_each_list():
    assert scalars(LINE | {"name": "x", "none": []}) == {
        "loss": 2.0,
        "max_attention_logit/layers.0": 3.0,
        "loss/we?b": 1.5,
    }


def test_tensorboard_reads_what_was_logged(tmp_path):
    board = TensorBoard(tmp_path)
    for step in (1, 2, 3):
        board.log(step, {"loss": 2.0 / step, "mfu": None, "name": "x", "heads": [1.0, 4.0 * step]})
    board.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    from tensorboardX.proto.event_pb2 import Event

    content, found = path.read_bytes(), []
    while content:  # TFRecord: length, checksum of it, data, checksum of that
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    named = {"loss": lambda step: pytest.approx(2.0 / step), "heads": lambda step: 4.0 * step}
    assert found == [(step, name, value(step)) for step in (1, 2, 3) for name, value in named.items()]


class WandbRun:
    def __init__(self):
        self.lines, self.metrics, self.finished = [], [], False

    def define_metric(self, name, *, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, line):
        self.lines.append(line)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    begun = []

    def init(**settings):
        begun.append((settings, WandbRun()))
        return begun[-1][1]

    module = SimpleNamespace(init=init, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return begun


def test_wandb_gets_every_line_with_its_step_and_a_resumed_run_goes_on_in_its_own(tmp_path, wandb):
    for resumes, step in ((False, 7), (True, 8), (False, 1)):
        (tracker,) = open_trackers(["wandb"], tmp_path, config={"seed": 3}, resumes=resumes)
        tracker.log(step, LINE)
        tracker.close()
    (first, run), (second, _), (third, _) = wandb
    assert run.lines == [{"loss": 2.0, "max_attention_logit/layers.0": 3.0, "loss/we?b": 1.5, "step": 7}]
    assert run.metrics == [("*", "step")], "steps that are made again are shown where they belong"
    assert run.finished
    assert (first["project"], first["name"], first["config"]) == ("jaxformers", tmp_path.name, {"seed": 3})
    assert first["id"] == second["id"] != third["id"]


class MlflowClient:
    """Holds what it is told; its experiments and runs have numbers for names."""

    made: "list[MlflowClient]"

    def __init__(self, *, tracking_uri):
        self.uri, self.experiments, self.runs, self.params, self.metrics, self.ended = tracking_uri, [], [], {}, [], []
        self.made.append(self)

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id="0") if name in self.experiments else None

    def create_experiment(self, name):
        self.experiments.append(name)
        return "0"

    def create_run(self, experiment, *, run_name):
        self.runs.append((experiment, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run of client {len(self.made)}"))

    def log_param(self, run, key, value):
        self.params[key] = value

    def log_batch(self, run, *, metrics):
        self.metrics += [(run, *metric) for metric in metrics]

    def set_terminated(self, run):
        self.ended.append(run)


@pytest.fixture
def mlflow(monkeypatch):
    made = []
    client = type("Client", (MlflowClient,), {"made": made})
    entities = SimpleNamespace(Metric=lambda name, value, time, step: (name, value, step))
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=client, __spec__=SimpleNamespace()))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return made


def test_mlflow_gets_the_config_and_every_line_and_a_resumed_run_goes_on_in_its_own(tmp_path, mlflow):
    for resumes in (False, True):
        (tracker,) = open_trackers(["mlflow"], tmp_path, config={"train": {"steps": 5}, "seed": 3}, resumes=resumes)
        tracker.log(7, LINE)
        tracker.close()
    first, second = mlflow
    assert first.uri == (tmp_path / "mlflow").as_uri()
    assert (first.experiments, first.runs) == (["jaxformers"], [("0", tmp_path.name)])
    assert first.params == {"train.steps": "5", "seed": "3"}
    # Its names have fewer characters, and its files no folder that is a file too.
    named = [("loss", 2.0, 7), ("max_attention_logit.layers.0", 3.0, 7), ("loss.we_b", 1.5, 7)]
    assert first.metrics == second.metrics == [("run of client 1", *metric) for metric in named]
    assert second.runs == []
    assert second.ended == ["run of client 1"]


def test_a_tracker_that_cannot_begin_is_named_and_left_out_and_the_others_listen(tmp_path, monkeypatch, caplog):
    def init(**settings):
        raise ConnectionError("no route to the server")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=SimpleNamespace()))
    (board,) = open_trackers(["wandb", "tensorboard"], tmp_path, config={}, resumes=False)
    board.close()
    assert isinstance(board, TensorBoard)
    assert caplog.messages == ["monitor.trackers: wandb did not begin and is off: no route to the server"]


@pytest.mark.parametrize(
    "name, module, extra",
    [("tensorboard", "tensorboardX", "monitor"), ("wandb", "wandb", "wandb"), ("mlflow", "mlflow", "mlflow")],
)
def test_a_tracker_without_its_extra_says_what_to_install(monkeypatch, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError) as refusal:
        check_trackers([name])
    needed = f"monitor.trackers has {name}, which needs {module}: pip install 'jaxformers[{extra}]'"
    assert str(refusal.value) == needed
