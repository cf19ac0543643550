"""StableLM: layer norms, a quarter of each head rotated, parallel branches in some sizes."""

from jaxformers.families.common import Family, head_dim, llama_config, llama_names, rope, uniform_layers
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_stablelm(c: Keys) -> ModelConfig:
    c.expect("qk_layernorm", False)
    parallel = c.flag("use_parallel_residual", False)
    return llama_config(
        c,
        layers=uniform_layers(c, rope=rope(c, head_dim(c), fraction=0.25)),
        num_kv_heads=c.integer("num_key_value_heads", 32),
        norm="layer",
        norm_bias=True,
        norm_eps=c.number("layer_norm_eps", 1e-5),
        parallel=parallel,
        shared_norm=parallel,
        qkv_bias=c.flag("use_qkv_bias", False),
    )


FAMILIES = {"stablelm": Family(read_stablelm, llama_names)}
