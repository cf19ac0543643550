"""What a reference continues a prompt with, greedily: the truth for tests of several modules.

For the types of `transformers` it is what its `generate` does; for the others, what their twins find likeliest, each
time in a plain pass over the whole text.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from families import checkpoints, foreign
from families.checkpoints import ROWS, reference_logits

from jaxformers.infer.generate import Prepared, prepare_model
from jaxformers.parallel.mesh import single_device_mesh

EOS = 2  # of every checkpoint here
Checkpoint = checkpoints.Checkpoint | foreign.Checkpoint


def checkpoint(name: str) -> Checkpoint:
    """The checkpoint of a row, or of a twin."""
    return checkpoints.checkpoint(name) if name in ROWS else foreign.checkpoint(name)


def prepared(name: str) -> Prepared:
    """Our model of a row or of a twin, on one device."""
    config, params, _ = checkpoint(name).ours
    return prepare_model(params, config, single_device_mesh())


def continuation(name: str, prompt: Sequence[int], *, new: int, **settings: Any) -> list[int]:
    """Up to `new` tokens behind one unpadded prompt, without the one that ends it. `settings` are `generate`'s, which
    a twin does not have."""
    torch.set_num_threads(1)
    model = checkpoint(name).model
    made = _generated(model, prompt, new, settings) if name in ROWS else _likeliest(model, prompt, new, **settings)
    return made[: made.index(EOS)] if EOS in made else made


@torch.no_grad()
def _generated(model: torch.nn.Module, prompt: Sequence[int], new: int, settings: dict[str, Any]) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": new, "attention_mask": torch.ones_like(ids)} | settings
    return model.generate(ids, **settings)[0, len(prompt) :].tolist()


def _likeliest(model: torch.nn.Module, prompt: Sequence[int], new: int) -> list[int]:
    text = list(prompt)
    while len(text) < len(prompt) + new:
        text.append(int(reference_logits(model, np.array([text], np.int32))[0, -1].argmax()))
    return text[len(prompt) :]
