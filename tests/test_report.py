"""The report: what its page holds of runs that went well, are in progress, or were cut short."""

import json
import re

import pytest
from serve.browser import Browser

from jaxformers.report.page import MOST_POINTS, render, write_report
from jaxformers.report.read import read_run


def write_run(path, *, steps=20, done=20, rate=1e-3, extra=None, torn=""):
    """A run directory as training writes it, without any model."""
    path.mkdir(parents=True)
    lines = [
        {"step": s, "loss": 5 / s, "tokens": 64 * s, "step_seconds": 0.5, "tokens_per_second": 128.0, "mfu": None}
        | ((extra or {}) if s % 5 == 0 else {})
        for s in range(1, done + 1)
    ]
    lines.append({"step": done, "validation_loss": 4.0, "validation_loss/web": 3.5})
    if done == steps:
        lines.append({"step": done, "goodput": 0.9, "seconds/productive": 9.0, "seconds/compile": 1.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn, encoding="utf-8")
    config = f"train:\n  steps: {steps}\noptimizer:\n  learning_rate: {rate}\nrun_dir: {path}\n"
    (path / "config.yaml").write_text(config, encoding="utf-8")
    return path


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def report_of(*paths):
    return data_of(render([read_run(path) for path in paths]))["runs"]


def test_a_page_asks_nothing_of_any_other_place(tmp_path):
    page = render([read_run(write_run(tmp_path / "a"))])
    assert page.startswith("<!DOCTYPE html>")
    addresses = set(re.findall(r"https?://[^\"'\s)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "the name of a namespace, which is never fetched"
    for loads in ("<link", "<img", " src=", "@import", "url(", "fetch(", "import("):
        assert loads not in page.replace("url(#", ""), loads
    assert "{{" not in page


def test_series_are_the_lines_of_metrics_by_step(tmp_path):
    (run,) = report_of(write_run(tmp_path / "a"))
    assert run["series"]["loss"] == {"x": list(range(1, 21)), "y": [float(f"{5 / s:.6g}") for s in range(1, 21)]}
    assert run["series"]["validation_loss"] == {"x": [20], "y": [4.0]}
    assert "mfu" not in run["series"], "there was never a number"
    assert run["axes"]["tokens"][-1] == 1280
    assert run["axes"]["hours"][-1] == pytest.approx(20 * 0.5 / 3600, rel=1e-5)
    assert run["time"] == {"productive": 9.0, "compile": 1.0}
    assert (run["step"], run["steps"], run["config"]["optimizer.learning_rate"]) == (20, 20, "0.001")


def test_steps_between_lines_count_for_the_time_taken(tmp_path):
    path = write_run(tmp_path / "a")
    lines = [{"step": step, "loss": 1.0, "tokens": step, "step_seconds": 2.0} for step in (10, 20)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = report_of(path)
    assert run["axes"]["hours"] == [pytest.approx(20 / 3600, rel=1e-5), pytest.approx(40 / 3600, rel=1e-5)]


@pytest.mark.parametrize("torn", ['{"step": 13, "lo', "\x00\x00", "[]\n", '{"step": true}\n', "7"])
def test_a_run_that_was_cut_short_shows_its_whole_lines(tmp_path, torn):
    (run,) = report_of(write_run(tmp_path / "a", done=12, torn=torn))
    assert (run["step"], run["steps"], run["time"]) == (12, 20, {})
    assert run["series"]["loss"]["x"] == list(range(1, 13))


def test_a_number_that_is_missing_is_a_gap(tmp_path):
    path = write_run(tmp_path / "a")
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 2.0}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report_of(path)[0]["series"]["loss"]["y"] == [1.0, None, 2.0]


def test_what_layers_say_is_a_table_of_layers_by_steps(tmp_path):
    extra = {
        "grad_norm/layers.0.attn": 0.5,
        "grad_norm/layers.10.attn": 0.25,
        "grad_norm/embed": 3.0,
        "max_attention_logit/layers.2": [1.0, 7.0],
        "expert_load/layers.2": [0.5, 1.5],
    }
    (run,) = report_of(write_run(tmp_path / "a", extra=extra))
    attn = run["layers"]["grad_norm"]["kinds"]["attn"]
    assert run["layers"]["grad_norm"]["steps"] == [5, 10, 15, 20]
    assert attn == {"layers": [0, 10], "values": [[0.5] * 4, [0.25] * 4]}
    assert run["layers"]["max_attention_logit"]["kinds"][""]["values"] == [[7.0] * 4], "the largest of its heads"
    assert run["experts"] == {"step": 20, "layers": [2], "load": [[0.5, 1.5]]}
    assert run["series"]["grad_norm/embed"]["y"] == [3.0] * 4
    assert not any("layers." in name for name in run["series"])


def test_a_long_run_keeps_its_extremes(tmp_path):
    path = write_run(tmp_path / "a")
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, 30_001):
            file.write(json.dumps({"step": step, "loss": 99.0 if step == 12_345 else 1.0 + step % 7}) + "\n")
    series = report_of(path)[0]["series"]["loss"]
    assert len(series["x"]) <= MOST_POINTS
    assert 99.0 in series["y"]
    assert series["x"] == sorted(series["x"])


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = report_of(write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run"))
    assert [run["name"] for run in runs] == ["x/run", "y/run"]


def test_what_a_run_says_of_itself_is_shown_and_cannot_end_the_script(tmp_path):
    path = write_run(tmp_path / "a")
    evil = "</script><script>alert(1)</script>"
    (path / "samples.json").write_text(json.dumps([{"prompt": "Once", "text": evil}]))
    (path / "about.json").write_text(json.dumps({"parameters": "7", "versions": {"jax": "1.0"}}))
    page = render([read_run(path)])
    assert evil not in page
    (run,) = data_of(page)["runs"]
    assert run["samples"] == [{"prompt": "Once", "text": evil}]
    assert (run["about"], run["versions"]) == ({"parameters": "7"}, {"jax": "1.0"})


def test_a_file_that_is_half_written_is_as_if_it_were_not_there(tmp_path):
    path = write_run(tmp_path / "a")
    (path / "about.json").write_text('{"parameters": "7')
    (path / "samples.json").write_text("{}")
    (run,) = report_of(path)
    assert (run["about"], run["samples"]) == ({}, [])


def test_the_command_writes_the_page(tmp_path, command):
    paths = [write_run(tmp_path / name, rate=rate) for name, rate in (("a", 1e-3), ("b", 2e-3))]
    outcome = command("report", *paths, "--output", tmp_path / "page.html")
    assert (outcome.code, outcome.err) == (0, f"{tmp_path / 'page.html'}: 2 runs\n")
    runs = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))["runs"]
    assert [run["config"]["optimizer.learning_rate"] for run in runs] == ["0.001", "0.002"]


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, command):
    assert command("report", tmp_path / "no").mistake == f"{tmp_path / 'no'}: no such run directory"
    (tmp_path / "empty").mkdir()
    nothing = f"{tmp_path / 'empty'} holds no metrics.jsonl: it is no run, or one that has taken no step yet"
    assert command("report", tmp_path / "empty").mistake == nothing
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1, "l')
    assert command("report", tmp_path / "empty").mistake == f"{tmp_path / 'empty'}/metrics.jsonl has no whole line yet"


