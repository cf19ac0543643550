"""From a body to what the engine is asked: prompts as ids, sampling settings, and the form that a text must have."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import anyio
import anyio.to_thread
import numpy as np
from pydantic_core import from_json

from jaxformers.data.stops import StoppableText, split_stops
from jaxformers.data.tokenizer import Tokenizer
from jaxformers.infer.request import Constraint, Request
from jaxformers.serve.errors import ApiError, too_long
from jaxformers.serve.protocol import Message, Prompt, Sampling, StructuredOutputs, Tool
from jaxformers.serve.served import Served
from jaxformers.serve.texts import ContinuationText

SEEDS = 2**32
RESERVED = frozenset({"self", "messages", "tools", "template", "add_generation_prompt"})
T = TypeVar("T")


async def off_loop(work: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """What takes milliseconds and more is done in a thread, so that streams go on meanwhile. A ValueError is the
    client's mistake."""
    try:
        return await anyio.to_thread.run_sync(functools.partial(work, *arguments, **named))
    except ValueError as error:
        raise ApiError(str(error)) from None


def encode_prompts(served: Served, prompts: Sequence[Prompt], *, add_special_tokens: bool = True) -> list[list[int]]:
    """The ids of each prompt; of an empty text, the token that begins one."""
    return [encode_prompt(served, prompt, add_special_tokens=add_special_tokens) for prompt in prompts]


def encode_prompt(served: Served, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
    if isinstance(prompt, str):
        ids = encode_text(served, prompt, add_special_tokens=add_special_tokens)
    else:
        ids = check_ids(served, prompt, param="prompt")
    if not ids:
        begin = served.tokenizer.bos_id if served.tokenizer.bos_id is not None else served.tokenizer.eos_id
        if begin is None:
            raise ApiError("prompt is empty, and this model has no token that begins a text", param="prompt")
        ids = [begin]
    return ids


def encode_text(served: Served, text: str, *, add_special_tokens: bool) -> list[int]:
    """The ids of a text, unless it is longer than any that would fit."""
    if len(text) > served.max_characters:
        message = f"the prompt has {len(text)} characters, more than {served.max_length} tokens can hold"
        raise ApiError(message, param="prompt", code="context_length_exceeded")
    return served.tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]


def check_ids(served: Served, ids: Sequence[int], *, param: str) -> list[int]:
    """The ids, all of them in the vocabulary."""
    foreign = next((i for i in ids if not 0 <= i < served.vocab_size), None)
    if foreign is not None:
        message = f"{param} has the id {str(foreign)[:20]}, but the model's ids are 0 to {served.vocab_size - 1}"
        raise ApiError(message, param=param, code="invalid_value")
    return list(ids)


class Rendered(NamedTuple):
    """A conversation as the model reads it."""

    text: str
    ids: list[int]


def render_messages(
    served: Served,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any],
) -> Rendered:
    """A conversation by the model's own template."""
    if taken := RESERVED & variables.keys():
        message = f"chat_template_kwargs may not hold {', '.join(sorted(taken))}"
        raise ApiError(message, param="chat_template_kwargs")
    values = {"tools": plain_tools(tools) or None, "add_generation_prompt": add_generation_prompt, **variables}
    text = _render(served.tokenizer, messages, values)
    return Rendered(text, encode_text(served, text, add_special_tokens=False))


def _render(tokenizer: Tokenizer, messages: Sequence[Message], values: Mapping[str, Any]) -> str:
    """The text, with the arguments of earlier calls as the template takes them: most spell an object as JSON
    themselves; DeepSeek's want the JSON text, and either fail on an object or print it as Python does."""
    turns = [_turn(message) for message in messages]
    arguments = [call["function"]["arguments"] for turn in turns for call in turn.get("tool_calls", ())]
    objects = [repr(value) for value in arguments if isinstance(value, Mapping) and value]
    try:
        text = tokenizer.render_chat(turns, **values)
    except ValueError:
        if not objects:
            raise
    else:
        if not any(spelled in text for spelled in objects):
            return text
    return tokenizer.render_chat([_turn(message, as_text=True) for message in messages], **values)


def check_tools_are_told(tokenizer: Tokenizer) -> None:
    """ApiError for a chat template that would not tell the model of any tool, so that it could only guess."""
    if "tools" not in tokenizer.chat_template_for(tools=True):
        message = "this model's chat template does not mention tools; it can call one only where tool_choice says so"
        raise ApiError(message, param="tools")


def plain_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """As templates, and readers of calls, take them."""
    return [{"type": "function", "function": tool.function.model_dump(exclude={"strict"})} for tool in tools]


def _turn(message: Message, *, as_text: bool = False) -> dict[str, Any]:
    """A message as templates read it: arguments of tool calls as objects, or as texts; developers as the system."""
    turn = message.model_dump(exclude_none=True)
    turn.setdefault("content", "")
    if message.role == "developer":
        turn["role"] = "system"
    for call in turn.get("tool_calls", ()):
        function = call["function"]
        function["arguments"] = (_as_text if as_text else as_object)(function["arguments"])
    return turn


def _as_text(arguments: Any) -> str:
    return (arguments or "{}") if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def as_object(arguments: Any) -> Any:
    """What a JSON text says, as templates and compilers read it; a text that is none stays as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return from_json(arguments or "{}", allow_inf_nan=False)
    except ValueError:
        return arguments


def own_sampling(generation: Mapping[str, Any]) -> dict[str, float]:
    """What a generation_config.json says of drawing; OpenAI's defaults where it is silent."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    own = {name: generation[name] for name in names if generation.get(name) is not None}
    return {"temperature": 1.0, **own} if generation.get("do_sample", True) else {**own, "temperature": 1.0}


