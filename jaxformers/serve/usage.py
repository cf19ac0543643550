"""How many tokens an answer cost, as OpenAI counts: each prompt once, and every token of every continuation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxformers.serve.texts import ContinuationText


def usage(prompts: Sequence[Sequence[int]], continued: Sequence[ContinuationText], *, n: int) -> dict[str, Any]:
    """OpenAI's `usage` of `n` continuations of each prompt."""
    read, made = sum(map(len, prompts)), sum(text.tokens for text in continued)
    cached = sum(text.cached_tokens for text in continued[::n])
    return {
        "prompt_tokens": read,
        "completion_tokens": made,
        "total_tokens": read + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
