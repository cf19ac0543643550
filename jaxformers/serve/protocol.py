"""The bodies of requests: OpenAI's names and defaults, and the extras that other servers of open models know.

One rule for what a body holds: a field with null counts as not given; a field that is not known is refused by name
(400, `unknown_parameter`), as OpenAI does; fields that concern OpenAI's own platform (`PLATFORM`) have no effect here.
Types are taken strictly: "5" is no integer. Knows no model and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import from_json

from jaxformers.serve.errors import ApiError

PLATFORM = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention".split()
)
MAX_STOPS = 32
MAX_STOP_CHARACTERS = 1024
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_BIASED = 1024
MAX_MESSAGES = 10_000

Prompt = str | list[int]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _prompts(value: Any) -> list[Prompt]:
    """One text, several, the ids of one, or those of several; always as a list of prompts."""
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if isinstance(value, list) and value and (all(isinstance(v, str) for v in value) or all(map(_is_ids, value))):
        return value
    raise ValueError("must be a text, a list of texts, a list of token ids or a list of such lists, none of them empty")


def _stops(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("must be a text, or a list of texts, none of them empty")
    if len(texts) > MAX_STOPS or any(len(text) > MAX_STOP_CHARACTERS for text in texts):
        raise ValueError(f"must be at most {MAX_STOPS} texts of at most {MAX_STOP_CHARACTERS} characters")
    return list(dict.fromkeys(texts))


def _bias(value: Any) -> dict[int, float]:
    """Token ids come as JSON's keys, which are texts."""
    if not isinstance(value, dict) or len(value) > MAX_BIASED:
        raise ValueError(f"must be an object of token ids and numbers, {MAX_BIASED} at most")
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError(f"has the key {key[:20]!r}, which is no token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"of {key} must be a number from -100 to 100")
    return {int(key): float(bias) for key, bias in value.items()}


def _text_of(content: Any) -> Any:
    """A message's content as one text: its parts, which must be texts, one a line."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"has a part of type {str(kind)[:40]!r}; this model reads text parts alone")
        if not isinstance(part.get(part["type"]), str):
            raise ValueError(f"has a part of type {part['type']!r} without its text")
    return "\n".join(part[part["type"]] for part in content)


def _ids(value: Any) -> list[int]:
    if value != [] and not _is_ids(value):
        raise ValueError("must be a list of token ids")
    return value


Prompts = Annotated[list[Prompt], PlainValidator(_prompts)]
Stops = Annotated[list[str], PlainValidator(_stops)]
Bias = Annotated[dict[int, float], PlainValidator(_bias)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Tokens = Annotated[int, Field(ge=0, le=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Body(BaseModel):
    """What every body keeps to."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any) -> Any:
        """Without nulls, and without what has no effect."""
        if not isinstance(data, dict):
            raise ValueError("must be a JSON object")
        return {name: value for name, value in data.items() if value is not None and name not in PLATFORM}


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # of OpenAI's platform: pads chunks; has no effect


class JsonSchema(Body):
    name: str = "response"
    description: str = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool = False


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and with no other")
        return self


class StructuredOutputs(Body):
    """The form that a text must have, in one of these ways."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Sampling(Body):
    """What completions and chats share. None is the model's own setting, or off."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Bias = Field(default_factory=dict)
    seed: Int64 | None = None
    stop: Stops = Field(default_factory=list)
    stop_token_ids: list[Int64] = Field(default_factory=list, max_length=MAX_STOPS)
    ignore_eos: bool = False
    min_tokens: Tokens = 0
    max_tokens: Tokens | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool = True
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _options_of_streams(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream alone")
        return self

    @property
    def usage_at_end(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_always(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: Prompts
    suffix: str | None = None
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = Field(None, ge=1)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _refused(self) -> CompletionBody:
        if self.suffix:
            raise ValueError("suffix is not done here: this server continues prompts and fills no gaps")
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of is {self.best_of}; choices are not ranked here, so it must be n, {self.n}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which is for echo alone")
        return self


class FunctionCall(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    function: FunctionCall


class Message(BaseModel):
    """One turn. What else it holds goes to the chat template."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_text_of)] = None
    tool_calls: list[ToolCall] | None = None


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"] = "function"
    function: NamedFunction


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Tokens | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] = Field(default_factory=list, max_length=1024)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _agree(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs alone")
        if self.new_tokens == 0:
            raise ValueError("max_completion_tokens is 0; it must be at least 1")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice names a tool, but there are no tools")
        names = [tool.function.name for tool in self.tools]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name[:60]!r}, which is none of the tools")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class TokenizeBody(Body):
    """POST /tokenize, of a text or of a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    tools: list[Tool] = Field(default_factory=list, max_length=1024)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: str | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[int], PlainValidator(_ids)]


B = TypeVar("B", bound=Body)


def parse_body(content: bytes, kind: type[B]) -> B:
    """The body that these bytes are. ApiError, naming the field at fault, for any other bytes."""
    try:
        data = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"the body is no valid JSON: {error}", code="invalid_json") from None
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _described(error.errors(include_url=False, include_context=False, include_input=False)[0]) from None


def _described(fault: Mapping[str, Any]) -> ApiError:
    param = _path(fault["loc"])
    if fault["type"] == "extra_forbidden":
        return ApiError(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if fault["type"] == "missing":
        message = f"Missing required parameter: '{param}'."
        return ApiError(message, param=param, code="missing_required_parameter")
    said = fault["msg"].removeprefix("Value error, ")
    return ApiError(f"{param}: {said}" if param else said, param=param, code="invalid_value")


def _path(places: tuple[str | int, ...]) -> str | None:
    """messages[0].content, as OpenAI spells it; None for the body as a whole."""
    path = ""
    for place in places:
        path += f"[{place}]" if isinstance(place, int) else f".{place}" if path else place
    return path[:100] or None
