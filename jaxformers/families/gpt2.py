"""GPT-2: learned positions, fused projections that lie untransposed in the file."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_gpt2(c: Keys) -> ModelConfig:
    c.expect("scale_attn_weights", True)
    c.expect("scale_attn_by_inverse_layer_idx", False)
    positions = c.integer("n_positions", 1024)
    c.expect("n_ctx", positions)
    return fam.gpt_config(
        c,
        d_ff=c.integer("n_inner", 4 * c.integer("n_embd")),
        context_length=positions,
        learned_positions=positions,
        activation=c.choice("activation_function", fam.ACTIVATIONS, "gelu_new"),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    )


def gpt2_table(*, transposed: bool) -> dict[str, str | fam.Source]:
    """GPT-2's names but those of the fused q, k and v; `transposed` says how its linear layers lie."""
    layer = "transformer.h.{l}."
    table: dict[str, str | fam.Source] = {
        "embed": "transformer.wte.weight",
        "positions": "transformer.wpe.weight",
        "lm_head": "lm_head.weight",
        **fam.norms(attn_norm=f"{layer}ln_1", ffn_norm=f"{layer}ln_2", final_norm="transformer.ln_f"),
    }
    for ours, theirs in (("attn.o", "attn.c_proj"), ("ffn.up", "mlp.c_fc"), ("ffn.down", "mlp.c_proj")):
        table[ours] = fam.Source(f"{layer}{theirs}.weight", transposed=transposed)
        table[f"{ours}_b"] = f"{layer}{theirs}.bias"
    return table


def gpt2_names(cfg: ModelConfig) -> fam.Names:
    fused, view = "transformer.h.{l}.attn.c_attn", (3, cfg.num_heads, cfg.head_dim)
    weight = fam.slices(f"{fused}.weight", (cfg.d_model, *view), 1, {f"attn.{x}": 1 for x in "qkv"}, transposed=False)
    bias = fam.slices(f"{fused}.bias", view, 0, {f"attn.{x}_b": 1 for x in "qkv"})
    return fam.Names(gpt2_table(transposed=False) | weight | bias, ignored=(r"\.attn\.(masked_)?bias$",))


FAMILIES = {"gpt2": fam.Family(read_gpt2, gpt2_names)}
