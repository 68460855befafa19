"""A complete list of the private and undocumented library interfaces that the code depends on.

If an upgrade changes one of them, the test that fails names the interface and our file that uses it. Other tests fail
if the code uses or overrides a private name of a library that is not listed.
"""

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import tomllib
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import ROOT


class Interface(NamedTuple):
    """An undocumented interface of a library.

    Args:
        name: dotted name, starting with the library.
        file: our file that depends on it.
        use: purpose.
        expected: parameter names, e.g. "(self, key, value)", or a tuple of them if supported versions differ; or the
            kind: "attribute" of a class or module, "property", "field" (an annotation), "class",
            "instance attribute" (assigned in the class's methods), "name in the module" (occurs in its source).
    """

    name: str
    file: str
    use: str
    expected: str | tuple[str, ...]


MODELING, GPTQ = "qwen/model/modeling_qwen.py", "qwen/model/gptq_qwen.py"
FUSED_BLOCK = "qwen/kernels/fused_block.py"
TOKENIZATION, TRAINER = "qwen/model/tokenization_qwen.py", "qwen/finetuning/trainer.py"
ENCODE_PLUS = (
    "(self, text, text_pair, add_special_tokens, padding_strategy, truncation_strategy, max_length, stride, "
    "is_split_into_words, pad_to_multiple_of, padding_side, return_tensors, return_token_type_ids, "
    "return_attention_mask, return_overflowing_tokens, return_special_tokens_mask, return_length, verbose, **kwargs)"
)
CAUSAL_MASK = (
    "(config, inputs_embeds, attention_mask, {}, position_ids, or_mask_function, and_mask_function, "
    "block_sequence_ids, layer_idx, allow_is_causal_skip)"
)
SHARD_FILES = (
    "(pretrained_model_name_or_path, index_filename, cache_dir, force_download, proxies, local_files_only, token, "
    "user_agent, revision, subfolder{}, tqdm_class, **deprecated_kwargs)"
)
COMPLETION_KWARGS = (
    "(self, messages, stop_sequences, response_format, tools_to_call_from, custom_role_conversions, "
    "convert_images_to_image_urls, tool_choice, **kwargs)"
)
DOWNLOAD_REPO = (
    "(self, repo_id, repo_type, revision, cache_dir, local_dir, allow_patterns, ignore_patterns, max_workers, "
    "local_files_only, user_agent, progress_callbacks, file_list)"
)

