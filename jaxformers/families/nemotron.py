"""Nemotron 3 and 4: layer norms that store w - 1, half of each head rotated, squared ReLU without a gate."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_nemotron(c: Keys) -> ModelConfig:
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, rope=fam.rope(c, fam.head_dim(c), fraction=0.5)),
        **fam.llama_attention(c),
        norm="layer",
        norm_bias=True,
        norm_offset=1.0,
        norm_eps=c.number("norm_eps", 1e-5),
        gated=False,
        activation=c.choice("hidden_act", fam.ACTIVATIONS, "relu2"),
        mlp_bias=c.flag("mlp_bias", False),
    )


FAMILIES = {"nemotron": fam.Family(read_nemotron, fam.llama_names)}
