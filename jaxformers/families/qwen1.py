"""Qwen (the first): a Llama under GPT-2's names, with a bias on q, k and v.

Past `seq_length` its authors' code grows the base of the rotation (`use_dynamic_ntk`) and scales queries by the
logarithm of their position (`use_logn_attn`). Up to that length both change nothing, and only that far goes the context
that is declared here: training on longer texts is refused, and generating past it is logged.
"""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig, Rope


def read_qwen(c: Keys) -> ModelConfig:
    c.expect(scale_attn_weights=True, rotary_pct=1.0, tie_word_embeddings=False)
    c.skip("attn_dropout_prob", "emb_dropout_prob", "bf16", "fp16", "fp32", "onnx_safe", "softmax_in_fp32")
    c.skip("use_flash_attn", "use_cache_quantization", "use_cache_kernel", "tokenizer_type")
    c.skip("max_position_embeddings", "use_dynamic_ntk", "use_logn_attn")
    width, heads, size = c.integer("hidden_size"), c.integer("num_attention_heads"), c.integer("kv_channels", 128)
    if heads * size != width:
        raise c.error("kv_channels", size, f"hidden_size ({width}) divided by num_attention_heads ({heads})")
    bias = not c.flag("no_bias", True)
    return fam.gpt_config(
        c,
        **fam.LLAMA_KEYS,
        rope=Rope(size, c.number("rotary_emb_base", 10_000.0)),
        d_ff=c.integer("intermediate_size") // 2,  # the published width counts gate and up together
        gated=True,
        context_length=c.integer("seq_length"),
        norm="rms",
        norm_bias=False,
        norm_eps=c.number("layer_norm_epsilon", 1e-6),
        tie_embeddings=False,
        **fam.biases(bias) | {"qkv_bias": True},
    )


def qwen_names(cfg: ModelConfig) -> fam.Names:
    layer = fam.GPT_LAYER
    ffn = fam.linears("ffn.", up=f"{layer}mlp.w1", gate=f"{layer}mlp.w2", down=f"{layer}mlp.c_proj")
    fused = fam.fused_qkv(f"{layer}attn.c_attn", cfg, (3, cfg.num_heads, cfg.head_dim), 0)
    table = fam.GPT | ffn | fused | fam.linears("attn.", o=f"{layer}attn.c_proj")
    return fam.Names(table, ignored=(r"\.rotary_emb\.inv_freq$",))


FAMILIES = {"qwen": fam.Family(read_qwen, qwen_names)}
