"""Which model types the matrix proves, by task, as `jaxformers models` reports it.

`python tests/families/proved.py` writes the file that the package ships; a test holds it to what the matrix runs.
"""

import json
import sys
from pathlib import Path

FILE = Path(__file__).parents[2] / "jaxformers" / "families" / "proved.json"
TASKS = {"train": ("logits", "gradients"), "generate": ("greedy", "cache"), "convert": ("files",)}


def proved() -> dict[str, list[str]]:
    """Types for which every check of a task runs on some row, by task."""
    from families.matrix import planned, types_of_rows

    types = types_of_rows()
    done = {(types[row], check) for row, check in planned()}
    return {
        task: sorted(t for t in set(types.values()) if all((t, check) in done for check in checks))
        for task, checks in TASKS.items()
    }


if __name__ == "__main__":
    sys.path[:0] = [str(FILE.parents[2]), str(Path(__file__).parents[1])]
    FILE.write_text(json.dumps(proved(), indent=1) + "\n", encoding="utf-8")
