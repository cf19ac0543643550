"""One process of several that work as one, started by tests: trains the configs of a file, one after the other.

    python worker.py CONFIGS.json

Who it is comes from variables, as for `jaxformers train`. Beside each run without evaluation it leaves the rows that
it was fed.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from jaxformers import training
from jaxformers.config import load_config
from jaxformers.data.pipeline import process_share
from jaxformers.environment import set_up
from jaxformers.parallel import distributed
from jaxformers.parallel.processes import find_processes


def main() -> None:
    set_up()
    jax.config.update("jax_default_matmul_precision", "highest")
    distributed.start(find_processes())
    to_global, fed = training.to_global, []

    def remember(batch, mesh, spec, **settings):
        fed.append((process_share(mesh, spec).index, batch["tokens"]))
        return to_global(batch, mesh, spec, **settings)

    training.to_global = remember
    for values in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        fed.clear()
        result = training.fit(load_config(values))
        if result.validation:
            continue
        shares, tokens = zip(*fed, strict=True)
        name = f"fed_at_{result.step}_by_{jax.process_index()}_of_{jax.process_count()}.npz"
        np.savez(Path(values["run_dir"]) / name, shares=shares, tokens=tokens)


if __name__ == "__main__":
    main()
