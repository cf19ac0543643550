"""Phi 3 to 4: fused projections and LongRoPE, and Phi 3.5's mixture of two experts."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.families.mixtral import mixtral_names
from jaxformers.models.config import ModelConfig, MoE


def read_phi3(c: Keys) -> ModelConfig:
    first = {"su": "longrope", "yarn": "longrope"}  # as the first files named it
    original = c.integer("original_max_position_embeddings", 4096)
    turn = fam.rope(c, fam.head_dim(c), fraction=1.0, original=original, renamed=first)
    layers = fam.uniform_layers(c, window=c.integer("sliding_window", None), rope=turn)
    kv_heads = c.integer("num_key_value_heads", c.integer("num_attention_heads"))
    c.expect(attention_bias=False)
    return fam.llama_config(c, layers=layers, num_kv_heads=kv_heads, norm_eps=c.number("rms_norm_eps", 1e-5))


def phi3_names(cfg: ModelConfig) -> fam.Names:
    h, k = cfg.num_heads, cfg.num_kv_heads
    fused = fam.fused_qkv(f"{fam.ATTN}qkv_proj", cfg, (h + 2 * k, cfg.head_dim), 0, (h, k, k))
    return fam.Names(fam.LLAMA | fused | fam.fused_gate_up(cfg))


def read_phimoe(c: Keys) -> ModelConfig:
    chosen, bias = fam.experts(c, "num_local_experts"), c.flag("attention_bias", False)
    if chosen["top_k"] != 2:
        raise c.error("num_experts_per_tok", chosen["top_k"], "2, which is what the sparse mixer chooses")
    width, jitter = c.integer("intermediate_size"), c.number("router_jitter_noise", 0.01)
    window = c.integer("sliding_window", None)
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, ffn="moe", window=window, rope=fam.rope(c, fam.head_dim(c), theta=1e6)),
        num_kv_heads=c.integer("num_key_value_heads", 8, null=c.integer("num_attention_heads")),
        moe=MoE(**chosen, d_ff=width, score="sparse_mixer", jitter=jitter),
        **fam.layer_norm(c.number("rms_norm_eps", 1e-5)),
        qkv_bias=bias,
        o_bias=bias,
        lm_head_bias=c.flag("lm_head_bias", False),
    )


FAMILIES = {
    "phi3": fam.Family(read_phi3, phi3_names),
    "phimoe": fam.Family(read_phimoe, mixtral_names),
}