class Form(NamedTuple):
    """What a text must be, as `constrain.ConstraintSpec` names it."""

    kind: str
    value: Any = None


def wanted_form(body: Sampling) -> Form | None:
    """The form that a body asks for; None for any text."""
    asked = [form for form in (_of_response_format(body), *_of_extras(body)) if form is not None]
    if len(asked) > 1:
        kinds = ", ".join(form.kind for form in asked)
        param = "response_format" if body.response_format else "structured_outputs"
        raise ApiError(f"one text can have one form, but the body asks for several: {kinds}", param=param)
    return asked[0] if asked else None


def _of_response_format(body: Sampling) -> Form | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    return Form("json_object") if wanted.json_schema is None else Form("json_schema", wanted.json_schema.schema_)


def _of_extras(body: Sampling) -> list[Form | None]:
    """vLLM's names, its older ones too."""
    extras = body.structured_outputs or StructuredOutputs()
    json_object = Form("json_object") if extras.json_object else None
    schemas = [Form("json_schema", _schema(given)) for given in (extras.json_, body.guided_json) if given is not None]
    others = [
        ("regex", extras.regex),
        ("regex", body.guided_regex),
        ("choice", extras.choice),
        ("choice", body.guided_choice),
        ("grammar", extras.grammar),
        ("grammar", body.guided_grammar),
    ]
    return [json_object, *schemas, *(Form(kind, value) for kind, value in others if value is not None)]


def _schema(schema: Mapping[str, Any] | str) -> Mapping[str, Any]:
    found = as_object(schema)
    if not isinstance(found, Mapping):
        raise ApiError("a JSON Schema must be an object", param="structured_outputs")
    return found


def compile_constraints(form: Form, served: Served, count: int, *, stop_ids: Sequence[int]) -> list[Constraint]:
    """One constraint for each of `count` continuations. ValueError for a form that does not compile."""
    from jaxformers.serve.constrain import ConstraintSpec, compile_constraint  # brings llguidance

    spec = ConstraintSpec(form.kind, form.value)
    sizes = {"vocab_size": served.vocab_size, "stop_ids": stop_ids}
    return [compile_constraint(spec, served.tokenizer, **sizes) for _ in range(count)]


class Asked:
    """What a body asks the engine, prompt after prompt, `n` continuations of each."""

    def __init__(self, served: Served, body: Sampling, prompts: Sequence[list[int]], *, max_new_tokens: int | None):
        self.adapter = served.adapter(body.model)
        self.prompts = prompts
        self.count = len(prompts) * body.n
        self._served, self._body, self._max_new_tokens = served, body, max_new_tokens
        self._stops = split_stops(body.stop, served.tokenizer)
        for prompt in prompts:
            self._room(prompt)

    def prompt_of(self, index: int) -> list[int]:
        return self.prompts[index // self._body.n]

    def requests(
        self,
        *,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        constraints: Sequence[Constraint | None] = (),
    ) -> list[Request]:
        """One for each continuation."""
        body = self._body
        seed = int(np.random.default_rng().integers(SEEDS)) if body.seed is None else body.seed
        shared = self._sampling() | {
            "min_new_tokens": body.min_tokens,
            "logit_bias": self._bias(),
            "stop_ids": self.stop_ids,
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
            "priority": body.priority,
            "adapter": self.adapter,
        }
        return [
            Request(
                prompt=self.prompt_of(index),
                max_new_tokens=self._room(self.prompt_of(index)),
                seed=(seed + index) % SEEDS,
                constraint=constraints[index] if constraints else None,
                **shared,
            )
            for index in range(self.count)
        ]

    def texts(self, *, keep: Sequence[str] = ()) -> list[ContinuationText]:
        """Where each continuation becomes text. keep: special tokens that show in it."""
        body = self._body
        settings = {"min_tokens": body.min_tokens, "skip_special_tokens": body.skip_special_tokens, "keep": keep}
        return [
            ContinuationText(
                StoppableText(self._served.tokenizer, self._stops.texts, prompt=self.prompt_of(index), **settings)
            )
            for index in range(self.count)
        ]

    def _room(self, prompt: Sequence[int]) -> int:
        """Tokens that a continuation may have."""
        room = self._served.max_length - len(prompt)
        wanted = max(room, 1) if self._max_new_tokens is None else self._max_new_tokens
        if self._body.min_tokens > wanted:
            message = f"min_tokens is {self._body.min_tokens}, more than the {wanted} tokens there may be"
            raise ApiError(message, param="min_tokens")
        if wanted > room:
            raise too_long(prompt=len(prompt), wanted=wanted, max_length=self._served.max_length)
        return wanted

    def _sampling(self) -> dict[str, Any]:
        """The settings given, over the model's own."""
        body = self._body
        given = {
            "temperature": body.temperature,
            "top_k": None if body.top_k is None else max(body.top_k, 0),  # vLLM's -1 is off
            "top_p": body.top_p,
            "min_p": body.min_p,
            "repetition_penalty": body.repetition_penalty,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
        }
        return own_sampling(self._served.generation) | {k: v for k, v in given.items() if v is not None}

    def _bias(self) -> dict[int, float]:
        check_ids(self._served, list(self._body.logit_bias), param="logit_bias")
        return self._body.logit_bias

    @cached_property
    def stop_ids(self) -> list[int]:
        """The ids that end a continuation."""
        body = self._body
        check_ids(self._served, body.stop_token_ids, param="stop_token_ids")
        own = self._served.generation.get("eos_token_id") or []
        model = (
            [] if body.ignore_eos else [*self._served.tokenizer.stop_ids, *(own if isinstance(own, list) else [own])]
        )
        return list(dict.fromkeys([*body.stop_token_ids, *self._stops.ids, *model]))
