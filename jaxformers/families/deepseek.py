"""DeepSeek-V2 and V3: latent attention, routing limited to groups of experts; in V3 a bias that only selects, and
multi-token prediction."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import MLA, LayerKind, ModelConfig, MoE, YarnScaling


def read_deepseek_v3(c: Keys) -> ModelConfig:
    c.expect(scoring_func="sigmoid", topk_method="noaux_tc", head_dim=c.integer("qk_rope_head_dim"))
    q_rank, interleaved = c.integer("q_lora_rank", null=None), c.flag("rope_interleave", True)
    return _deepseek(c, q_rank, interleaved, deepseek_moe(c, scale=2.5), mtp_modules=fam.mtp_modules(c))


def read_deepseek_v2(c: Keys) -> ModelConfig:
    c.expect(scoring_func="softmax", mlp_bias=False)
    c.expect(norm_topk_prob=False)  # never read by the reference implementation
    width, method = c.integer("moe_intermediate_size"), c.choice("topk_method", METHODS, "greedy")
    # The group keys are in files that do not use them, too.
    groups = _groups(c) if method == "groups" else {}
    c.integer("n_group", None), c.integer("topk_group", None)
    moe = MoE(
        **fam.experts(c, "n_routed_experts"),
        **groups,
        d_ff=width,
        normalize=False,
        scale=c.number("routed_scaling_factor", 1.0),
        shared_d_ff=width * c.integer("n_shared_experts", 2, minimum=0),
    )
    c.skip("head_dim")  # hidden size / heads there, which latent attention does not have
    return _deepseek(c, c.integer("q_lora_rank", 1536, null=None), True, moe)


METHODS = {"greedy": "all", "group_limited_greedy": "groups"}


def _deepseek(c: Keys, q_rank: int | None, interleaved: bool, moe: MoE, *, mtp_modules: int = 0) -> ModelConfig:
    c.expect(moe_layer_freq=1, attention_bias=False)
    mla = MLA(
        q_rank=q_rank,
        kv_rank=c.integer("kv_lora_rank"),
        nope_dim=c.integer("qk_nope_head_dim"),
        rope_dim=c.integer("qk_rope_head_dim"),
        v_dim=c.integer("v_head_dim"),
    )
    c.expect(qk_head_dim=mla.nope_dim + mla.rope_dim)
    turn = fam.rope(c, mla.rope_dim, interleaved=interleaved)
    first = c.integer("first_k_dense_replace", minimum=0)
    layers = tuple(
        LayerKind(mixer="mla", ffn="dense" if i < first else "moe", rope=turn)
        for i in range(c.integer("num_hidden_layers"))
    )
    return fam.llama_config(
        c,
        layers=layers,
        mla=mla,
        moe=moe,
        mtp_modules=mtp_modules,
        head_dim=mla.nope_dim + mla.rope_dim,
        attn_scale=_scale(c, mla, turn.scaling),
    )


def deepseek_moe(c: Keys, *, scale: float = 1.0, normalize: bool = True) -> MoE:
    """DeepSeek-V3's routing, under its keys. scale and normalize are the type's defaults."""
    width, groups = c.integer("moe_intermediate_size"), _groups(c)
    return MoE(
        **fam.experts(c, "n_routed_experts"),
        **groups,
        d_ff=width,
        score="sigmoid",
        normalize=c.flag("norm_topk_prob", normalize),
        scale=c.number("routed_scaling_factor", scale),
        select_bias=True,
        group_score="top2",
        shared_d_ff=width * c.integer("n_shared_experts", null=0, minimum=0),
    )


def _groups(c: Keys) -> dict[str, int]:
    count, groups, best = c.integer("n_routed_experts"), c.integer("n_group"), c.integer("topk_group")
    # A group's score is the sum of its two best experts'.
    if count % groups or (groups > 1 and count // groups < 2):
        raise c.error("n_group", groups, f"1, or groups of 2 or more that split n_routed_experts ({count}) evenly")
    if best > groups:
        raise c.error("topk_group", best, f"at most n_group ({groups})")
    if c.integer("num_experts_per_tok") > count // groups * best:
        raise c.error("topk_group", best, f"enough groups for num_experts_per_tok of {count // groups} experts each")
    return {"groups": groups, "top_groups": best}


def _scale(c: Keys, mla: MLA, scaling: object) -> float:
    """The softmax scale; YaRN's `mscale_all_dim` enters it squared rather than through sin and cos."""
    scale = (mla.nope_dim + mla.rope_dim) ** -0.5
    values = c.table("rope_parameters", None) or c.table("rope_scaling", None) or {}
    if isinstance(scaling, YarnScaling) and values.get("mscale_all_dim"):
        scale *= fam.yarn_mscale(scaling.factor, values["mscale_all_dim"]) ** 2
    return scale


def deepseek_names(cfg: ModelConfig) -> fam.Names:
    m = cfg.mla
    assert m is not None
    kv_a, kv_b = f"{fam.ATTN}kv_a_proj_with_mqa.weight", f"{fam.ATTN}kv_b_proj.weight"
    compress, expand = (cfg.d_model, m.kv_rank + m.rope_dim), (m.kv_rank, cfg.num_heads, m.nope_dim + m.v_dim)
    table = fam.LLAMA | {
        "attn.q_a": f"{fam.ATTN}q_a_proj.weight",
        "attn.q_norm.w": f"{fam.ATTN}q_a_layernorm.weight",
        "attn.q_b": f"{fam.ATTN}q_b_proj.weight",
        "attn.kv_norm.w": f"{fam.ATTN}kv_a_layernorm.weight",
        "attn.kv_a": fam.Source(kv_a, compress, 1, 0, m.kv_rank),
        "attn.k_rope": fam.Source(kv_a, compress, 1, m.kv_rank, m.kv_rank + m.rope_dim),
        "attn.k_b": fam.Source(kv_b, expand, 2, 0, m.nope_dim),
        "attn.v_b": fam.Source(kv_b, expand, 2, m.nope_dim, m.nope_dim + m.v_dim),
    }
    return fam.mtp_names(cfg, table)


FAMILIES = {
    "deepseek_v2": fam.Family(read_deepseek_v2, deepseek_names),
    "deepseek_v3": fam.Family(read_deepseek_v3, deepseek_names),
}
