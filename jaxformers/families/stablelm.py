"""StableLM: layer norms, a quarter of each head rotated, parallel branches in some sizes."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_stablelm(c: Keys) -> ModelConfig:
    c.expect(qk_layernorm=False)
    parallel = c.flag("use_parallel_residual", False)
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, rope=fam.rope(c, fam.head_dim(c), fraction=0.25)),
        num_kv_heads=c.integer("num_key_value_heads", 32),
        **fam.layer_norm(c.number("layer_norm_eps", 1e-5)),
        parallel=parallel,
        shared_norm=parallel,
        qkv_bias=c.flag("use_qkv_bias", False),
    )


FAMILIES = {"stablelm": fam.Family(read_stablelm, fam.llama_names)}