# fmt: off
INTERFACES = [
    # ---- transformers 5.17 to 5.24: models ----
    Interface("transformers.PreTrainedModel._load_pretrained_model", GPTQ,
              "overridden: zero biases are not unexpected tensors, missing GPTQ weights are an error",
              "(model, state_dict, checkpoint_files, load_config, expected_keys)"),
    Interface("transformers.utils.loading_report.LoadStateDictInfo.unexpected_keys", GPTQ,
              "the report of _load_pretrained_model, modified in place", "field"),
    Interface("transformers.utils.loading_report.LoadStateDictInfo.missing_keys", GPTQ,
              "the report of _load_pretrained_model", "field"),
    Interface("transformers.PreTrainedModel._hf_peft_config_loaded", GPTQ,
              "whether save_pretrained writes an adapter instead of the weights", "attribute"),
    Interface("transformers.quantizers.base.HfQuantizer.pre_quantized", GPTQ,
              "whether the weights were read from a quantized checkpoint", "instance attribute"),
    Interface("transformers.modeling_utils._is_hf_initialized", "qwen/model/gptq_linear_qwen.py",
              "keeps transformers from initializing a layer at random", "name in the module"),
    Interface("transformers.PreTrainedModel._input_embed_layer", MODELING, "names the embedding", "attribute"),
    Interface("transformers.PreTrainedModel._no_split_modules", MODELING,
              "keeps each layer on one device with device_map", "attribute"),
    Interface("transformers.PreTrainedModel._skip_keys_device_placement", MODELING,
              "stops accelerate from moving the cache", "attribute"),
    Interface("transformers.PreTrainedModel._supports_flash_attn", MODELING,
              "supported attention implementation", "attribute"),
    Interface("transformers.PreTrainedModel._supports_sdpa", MODELING,
              "supported attention implementation", "attribute"),
    Interface("transformers.PreTrainedModel._supports_flex_attn", MODELING,
              "supported attention implementation", "attribute"),
    Interface("transformers.PreTrainedModel._supports_attention_backend", MODELING,
              "supported attention implementation", "attribute"),
    Interface("transformers.PreTrainedModel._can_compile_fullgraph", MODELING,
              "lets generate compile decoding with a static cache", "attribute"),
    Interface("transformers.PreTrainedModel._can_record_outputs", MODELING,
              "output_hidden_states and output_attentions", "attribute"),
    Interface("transformers.PreTrainedModel._tied_weights_keys", MODELING,
              "the matrix that is tied to the embedding", "attribute"),
    Interface("transformers.PreTrainedConfig._attn_implementation", MODELING,
              "the selected attention implementation; there is no public getter", "property"),
    Interface("transformers.PreTrainedModel._tp_plan", MODELING,
              "tensor parallel style of the output layer", "attribute"),
    Interface("torch.distributed.tensor.placement_types._StridedShard", "qwen/model/parallel_qwen.py",
              "placement of a matrix whose parts are each cut, so that it is saved whole", "class"),
    Interface("transformers.PreTrainedModel._auto_class", "qwen/model/loading_qwen.py",
              "whether save_pretrained copies the code, and names it in auto_map", "attribute"),
    Interface("transformers.PreTrainedConfig.base_model_fsdp_plan", "qwen/model/configuration_qwen.py",
              "FSDP sharding plan of the layers", "attribute"),
    Interface("transformers.GenerationMixin._prepare_cache_for_generation", MODELING,
              "overridden: creates the 8-bit cache with the prompt lengths",
              "(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)"),
    Interface("transformers.GenerationMixin._get_stopping_criteria", MODELING,
              "overridden: compares stop strings as bytes",
              "(self, generation_config, stopping_criteria, tokenizer)"),
    Interface("transformers.GenerationMixin.init_continuous_batching", MODELING,
              "overridden: rejects options that the paged cache would ignore",
              "(self, generation_config, continuous_batching_config, workload_hints)"),
    Interface("transformers.masking_utils.create_causal_mask", MODELING,
              "attention mask for all implementations; `cache` since 5.24",
              (CAUSAL_MASK.format("past_key_values"), CAUSAL_MASK.format("cache"))),
    Interface("transformers.modeling_utils.AttentionInterface.get_interface", MODELING,
              "looks up an attention implementation by name", "(self, attn_implementation, default)"),
    Interface("transformers.utils.generic.merge_with_config_defaults", MODELING,
              "decorator of forward: replaces None arguments by values of the configuration", "(func)"),
    Interface("transformers.utils.output_capturing.capture_outputs", MODELING,
              "decorator of forward: returns hidden states and attentions", "(func, tie_last_hidden_states)"),
    Interface("transformers.initialization.no_init_weights", "benchmarks/random_models.py",
              "creates a large model without initializing it", "()"),
    Interface("transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding", "benchmarks/qwen2.py",
              "recreates non-persistent buffers after creation on the meta device; `device` in 5.17",
              ("(config)", "(config, device)")),
    # ---- transformers: tokenizers ----
    Interface("transformers.PreTrainedTokenizer._encode_plus", TOKENIZATION,
              "overridden: encodes text into ids without a list of tokens", ENCODE_PLUS),
    Interface("transformers.PreTrainedTokenizerBase._pad", TOKENIZATION, "overridden: pads offsets too",
              "(self, encoded_inputs, max_length, padding_strategy, pad_to_multiple_of, padding_side, "
              "return_attention_mask)"),
    Interface("transformers.PreTrainedTokenizer._convert_id_to_token", TOKENIZATION,
              "overridden: transformers' StopStringCriteria calls it", "(self, index)"),
    Interface("transformers.PreTrainedTokenizer._decode", TOKENIZATION, "overridden: decodes with tiktoken",
              "(self, token_ids, skip_special_tokens, clean_up_tokenization_spaces, **kwargs)"),
    Interface("transformers.PreTrainedTokenizer._add_tokens", TOKENIZATION,
              "overridden: rejects tokens that are not control tokens", "(self, new_tokens, special_tokens)"),
    Interface("transformers.PreTrainedTokenizer._get_padding_truncation_strategies", TOKENIZATION,
              "overridden: names the padding token in its error",
              "(self, padding, truncation, max_length, pad_to_multiple_of, verbose, **kwargs)"),
    Interface("transformers.PreTrainedTokenizer._added_tokens_decoder", TOKENIZATION,
              "set before the base class does: control tokens by id", "instance attribute"),
    Interface("transformers.PreTrainedTokenizer.__setattr__", TOKENIZATION,
              "overridden: special tokens are control tokens", "(self, key, value)"),
    Interface("transformers.PreTrainedTokenizer.SPECIAL_TOKENS_ATTRIBUTES", TOKENIZATION,
              "names of the special token attributes", "attribute"),
    # ---- transformers: training and files ----
    Interface("transformers.Trainer._save", TRAINER, "overridden: files and precision of checkpoints",
              "(self, output_dir, state_dict)"),
    Interface("transformers.Trainer.save_model", TRAINER, "overridden: avoids a second copy of all weights",
              "(self, output_dir, _internal_call)"),
    Interface("transformers.Trainer._save_checkpoint", TRAINER, "overridden: names a full disk",
              "(self, model, trial)"),
    Interface("transformers.Trainer._load_from_checkpoint", TRAINER,
              "overridden: rejects damaged weights, and other names of tensors",
              "(self, resume_from_checkpoint, model)"),
    Interface("transformers.Trainer._issue_warnings_after_load", TRAINER,
              "overridden: missing tensors are an error", "(self, load_result)"),
    Interface("transformers.Trainer._load_optimizer_and_scheduler", TRAINER,
              "overridden: rejects a damaged state", "(self, checkpoint)"),
    Interface("transformers.Trainer._load_scaler", TRAINER, "overridden: rejects a damaged state",
              "(self, checkpoint)"),
    Interface("transformers.Trainer._load_rng_state", TRAINER, "overridden: rejects a damaged state",
              "(self, checkpoint)"),
    Interface("transformers.Trainer._prepare_inputs", TRAINER, "moves a batch to the device", "(self, inputs)"),
    Interface("transformers.trainer.TRAINING_ARGS_NAME", TRAINER, "name of the pickle file to delete", "attribute"),
    Interface("transformers.TrainingArguments.n_gpu", "qwen/finetuning/arguments.py",
              "overridden: one GPU per process", "property"),
    Interface("transformers.dynamic_module_utils.custom_object_save", "qwen/quantization/writer.py",
              "copies the model code into the checkpoint", "(obj, folder, config)"),
    Interface("transformers.utils.hub.convert_file_size_to_int", "qwen/quantization/checks.py",
              "checks --max_shard_size", "(size)"),
    Interface("transformers.utils.hub.get_checkpoint_shard_files", "qwen/checkpoint/hub_huggingface.py",
              "downloads all files of an index; `_commit_hash` up to 5.17",
              (SHARD_FILES.format(""), SHARD_FILES.format(", _commit_hash"))),
    # ---- torch, Triton ----
    Interface("torch._dynamo.mark_static_address", MODELING,
              "marks a tensor that the compiled step writes to, for CUDA graphs", "(t, guard)"),
    Interface("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", "qwen/serving/engine/paged_attention.py",
              "attention with its log-sum-exp, which scaled_dot_product_attention does not return", "attribute"),
    Interface("torch.nn.Module._apply", "qwen/model/gptq_linear_qwen.py",
              "overridden: conversions keep scales in float32", "(self, fn, recurse)"),
    Interface("torch.nn.Module._parameters", FUSED_BLOCK, "whether tensors have moved since the last step", "field"),
    Interface("torch.nn.Module._buffers", FUSED_BLOCK, "same", "field"),
    Interface("torch.nn.Module._modules", FUSED_BLOCK, "whether a layer was replaced", "field"),
    Interface("torch.nn.Module._forward_hooks", FUSED_BLOCK, "whether a layer is observed", "field"),
    Interface("torch.nn.Module._forward_pre_hooks", FUSED_BLOCK, "same", "field"),
    Interface("torch.utils.cpp_extension.CUDA_HOME", GPTQ, "whether nvcc is installed", "attribute"),
    Interface("triton.runtime.driver.DriverConfig.active", "qwen/model/kv_cache_triton_qwen.py",
              "checks for a GPU before the first kernel", "property"),
    Interface("triton.backends.driver.DriverBase.get_current_target", "qwen/model/kv_cache_triton_qwen.py",
              "builds the launcher before the first kernel", "(self)"),
    # ---- accelerate, DeepSpeed ----
    Interface("accelerate.hooks._hf_hook", MODELING, "names the device that a layer runs on with device_map",
              "name in the module"),
    Interface("accelerate.PartialState._shared_state", "qwen/finetuning/distributed.py",
              "enables FSDP without a GPU", "attribute"),
    Interface("accelerate.utils.FullyShardedDataParallelPlugin.set_state_dict_type", TRAINER,
              "saves the FSDP result as one full state dict", "(self, state_dict_type)"),
    Interface("deepspeed.ops.__compatible_ops__", "qwen/finetuning/distributed.py",
              "prevents compiling a kernel on the CPU", "name in the module"),
    # ---- GPTQModel and its logger ----
    Interface("gptqmodel.models._const.DEVICE", "qwen/quantization/gptqmodel_runner.py",
              "quantizes on the CPU; not all of its code accepts \"cpu\" or torch.device(\"cpu\")", "class"),
    Interface("gptqmodel.utils.importer.auto_select_device", "qwen/quantization/gptqmodel_runner.py",
              "the default device", "(device, backend)"),
    Interface("gptqmodel.models.definitions.qwen.QwenQModel", "qwen/quantization/gptqmodel_runner.py",
              "quantizes a model that is already loaded", "class"),
    Interface("gptqmodel.models.base.BaseQModel.__init__", "qwen/quantization/gptqmodel_runner.py",
              "constructor of QwenQModel",
              "(self, model, quantized, quantize_config, tokenizer, qlinear_kernel, load_quantized_model, "
              "trust_remote_code, model_local_path, turtle_model, effective_module_tree)"),
    Interface("gptqmodel.looper.module_looper.subset_callback", "qwen/quantization/gptqmodel_runner.py",
              "attribute with the progress callback", "name in the module"),
    Interface("gptqmodel.looper.module_looper.subset_event", "qwen/quantization/gptqmodel_runner.py",
              "method of the progress callback", "name in the module"),
    Interface("gptqmodel.nn_modules.qlinear.BaseQuantLinear.SUPPORTS_TRAINING", GPTQ,
              "identifies a layer with packed weights", "attribute"),
    Interface("gptqmodel.quantization.gptq.999999999", "qwen/quantization/gptqmodel_runner.py",
              "loss value of a matrix that was only rounded", "name in the module"),
    Interface("logbar.LogBar.shared", "qwen/quiet.py", "logger to silence before first use", "(override_logger)"),
    # ---- ModelScope ----
    Interface("modelscope.pipelines.builder.PIPELINES", "qwen/integrations/modelscope.py",
              "registry of pipelines", "attribute"),
    Interface("modelscope.pipelines.builder.is_official_hub_path", "qwen/integrations/modelscope.py",
              "replaced: accepts our folders as models", "attribute"),
    Interface("modelscope.pipelines.util.is_official_hub_path", "qwen/integrations/modelscope.py",
              "called by the replacement", "(path, revision)"),
    Interface("modelscope.pipelines.builder.read_config", "qwen/integrations/modelscope.py",
              "replaced: returns the pipeline of a model", "attribute"),
    Interface("modelscope.utils.hub.read_config", "qwen/integrations/modelscope.py",
              "called by the replacement", "(model_id_or_path, revision)"),
    Interface("modelscope.utils.import_utils.LazyImportModule.get_ast_index", "qwen/integrations/modelscope.py",
              "modified in place: module of a pipeline", "()"),
    Interface("modelscope_hub.api.HubApi.download_repo", "qwen/checkpoint/hub_modelscope.py",
              "file_list: files to download, with sizes and checksums", DOWNLOAD_REPO),
    # ---- servers ----
    Interface("uvicorn.server.Server.startup", "qwen/serving/api/server.py",
              "overridden: reports that requests are accepted", "(self, sockets)"),
    Interface("uvicorn.server.Server.handle_exit", "qwen/serving/api/server.py", "overridden: drains on signals",
              "(self, sig, frame)"),
    Interface("uvicorn.server.Server.started", "qwen/serving/api/server.py", "whether startup succeeded",
              "instance attribute"),
    Interface("uvicorn.server.Server.should_exit", "qwen/serving/api/server.py", "stops the server",
              "instance attribute"),
    Interface("uvicorn.server.Server.force_exit", "qwen/serving/web/launch.py", "stops it with open connections",
              "instance attribute"),
    Interface("gradio.blocks.Blocks.server", "qwen/serving/web/launch.py", "uvicorn server of the page",
              "instance attribute"),
    Interface("gradio.routes.App.tokens", "qwen/serving/web/launch.py", "users who have logged in",
              "instance attribute"),
    Interface("gradio.routes.App.cookie_id", "qwen/serving/web/launch.py", "name of the login's cookie",
              "instance attribute"),
    Interface("gradio.routes.App.startup_events_triggered", "qwen/serving/web/launch.py",
              "whether Gradio has sent its request to itself", "instance attribute"),
    Interface("starlette.applications.Starlette.middleware_stack", "qwen/serving/web/launch.py",
              "replaced: puts the page's checks around Gradio's CORS", "instance attribute"),
    Interface("sse_starlette.EventSourceResponse.__call__", "qwen/serving/api/generation.py",
              "overridden: aborts generation on disconnect", "(self, scope, receive, send)"),
    Interface("llguidance.TokenizerWrapper.is_tokenizer_wrapper", "qwen/serving/engine/grammar.py",
              "vocabulary for grammars: tells LLTokenizer what to read", "instance attribute"),
    Interface("llguidance.LLTokenizer.from_tiktoken", "qwen/serving/engine/grammar_worker.py",
              "vocabulary for trials of grammars", "(encoder, special_tokens, pattern, eos_token, n_vocab, slices)"),
    # ---- others ----
    Interface("smolagents.models.Model._prepare_completion_kwargs", "examples/transformers_agent.md",
              "overridden: sends tool calls and results as such", COMPLETION_KWARGS),
    Interface("readline._READLINE_RUNTIME_VERSION", "qwen_cli/chat/terminal.py",
              "whether pasted lines are marked", "attribute"),
    Interface("argparse.ArgumentParser._option_string_actions", "qwen_cli/arguments.py",
              "options of a command, to name the one that replaces an unknown one", "instance attribute"),
]
# fmt: on

