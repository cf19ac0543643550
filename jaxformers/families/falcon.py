"""Falcon: one key and value for all heads (7B), groups with a norm for each branch (40B), position biases (RW)."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_falcon(c: Keys) -> ModelConfig:
    width = "n_embed" if c.integer("n_embed", None) else "hidden_size"
    heads, size = c.integer("num_attention_heads"), fam.even_heads(c, width, "num_attention_heads")
    c.expect(apply_residual_connection_post_layernorm=False)
    alibi = c.flag("alibi", False)
    if alibi:
        c.skip("rope_parameters")
    grouped, parallel = c.flag("new_decoder_architecture", False), c.flag("parallel_attn", True)
    single, groups = c.flag("multi_query", True), c.integer("num_kv_heads", heads)
    if grouped and not parallel:
        raise c.error("parallel_attn", parallel, "True where new_decoder_architecture is")
    norms_before = c.integer("num_ln_in_parallel_attn", 2 if grouped else 1)
    return fam.gpt_config(
        c,
        **fam.LLAMA_KEYS | {"width": width},
        rope=None if alibi else fam.rope(c, size, context=2048),
        num_kv_heads=groups if grouped else 1 if single else heads,
        d_ff=c.integer("ffn_hidden_size", 4 * c.integer(width)),
        context_length=c.integer("max_position_embeddings", 2048),
        alibi=alibi,
        alibi_scale=size**-0.5,  # the biases are scaled with the products that they are added to
        alibi_rounded=alibi,
        parallel=parallel,
        shared_norm=parallel and norms_before == 1,
        activation=c.choice("activation", fam.ACTIVATIONS, "gelu"),
        **fam.biases(c.flag("bias", False)),
    )


def falcon_names(cfg: ModelConfig) -> fam.Names:
    layer, group = fam.GPT_LAYER, cfg.num_heads // cfg.num_kv_heads
    view = (cfg.num_kv_heads, group + 2, cfg.head_dim)
    table = fam.BLOOM | fam.fused_qkv(f"{layer}self_attention.query_key_value", cfg, view, 1, (group, 1, 1))
    if cfg.parallel and not cfg.shared_norm:
        table |= fam.norms(attn_norm=f"{layer}ln_attn", ffn_norm=f"{layer}ln_mlp")
    return fam.Names(table)


FAMILIES = {"falcon": fam.Family(read_falcon, falcon_names)}
