"""Mistral (windows) and the two Ministrals (windows on some layers; queries that grow)."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig, QueryGrowth


def read_mistral(c: Keys) -> ModelConfig:
    window = c.integer("sliding_window", 4096, null=None)
    return fam.llama_config(c, layers=fam.uniform_layers(c, window=window, rope=fam.rope(c, fam.head_dim(c))))


def read_ministral(c: Keys) -> ModelConfig:
    window = c.integer("sliding_window", 4096, null=None)
    default = "full_attention" if window is None else "sliding_attention"
    return fam.llama_config(c, layers=fam.typed_layers(c, lambda _: default, window, fam.rope(c, fam.head_dim(c))))


def read_ministral3(c: Keys) -> ModelConfig:
    size, values = fam.head_dim(c, 128), c.table("rope_parameters")
    if values.get("max_position_embeddings") not in (None, c.integer("max_position_embeddings")):
        raise c.error("rope_parameters", values, "of the same max_position_embeddings as the model")
    # Two keys among the rope's settings are not about the rotation.
    turn = fam.rope(c, size, beside=("llama_4_scaling_beta", "max_position_embeddings"))
    beta, span = values.get("llama_4_scaling_beta"), values.get("original_max_position_embeddings")
    if not isinstance(beta, float | int) or not isinstance(span, int):
        raise c.error("rope_parameters", values, "with llama_4_scaling_beta and original_max_position_embeddings")
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, window=c.integer("sliding_window", None), rope=turn),
        head_dim=size,
        norm_eps=c.number("rms_norm_eps", 1e-5),
        query_growth=QueryGrowth(float(beta), span),
    )


FAMILIES = {
    "mistral": fam.Family(read_mistral, fam.llama_names),
    "ministral": fam.Family(read_ministral, fam.llama_names),
    "ministral3": fam.Family(read_ministral3, fam.llama_names),
}