LISTED = {interface.name.rpartition(".")[2] for interface in INTERFACES} | {"_internal_call", "_const", "_dynamo"}
# Libraries whose source is read instead of importing them: slow to import, noisy, or patched by other imports.
READ = {"deepspeed", "gptqmodel", "gradio", "logbar", "modelscope", "modelscope_hub", "smolagents", "uvicorn"}
# Names with an underscore that Python documents: of `os`, and of named tuples.
DOCUMENTED = {"_exit", "_asdict", "_fields", "_field_defaults", "_make", "_replace"}
# Attributes of all Python classes, functions, modules and exceptions, and the documented hook of dataclasses.
SPECIAL = {
    *(name for kind in (type, types.FunctionType, types.ModuleType, BaseException, list) for name in dir(kind)),
    *("__file__", "__path__", "__version__", "__post_init__"),
}


# ---- the interfaces exist with these signatures ----


@pytest.mark.parametrize("interface", INTERFACES, ids=lambda interface: interface.name)
def test_an_interface_is_as_the_code_expects(interface: Interface) -> None:
    library = interface.name.partition(".")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    expected = (interface.expected,) if isinstance(interface.expected, str) else interface.expected
    found = (read if library in READ else imported)(interface.name, expected[0])
    assert found in expected, (
        f"{interface.name} ({library} {version_of(library)}) is {found}, not {' or '.join(expected)}. "
        f"{interface.file} depends on it: {interface.use}. Check what changed there, then update this list."
    )


