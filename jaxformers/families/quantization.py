"""What a config.json's `quantization_config` says of its weights, as far as they can be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def block_size(values: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a weight that share one scale (DeepSeek-V3's float8, arXiv:2412.19437, section 3.3); None if
    the weights are plain numbers.

    ValueError names any other quantization.
    """
    settings = values.get("quantization_config")
    if settings is None:
        return None
    settings = settings if isinstance(settings, Mapping) else {"quant_method": settings}
    method, blocks, form = (settings.get(key) for key in ("quant_method", "weight_block_size", "fmt"))
    sizes = blocks if isinstance(blocks, list | tuple) else ()
    in_blocks = len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)
    if method != "fp8" or not in_blocks or form not in (None, "e4m3", "float8_e4m3fn"):
        detail = "" if method != "fp8" else f" with weight_block_size {blocks!r} and fmt {form!r}"
        raise ValueError(
            f"{values.get('model_type')} config: weights quantized by {method!r}{detail} (quantization_config) cannot "
            "be read; use a float32, float16 or bfloat16 checkpoint, or one in blocks of float8 e4m3"
        )
    return sizes[0], sizes[1]
