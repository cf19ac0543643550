"""nanochat: norms without weights, one of them behind the embedding; rope that turns backward; capped logits."""

from dataclasses import replace

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_nanochat(c: Keys) -> ModelConfig:
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, rope=replace(fam.rope(c, fam.head_dim(c)), backward=True)),
        **fam.llama_attention(c),
        norm_weight=False,
        embed_norm=True,
        qk_norm="head",
        qk_norm_after_rope=True,
        gated=False,
        activation=c.choice("hidden_act", {"relu2": "relu2"}, "relu2"),
        logit_softcap=c.number("final_logit_softcapping", 15.0, null=None),
    )


def nanochat_names(_cfg: ModelConfig) -> fam.Names:
    return fam.Names(fam.LLAMA | {"ffn.up": f"{fam.MLP}fc1.weight", "ffn.down": f"{fam.MLP}fc2.weight"})


FAMILIES = {"nanochat": fam.Family(read_nanochat, nanochat_names)}