@pytest.mark.parametrize("interface", INTERFACES, ids=lambda interface: interface.name)
def test_the_file_uses_the_interface(interface: Interface) -> None:
    parent, _, name = interface.name.rpartition(".")
    if name == "__init__":
        name = "QwenQModel"
    assert re.search(rf"\b{name}\b", (ROOT / interface.file).read_text(encoding="utf-8")), parent


def version_of(library: str) -> str:
    names = importlib.metadata.packages_distributions().get(library)
    return importlib.metadata.version(names[0]) if names else "of Python"


def imported(name: str, kind: str) -> str:
    """Describe an imported name in the terms of `Interface.expected`."""
    place, _, last = name.rpartition(".")
    if kind == "name in the module":
        source = inspect.getsource(importlib.import_module(place))
        return kind if re.search(rf"\b{last}\b", source) else "missing"
    if kind in ("instance attribute", "field"):
        owners = inspect.getmro(pkgutil.resolve_name(place))
        if kind == "field":
            return kind if any(last in inspect.get_annotations(owner) for owner in owners) else "missing"
        texts = (inspect.getsource(owner) for owner in owners if owner is not object)
        return kind if any(re.search(rf"\bself\.{last}\b.* = ", text) for text in texts) else "missing"
    try:
        owner = importlib.import_module(place)
    except ImportError:
        owner = pkgutil.resolve_name(place)
    static = inspect.getattr_static(owner, last, None)
    value = getattr(owner, last, None)
    if isinstance(static, property):
        return "property"
    if static is None and value is None:
        return "attribute" if hasattr(owner, last) else "missing"
    if kind.startswith("(") and callable(value):
        return signature((p.kind, p.name) for p in inspect.signature(value).parameters.values())
    return "class" if inspect.isclass(value) else "attribute"


