"""jaxformers: pre-train, fine-tune, evaluate and serve large language models on JAX.

Names load on first use: importing this package imports neither jax nor anything heavy.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Model": "jaxformers.api",
    "load": "jaxformers.api",
    "save_pretrained": "jaxformers.api",
    "generate": "jaxformers.generation",
    "stream": "jaxformers.generation",
    "Engine": "jaxformers.infer.engine",
    "EngineConfig": "jaxformers.infer.request",
    "Replicas": "jaxformers.infer.engine",
    "Request": "jaxformers.infer.request",
    "adapter_params": "jaxformers.adapters",
    "Conversation": "jaxformers.chat",
    "fit": "jaxformers.training",
    "FitResult": "jaxformers.training",
    "load_config": "jaxformers.config",
    "RunConfig": "jaxformers.config",
    "read_config": "jaxformers.families",
    "ModelConfig": "jaxformers.models.config",
    "model_spec": "jaxformers.models.params",
    "init_params": "jaxformers.models.params",
    "abstract_params": "jaxformers.models.params",
    "count_params": "jaxformers.models.params",
    "flops_per_token": "jaxformers.models.params",
    "forward": "jaxformers.models.decoder",
    "Runtime": "jaxformers.models.runtime",
    "MeshConfig": "jaxformers.parallel.mesh",
    "make_mesh": "jaxformers.parallel.mesh",
    "param_shardings": "jaxformers.parallel.mesh",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxformers' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
