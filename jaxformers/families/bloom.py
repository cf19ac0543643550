"""BLOOM: linear position biases, a norm behind the embedding."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_bloom(c: Keys) -> ModelConfig:
    c.expect("apply_residual_connection_post_layernorm", False)
    width = "n_embed" if c.integer("n_embed", None) else "hidden_size"
    c.integer("hidden_size", None)
    c.skip("offset_alibi", "masked_softmax_fusion", "bias_dropout_fusion", "skip_bias_add", "skip_bias_add_qkv")
    c.skip("attention_softmax_in_fp32", "unk_token_id")
    return fam.gpt_config(
        c,
        width=width,
        # Distances are unbounded; the published models were trained on this many tokens.
        context_length=c.integer("seq_length", 2048),
        alibi=True,
        embed_norm=True,
        activation="gelu_tanh",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    )


def bloom_names(cfg: ModelConfig) -> fam.Names:
    layer = "transformer.h.{l}."
    table = {
        "embed": "transformer.word_embeddings.weight",
        "lm_head": "lm_head.weight",
        **fam.norms(
            embed_norm="transformer.word_embeddings_layernorm",
            attn_norm=f"{layer}input_layernorm",
            ffn_norm=f"{layer}post_attention_layernorm",
            final_norm="transformer.ln_f",
        ),
        **fam.linears("attn.", o=f"{layer}self_attention.dense"),
        **fam.linears("ffn.", up=f"{layer}mlp.dense_h_to_4h", down=f"{layer}mlp.dense_4h_to_h"),
        **fam.per_head_qkv(f"{layer}self_attention.query_key_value", cfg),
    }
    return fam.Names(table)


FAMILIES = {"bloom": fam.Family(read_bloom, bloom_names)}