def read(name: str, kind: str) -> str:
    """Describe a name as `imported` does, from the source of a library without importing it."""
    path, inside = source_file(name)
    text = path.read_text(encoding="utf-8")
    if kind == "name in the module":
        return kind if re.search(rf"\b{inside[-1]}\b", text) else "missing"
    body, owner = ast.parse(text).body, None
    for part in inside:
        found = next((node for node in body if part in defined(node)), None)
        if found is None:
            if kind == "instance attribute" and owner and re.search(rf"\bself\.{part} = ", ast.unparse(owner)):
                return kind
            return "missing"
        body, owner = getattr(found, "body", []), found
    if isinstance(owner, ast.FunctionDef | ast.AsyncFunctionDef):
        parameters = owner.args
        static = any(ast.unparse(decorator) in ("staticmethod", "classmethod") for decorator in owner.decorator_list)
        kinds = [(inspect.Parameter.POSITIONAL_OR_KEYWORD, p.arg) for p in [*parameters.posonlyargs, *parameters.args]]
        if static and kinds and kinds[0][1] == "cls":
            kinds = kinds[1:]
        kinds += [(inspect.Parameter.VAR_POSITIONAL, parameters.vararg.arg)] if parameters.vararg else []
        kinds += [(inspect.Parameter.KEYWORD_ONLY, p.arg) for p in parameters.kwonlyargs]
        kinds += [(inspect.Parameter.VAR_KEYWORD, parameters.kwarg.arg)] if parameters.kwarg else []
        return signature(kinds)
    return "class" if isinstance(owner, ast.ClassDef) else "attribute"


