"""Baichuan and Baichuan 2: Llama with q, k and v in one tensor. The 13B models have ALiBi in place of rope, and
Baichuan 2 divides each row of its head by the row's length."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig, Rope

BAICHUAN_2_VOCABULARY = 125_696


def read_baichuan(c: Keys) -> ModelConfig:
    # Only files of the 7B models have this key: ALiBi needs no table of positions.
    positions = c.integer("max_position_embeddings", None)
    context = c.integer("model_max_length", positions)
    # A coefficient of the training loss, in Baichuan 2's files alone.
    second = c.number("z_loss_weight", None) is not None or c.integer("vocab_size") == BAICHUAN_2_VOCABULARY
    c.expect(tie_word_embeddings=False)
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, rope=None if positions is None else Rope(fam.head_dim(c))),
        alibi=positions is None,
        context_length=context,
        num_kv_heads=c.integer("num_attention_heads"),
        normalize_head=second,
        tie_embeddings=False,
    )


def baichuan_names(cfg: ModelConfig) -> fam.Names:
    view = (cfg.d_model, 3, cfg.num_heads, cfg.head_dim)
    qkv = fam.slices(f"{fam.ATTN}W_pack.weight", view, 1, {"attn.q": 1, "attn.k": 1, "attn.v": 1})
    return fam.Names(fam.LLAMA | qkv, ignored=(r"\.rotary_emb\.inv_freq$",))


FAMILIES = {"baichuan": fam.Family(read_baichuan, baichuan_names)}
