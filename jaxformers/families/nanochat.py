"""nanochat: norms without weights, one of them behind the embedding; rope that turns backward; capped logits."""

from dataclasses import replace

from jaxformers.families.common import LLAMA, MLP, Family, Names, head_dim, llama_config, rope, uniform_layers
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_nanochat(c: Keys) -> ModelConfig:
    kv_heads, bias = c.integer("num_key_value_heads", c.integer("num_attention_heads")), c.flag("attention_bias", False)
    return llama_config(
        c,
        layers=uniform_layers(c, rope=replace(rope(c, head_dim(c)), backward=True)),
        num_kv_heads=kv_heads,
        norm_weight=False,
        embed_norm=True,
        qk_norm="head",
        qk_norm_after_rope=True,
        gated=False,
        activation=c.choice("hidden_act", {"relu2": "relu2"}, "relu2"),
        logit_softcap=c.number("final_logit_softcapping", 15.0, null=None),
        qkv_bias=bias,
        o_bias=bias,
    )


def nanochat_names(_cfg: ModelConfig) -> Names:
    return Names(LLAMA | {"ffn.up": f"{MLP}fc1.weight", "ffn.down": f"{MLP}fc2.weight"})


FAMILIES = {"nanochat": Family(read_nanochat, nanochat_names)}
