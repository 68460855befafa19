"""Plugin for vLLM: serves published checkpoints as they are, with dynamic NTK and LogN attention.

vLLM finds `plugin.register` by the entry point `vllm.general_plugins`. The other modules import vLLM.
"""
