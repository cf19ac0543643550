"""A model that is real but for what it has learnt: bytes, and a template in which calls of tools read as Hermes'."""

import functools

import jax
import numpy as np
from tiny import LLAMA, random_params

from jaxformers.api import Model
from jaxformers.data.tokenizer import byte_tokenizer
from jaxformers.families import read_config
from jaxformers.models.decoder import forward
from jaxformers.parallel.mesh import single_device_mesh

NAME = "tiny"
TEMPLATE = (
    "{% for tool in tools or () %}{{ tool.function | tojson }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or () %}"
    "<tool_call>\n{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}\n</tool_call>"
    "{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_model() -> Model:
    """Two layers with random weights, over the bytes' ids and some that no token has."""
    cfg = read_config(LLAMA | {"max_position_embeddings": 512})
    tokenizer = byte_tokenizer().with_chat_template(TEMPLATE)
    return Model(cfg, jax.device_put(random_params(cfg)), tokenizer, single_device_mesh())


@functools.cache
def _forward(model: Model):
    return jax.jit(lambda tokens: jax.nn.log_softmax(forward(model.params, model.config, tokens)[0]))


def log_probabilities(model: Model, ids) -> np.ndarray:
    """[T, V] of the token behind each of at most 64 ids, by the model's forward pass."""
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(_forward(model)(tokens))[: len(ids)]
