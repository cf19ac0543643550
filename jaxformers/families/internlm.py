"""InternLM (Llama with a bias on every projection of attention) and InternLM2 (one tensor for each kv head's queries,
key and value, under names of its own)."""

from jaxformers.families.common import (
    LAYER,
    Family,
    Names,
    Source,
    head_dim,
    linears,
    llama_config,
    llama_names,
    norms,
    rope,
    slices,
    uniform_layers,
)
from jaxformers.families.keys import Keys
from jaxformers.models.config import DynamicScaling, ModelConfig, Rope


def read_internlm(c: Keys) -> ModelConfig:
    heads, bias = c.integer("num_attention_heads"), c.flag("bias", True)
    c.expect("num_key_value_heads", heads)
    layers = uniform_layers(c, rope=_rotary(c))
    return llama_config(c, layers=layers, num_kv_heads=heads, qkv_bias=bias, o_bias=bias)


def _rotary(c: Keys) -> Rope:
    """The `rotary` table of newer files; older ones have none and rotate plainly."""
    rotary = Keys({"type": "origin", "base": 10_000, **c.table("rotary", {}), "model_type": f"{c.model_type} rotary"})
    kinds = {"origin": None, "dynamic": DynamicScaling}
    scaling, factor = rotary.choice("type", kinds), rotary.number("scaling_factor", 1.0)
    theta = rotary.number("base")
    rotary.finish()
    scaled = scaling and scaling(factor, c.integer("max_position_embeddings"))
    return Rope(head_dim(c), theta, scaling=scaled)


def read_internlm2(c: Keys) -> ModelConfig:
    bias = c.flag("bias", True)
    c.skip("attn_implementation")
    layers = uniform_layers(c, rope=rope(c, head_dim(c)))
    return llama_config(c, layers=layers, qkv_bias=bias, o_bias=bias)


def internlm2_names(cfg: ModelConfig) -> Names:
    groups, size = cfg.num_heads // cfg.num_kv_heads, cfg.head_dim
    view = (cfg.num_kv_heads, groups + 2, size)
    table: dict[str, str | Source] = {
        "embed": "model.tok_embeddings.weight",
        "lm_head": "output.weight",
        **norms(final_norm="model.norm", attn_norm=f"{LAYER}attention_norm", ffn_norm=f"{LAYER}ffn_norm"),
        **linears("attn.", o=f"{LAYER}attention.wo"),
        **linears("ffn.", **{x: f"{LAYER}feed_forward.w{i}" for x, i in (("gate", 1), ("down", 2), ("up", 3))}),
    }
    wqkv = f"{LAYER}attention.wqkv"
    table |= slices(f"{wqkv}.weight", (cfg.d_model, *view), 2, {"attn.q": groups, "attn.k": 1, "attn.v": 1})
    table |= slices(f"{wqkv}.bias", view, 1, {"attn.q_b": groups, "attn.k_b": 1, "attn.v_b": 1})
    return Names(table, ignored=(r"\.rotary_emb\.inv_freq$",))


FAMILIES = {"internlm": Family(read_internlm, llama_names), "internlm2": Family(read_internlm2, internlm2_names)}