def signature(parameters: Iterator[tuple[object, str]] | list[tuple[object, str]]) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return f"({', '.join(stars.get(kind, '') + name for kind, name in parameters)})"


def source_file(name: str) -> tuple[Path, list[str]]:
    """Return the file of the module that defines a dotted name, and the parts of the name inside it."""
    library, *parts = name.split(".")
    place = Path(importlib.util.find_spec(library).origin).parent
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    if parts and (place / f"{parts[0]}.py").is_file():
        return place / f"{parts[0]}.py", parts[1:]
    init = place / "__init__.py"
    if parts[:1] == ["LogBar"]:  # imported into the package from the module of the same name
        init = place / "logbar.py"
    return init, parts


def defined(node: ast.stmt) -> set[str]:
    """Return the names that a statement defines in its scope."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = (name for target in targets for name in ast.walk(target))
        return {name.id for name in names if isinstance(name, ast.Name)}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    return set()


# ---- the list is complete ----


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Return our code by path, including Python blocks in Markdown, without tests and copies in checkpoints."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "docs/*.md", "examples/*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    trees = {}
    for path in listed.stdout.split():
        if path.startswith(("tests/", "checkpoints/qwen-tiny-")) or not (ROOT / path).is_file():
            continue
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.endswith(".py"):
            trees[path] = ast.parse(text)
            continue
        for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)):
            trees[f"{path}#{number}"] = ast.parse(block)
    return trees


def is_private(name: str) -> bool:
    dunder = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and name != "_" and not (dunder and name in SPECIAL)


def own_names(tree: ast.Module) -> set[str]:
    """Return the private names that a file defines: in modules and classes, as instance attributes and parameters."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            names |= defined(node) if not isinstance(node, ast.Import | ast.ImportFrom) else set()
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
        if isinstance(node, ast.arg):
            names.add(node.arg)
    return {name for name in names if is_private(name)}


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def used_names(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Yield the line, the name, and whether it is an attribute of `self`, for each name used."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr, is_self(node.value)
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, word.arg, False) for word in node.keywords if word.arg)
            by_string = isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "hasattr", "delattr")
            if by_string and isinstance(node.args[1], ast.Constant):
                yield node.lineno, node.args[1].value, is_self(node.args[0])
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] != "qwen":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, name, False) for name in names)
        elif isinstance(node, ast.Import):
            names = (name for alias in node.names for name in alias.name.split("."))
            yield from ((node.lineno, name, False) for name in names)


