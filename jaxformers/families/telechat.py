"""TeleChat 1 and 2 (Llama under BLOOM's names, key and value of each head side by side) and TeleChat 3, whose dense
models are Llama's and whose sparse ones are DeepSeek-V3's under other type names."""

import math

from jaxformers.families.common import Family, Names, Source, linears, llama_names, norms, slices
from jaxformers.families.deepseek import deepseek_names, read_deepseek_v3
from jaxformers.families.keys import Keys
from jaxformers.families.llama import read_llama
from jaxformers.models.config import LayerKind, ModelConfig, Rope


def read_telechat(c: Keys) -> ModelConfig:
    for key in ("apply_residual_connection_post_layernorm", "embed_layernorm", "semi_causal"):
        c.expect(key, False)
    c.skip("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "flash_attn", "unk_token_id")
    c.skip("skip_bias_add", "skip_bias_add_qkv", "slow_but_exact", "pretraining_tp", "offset_alibi", "n_inner")
    c.skip("seq_length", "logn")  # how far a text may go past the trained length, and what would help it there
    width, heads = c.integer("hidden_size"), c.integer("n_head")
    if width % heads:
        raise c.error("hidden_size", width, f"a multiple of n_head ({heads})")
    kv_heads = c.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise c.error("num_key_value_heads", kv_heads, f"a divisor of n_head ({heads})")
    tied, context = c.flag("tie_word_embeddings", True), c.integer("training_seqlen")
    return ModelConfig(
        family=c.model_type,
        vocab_size=c.integer("vocab_size"),
        d_model=width,
        d_ff=c.integer("ffn_hidden_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        layers=(LayerKind(rope=_rope(c, width // heads, context, tied)),) * c.integer("n_layer"),
        context_length=context,
        norm_eps=c.number("layer_norm_epsilon", 1e-5),
        o_bias=True,
        down_bias=True,
        tie_embeddings=tied,
    )


def _rope(c: Keys, dim: int, context: int, tied: bool) -> Rope:
    """The base of the rotation grows with how often the trained length doubled the first one (NTK-aware scaling).

    TeleChat 1 has that first length in its code: 4096 in that of the 7B model, 8192 in that of the 12B, whose head is
    its own.
    """
    first = c.integer("base_seqlen", 4096 if tied else 8192)
    growth = max(2 ** (math.ceil(math.log2(context / first)) + 1) - 1, 1)
    return Rope(dim, 10_000.0 * growth ** (dim / (dim - 2)))


def telechat_names(cfg: ModelConfig) -> Names:
    layer = "transformer.h.{l}."
    attention, view = f"{layer}self_attention.", (cfg.d_model, cfg.num_kv_heads, 2, cfg.head_dim)
    table: dict[str, str | Source] = {
        "embed": "transformer.word_embeddings.weight",
        "lm_head": "lm_head.weight",
        **norms(
            attn_norm=f"{layer}input_layernorm",
            ffn_norm=f"{layer}post_attention_layernorm",
            final_norm="transformer.ln_f",
        ),
        **linears("attn.", q=f"{attention}query", o=f"{attention}dense"),
        **linears("ffn.", **{x: f"{layer}mlp.{x}_proj" for x in ("gate", "up", "down")}),
        **slices(f"{attention}key_value.weight", view, 2, {"attn.k": 1, "attn.v": 1}),
    }
    return Names(table)


def read_telechat3(c: Keys) -> ModelConfig:
    """Sparse where the file speaks of latent attention, or dense."""
    return read_deepseek_v3(c) if "kv_lora_rank" in c.values else read_llama(c)


def telechat3_names(cfg: ModelConfig) -> Names:
    return deepseek_names(cfg) if cfg.mla else llama_names(cfg)


_FIRST, _THIRD = Family(read_telechat, telechat_names), Family(read_telechat3, telechat3_names)
FAMILIES = {"telechat": _FIRST, "telechat2": _FIRST, "telechat3": _THIRD, "telechat3_moe": _THIRD}
