"""StarCoder 2: layer norms, a plain feed-forward network, windows, biases everywhere."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_starcoder2(c: Keys) -> ModelConfig:
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, window=c.integer("sliding_window", None), rope=fam.rope(c, fam.head_dim(c))),
        num_kv_heads=c.integer("num_key_value_heads", 2),
        **fam.layer_norm(c.number("norm_epsilon", 1e-5)),
        gated=False,
        activation=c.choice("hidden_act", fam.ACTIVATIONS, "gelu_pytorch_tanh"),
        tie_embeddings=c.flag("tie_word_embeddings", True),
        **fam.biases(c.flag("use_bias", True)),
    )


def starcoder2_names(_cfg: ModelConfig) -> fam.Names:
    return fam.Names(fam.LLAMA | fam.linears("ffn.", up=f"{fam.MLP}c_fc", down=f"{fam.MLP}c_proj"))


FAMILIES = {"starcoder2": fam.Family(read_starcoder2, starcoder2_names)}
