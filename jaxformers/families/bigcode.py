"""StarCoder (`gpt_bigcode`): GPT-2 with one key and value for all heads."""

from jaxformers.families import common as fam
from jaxformers.families.gpt2 import gpt2_table
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_gpt_bigcode(c: Keys) -> ModelConfig:
    fam.gpt_aliases(c)
    c.expect(scale_attn_weights=True)
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


FAMILIES = {"gpt_bigcode": fam.Family(read_gpt_bigcode, gpt_bigcode_names)}
