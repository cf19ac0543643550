"""InternLM (Llama with a bias on every projection of attention) and InternLM2 (one tensor for each kv head's queries,
key and value, under names of its own)."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import DynamicScaling, ModelConfig, Rope


def read_internlm(c: Keys) -> ModelConfig:
    heads, bias = c.integer("num_attention_heads"), c.flag("bias", True)
    c.expect(num_key_value_heads=heads)
    layers = fam.uniform_layers(c, rope=_rotary(c))
    return fam.llama_config(c, layers=layers, num_kv_heads=heads, qkv_bias=bias, o_bias=bias)


def _rotary(c: Keys) -> Rope:
    """The `rotary` table of newer files; older ones have none and rotate plainly."""
    rotary = Keys({"type": "origin", "base": 10_000, **c.table("rotary", {}), "model_type": f"{c.model_type} rotary"})
    kinds = {"origin": None, "dynamic": DynamicScaling}
    scaling, factor = rotary.choice("type", kinds), rotary.number("scaling_factor", 1.0)
    theta = rotary.number("base")
    rotary.finish()
    scaled = scaling and scaling(factor, c.integer("max_position_embeddings"))
    return Rope(fam.head_dim(c), theta, scaling=scaled)


def read_internlm2(c: Keys) -> ModelConfig:
    bias = c.flag("bias", True)
    c.skip("attn_implementation")
    return fam.llama_config(c, qkv_bias=bias, o_bias=bias)


def internlm2_names(cfg: ModelConfig) -> fam.Names:
    groups, size = cfg.num_heads // cfg.num_kv_heads, cfg.head_dim
    view = (cfg.num_kv_heads, groups + 2, size)
    table: dict[str, str | fam.Source] = {
        "embed": "model.tok_embeddings.weight",
        "lm_head": "output.weight",
        **fam.norms(final_norm="model.norm", attn_norm=f"{fam.LAYER}attention_norm", ffn_norm=f"{fam.LAYER}ffn_norm"),
        **fam.linears("attn.", o=f"{fam.LAYER}attention.wo"),
        **fam.linears("ffn.", **{x: f"{fam.LAYER}feed_forward.w{i}" for x, i in (("gate", 1), ("down", 2), ("up", 3))}),
    }
    table |= fam.fused_qkv(f"{fam.LAYER}attention.wqkv", cfg, view, 1, (groups, 1, 1))
    return fam.Names(table, ignored=(r"\.rotary_emb\.inv_freq$",))


FAMILIES = {
    "internlm": fam.Family(read_internlm, fam.llama_names),
    "internlm2": fam.Family(read_internlm2, internlm2_names),
}
