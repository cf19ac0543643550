"""Which model types the matrix proves, by task, as `jaxformers models` reports it.

`python tests/families/proved.py` writes the file that the package ships; a test holds it to what the matrix runs.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

FILE = Path(__file__).parents[2] / "jaxformers" / "families" / "proved.json"


def rows_of(test: Callable) -> set[str]:
    """The rows that a test runs for."""
    (mark,) = (mark for mark in test.pytestmark if mark.name == "parametrize")
    return {case if isinstance(case, str) else case.values[0] for case in mark.args[1]}


def proved() -> dict[str, list[str]]:
    """Types of which some row is run by every test of a task."""
    from families import test_foreign as twins
    from families import test_parity as matrix
    from families.checkpoints import ROWS
    from families.foreign import TWINS

    tasks = {
        "train": [
            (matrix.test_logits_are_the_references, matrix.test_loss_and_every_gradient_are_the_references),
            (twins.test_logits_are_the_twins, twins.test_loss_and_every_gradient_are_the_twins),
        ],
        "generate": [
            (
                matrix.test_greedy_tokens_are_the_references,
                matrix.test_cached_decoding_of_ragged_rows_is_the_forward_pass_at_every_position,
            ),
            (
                twins.test_greedy_tokens_are_the_twins,
                twins.test_cached_decoding_of_ragged_rows_is_the_forward_pass_at_every_position,
            ),
        ],
        "convert": [
            (matrix.test_import_and_export_are_bit_equal_and_the_reference_opens_the_result,),
            (twins.test_import_and_export_are_bit_equal,),
        ],
    }
    types = {name: row.model_type for name, row in ROWS.items()}
    types |= {name: twin.config["model_type"] for name, twin in TWINS.items()}
    runs = {task: [set.intersection(*map(rows_of, tests)) for tests in groups] for task, groups in tasks.items()}
    return {task: sorted({types[name] for rows in groups for name in rows}) for task, groups in runs.items()}


if __name__ == "__main__":
    sys.path[:0] = [str(FILE.parents[2]), str(Path(__file__).parents[1])]
    FILE.write_text(json.dumps(proved(), indent=1) + "\n", encoding="utf-8")
