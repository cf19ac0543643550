"""Phi 1 and 2: both branches behind one layer norm, half of each head rotated, biases everywhere."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_phi(c: Keys) -> ModelConfig:
    c.expect(qk_layernorm=False)
    kv_heads = c.integer("num_key_value_heads", c.integer("num_attention_heads"))
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, rope=fam.rope(c, fam.head_dim(c), fraction=0.5)),
        num_kv_heads=kv_heads,
        **fam.layer_norm(c.number("layer_norm_eps", 1e-5)),
        parallel=True,
        shared_norm=True,
        **fam.biases(True),
        lm_head_bias=True,
        gated=False,
        activation=c.choice("hidden_act", {"gelu_new": "gelu_tanh", "gelu": "gelu"}, "gelu_new"),
    )


def phi_names(_cfg: ModelConfig) -> fam.Names:
    ffn = fam.linears("ffn.", up=f"{fam.MLP}fc1", down=f"{fam.MLP}fc2")
    return fam.Names(
        fam.LLAMA | ffn | fam.linears("attn.", o=f"{fam.ATTN}dense") | fam.norms(final_norm="model.final_layernorm")
    )


FAMILIES = {"phi": fam.Family(read_phi, phi_names)}
