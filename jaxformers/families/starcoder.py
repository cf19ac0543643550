"""StarCoder: GPT-2 with one key and value for all heads, then its successor with rope and windows."""

from jaxformers.families import common as fam
from jaxformers.families.gpt2 import gpt2_table
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_gpt_bigcode(c: Keys) -> ModelConfig:
    c.expect("scale_attn_weights", True)
    single = c.flag("multi_query", True)
    positions, kv_heads = c.integer("n_positions", 1024), 1 if single else c.integer("n_head")
    if c.integer("num_key_value_heads", kv_heads) != kv_heads:
        raise c.error("num_key_value_heads", c.values["num_key_value_heads"], f"{kv_heads} as multi_query is {single}")
    return fam.gpt_config(
        c,
        d_ff=c.integer("n_inner", 4 * c.integer("n_embd")),
        num_kv_heads=kv_heads,
        context_length=positions,
        learned_positions=positions,
        activation=c.choice("activation_function", fam.ACTIVATIONS, "gelu_pytorch_tanh"),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    )


def gpt_bigcode_names(cfg: ModelConfig) -> fam.Names:
    h, name = cfg.num_heads, "transformer.h.{l}.attn.c_attn"
    if cfg.num_kv_heads == 1:
        sizes, view, axis = (h, 1, 1), (h + 2, cfg.head_dim), 0
    else:
        sizes, view, axis = (1, 1, 1), (h, 3, cfg.head_dim), 1
    weights = {f"attn.{x}": size for x, size in zip("qkv", sizes, strict=True)}
    biases = {f"{path}_b": size for path, size in weights.items()}
    fused = fam.slices(f"{name}.weight", (cfg.d_model, *view), axis + 1, weights) | fam.slices(
        f"{name}.bias", view, axis, biases
    )
    return fam.Names(gpt2_table(transposed=True) | fused, ignored=(r"\.attn\.(masked_)?bias$",))


def read_starcoder2(c: Keys) -> ModelConfig:
    bias = c.flag("use_bias", True)
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, window=c.integer("sliding_window", None), rope=fam.rope(c, fam.head_dim(c))),
        num_kv_heads=c.integer("num_key_value_heads", 2),
        norm="layer",
        norm_bias=True,
        norm_eps=c.number("norm_epsilon", 1e-5),
        gated=False,
        activation=c.choice("hidden_act", fam.ACTIVATIONS, "gelu_pytorch_tanh"),
        tie_embeddings=c.flag("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )


def starcoder2_names(_cfg: ModelConfig) -> fam.Names:
    return fam.Names(fam.LLAMA | fam.linears("ffn.", up=f"{fam.MLP}c_fc", down=f"{fam.MLP}c_proj"))


FAMILIES = {
    "gpt_bigcode": fam.Family(read_gpt_bigcode, gpt_bigcode_names),
    "starcoder2": fam.Family(read_starcoder2, starcoder2_names),
}
