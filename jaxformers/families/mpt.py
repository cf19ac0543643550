"""MPT: position biases, layer norms without bias, no biases anywhere."""

from jaxformers.families.common import Family, Names, gpt_config, slices
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_mpt(c: Keys) -> ModelConfig:
    c.alias(hidden_size="d_model", num_attention_heads="n_heads", num_hidden_layers="n_layers")
    c.expect(expansion_ratio=4, no_bias=True, embedding_fraction=1.0, norm_type="low_precision_layernorm")
    # Of no effect in the reference implementation.
    c.skip("learned_pos_emb", "logit_scale", "use_pad_tok_in_ffn", "init_config", "ffn_config", "verbose")
    a = Keys({**c.table("attn_config", {}), "model_type": "mpt attn_config"})
    a.expect(attn_type="multihead_attention", prefix_lm=False, qk_ln=False, alibi=True, alibi_bias_max=8)
    a.skip("attn_pdrop", "attn_impl", "attn_uses_sequence_id")
    clip, scale = a.number("clip_qkv", None), a.number("softmax_scale", None)
    a.finish()
    return gpt_config(
        c,
        width="d_model",
        heads="n_heads",
        layers="n_layers",
        norm_bias=False,
        context_length=c.integer("max_seq_len", 2048),
        alibi=True,
        attn_scale=scale,
        qkv_clip=clip,
        activation="gelu",
    )


def mpt_names(cfg: ModelConfig) -> Names:
    layer, view = "transformer.blocks.{l}.", (cfg.d_model, 3, cfg.num_heads, cfg.head_dim)
    table = {
        "embed": "transformer.wte.weight",
        "lm_head": "lm_head.weight",
        "attn_norm.w": f"{layer}norm_1.weight",
        "ffn_norm.w": f"{layer}norm_2.weight",
        "final_norm.w": "transformer.norm_f.weight",
        "attn.o": f"{layer}attn.out_proj.weight",
        "ffn.up": f"{layer}ffn.up_proj.weight",
        "ffn.down": f"{layer}ffn.down_proj.weight",
        **slices(f"{layer}attn.Wqkv.weight", view, 1, {f"attn.{x}": 1 for x in "qkv"}),
    }
    return Names(table)


FAMILIES = {"mpt": Family(read_mpt, mpt_names)}
