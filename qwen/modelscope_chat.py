"""A chat model as ModelScope's pipelines have them: called with a text and a history, it returns both in a dictionary.

modelscope's registry imports this module; modelscope_pipeline.py tells it to. It knows nothing but `model.chat`.
"""

from collections.abc import Sequence
from typing import Any

from modelscope.pipelines.builder import PIPELINES
from modelscope.utils.constant import Tasks

from .checkpoint.loading import check_chat, load_model
from .model.qwen_generation_utils import History
from .modelscope_pipeline import TYPE


@PIPELINES.register_module(Tasks.chat, module_name=TYPE, force=True)
class QwenChat:
    """What `pipeline(task=Tasks.chat, model=FOLDER)` returns.

    Args:
        model: a folder, which modelscope fetches first where an id is given.
        device: "gpu", which is the CPU where there is none, "gpu:1" or "cpu".
        device_map: as for from_pretrained, instead of `device`.
        kwargs: for from_pretrained, such as bf16=True.

    Raises:
        CheckpointError: this is no chat model, or it cannot be loaded.
    """

    def __init__(self, model: str, device: str = "gpu", device_map: Any = None, **kwargs: Any):
        if device_map is None:
            device_map = "auto" if device in ("gpu", "cuda") else device.replace("gpu", "cuda")
        check_chat(model)
        self.model, self.tokenizer = load_model(model, device_map=device_map, **kwargs)

    def __call__(
        self, input: str | dict[str, Any], history: Sequence[tuple[str, str]] | None = None, **kwargs: Any
    ) -> dict[str, str | History]:
        """Answer one query.

        Args:
            input: the query, or {"text": query, "history": earlier turns}.
            history: earlier turns, (query, response) each.
            kwargs: for `model.chat`, such as system="…".

        Returns:
            "response", and "history" with this turn at its end.
        """
        if isinstance(input, dict):
            input, history = input["text"], input.get("history", history)
        response, history = self.model.chat(self.tokenizer, input, history=history, **kwargs)
        return {"response": response, "history": history}
