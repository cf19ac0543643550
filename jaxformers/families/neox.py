"""GPT-NeoX and Pythia (parallel branches, fused projections) and GPT-J (one norm for both, interleaved rope)."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig, Rope


def read_gpt_neox(c: Keys) -> ModelConfig:
    size, bias = fam.even_heads(c, "hidden_size", "num_attention_heads"), c.flag("attention_bias", True)
    turn = fam.rope(c, size, theta=c.number("rotary_emb_base", 1e4), fraction=c.number("rotary_pct", 0.25))
    return fam.gpt_config(
        c,
        width="hidden_size",
        heads="num_attention_heads",
        layers="num_hidden_layers",
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
        **fam.per_head_qkv(f"{layer}attention.query_key_value", cfg),
    }
    return fam.Names(table, ignored=(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",))


def read_gptj(c: Keys) -> ModelConfig:
    size = fam.even_heads(c, "n_embd", "n_head")
    return fam.gpt_config(
        c,
        rope=Rope(c.integer("rotary_dim", 64, null=size), interleaved=True),
        d_ff=c.integer("n_inner", 4 * c.integer("n_embd")),
        context_length=c.integer("n_positions", 2048),
        tie_embeddings=c.flag("tie_word_embeddings", False),
        parallel=True,
        shared_norm=True,
        activation=c.choice("activation_function", fam.ACTIVATIONS, "gelu_new"),
        mlp_bias=True,
        lm_head_bias=True,
    )


def gptj_names(_cfg: ModelConfig) -> fam.Names:
    layer = "transformer.h.{l}."
    table = {
        "embed": "transformer.wte.weight",
        "lm_head": "lm_head.weight",
        "lm_head_b": "lm_head.bias",
        **fam.norms(attn_norm=f"{layer}ln_1", final_norm="transformer.ln_f"),
        **fam.linears("attn.", o=f"{layer}attn.out_proj", **{x: f"{layer}attn.{x}_proj" for x in "qkv"}),
        **fam.linears("ffn.", up=f"{layer}mlp.fc_in", down=f"{layer}mlp.fc_out"),
    }
    return fam.Names(table, ignored=(r"\.attn\.(masked_)?bias$",))


FAMILIES = {"gpt_neox": fam.Family(read_gpt_neox, gpt_neox_names), "gptj": fam.Family(read_gptj, gptj_names)}
