"""Adapters behind HTTP: chosen by name in place of the model, each the model with its weights added."""

import dataclasses

import jax
import numpy as np
import pytest
from real_model import NAME

from jaxformers.generation import generate
from jaxformers.hub.peft import detach, write_adapter
from jaxformers.hub.targets import Wish, plan_adapter
from jaxformers.infer.request import EngineConfig
from jaxformers.models.adapters import add_adapter, is_adapted, merge
from jaxformers.serving import add_adapters, served_model

CONFIG = EngineConfig(slots=2, max_length=256, prefill_piece=32, adapters=1, adapter_rank=4)


PROMPT = list(range(70, 110))


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """A directory in peft's format, and the model with it merged."""
    plan = plan_adapter(model.config, Wish(targets=["q_proj", "v_proj", "down_proj"], rank=4))
    draw = np.random.default_rng(0)

    def stronger(w):
        return w.replace(b=0.3 * draw.standard_normal(w.b.shape, dtype=np.float32)) if is_adapted(w) else w

    tree = jax.tree.map(stronger, add_adapter(model.params, model.config, plan, jax.random.key(0)), is_leaf=is_adapted)
    directory = tmp_path_factory.mktemp("adapter")
    write_adapter(directory, detach(tree, model.config, plan), model.config)
    return directory, dataclasses.replace(model, params=merge(tree))


@pytest.fixture(scope="module")
def two_voices(model, adapter, launched):
    """A server of the model, and of it with the adapter."""
    served = served_model(model, CONFIG, name=NAME)
    add_adapters(served, model, {"loud": str(adapter[0])})
    return launched(served)


def answer(live, name):
    body = {"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    return live.post("/v1/completions", body).json()["choices"][0]["text"]


def truth(model):
    return generate(model, [PROMPT], max_new_tokens=12, temperature=0)[0]


def test_the_name_of_an_adapter_is_that_of_a_model(two_voices, model, adapter):
    names = [card["id"] for card in two_voices.get("/v1/models").json()["data"]]
    assert names == [NAME, "loud"]
    own, loud = answer(two_voices, NAME), answer(two_voices, "loud")
    assert own != loud
    assert (own, loud) == (truth(model), truth(adapter[1]))


def test_a_name_that_no_adapter_has_is_no_model(two_voices):
    refused = two_voices.post("/v1/completions", {"model": "quiet", "prompt": PROMPT})
    assert refused.status_code == 404
    assert "'quiet' does not exist; this server has tiny, loud" in refused.json()["error"]["message"]


def test_an_adapter_with_the_models_own_name_is_refused(two_voices, model, adapter):
    with pytest.raises(ValueError, match="adapter 'tiny' has the model's own name; choose another, or --name"):
        add_adapters(served_model(model, CONFIG, name=NAME), model, {NAME: str(adapter[0])})


@pytest.mark.parametrize(
    "given, line",
    [
        (["loud"], "--adapter 'loud' is not of the form NAME=DIRECTORY"),
        (["=there"], "--adapter '=there' is not of the form NAME=DIRECTORY"),
        (["a=here", "a=there"], "--adapter 'a' is given twice"),
    ],
)
def test_what_names_no_adapter_is_refused(given, line, command):
    options = [part for text in given for part in ("--adapter", text)]
    assert command("serve", "nowhere", *options).mistake == line
