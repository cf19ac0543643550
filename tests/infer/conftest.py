"""What tests of the engine share."""

from collections.abc import Iterator

import jax
import pytest

from jaxformers.infer.engine import sizes


@pytest.fixture(scope="module")
def small_key_blocks(request, quick_compilation) -> Iterator[None]:
    """Short rows take several blocks of keys: of a module's KEY_BLOCK, or 32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "KEY_BLOCK", getattr(request.module, "KEY_BLOCK", 32))
        yield


@pytest.fixture
def programs_go_with_their_model() -> Iterator[None]:
    """For tests of every row: a process has room for the code of some hundred engines, and few rows share any."""
    yield
    jax.clear_caches()
