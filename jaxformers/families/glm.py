"""GLM: half of each head rotated, fused gate and up, then norms around each branch, then a mixture of experts."""

from jaxformers.families import common as fam
from jaxformers.families.deepseek import deepseek_moe
from jaxformers.families.keys import Keys
from jaxformers.models.config import LayerKind, ModelConfig


def read_glm(c: Keys) -> ModelConfig:
    size = fam.head_dim(c, 128)
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, rope=fam.rope(c, size, interleaved=True, fraction=0.5)),
        num_kv_heads=c.integer("num_key_value_heads", 2, null=c.integer("num_attention_heads")),
        head_dim=size,
        norm_eps=c.number("rms_norm_eps", 1.5625e-7),
        post_norm=c.model_type == "glm4",
        qkv_bias=c.flag("attention_bias", True),
    )


def glm_names(cfg: ModelConfig) -> fam.Names:
    after = fam.norms(
        attn_post_norm=f"{fam.LAYER}post_self_attn_layernorm", ffn_post_norm=f"{fam.LAYER}post_mlp_layernorm"
    )
    return fam.Names(fam.LLAMA | fam.fused_gate_up(cfg) | after)


def read_glm4_moe(c: Keys) -> ModelConfig:
    turn, first = fam.rope(c, fam.head_dim(c), fraction=0.5), c.integer("first_k_dense_replace", 1, minimum=0)
    return fam.llama_config(
        c,
        layers=tuple(
            LayerKind(ffn="dense" if i < first else "moe", rope=turn) for i in range(c.integer("num_hidden_layers"))
        ),
        moe=deepseek_moe(c),
        num_kv_heads=c.integer("num_key_value_heads", 8),
        norm_eps=c.number("rms_norm_eps", 1e-5),
        qk_norm="head" if c.flag("use_qk_norm", False) else "none",
        qkv_bias=c.flag("attention_bias", False),
        mtp_modules=fam.mtp_modules(c),
    )


def glm4_moe_names(cfg: ModelConfig) -> fam.Names:
    return fam.mtp_names(cfg, fam.LLAMA)


FAMILIES = {
    "glm": fam.Family(read_glm, glm_names),
    "glm4": fam.Family(read_glm, glm_names),
    "glm4_moe": fam.Family(read_glm4_moe, glm4_moe_names),
}
