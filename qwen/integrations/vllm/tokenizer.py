"""The tokenizer in vLLM: a conversation becomes token ids as in `model.chat`, with tools in ReAct."""

import json
from typing import Any

from vllm.tokenizers.hf import get_cached_tokenizer

from ...model.qwen_generation_utils import encode_turns
from ...model.tokenization_qwen import QWenTokenizer
from ...tools import parse_turns

ALL_TURNS = 2**31
"""As max_window_size: vLLM refuses prompts that are too long, instead of dropping turns."""


class QWenTokenizerLoader:
    """Loads the tokenizer of a checkpoint for vLLM, which asks for a class with `from_pretrained`."""

    @staticmethod
    def from_pretrained(
        name: str,
        *args: Any,
        trust_remote_code: bool = False,
        code_revision: str | None = None,
        download_dir: str | None = None,
        **kwargs: Any,
    ) -> QWenTokenizer:
        """Return the tokenizer with its tables cached as vLLM needs them.

        Args:
            name: folder or hub id.
            trust_remote_code, code_revision: ignored; no code of the checkpoint is run.
            download_dir: folder for downloads.
        """
        tokenizer = ConversationTokenizer.from_pretrained(name, *args, cache_dir=download_dir, **kwargs)
        return get_cached_tokenizer(tokenizer)


class ConversationTokenizer(QWenTokenizer):
    """`apply_chat_template` without the template: it returns ids, so that no text in a message is a control token."""

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Encode a conversation.

        Args:
            chat_template: one that was given to vLLM is used instead, and control tokens in messages then count.
            continue_final_message: the reply continues the last message, if that is the assistant's.

        Raises:
            MalformedConversation: the conversation has no turns, or other problems that the message names.
        """
        if chat_template not in (None, self.chat_template):
            return super().apply_chat_template(
                conversation,
                tools=tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **kwargs,
            )
        messages = [with_argument_texts(message) for message in conversation]
        turns, reply_start = parse_turns(messages, tools)
        if messages[-1]["role"] == "assistant" and not continue_final_message:
            turns, reply_start = [*turns, ("assistant", reply_start)], ""
        add_reply = add_generation_prompt or continue_final_message
        return encode_turns(self, turns, ALL_TURNS, reply_start if add_reply else None)[1]


def with_argument_texts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with the arguments of its tool calls as text. vLLM parses them, for other templates."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = []
    for call in calls:
        function = dict(call["function"])
        if not isinstance(function.get("arguments"), str):
            function["arguments"] = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
        texts.append({**call, "function": function})
    return {**message, "tool_calls": texts}
