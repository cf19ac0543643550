"""PanGu-alpha as ported to PyTorch (`gpt_pangu`): GPT-2 whose last layer asks with queries learned for each position,
behind the norm that other models end with."""

from dataclasses import replace

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import LayerKind, ModelConfig


def read_pangu(c: Keys) -> ModelConfig:
    c.expect(scale_attn_weights=True)
    positions, layers = c.integer("max_position_embeddings"), c.integer("num_layers", minimum=2)
    cfg = fam.gpt_config(
        c,
        width="hidden_size",
        heads="num_heads",
        layers="num_layers",
        d_ff=c.integer("intermediate_size", 4 * c.integer("hidden_size")),
        context_length=positions,
        learned_positions=positions,
        final_norm=False,
        activation=c.choice("activation_function", fam.ACTIVATIONS, "gelu"),
        **fam.biases(True),
    )
    return replace(cfg, layers=(LayerKind(),) * (layers - 1) + (LayerKind(mixer="query"),))


def pangu_names(_cfg: ModelConfig) -> fam.Names:
    layer = fam.GPT_LAYER
    table = fam.GPT | {
        "positions": "transformer.wpe.weight",
        "attn.queries": "transformer.wqe.weight",
        **fam.norms(entry_norm="transformer.ln_f"),
        **fam.linears("attn.", **{x: f"{layer}attn.{x}_proj" for x in "qkv"}, o=f"{layer}attn.c_proj"),
        **fam.linears("ffn.", up=f"{layer}mlp.c_fc", down=f"{layer}mlp.c_proj"),
    }
    return fam.Names(table, ignored=(r"\.attn\.(masked_)?bias$",))


FAMILIES = {"gpt_pangu": fam.Family(read_pangu, pangu_names)}
