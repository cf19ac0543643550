"""Chat templates for tokenizers that bring none: a few plain ones, or a file. Their marks say what the model writes."""

from pathlib import Path

from jaxformers.data.config import DataConfig
from jaxformers.data.tokenizer import Tokenizer

# `plain` is for prompts and completions as they are: it adds nothing but the token that ends an answer.
_TEXT_ONLY = """{% for message in messages %}{% if tools or message.tool_calls %}\
{{ raise_exception('it has no place for tools') }}{% endif %}{% endfor %}"""
BUILT_IN = {
    "chatml": _TEXT_ONLY
    + """{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}\
{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}\
{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "zephyr": _TEXT_ONLY
    + """{% for message in messages %}{{ '<|' + message.role + '|>\\n' }}\
{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}\
{% else %}{{ message.content + eos_token }}{% endif %}{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}""",
    "plain": _TEXT_ONLY
    + """{{ bos_token | default('') }}{% for message in messages %}\
{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}\
{% else %}{{ message.content }}{% endif %}{% endfor %}""",
}
_NEEDED_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}


def with_chat_template(tokenizer: Tokenizer, config: DataConfig) -> Tokenizer:
    """The tokenizer as conversations of a config are written out: with the template the config names, if it does.

    Raises:
        ValueError: no such template, tokens that a built-in one needs and the tokenizer lacks, or conversations and no
            template for them.
    """
    chats = [source.chat for source in config.by_source().values() if source.chat.on]
    name = next((chat.template for chat in chats if chat.template is not None), None)
    if name is not None:
        return tokenizer.with_chat_template(_read(name, tokenizer))
    if any(chat.format != "text" for chat in chats) and tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, as those of base models: set data.chat.template to a file with one, "
            f"or to {', '.join(BUILT_IN)}"
        )
    return tokenizer


def _read(name: str, tokenizer: Tokenizer) -> str:
    if name in BUILT_IN:
        for token in _NEEDED_TOKENS.get(name, ()):
            if tokenizer.token_id(token) is None:
                raise ValueError(
                    f"data.chat.template is {name}, but the tokenizer has no token {token}: use zephyr or plain, which "
                    "need none but the end-of-text token, or a file"
                )
        return BUILT_IN[name]
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        known = ", ".join(BUILT_IN)
        raise ValueError(f"data.chat.template: cannot read {name} ({reason}); built-in ones are {known}") from error
