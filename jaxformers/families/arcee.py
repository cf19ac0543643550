"""Arcee: Llama with a plain feed-forward network of squared ReLU."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_arcee(c: Keys) -> ModelConfig:
    return fam.llama_config(
        c,
        **fam.llama_attention(c),
        gated=False,
        activation=c.choice("hidden_act", {"relu2": "relu2"}, "relu2"),
        norm_eps=c.number("rms_norm_eps", 1e-5),
        mlp_bias=c.flag("mlp_bias", False),
    )


FAMILIES = {"arcee": fam.Family(read_arcee, fam.llama_names)}
