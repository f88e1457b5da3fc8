"""Token ids of texts, prompts and conversations, and which of a conversation's tokens the policy generated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from vllm_bebop.errors import UserError
from vllm_bebop.train.records import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROMPT_FORMS = ("prompt_token_ids", "messages", "prompt", "text")


def tokenizer_and_vocab_size(model: str) -> tuple[PreTrainedTokenizerBase | None, int]:
    """Of a directory or Hub id; without a tokenizer, only token ids can be used. Raises UserError without a model."""
    from transformers import AutoConfig, AutoTokenizer

    import vllm_bebop.train.target  # noqa: F401 (makes MiMo known)

    try:
        vocab_size = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{model}: no such model, or no usable config.json in it ({reason})") from error
    try:
        return AutoTokenizer.from_pretrained(model), vocab_size
    except (OSError, ValueError):
        return None, vocab_size


def check_token_ids(token_ids: Any, vocab_size: int | None = None) -> None:
    """Raises DataError unless `token_ids` is a non-empty list of whole numbers from 0, below `vocab_size` if given."""
    if not isinstance(token_ids, list) or not token_ids or set(map(type, token_ids)) != {int}:
        raise DataError("token ids must be a non-empty list of whole numbers")
    if min(token_ids) < 0:
        raise DataError(f"token id {min(token_ids)} is below 0")
    if vocab_size is not None and max(token_ids) >= vocab_size:
        raise DataError(f"token id {max(token_ids)} is outside the model's vocabulary of {vocab_size}")


def tokenise_text(text: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Token ids with the special tokens that the tokenizer adds. Raises DataError where that is not possible."""
    if tokenizer is None:
        raise DataError("this model has no tokenizer: only token ids can be used")
    if not isinstance(text, str) or not text:
        raise DataError("a text must be a non-empty string")
    _check_unicode(text)
    return list(tokenizer(text, truncation=False, verbose=False)["input_ids"])


def tokenise_prompt(
    record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> tuple[str, list[int]]:
    """Which key a prompt is given by, the first of these that is there, and its token ids, all below `vocab_size`:

        {"prompt_token_ids": [...]}, {"messages": [...], "tools": [...]}, {"prompt": "..."}, {"text": "..."}

    Of a conversation, the assistant's last turn is left out: it is what will be generated.

    Raises:
        DataError: no such key, or its value cannot be used.
    """
    form = next((key for key in _PROMPT_FORMS if record.get(key) is not None), None)
    if form is None:
        raise DataError(f"expected one of {', '.join(map(repr, _PROMPT_FORMS))}")
    if form == "prompt_token_ids":
        token_ids = record[form]
    elif form == "messages":
        token_ids = tokenise_chat_prompt(record, tokenizer)
    else:
        token_ids = tokenise_text(record[form], tokenizer)
    check_token_ids(token_ids, vocab_size)
    return form, token_ids


def tokenise_chat_prompt(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """What the assistant answers to in {"messages": [...], "tools": [...]}: all up to its last turn, which is left out.

    Raises:
        DataError: no tokenizer, malformed messages, or the chat template refuses them.
    """
    tokenizer = _check_messages(record, tokenizer)
    prompt = _render(record, tokenizer, _length_before_answer(record), add_generation_prompt=True)
    return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def tokenise_conversation(
    record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[int], bytes]:
    """All tokens of {"messages": [...], "tools": [...]}, and a byte for each: 1 for those that the policy generated.

    They are the assistant's turns where the chat template marks them ({% generation %}). Where it does not, they are
    the assistant's last turn, up to its end-of-text token: what follows the last message of anyone else (user, tool),
    without what the template puts in front of every answer.

    Raises:
        DataError: no tokenizer, malformed messages, or the chat template refuses them or renders them in another way
            once they are answered.
    """
    tokenizer = _check_messages(record, tokenizer)
    text = _render(record, tokenizer)
    if re.search(r"{%-?\s*generation\b", tokenizer.get_chat_template(tools=record.get("tools"))):
        encoded: Any = tokenizer.apply_chat_template(
            record["messages"], tools=record.get("tools"), return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoded["input_ids"]), bytes(encoded["assistant_masks"])
    length = _length_before_answer(record)
    if not text.startswith(_render(record, tokenizer, length)):
        raise DataError("the chat template renders earlier messages in another way once answered: give token ids")
    # Of the prompt as it was served, what the template keeps: some drop a thinking part that was opened there.
    prompt = commonprefix([text, _render(record, tokenizer, length, add_generation_prompt=True)])
    # Tokenised apart, as when serving: no token spans prompt and answer.
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(text[len(prompt) :], add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id in answer:
        answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
    return [*before, *answer], bytes(len(before)) + b"\1" * len(answer)


def _check_messages(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Any:
    if tokenizer is None:
        raise DataError("this model has no tokenizer: only token ids can be used")
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(each, dict) and "role" in each for each in messages):
        raise DataError("'messages' must be a list of objects with a 'role'")
    return tokenizer


def _length_before_answer(record: Mapping[str, Any]) -> int:
    """How many messages come before the assistant's last turn."""
    return 1 + max((i for i, message in enumerate(record["messages"]) if message["role"] != "assistant"), default=-1)


def _render(
    record: Mapping[str, Any],
    tokenizer: Any,
    length: int | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The first `length` messages as text."""
    try:
        text = tokenizer.apply_chat_template(
            record["messages"][:length],
            tools=record.get("tools"),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise DataError(f"the chat template refuses the messages ({error})") from error
    _check_unicode(text)
    return text


def _check_unicode(text: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character, and which tokenizers do not take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"a lone surrogate (character {error.start + 1} of the text)") from None