@pytest.mark.slow
def test_used_private_names_are_ours_or_listed() -> None:
    all_own = set().union(*map(own_names, sources().values()))
    unknown = []
    for path, tree in sources().items():
        here = own_names(tree)
        for line, name, of_self in used_names(tree):
            ours = all_own if of_self else here
            if is_private(name) and name not in LISTED | DOCUMENTED | ours and name != "__future__":
                unknown.append(f"{path}:{line}: {name}")
    assert not unknown, "Use a public interface, or add these to INTERFACES:\n" + "\n".join(unknown)


def own_classes() -> Iterator[type]:
    """Yield the classes of our modules that define subclasses. Modules whose dependencies are missing are skipped."""
    for path, tree in sources().items():
        if not path.startswith(("qwen/", "qwen_cli/")) or path.startswith(("qwen/_moved/", "qwen/sandbox/")):
            continue
        if not any(isinstance(node, ast.ClassDef) and node.bases for node in tree.body):
            continue
        module_name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in ("qwen", "qwen_cli"):
                raise
            continue
        yield from (kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__ == module_name)


def is_own(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("qwen", "qwen_cli")


def own_names_of(kind: type) -> set[str]:
    """Return the private names that our class and its instances define, without names added by decorators."""
    tree = sources()[kind.__module__.replace(".", "/") + ".py"]
    (definition,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__)
    return own_names(ast.Module([definition], [])) - {definition.name}


@functools.cache
def text_of(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # implemented in C
        return ""


def has(kind: type, name: str) -> bool:
    """Whether a library class or its instances have the name."""
    return name in vars(kind) or name in inspect.get_annotations(kind) or f"self.{name} = " in text_of(kind)


@pytest.mark.slow
def test_overridden_private_names_are_listed() -> None:
    unknown, checked = defaultdict(set), 0
    for kind in own_classes():
        foreign = [base for base in kind.__mro__ if not is_own(base) and base is not object]
        checked += bool(foreign)
        for own in (base for base in kind.__mro__ if is_own(base) and foreign):
            if own.__module__.replace(".", "/") + ".py" not in sources():
                continue
            for name in own_names_of(own) - LISTED:
                for base in (base for base in foreign if has(base, name)):
                    unknown[f"{own.__module__}.{own.__qualname__}.{name}"].add(f"{base.__module__}.{base.__qualname__}")
    assert checked > 30
    assert not unknown, f"Rename these, or add them to INTERFACES: {dict(unknown)}"


def test_names_ignored_by_ruff_are_listed() -> None:
    """ruff's rule SLF001 also reports private names; all names that it ignores must be in INTERFACES."""
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    settings = lint.get("flake8-self", {})
    ignored = {*settings.get("ignore-names", []), *settings.get("extend-ignore-names", [])}
    assert ignored <= LISTED | DOCUMENTED | {"_name_", "_value_"}, "Add names ignored by ruff to INTERFACES."


def test_used_names_finds_private_names_of_libraries() -> None:
    tree = ast.parse(
        "from lib._place import _thing\n"
        "class Own:\n"
        "    def _method(self, other, _option=None):\n"
        "        self._state = other._method()\n"
        "        return other._secret, getattr(other, '_hidden'), other(_flag=1), self._inherited, other.__odd__\n"
    )
    assert own_names(tree) == {"_method", "_option", "_state"}
    found = {name for _, name, _ in used_names(tree) if is_private(name)} - own_names(tree)
    assert found == {"_place", "_thing", "_secret", "_hidden", "_flag", "_inherited", "__odd__"}
