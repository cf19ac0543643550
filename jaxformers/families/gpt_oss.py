"""gpt-oss: attention sinks, clamped experts with gate and up interleaved."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig, MoE


def read_gpt_oss(c: Keys) -> ModelConfig:
    c.expect(swiglu_alpha=1.702)
    if not (c.table("rope_parameters", None) or c.table("rope_scaling", None)):
        raise ValueError("gpt_oss config: the required key 'rope_scaling' (or 'rope_parameters') is missing")
    window, size = c.integer("sliding_window", null=None), fam.head_dim(c, 64)
    turn = fam.rope(c, size, theta=150_000.0)
    c.expect(initial_context_length=getattr(turn.scaling, "original_positions", None))
    moe = MoE(
        **fam.experts(c, "num_local_experts"),
        d_ff=c.integer("intermediate_size"),
        score="softmax_topk",
        router_bias=True,
        expert_bias=True,
    )
    c.expect(experts_per_token=moe.top_k)
    bias = c.flag("attention_bias", True)
    return fam.llama_config(
        c,
        layers=fam.typed_layers(c, fam.full_every(2), window, turn, ffn="moe"),
        head_dim=size,
        moe=moe,
        norm_eps=c.number("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        o_bias=bias,
        attn_sinks=True,
        swiglu_limit=c.number("swiglu_limit", 7.0),
    )


def gpt_oss_names(cfg: ModelConfig) -> fam.Names:
    assert cfg.moe is not None
    e, f = cfg.moe.num_experts, cfg.moe.d_ff
    table: dict[str, str | fam.Source] = {
        **fam.LLAMA,
        "attn.sinks": f"{fam.ATTN}sinks",
        "ffn.router": f"{fam.MLP}router.weight",
        "ffn.router_b": f"{fam.MLP}router.bias",
        "ffn.down": fam.Source(f"{fam.MLP}experts.down_proj", transposed=False),
        "ffn.down_b": f"{fam.MLP}experts.down_proj_bias",
    }
    for i, x in enumerate(("gate", "up")):
        table[f"ffn.{x}"] = fam.Source(
            f"{fam.MLP}experts.gate_up_proj", (e, cfg.d_model, f, 2), 3, i, i + 1, transposed=False
        )
        table[f"ffn.{x}_b"] = fam.Source(f"{fam.MLP}experts.gate_up_proj_bias", (e, f, 2), 2, i, i + 1)
    return fam.Names(table)


FAMILIES = {"gpt_oss": fam.Family(read_gpt_oss, gpt_oss_names)}
