"""ChatGLM2, ChatGLM3, GLM-4, CodeGeeX2 and YiZhao in the `chatglm` layout: one tensor for q, k and v and one for gate
and up, few kv heads, and half of each head's dims rotated in neighbouring pairs."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import LayerKind, ModelConfig, Rope


def read_chatglm(c: Keys) -> ModelConfig:
    c.expect(rmsnorm=True, post_layer_norm=True, original_rope=True, rotary_percent=0.5, interleaved_qkv=False)
    c.expect(apply_residual_connection_post_layernorm=False, fp32_residual_connection=False, tie_word_embeddings=False)
    c.expect(prefix_projection=False, quantization_bit=0)
    if not c.flag("multi_query_attention", False):
        raise c.error("multi_query_attention", False, "true")
    # Scaling scores by the layer's number is undone within the softmax.
    c.skip("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion", "classifier_dropout")
    heads, groups, size = (c.integer(x) for x in ("num_attention_heads", "multi_query_group_num", "kv_channels"))
    if heads % groups:
        raise c.error("multi_query_group_num", groups, f"a divisor of num_attention_heads ({heads})")
    vocabulary, bias = c.integer("padded_vocab_size"), c.flag("add_bias_linear", False)
    # Newer files say both of these twice.
    c.expect(vocab_size=vocabulary, num_hidden_layers=c.integer("num_layers"))
    turn = Rope(size // 2, 10_000.0 * c.number("rope_ratio", 1.0), interleaved=True)
    return ModelConfig(
        family="chatglm",
        vocab_size=vocabulary,
        d_model=c.integer("hidden_size"),
        d_ff=c.integer("ffn_hidden_size"),
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=size,
        layers=(LayerKind(rope=turn),) * c.integer("num_layers"),
        context_length=c.integer("seq_length"),
        norm_eps=c.number("layernorm_epsilon", 1e-5),
        **fam.biases(bias) | {"qkv_bias": bias or c.flag("add_qkv_bias", False)},
    )


def chatglm_names(cfg: ModelConfig) -> fam.Names:
    layer, h, k = "transformer.encoder.layers.{l}.", cfg.num_heads, cfg.num_kv_heads
    table = {
        "embed": "transformer.embedding.word_embeddings.weight",
        "lm_head": "transformer.output_layer.weight",
        **fam.norms(
            attn_norm=f"{layer}input_layernorm",
            ffn_norm=f"{layer}post_attention_layernorm",
            final_norm="transformer.encoder.final_layernorm",
        ),
        **fam.linears("attn.", o=f"{layer}self_attention.dense"),
        **fam.linears("ffn.", down=f"{layer}mlp.dense_4h_to_h"),
        **fam.fused_qkv(f"{layer}self_attention.query_key_value", cfg, (h + 2 * k, cfg.head_dim), 0, (h, k, k)),
        **fam.fused_gate_up(cfg, f"{layer}mlp.dense_h_to_4h"),
    }
    return fam.Names(table, ignored=(r"rotary_pos_emb\.inv_freq$",))


FAMILIES = {"chatglm": fam.Family(read_chatglm, chatglm_names)}
