"""Qwen (the first): a Llama under GPT-2's names, with a bias on q, k and v.

Past `seq_length` its authors' code grows the base of the rotation (`use_dynamic_ntk`) and scales queries by the
logarithm of their position (`use_logn_attn`). Up to that length both change nothing, and only that far goes the context
that is declared here: training on longer texts is refused, and generating past it is logged.
"""

from jaxformers.families.common import Family, Names, Source, linears, norms, slices
from jaxformers.families.keys import Keys
from jaxformers.models.config import LayerKind, ModelConfig, Rope


def read_qwen(c: Keys) -> ModelConfig:
    c.expect("scale_attn_weights", True)
    c.expect("rotary_pct", 1.0)
    c.expect("tie_word_embeddings", False)
    c.skip("attn_dropout_prob", "emb_dropout_prob", "bf16", "fp16", "fp32", "onnx_safe", "softmax_in_fp32")
    c.skip("use_flash_attn", "use_cache_quantization", "use_cache_kernel", "tokenizer_type")
    c.skip("max_position_embeddings", "use_dynamic_ntk", "use_logn_attn")
    width, heads, size = c.integer("hidden_size"), c.integer("num_attention_heads"), c.integer("kv_channels", 128)
    if heads * size != width:
        raise c.error("kv_channels", size, f"hidden_size ({width}) divided by num_attention_heads ({heads})")
    bias = not c.flag("no_bias", True)
    return ModelConfig(
        family="qwen",
        vocab_size=c.integer("vocab_size"),
        d_model=width,
        d_ff=c.integer("intermediate_size") // 2,  # the published width counts gate and up together
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=size,
        layers=(LayerKind(rope=Rope(size, c.number("rotary_emb_base", 10_000.0))),) * c.integer("num_hidden_layers"),
        context_length=c.integer("seq_length"),
        norm_eps=c.number("layer_norm_epsilon", 1e-6),
        qkv_bias=True,
        o_bias=bias,
        mlp_bias=bias,
    )


def qwen_names(cfg: ModelConfig) -> Names:
    layer, view = "transformer.h.{l}.", (3, cfg.num_heads, cfg.head_dim)
    table: dict[str, str | Source] = {
        "embed": "transformer.wte.weight",
        "lm_head": "lm_head.weight",
        **norms(attn_norm=f"{layer}ln_1", ffn_norm=f"{layer}ln_2", final_norm="transformer.ln_f"),
        **linears("attn.", o=f"{layer}attn.c_proj"),
        **linears("ffn.", up=f"{layer}mlp.w1", gate=f"{layer}mlp.w2", down=f"{layer}mlp.c_proj"),
        **slices(f"{layer}attn.c_attn.weight", (cfg.d_model, *view), 1, {f"attn.{x}": 1 for x in "qkv"}),
        **slices(f"{layer}attn.c_attn.bias", view, 0, {f"attn.{x}_b": 1 for x in "qkv"}),
    }
    return Names(table, ignored=(r"\.rotary_emb\.inv_freq$",))


FAMILIES = {"qwen": Family(read_qwen, qwen_names)}
