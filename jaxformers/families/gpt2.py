"""GPT-2: learned positions, fused projections that lie untransposed in the file."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_gpt2(c: Keys) -> ModelConfig:
    fam.gpt_aliases(c)
    c.expect(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    positions = c.integer("n_positions", 1024)
    c.expect(n_ctx=positions)
    return fam.gpt_config(
        c,
        d_ff=c.integer("n_inner", 4 * c.integer("n_embd")),
        context_length=positions,
        learned_positions=positions,
        activation=c.choice("activation_function", fam.ACTIVATIONS, "gelu_new"),
        **fam.biases(True),
    )


def gpt2_table(*, transposed: bool) -> dict[str, str | fam.Source]:
    """GPT-2's names but those of the fused q, k and v; `transposed` says how its linear layers lie."""
    table = fam.GPT | {"positions": "transformer.wpe.weight"}
    for ours, theirs in (("attn.o", "attn.c_proj"), ("ffn.up", "mlp.c_fc"), ("ffn.down", "mlp.c_proj")):
        table[ours] = fam.Source(f"{fam.GPT_LAYER}{theirs}.weight", transposed=transposed)
        table[f"{ours}_b"] = f"{fam.GPT_LAYER}{theirs}.bias"
    return table


def gpt2_names(cfg: ModelConfig) -> fam.Names:
    view = (3, cfg.num_heads, cfg.head_dim)
    fused = fam.fused_qkv(f"{fam.GPT_LAYER}attn.c_attn", cfg, view, 0, transposed=False)
    return fam.Names(gpt2_table(transposed=False) | fused, ignored=(r"\.attn\.(masked_)?bias$",))


FAMILIES = {"gpt2": fam.Family(read_gpt2, gpt2_names)}
