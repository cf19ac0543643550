"""Falcon: one key and value for all heads (7B), groups with a norm for each branch (40B), position biases (RW)."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_falcon(c: Keys) -> ModelConfig:
    width = "n_embed" if c.integer("n_embed", None) else "hidden_size"
    heads, size, alibi = c.integer("num_attention_heads"), fam.even_heads(c, width, "num_attention_heads"), _alibi(c)
    grouped, single, parallel = (
        c.flag("new_decoder_architecture", False),
        c.flag("multi_query", True),
        c.flag("parallel_attn", True),
    )
    groups = c.integer("num_kv_heads", heads)
    if grouped and not parallel:
        raise c.error("parallel_attn", parallel, "True where new_decoder_architecture is")
    norms_before = c.integer("num_ln_in_parallel_attn", 2 if grouped else 1)
    turn = None if alibi else fam.rope(c, size)
    bias = c.flag("bias", False)
    return fam.gpt_config(
        c,
        width=width,
        heads="num_attention_heads",
        layers="num_hidden_layers",
        rope=turn,
        num_kv_heads=groups if grouped else 1 if single else heads,
        d_ff=c.integer("ffn_hidden_size", 4 * c.integer(width)),
        context_length=c.integer("max_position_embeddings", 2048),
        alibi=alibi,
        alibi_scale=size**-0.5,  # the biases are scaled with the products that they are added to
        parallel=parallel,
        shared_norm=parallel and norms_before == 1,
        activation=c.choice("activation", fam.ACTIVATIONS, "gelu"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )


def _alibi(c: Keys) -> bool:
    alibi = c.flag("alibi", False)
    if alibi:
        c.integer("max_position_embeddings", 2048)
        c.table("rope_parameters", None)
    return alibi


def falcon_names(cfg: ModelConfig) -> fam.Names:
    layer, group = "transformer.h.{l}.", cfg.num_heads // cfg.num_kv_heads
    two_norms = cfg.parallel and not cfg.shared_norm
    fused, view = f"{layer}self_attention.query_key_value", (cfg.num_kv_heads, group + 2, cfg.head_dim)
    parts = {"attn.q": group, "attn.k": 1, "attn.v": 1}
    table = {
        "embed": "transformer.word_embeddings.weight",
        "lm_head": "lm_head.weight",
        **fam.norms(
            attn_norm=f"{layer}{'ln_attn' if two_norms else 'input_layernorm'}",
            ffn_norm=f"{layer}{'ln_mlp' if two_norms else 'post_attention_layernorm'}",
            final_norm="transformer.ln_f",
        ),
        **fam.linears("attn.", o=f"{layer}self_attention.dense"),
        **fam.linears("ffn.", up=f"{layer}mlp.dense_h_to_4h", down=f"{layer}mlp.dense_4h_to_h"),
        **fam.slices(f"{fused}.weight", (cfg.d_model, *view), 2, parts),
        **fam.slices(f"{fused}.bias", view, 1, {f"{path}_b": size for path, size in parts.items()}),
    }
    return fam.Names(table)


FAMILIES = {"falcon": fam.Family(read_falcon, falcon_names)}
