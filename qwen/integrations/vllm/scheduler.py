"""Prefix caching with dynamic NTK: a prompt shares cached keys only with prompts of the same α."""

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from .config import count_doublings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request


class SaltByAlpha:
    """Mixin of a scheduler that adds α to the names of the blocks of prompts beyond the trained length."""

    vllm_config: "VllmConfig"

    def add_request(self, request: "Request") -> None:
        """Add a request, whose blocks have been named without α."""
        doublings = count_doublings(request.num_prompt_tokens, self.vllm_config.model_config.hf_config.seq_length)
        if doublings > 0:
            request.cache_salt = f"{request.cache_salt or ''} ntk {doublings}"
            request.block_hashes.clear()
            request.update_block_hashes()
        super().add_request(request)  # type: ignore[misc]  # the scheduler's


class SaltingScheduler(SaltByAlpha, Scheduler):
    pass


class SaltingAsyncScheduler(SaltByAlpha, AsyncScheduler):
    pass


def create_scheduler(vllm_config: "VllmConfig", *args: Any, **kwargs: Any) -> Scheduler:
    """Return vLLM's own scheduler, of the kind that it would have chosen, with salted blocks."""
    scheduler = SaltingAsyncScheduler if vllm_config.scheduler_config.async_scheduling else SaltingScheduler
    return scheduler(vllm_config, *args, **kwargs)
