"""GPT-J: both branches behind one norm, interleaved rope."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig, Rope


def read_gptj(c: Keys) -> ModelConfig:
    fam.gpt_aliases(c)
    size = fam.even_heads(c, "n_embd", "n_head")
    return fam.gpt_config(
        c,
        rope=Rope(c.integer("rotary_dim", 64, null=size), interleaved=True),
        d_ff=c.integer("n_inner", 4 * c.integer("n_embd")),
        context_length=c.integer("n_positions", 2048),
        tie_embeddings=c.flag("tie_word_embeddings", False),
        parallel=True,
        shared_norm=True,
        activation=c.choice("activation_function", fam.ACTIVATIONS, "gelu_new"),
        mlp_bias=True,
        lm_head_bias=True,
    )


def gptj_names(_cfg: ModelConfig) -> fam.Names:
    layer = fam.GPT_LAYER
    attention = fam.linears("attn.", o=f"{layer}attn.out_proj", **{x: f"{layer}attn.{x}_proj" for x in "qkv"})
    ffn = fam.linears("ffn.", up=f"{layer}mlp.fc_in", down=f"{layer}mlp.fc_out")
    return fam.Names(fam.GPT | attention | ffn, ignored=(r"\.attn\.(masked_)?bias$",))


FAMILIES = {"gptj": fam.Family(read_gptj, gptj_names)}
