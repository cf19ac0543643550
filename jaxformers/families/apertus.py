"""Apertus: an activation with two learned curvatures a layer, normalised queries and keys."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_apertus(c: Keys) -> ModelConfig:
    if not (c.table("rope_parameters", None) or c.table("rope_scaling", None)):
        raise ValueError("apertus config: the required key 'rope_parameters' (or 'rope_scaling') is missing")
    c.expect(mlp_bias=False, qk_norm=True, post_norm=False)
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, rope=fam.rope(c, fam.head_dim(c), theta=12e6)),
        **fam.llama_attention(c),
        norm_eps=c.number("rms_norm_eps", 1e-5),
        gated=False,
        activation=c.choice("hidden_act", {"xielu": "xielu"}, "xielu"),
        qk_norm="head",
    )


def apertus_names(_cfg: ModelConfig) -> fam.Names:
    before = fam.norms(attn_norm=f"{fam.LAYER}attention_layernorm", ffn_norm=f"{fam.LAYER}feedforward_layernorm")
    curve = {f"ffn.xielu.{x}": f"{fam.MLP}act_fn.{x}" for x in ("alpha_p", "alpha_n", "beta", "eps")}
    return fam.Names(fam.LLAMA | before | curve)


FAMILIES = {"apertus": fam.Family(read_apertus, apertus_names)}
