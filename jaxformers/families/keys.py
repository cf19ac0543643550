"""Reading a `config.json`: every key is read, known to be irrelevant, or refused."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import resources
from typing import Any

# Keys that describe a file, a training run, a tokenizer or an output format: none of them changes what is computed.
IRRELEVANT = frozenset(
    """
    _name_or_path architectures auto_map model_type torch_dtype dtype transformers_version use_cache return_dict
    output_attentions output_hidden_states output_router_logits problem_type id2label label2id chunk_size_feed_forward
    bos_token_id eos_token_id pad_token_id decoder_start_token_id initializer_range initializer_factor
    is_encoder_decoder attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop router_aux_loss_coef
    router_jitter_noise aux_loss_alpha seq_aux summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout task_specific_params tokenizer_class unsloth_version unsloth_fixed
    cache_implementation _attn_implementation ep_size num_nextn_predict_layers reorder_and_upcast_attn
    gradient_checkpointing residual_dropout embedding_dropout classifier_dropout dropout layerdrop init_std emb_pdrop
    attention_softmax_in_fp32 scale_attention_softmax_in_fp32 slow_but_exact init_device eod_token_id sep_token_id
    im_start_id im_end_id text_start_id text_end_id input_jitter_noise _from_model_config
    """.split()
)
# Keys that change what is computed unless they hold this value.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (1,),
    "add_cross_attention": (False,),
    "use_bidirectional_attention": (False, None),
    "is_decoder": (True, False),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
}
_MISSING = object()


@functools.cache
def unused() -> dict[str, list[str]]:
    """By type, keys that published files hold and that the reference implementation of the type reads nowhere; under
    "*", those of any type."""
    return json.loads(resources.files(__package__).joinpath("unused.json").read_text(encoding="utf-8"))


class Keys:
    """One `config.json`. Each typed getter marks its key as read; `finish` refuses what nobody read.

    An absent key gives the default; without a default it is an error. A null means the same as an absent key, except
    where `null` says what it means.
    """

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self.model_type = values["model_type"]
        self._read: set[str] = set()

    def integer(self, key: str, default: Any = _MISSING, *, null: Any = _MISSING, minimum: int = 1) -> int:
        value = self._typed(key, default, int, "an integer", null)
        if value is not None and value < minimum:
            raise self.error(key, value, f"{minimum} or more")
        return value

    def number(self, key: str, default: Any = _MISSING, *, null: Any = _MISSING) -> float:
        value = self._typed(key, default, (int, float), "a number", null)
        return value if value is None else float(value)

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        return self._typed(key, default, bool, "true or false")

    def text(self, key: str, default: Any = _MISSING) -> str:
        return self._typed(key, default, str, "a string")

    def sequence(self, key: str, default: Any = _MISSING) -> list[Any]:
        return self._typed(key, default, (list, tuple), "a list")

    def table(self, key: str, default: Any = _MISSING) -> dict[str, Any]:
        return self._typed(key, default, Mapping, "a mapping")

    def choice(self, key: str, table: Mapping[str, Any], default: Any = _MISSING) -> Any:
        """The table's entry for the text under `key`."""
        value = self.text(key, default)
        if value not in table:
            raise self.error(key, value, f"one of {', '.join(sorted(table))}")
        return table[value]

    def expect(self, **only: Any) -> None:
        """Refuses any value of these keys but the one (or those in a tuple) that is implemented. Absent and null are
        fine."""
        self._read.update(only)
        for key, implemented in only.items():
            allowed = implemented if isinstance(implemented, tuple) else (implemented,)
            value = self.values.get(key)
            if value is not None and value not in allowed:
                raise self.error(key, value, " or ".join(repr(a) for a in allowed))

    def alias(self, **known: str) -> None:
        """Reads keys under the names that they are other spellings of. ValueError where both are there and differ."""
        for other, key in known.items():
            value = self.values.get(other)
            if self.values.get(key) not in (None, value) and value is not None:
                raise self.error(other, value, f"what {key} is, {self.values[key]!r}")
            if value is not None:
                self.values = {**self.values, key: value}
            self._read.add(other)

    def skip(self, *keys: str) -> None:
        """Marks keys of this family that change nothing of what is computed."""
        self._read.update(keys)

    def error(self, key: str, value: Any, allowed: str) -> ValueError:
        return ValueError(f"{self.model_type} config: {key} is {value!r}; it must be {allowed}")

    def finish(self) -> None:
        """Raises ValueError naming every key that changes the model in a way nobody here read."""
        unread = {k: v for k, v in self.values.items() if k not in self._read and k not in IRRELEVANT}
        known = {*unused()["*"], *unused().get(self.model_type, ())}
        unread = {
            k: v
            for k, v in unread.items()
            if not (k in NEUTRAL and v in NEUTRAL[k]) and v is not None and k not in known
        }
        if unread:
            key, value = next(iter(unread.items()))
            near = get_close_matches(key, sorted(self._read), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            others = f" (also unread: {', '.join(list(unread)[1:])})" if len(unread) > 1 else ""
            raise ValueError(
                f"{self.model_type} config: {key} = {value!r} is not supported{hint}{others} "
                f"(keys read: {', '.join(sorted(self._read))})"
            )

    def _typed(self, key: str, default: Any, kind: Any, described: str, null: Any = _MISSING) -> Any:
        self._read.add(key)
        value = self.values.get(key)
        if value is None:
            if null is not _MISSING and key in self.values:
                return null
            if default is _MISSING:
                raise ValueError(f"{self.model_type} config: the required key {key!r} is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(key, value, described)
        return value
