"""Who may import whom: the layers of the package, enforced over the source of every module."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import jaxformers

ROOT = Path(jaxformers.__file__).parent
# package -> the first-party packages (or modules) it may import besides itself
FIRST_PARTY: dict[str, set[str]] = {
    "models": set(),
    "families": {"models"},
    "hub": {"models", "families"},
    "parallel": {"models"},
    "data": set(),
    "train": {"models", "parallel", "hub", "data"},
    "infer": {"models", "parallel"},
    "serve": {"infer", "data.tokenizer", "data.stops"},
    "evaluate": {"models", "infer"},
    "quantize": {"models", "hub", "infer"},
    "launch": set(),
    "report": {"train"},
}
# package -> the only third-party modules it may import
THIRD_PARTY = {"models": {"jax", "numpy", "flax.struct"}, "families": set()}
# The modules beside the packages compose them: they may import everything, and no package imports them.
ENTRY_POINTS = {path.stem for path in ROOT.glob("*.py")}
NEVER = {"torch", "transformers", "tensorflow"}
HOLDS_JAX_IN_DATA = "data.pipeline"


class Import(NamedTuple):
    """One import statement: the module it stands in and the module it names, both without `jaxformers.`."""

    where: str
    line: int
    named: str
    first_party: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1])


def imports_of(path: Path) -> list[Import]:
    """Every import of a module, wherever it stands; `from a import b` counts as `a.b`, and as `a` if b is a name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            first_party = top == ROOT.name
            found.append(Import(module_name(path), node.lineno, rest if first_party else name, first_party))
    return found


MODULES = sorted(ROOT.rglob("*.py"))
IMPORTS = [found for path in MODULES for found in imports_of(path)]
FIRST = [found for found in IMPORTS if found.first_party]
THIRD = [i for i in IMPORTS if not i.first_party and i.named.partition(".")[0] not in sys.stdlib_module_names]


def package_of(module: str) -> str:
    return module.partition(".")[0]


def is_within(named: str, allowed: set[str]) -> bool:
    """Whether a dotted name is one of the allowed modules, or lies in one."""
    return any(named == module or named.startswith(f"{module}.") for module in allowed)


def listed(imports: list[Import]) -> str:
    return "\n".join(f"{found.where}, line {found.line}: {found.named}" for found in imports)


def test_every_package_has_a_row_in_the_table():
    packages = {package_of(module_name(path)) for path in MODULES}
    assert packages <= FIRST_PARTY.keys() | ENTRY_POINTS
    assert packages >= {"models", "families", "hub"}


@pytest.mark.parametrize("package", FIRST_PARTY)
def test_a_package_imports_only_those_below_it(package):
    allowed = {package} | FIRST_PARTY[package]
    wrong = [i for i in FIRST if package_of(i.where) == package and not is_within(i.named, allowed)]
    assert not wrong, listed(wrong)


def test_no_package_imports_what_composes_them():
    wrong = [i for i in FIRST if package_of(i.where) not in ENTRY_POINTS and package_of(i.named) in ENTRY_POINTS | {""}]
    assert not wrong, listed(wrong)


def test_no_module_imports_another_framework():
    wrong = [i for i in THIRD if is_within(i.named, NEVER)]
    assert not wrong, listed(wrong)


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_models_and_families_need_next_to_nothing(package):
    wrong = [i for i in THIRD if package_of(i.where) == package and not is_within(i.named, THIRD_PARTY[package])]
    assert not wrong, listed(wrong)


def test_data_is_made_without_jax_but_for_the_last_hop():
    jax_there = [i for i in THIRD if package_of(i.where) == "data" and is_within(i.named, {"jax"})]
    wrong = [i for i in jax_there if i.where != HOLDS_JAX_IN_DATA]
    assert not wrong, listed(wrong)


def in_a_fresh_interpreter(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_loads_neither_jax_nor_any_other_heavy_library():
    heavy = {"jax", "numpy", "flax", "optax", "orbax", "grain", "tokenizers", "pydantic", "typer"}
    code = f"import sys, jaxformers; print(*sorted({heavy!r} & sys.modules.keys()))"
    assert in_a_fresh_interpreter(code).split() == []


def test_importing_the_package_takes_less_than_a_third_of_a_second():
    code = "import time; start = time.perf_counter(); import jaxformers; print(time.perf_counter() - start)"
    assert min(float(in_a_fresh_interpreter(code)) for _ in range(3)) < 0.3


def test_serving_and_generating_load_nothing_that_only_training_needs():
    unneeded = {"optax", "orbax", "grain", "tensorstore", "jaxformers.train", "jaxformers.data.config"}
    code = f"import sys, jaxformers.serving, jaxformers.generation; print(*sorted({unneeded!r} & sys.modules.keys()))"
    assert in_a_fresh_interpreter(code).split() == []
