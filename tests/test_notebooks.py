"""Every notebook runs from its first cell to its last, keeps its outputs, and tells nothing of where it was run."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NEEDS_NO_TRAINING = ("jf.read_config({", "jf.model_spec(", "jf.make_mesh(")  # equal on every machine


def named(notebooks: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", notebooks, ids=lambda path: path.stem)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell: NotebookNode) -> str:
    """All that a cell put out as text, printed or shown."""
    return "".join(
        output.text if output.output_type == "stream" else output.data.get("text/plain", "") for output in cell.outputs
    )


def images_of(cell: NotebookNode) -> list[str]:
    return [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> dict[Path, NotebookNode]:
    """The notebooks after a run of their own in an empty folder. A cell that fails raises here, with its traceback."""
    runs = {}
    for path in NOTEBOOKS:
        runs[path] = nbformat.read(path, as_version=4)
        folder = tmp_path_factory.mktemp(path.stem)
        client = NotebookClient(
            runs[path],
            timeout=900,
            kernel_name="python3",
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute()
        assert list(folder.iterdir()) == [], f"{path.name} leaves files where it is run"
    return runs


def test_there_is_a_quickstart():
    assert FOLDER / "quickstart.ipynb" in NOTEBOOKS


@named(NOTEBOOKS)
def test_a_notebook_is_valid_and_was_run_in_order(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


@named(NOTEBOOKS)
def test_the_committed_outputs_are_there_and_hold_no_error_and_no_path_of_a_machine(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert all(cell.outputs for cell in cells), "a cell has no output"
    assert any(images_of(cell) for cell in cells), "no plot is kept"
    for cell in cells:
        assert all(output.output_type != "error" for output in cell.outputs)
        assert all(output.get("name") != "stderr" for output in cell.outputs), text_of(cell)
        assert not re.search(r"/(tmp|home|root|Users|opt|work|var)/", text_of(cell)), text_of(cell)


@named(NOTEBOOKS)
def test_a_fresh_run_puts_out_what_the_committed_one_did(path, executed):
    committed, fresh = code_cells(nbformat.read(path, as_version=4)), code_cells(executed[path])
    for before, after in zip(committed, fresh, strict=True):
        assert {output.output_type for output in after.outputs} == {output.output_type for output in before.outputs}
        assert len(images_of(after)) == len(images_of(before))
        if any(call in before.source for call in NEEDS_NO_TRAINING):
            assert text_of(after) == text_of(before)


def test_the_quickstart_learns_and_its_export_is_what_was_trained(executed):
    told = "\n".join(text_of(cell) for cell in code_cells(executed[FOLDER / "quickstart.ipynb"]))
    by_hand = [float(loss) for loss in re.findall(r"^step +\d+ +loss ([\d.]+)", told, re.MULTILINE)]
    assert by_hand[0] > 6 > 1 > by_hand[-1]
    assert float(re.search(r"validation loss ([\d.]+)", told)[1]) < 5.5  # log(1024) = 6.93 before the first step
    assert "model.safetensors" in told
    assert "on 1 device and on 8 alike: True" in told


def test_every_mesh_of_the_walk_through_the_axes_equals_one_device_and_its_misfits_are_refused(executed):
    told = "\n".join(text_of(cell) for cell in code_cells(executed[FOLDER / "parallelism.ipynb"]))
    assert told.count("equal to one device: True") == 5
    assert "equal to one device: False" not in told
    assert len(re.findall(r"^- ", told, re.MULTILINE)) == 6


def test_the_stream_of_a_mixture_is_the_same_after_a_resume_and_for_any_number_of_processes(executed):
    told = "\n".join(text_of(cell) for cell in code_cells(executed[FOLDER / "data.ipynb"]))
    shares = [float(share) for share in re.findall(r"([\d.]+)% of tokens are code", told)]
    assert shares == pytest.approx([50, 75], abs=3)
    assert "there already: [True, True]" in told
    assert "prose.jsonl:" in told, "the broken line is named"
    assert told.count("the same stream: True") == 5
    assert "the same stream: False" not in told
    assert told.count(" is refused: ") == 2
    assert "goes on, the same up to row 400: True" in told


def test_the_served_model_answers_in_the_form_that_is_asked_and_ends_when_told(executed):
    told = "\n".join(text_of(cell) for cell in code_cells(executed[FOLDER / "serving.ipynb"]))
    assert "the stream adds up to the answer: True" in told
    assert (
        len(re.findall(r"^\{'mood': '(?:good|bad|undecided)', 'score': \d+, 'tags': \[.*\]\}$", told, re.MULTILINE))
        == 3
    )
    assert re.search(r"^tool_calls get_weather \{'city': '(Paris|Lisbon)', 'days': [1-7]\}$", told, re.MULTILINE)
    assert "all were answered: True" in told
    assert "exit status: 0" in told


def test_an_adapter_changes_what_the_model_says_and_is_the_same_when_loaded_again(executed):
    told = "\n".join(text_of(cell) for cell in code_cells(executed[FOLDER / "finetune.ipynb"]))
    losses = [float(loss) for loss in re.findall(r"^step +\d+ +validation loss ([\d.]+)", told, re.MULTILINE)]
    assert losses[-1] < 0.5 < 1 < losses[0]
    before, after = told.split("before\n")[1].split("after\n")
    assert before.count("It is ") == 3
    assert after.count("Arr, ") == 6  # with the adapter of the run, and with the one loaded from its files
    assert "adapter_model.safetensors" in told
