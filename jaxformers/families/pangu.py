"""PanGu-alpha as ported to PyTorch (`gpt_pangu`): GPT-2 whose last layer asks with queries learned for each position,
behind the norm that other models end with."""

from jaxformers.families.common import ACTIVATIONS, Family, Names, Source, linears, norms
from jaxformers.families.keys import Keys
from jaxformers.models.config import LayerKind, ModelConfig


def read_pangu(c: Keys) -> ModelConfig:
    c.expect("scale_attn_weights", True)
    width, heads = c.integer("hidden_size"), c.integer("num_heads")
    if width % heads:
        raise c.error("hidden_size", width, f"a multiple of num_heads ({heads})")
    positions = c.integer("max_position_embeddings")
    return ModelConfig(
        family="gpt_pangu",
        vocab_size=c.integer("vocab_size"),
        d_model=width,
        d_ff=c.integer("intermediate_size", 4 * width),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        layers=(LayerKind(),) * (c.integer("num_layers", minimum=2) - 1) + (LayerKind(mixer="query"),),
        context_length=positions,
        norm="layer",
        norm_bias=True,
        norm_eps=c.number("layer_norm_epsilon", 1e-5),
        final_norm=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        gated=False,
        activation=c.choice("activation_function", ACTIVATIONS, "gelu"),
        learned_positions=positions,
        tie_embeddings=c.flag("tie_word_embeddings", True),
    )


def pangu_names(_cfg: ModelConfig) -> Names:
    layer = "transformer.h.{l}."
    table: dict[str, str | Source] = {
        "embed": "transformer.wte.weight",
        "positions": "transformer.wpe.weight",
        "attn.queries": "transformer.wqe.weight",
        "lm_head": "lm_head.weight",
        **norms(attn_norm=f"{layer}ln_1", ffn_norm=f"{layer}ln_2", entry_norm="transformer.ln_f"),
        **linears("attn.", **{x: f"{layer}attn.{x}_proj" for x in "qkv"}, o=f"{layer}attn.c_proj"),
        **linears("ffn.", up=f"{layer}mlp.c_fc", down=f"{layer}mlp.c_proj"),
    }
    return Names(table, ignored=(r"\.attn\.(masked_)?bias$",))


FAMILIES = {"gpt_pangu": Family(read_pangu, pangu_names)}
