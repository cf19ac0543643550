"""What every test of a family starts from, and the parity matrix that `--matrix` prints at the end."""

import jax
import pytest
import torch
from families.matrix import check_of, table, types_of_rows

OUTCOMES: dict[tuple[str, str], bool] = {}


@pytest.fixture(autouse=True, scope="module")
def exact_matmuls():
    """float32 means float32, and one thread each: the machine is shared."""
    torch.set_num_threads(1)
    with jax.default_matmul_precision("highest"):
        yield


def pytest_addoption(parser):
    parser.addoption("--matrix", action="store_true", help="print the parity matrix of all model types at the end")


def pytest_collection_modifyitems(items):
    """The tests of a row follow one another in one process: they share its programs, which are dropped after them."""
    order = {name: number for number, name in enumerate(types_of_rows())}

    def place(item):
        return order.get(item.callspec.params.get("name"), -1) if hasattr(item, "callspec") else -1

    here = [i for i, item in enumerate(items) if place(item) >= 0 and check_of(item.originalname)]
    for i, item in zip(here, sorted((items[i] for i in here), key=place), strict=True):
        item.add_marker(pytest.mark.xdist_group(item.callspec.params["name"]))
        items[i] = item


def pytest_runtest_logreport(report):
    function, _, row = report.nodeid.rpartition("::")[2].partition("[")
    row, check = row.partition("@")[0].rstrip("]"), check_of(function)
    if check and (report.when == "call" or report.failed):
        OUTCOMES[row, check] = OUTCOMES.get((row, check), True) and report.passed


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--matrix", default=False):
        terminalreporter.section("parity matrix")
        terminalreporter.write_line(table(OUTCOMES))