def test_a_run_given_twice_is_refused(tmp_path):
    path = write_run(tmp_path / "a")
    with pytest.raises(ValueError, match=re.escape(f"the run {path} is given twice")):
        write_report([path, path / ".." / "a"], tmp_path / "page.html")


def test_a_config_that_is_no_yaml_is_refused(tmp_path):
    path = write_run(tmp_path / "a")
    (path / "config.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"config.yaml is not YAML: ") as refusal:
        read_run(path)
    assert "\n" not in str(refusal.value)


POINTER = """(() => {
  const svg = document.querySelector("section.card svg"), box = svg.getBoundingClientRect();
  for (const [kind, share] of %s)
    svg.dispatchEvent(new PointerEvent(kind,
      {clientX: box.left + share * box.width, clientY: box.top + 50, pointerType: "mouse", bubbles: true}));
})()"""


def test_its_plots_are_drawn_say_what_the_pointer_is_at_and_zoom(tmp_path):
    runs = [write_run(tmp_path / name, steps=60, done=60) for name in ("a", "b")]
    write_report(runs, tmp_path / "report.html")
    browser = Browser(tmp_path / "profile")

    def marks():
        return browser.see(
            "[...document.querySelector('section.card svg').querySelectorAll('text')].map(t => t.innerHTML)"
        )

    try:
        browser.open((tmp_path / "report.html").as_uri(), width=1200, height=900)
        assert browser.see("document.querySelector('section.card h3').textContent") == "Training loss nats"
        assert browser.see("document.querySelectorAll('section.card svg')[0].querySelectorAll('path').length") == len(
            runs
        )
        whole = marks()
        browser.see(POINTER % '[["pointermove", 1]]')
        assert browser.text("#tip").split() == ["step", "60", "a", "0.08333", "b", "0.08333"]
        browser.see(POINTER % '[["pointerdown", 0.5], ["pointermove", 0.6], ["pointerup", 0.7]]')
        assert marks() != whole
        browser.see("document.querySelector('section.card svg').dispatchEvent(new Event('dblclick'))")
        assert marks() == whole
        browser.click("section.card button")
        assert marks() != whole
        assert browser.problems == []
    finally:
        browser.close()
