"""OPT: learned positions that start at 2, ReLU."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_opt(c: Keys) -> ModelConfig:
    c.expect(do_layer_norm_before=True, _remove_final_layer_norm=False, layer_norm_elementwise_affine=True)
    c.expect(enable_bias=True, word_embed_proj_dim=c.integer("hidden_size"))
    positions = c.integer("max_position_embeddings", 2048)
    return fam.gpt_config(
        c,
        **fam.LLAMA_KEYS,
        d_ff=c.integer("ffn_dim"),
        context_length=positions,
        learned_positions=positions + 2,
        position_offset=2,
        norm_eps=1e-5,
        activation=c.choice("activation_function", fam.ACTIVATIONS, "relu"),
        **fam.biases(True),
    )


def opt_names(_cfg: ModelConfig) -> fam.Names:
    layer, attention = "model.decoder.layers.{l}.", "model.decoder.layers.{l}.self_attn."
    table = {
        "embed": "model.decoder.embed_tokens.weight",
        "positions": "model.decoder.embed_positions.weight",
        "lm_head": "lm_head.weight",
        **fam.norms(
            attn_norm=f"{layer}self_attn_layer_norm",
            ffn_norm=f"{layer}final_layer_norm",
            final_norm="model.decoder.final_layer_norm",
        ),
        **fam.linears("attn.", o=f"{attention}out_proj", **{x: f"{attention}{x}_proj" for x in "qkv"}),
        **fam.linears("ffn.", up=f"{layer}fc1", down=f"{layer}fc2"),
    }
    return fam.Names(table)


FAMILIES = {"opt": fam.Family(read_opt, opt_names)}
