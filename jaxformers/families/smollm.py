"""SmolLM3: no rope on some layers."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import LayerKind, ModelConfig


def read_smollm3(c: Keys) -> ModelConfig:
    count, step = c.integer("num_hidden_layers"), c.integer("no_rope_layer_interval", 4)
    rotated = c.sequence("no_rope_layers", [int((i + 1) % step != 0) for i in range(count)])
    if len(rotated) != count or not set(rotated) <= {0, 1}:
        raise c.error("no_rope_layers", rotated, f"{count} entries, 1 (rope) or 0 (none)")
    window = c.integer("sliding_window", None) if c.flag("use_sliding_window", False) else None
    c.integer("sliding_window", None)
    types = fam.layer_types(c, lambda i: "full_attention" if window is None or rotated[i] else "sliding_attention")
    turn, bias = fam.rope(c, fam.head_dim(c), theta=2e6), c.flag("attention_bias", False)
    return fam.llama_config(
        c,
        layers=tuple(
            LayerKind(window=window if t == "sliding_attention" else None, rope=turn if on else None)
            for t, on in zip(types, rotated, strict=True)
        ),
        num_kv_heads=c.integer("num_key_value_heads", 4, null=c.integer("num_attention_heads")),
        tie_embeddings=c.flag("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=c.flag("mlp_bias", False),
    )


FAMILIES = {"smollm3": fam.Family(read_smollm3, fam.llama_names)}
