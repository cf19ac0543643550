"""The parity matrix: every model type, and what is compared with its reference.

`pytest tests/families --matrix` prints it with what was found; the README holds it as it should be.
`python tests/families/matrix.py` prints that table.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECKS = {
    "logits": ("test_logits_are_the_references", "test_logits_are_the_twins"),
    "gradients": ("test_loss_and_every_gradient_are_the_references", "test_loss_and_every_gradient_are_the_twins"),
    "greedy": ("test_greedy_tokens_are_the_references", "test_greedy_tokens_are_the_twins"),
    "cache": ("test_cached_decoding_of_ragged_rows_is_the_forward_pass_at_every_position",),
    "packing": ("test_documents_packed_into_a_row_do_not_see_each_other",),
    "files": (
        "test_import_and_export_are_bit_equal_and_the_reference_opens_the_result",
        "test_import_and_export_are_bit_equal",
    ),
    "tp 4": ("test_tensor_parallel_logits_are_the_references",),
    "bfloat16": ("test_bfloat16_logits_are_as_near_to_the_truth_as_the_references",),
}
Outcomes = Mapping[tuple[str, str], bool]  # (row, check) -> whether it holds


def check_of(function: str) -> str | None:
    """The check that a test function makes."""
    return next((check for check, functions in CHECKS.items() if function in functions), None)


def types_of_rows() -> dict[str, str]:
    """The model type of every row and twin."""
    from families.checkpoints import ROWS
    from families.foreign import TWINS

    twins = {name: twin.config["model_type"] for name, twin in TWINS.items()}
    return {name: row.model_type for name, row in ROWS.items()} | twins


def planned() -> dict[tuple[str, str], bool]:
    """Every case of the quick suite, as if it held."""
    from families import test_execution, test_foreign, test_parity

    functions: Iterator[tuple[str, Callable]] = (
        item for module in (test_parity, test_foreign, test_execution) for item in vars(module).items()
    )
    return {(row, check): True for name, test in functions if (check := check_of(name)) for row in _rows(test)}


def _rows(test: Callable) -> set[str]:
    (mark,) = (mark for mark in test.pytestmark if mark.name == "parametrize")
    return {case if isinstance(case, str) else case.values[0] for case in mark.args[1]}


def table(outcomes: Outcomes) -> str:
    """A Markdown table: a line a type, a mark where every case of a check holds over all its variants."""
    types = types_of_rows()
    lines = ["| type | variants | " + " | ".join(CHECKS) + " |", "| --- " * (len(CHECKS) + 2) + "|"]
    for model_type in sorted(set(types.values()), key=str.lower):
        rows = [row for row, its_type in types.items() if its_type == model_type]
        cells = [_cell([outcomes[row, check] for row in rows if (row, check) in outcomes]) for check in CHECKS]
        lines.append(f"| {model_type} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(found: list[bool]) -> str:
    return "" if not found else "✓" if all(found) else "✗"


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    print(table(planned()))
