"""GPT-NeoX and Pythia: parallel branches, fused projections."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_gpt_neox(c: Keys) -> ModelConfig:
    size, bias = fam.even_heads(c, "hidden_size", "num_attention_heads"), c.flag("attention_bias", True)
    c.alias(rope_theta="rotary_emb_base", partial_rotary_factor="rotary_pct")
    turn = fam.rope(c, size, theta=c.number("rotary_emb_base", 1e4), fraction=c.number("rotary_pct", 0.25))
    return fam.gpt_config(
        c,
        **fam.LLAMA_KEYS,
        rope=turn,
        d_ff=c.integer("intermediate_size"),
        context_length=c.integer("max_position_embeddings"),
        norm_eps=c.number("layer_norm_eps", 1e-5),
        tie_embeddings=c.flag("tie_word_embeddings", False),
        parallel=c.flag("use_parallel_residual", True),
        activation=c.choice("hidden_act", fam.ACTIVATIONS, "gelu"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
    )


def gpt_neox_names(cfg: ModelConfig) -> fam.Names:
    layer = "gpt_neox.layers.{l}."
    table = {
        "embed": "gpt_neox.embed_in.weight",
        "lm_head": "embed_out.weight",
        **fam.norms(
            attn_norm=f"{layer}input_layernorm",
            ffn_norm=f"{layer}post_attention_layernorm",
            final_norm="gpt_neox.final_layer_norm",
        ),
        **fam.linears("attn.", o=f"{layer}attention.dense"),
        **fam.linears("ffn.", up=f"{layer}mlp.dense_h_to_4h", down=f"{layer}mlp.dense_4h_to_h"),
        **fam.fused_qkv(f"{layer}attention.query_key_value", cfg, (cfg.num_heads, 3, cfg.head_dim), 1),
    }
    return fam.Names(table, ignored=(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",))


FAMILIES = {"gpt_neox": fam.Family(read_gpt_neox, gpt_neox_names)}
