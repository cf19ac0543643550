"""TeleChat 1 and 2: Llama under BLOOM's names, key and value of each head side by side."""

import math

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig, Rope


def read_telechat(c: Keys) -> ModelConfig:
    c.expect(apply_residual_connection_post_layernorm=False, embed_layernorm=False, semi_causal=False)
    c.skip("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "flash_attn", "unk_token_id")
    c.skip("skip_bias_add", "skip_bias_add_qkv", "slow_but_exact", "pretraining_tp", "offset_alibi", "n_inner")
    c.skip("seq_length", "logn")  # how far a text may go past the trained length, and what would help it there
    size = fam.even_heads(c, "hidden_size", "n_head")
    tied, context = c.flag("tie_word_embeddings", True), c.integer("training_seqlen")
    return fam.gpt_config(
        c,
        width="hidden_size",
        rope=_rope(c, size, context, tied),
        num_kv_heads=c.integer("num_key_value_heads", c.integer("n_head")),
        d_ff=c.integer("ffn_hidden_size"),
        gated=True,
        context_length=context,
        norm="rms",
        norm_bias=False,
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


def telechat_names(cfg: ModelConfig) -> fam.Names:
    layer = fam.GPT_LAYER
    attention, view = f"{layer}self_attention.", (cfg.d_model, cfg.num_kv_heads, 2, cfg.head_dim)
    table = fam.BLOOM | {
        **fam.linears("attn.", q=f"{attention}query", o=f"{attention}dense"),
        **fam.linears("ffn.", **{x: f"{layer}mlp.{x}_proj" for x in ("gate", "up", "down")}),
        **fam.slices(f"{attention}key_value.weight", view, 2, {"attn.k": 1, "attn.v": 1}),
    }
    return fam.Names(table)


FAMILY = fam.Family(read_telechat, telechat_names)
FAMILIES = {"telechat": FAMILY, "telechat2": FAMILY}
