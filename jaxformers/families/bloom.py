"""BLOOM: linear position biases, a norm behind the embedding."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_bloom(c: Keys) -> ModelConfig:
    c.alias(num_attention_heads="n_head", num_hidden_layers="n_layer")
    c.expect(apply_residual_connection_post_layernorm=False)
    width = "n_embed" if c.integer("n_embed", None) else "hidden_size"
    c.integer("hidden_size", None)
    c.skip("offset_alibi", "masked_softmax_fusion", "bias_dropout_fusion", "skip_bias_add", "skip_bias_add_qkv")
    c.skip("attention_softmax_in_fp32", "unk_token_id", "pretraining_tp")  # the last: slices of sums
    return fam.gpt_config(
        c,
        width=width,
        # Distances are unbounded; the published models were trained on this many tokens.
        context_length=c.integer("seq_length", 2048),
        alibi=True,
        embed_norm=True,
        activation="gelu_tanh",
        **fam.biases(True),
    )


def bloom_names(cfg: ModelConfig) -> fam.Names:
    name, view = f"{fam.GPT_LAYER}self_attention.query_key_value", (cfg.num_heads, 3, cfg.head_dim)
    return fam.Names(fam.BLOOM | fam.fused_qkv(name, cfg, view, 1))


FAMILIES = {"bloom": fam.Family(read_bloom, bloom_names)}
