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
        **fam.biases(True),
    )


def gpt_bigcode_names(cfg: ModelConfig) -> fam.Names:
    h, n, name = cfg.num_heads, cfg.head_dim, f"{fam.GPT_LAYER}attn.c_attn"
    single = cfg.num_kv_heads == 1
    fused = fam.fused_qkv(name, cfg, (h + 2, n), 0, (h, 1, 1)) if single else fam.fused_qkv(name, cfg, (h, 3, n), 1)
    return fam.Names(gpt2_table(transposed=True) | fused, ignored=(r"\.attn\.(masked_)?bias$",))


def read_starcoder2(c: Keys) -> ModelConfig:
    bias = c.flag("use_bias", True)
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, window=c.integer("sliding_window", None), rope=fam.rope(c, fam.head_dim(c))),
        num_kv_heads=c.integer("num_key_value_heads", 2),
        **fam.layer_norm(c.number("norm_epsilon", 1e-5)),
        gated=False,
        activation=c.choice("hidden_act", fam.ACTIVATIONS, "gelu_pytorch_tanh"),
        tie_embeddings=c.flag("tie_word_embeddings", True),
        **fam.biases(bias),
    )


def starcoder2_names(_cfg: ModelConfig) -> fam.Names:
    return fam.Names(fam.LLAMA | fam.linears("ffn.", up=f"{fam.MLP}c_fc", down=f"{fam.MLP}c_proj"))


FAMILIES = {
    "gpt_bigcode": fam.Family(read_gpt_bigcode, gpt_bigcode_names),
    "starcoder2": fam.Family(read_starcoder2, starcoder2_names),
}
