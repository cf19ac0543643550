"""Fixtures that every test of a family starts from."""

import jax
import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def exact_matmuls():
    """float32 means float32, and one thread each: the machine is shared."""
    torch.set_num_threads(1)
    with jax.default_matmul_precision("highest"):
        yield
