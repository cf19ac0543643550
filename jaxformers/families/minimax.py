"""MiniMax-M2: every layer a mixture with sigmoid scores and a bias that only selects; part of each head rotated."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig, MoE


def read_minimax_m2(c: Keys) -> ModelConfig:
    size = fam.head_dim(c, 128)
    rotated = c.integer("rotary_dim", size)
    c.expect(scoring_func="sigmoid", use_qk_norm=True, qk_norm_type="per_layer", use_routing_bias=True)
    c.expect(shared_intermediate_size=0, attn_type_list=[1] * c.integer("num_hidden_layers"))
    c.skip("use_mtp", "num_mtp_modules", "mtp_transformer_layers")  # of modules behind the decoder
    moe = MoE(
        **fam.experts(c, "num_local_experts"), d_ff=c.integer("intermediate_size"), score="sigmoid", select_bias=True
    )
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, ffn="moe", rope=fam.rope(c, size, theta=5e6, fraction=rotated / size)),
        num_kv_heads=c.integer("num_key_value_heads", 8),
        head_dim=size,
        moe=moe,
        qk_norm="full",
    )


def minimax_names(cfg: ModelConfig) -> fam.Names:
    return fam.Names(fam.LLAMA, moe=fam.MIXTRAL_EXPERTS, ignored=(rf"^model\.layers\.{cfg.num_layers}\.",))


FAMILIES = {"minimax_m2": fam.Family(read_minimax_m2, minimax_names)}
