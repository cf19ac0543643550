"""The engine: many requests share one batch of slots and one paged cache, and none of them can tell.

`engine` decides what runs next, `pages` owns the memory, `programs` are the few pure functions that run on the device
over one `state`, and `checks` refuses what cannot be answered.
"""

from jaxformers.infer.engine.engine import Engine
from jaxformers.infer.engine.replicas import Replicas

__all__ = ["Engine", "Replicas"]
