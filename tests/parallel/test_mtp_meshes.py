"""Multi-token prediction on every mesh is what it is on one device: loss, gradient norm and parameters over steps.

The token that a module reads lies further on in the row: under a context axis on another device, in zigzag order.
"""

import jax
import pytest
from runs import Case, assert_equal_to_one_device, one_device
from tiny import relative_error

from jaxformers.models.params import path_name

BIAS, GLOBAL = (("expert_bias_rate", 0.05),), (("balance_over", "batch"),)
CP4, ONE_F_ONE_B = {"cp": 4}, {"pipeline": "1f1b"}
CASES = [
    Case("mtp", {"fsdp": 2, "tp": 2}, accumulation=4, remat="full", loss=BIAS),
    Case("mtp", CP4, chunk=8, loss=BIAS),
    Case("mtp", {"ep": 2, "cp": 2}, context="ulysses", loss=BIAS),
]
MORE_CASES = [
    Case("mtp", {}, accumulation=4, layers="unroll", remat="none"),
    Case("mtp", {"dp": 8}, accumulation=4, layers="unroll", zero=1),
    Case("mtp", {"fsdp": 8}, remat="dots"),
    Case("mtp", {"tp": 4}, sequence_parallel=True),
    Case("mtp", {"dp": 2, "tp": 4}, accumulation=4, chunk=8, sequence_parallel=True),
    Case("mtp", {"dp": 2, "fsdp": 2, "tp": 2}, zero=2, loss=BIAS),
    Case("mtp", {"cp": 8}, accumulation=2, remat="full"),
    Case("mtp", CP4, context="ulysses"),
    Case("mtp", CP4, context="hybrid", accumulation=4),
    Case("mtp", {"fsdp": 2, "cp": 2, "tp": 2}, chunk=8, sequence_parallel=True),
    Case("mtp", {"ep": 4}, accumulation=2, loss=BIAS),
    Case("mtp", {"ep": 2, "tp": 2}, layers="unroll", remat="none"),
    Case("mtp", {"dp": 2, "ep": 2}, loss=GLOBAL),
]
PP2 = {"pp": 2}
PIPELINES = [
    Case("deep mtp", PP2 | {"fsdp": 2}, accumulation=2, loss=BIAS),
]
MORE_PIPELINES = [
    Case("deep mtp", PP2, **ONE_F_ONE_B, loss=BIAS),
    Case("deep mtp", PP2 | {"fsdp": 2}, chunk=8, **ONE_F_ONE_B | {"remat": "full"}),
    Case("deep mtp", PP2 | {"tp": 2}, **ONE_F_ONE_B),
    Case("deep mtp", PP2 | {"ep": 2}, accumulation=2, **ONE_F_ONE_B, loss=BIAS),
    Case("deep mtp", PP2 | {"cp": 2}, chunk=8, remat="full"),
    Case("deep mtp", PP2 | {"tp": 2}, pipeline="interleaved", loss=BIAS),
    Case("deep mtp", PP2 | {"ep": 2}, stages=(1, 3), loss=BIAS),
]


@pytest.mark.parametrize("case", CASES + PIPELINES, ids=str)
def test_modules_train_on_a_mesh_as_on_one_device(case):
    assert_equal_to_one_device(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES + MORE_PIPELINES, ids=str)
def test_modules_train_on_further_meshes_as_on_one_device(case):
    assert_equal_to_one_device(case)


def test_every_weight_of_every_module_is_trained():
    """Else equality would prove nothing."""
    start = one_device("mtp", (("mtp_loss", 0.0), *BIAS)).params["mtp"]
    trained = one_device("mtp", BIAS).params["mtp"]
    for (path, before), after in zip(jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(trained), strict=True):
        assert relative_error(after, before) > 1e-4, path_name(path)
