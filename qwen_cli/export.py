"""Export a first-generation Qwen checkpoint for other inference engines.

    qwen export -c Qwen/Qwen-7B-Chat -o qwen-7b-chat            # Qwen2: vLLM, SGLang, plain transformers, ...
    qwen export -c Qwen/Qwen-7B-Chat -o qwen-7b-chat.gguf       # GGUF: llama.cpp, Ollama, ...

The output name selects the format: a file for names that end in .gguf, otherwise a folder. Quantized weights stay
quantized in a folder and are dequantized for GGUF. docs/deployment.md explains how to serve the result.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .arguments import add_checkpoint_argument, add_hub_argument, add_overwrite_argument, make_parser
from .console import explain_errors, how_to_install, interrupt_message_for, print_message, print_starting


def parse_arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__, prog, allow_abbrev=False)
    add_checkpoint_argument(parser)
    parser.add_argument(
        "-o",
        "--out-path",
        default="output_qwen2",
        metavar="OUT",
        help="output folder, or output file that ends in .gguf (default: %(default)s)",
    )
    parser.add_argument(
        "--type", metavar="TYPE", help="type of the weights in GGUF: f32, f16 (the default), bf16, q8_0 or q4_0"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="stretch the rotary embedding for prompts of N tokens, if N exceeds the trained length",
    )
    add_hub_argument(parser)
    add_overwrite_argument(parser)
    arguments = parser.parse_args(argv)
    if Path(arguments.out_path).suffix.lower() in (".bin", ".ggml"):
        parser.error(f"{arguments.out_path}: qwen.cpp's format is replaced by llama.cpp's: name a file ending in .gguf")
    if arguments.type is not None and not is_gguf(arguments.out_path):
        parser.error("--type is for GGUF: name a file that ends in .gguf, or omit --type to keep the weights' type")
    return arguments


def is_gguf(out: str) -> bool:
    """Return whether a path names a GGUF file."""
    return Path(out).suffix.lower() == ".gguf"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Export a model. Returns the exit status: 0 on success, 1 on error, 130 after Ctrl-C."""
    arguments = parse_arguments(argv, prog)
    print_starting()
    out = Path(arguments.out_path)
    with explain_errors(
        install_hint=how_to_install("export", "export"),
        interrupt_message=interrupt_message_for(out if is_gguf(arguments.out_path) else out / "config.json"),
        prog=prog,
    ) as result:
        remarks = run(arguments)
    if not result.status:
        for remark in remarks:
            print_message(remark)
        print(arguments.out_path)
    return result.status


def run(arguments: argparse.Namespace) -> list[str]:
    """Export a model and return remarks about the result."""
    from qwen.checkpoint.staging import handle_signals_as_ctrl_c
    from qwen.export import export_gguf, export_qwen2
    from qwen.quiet import quiet_loading

    handle_signals_as_ctrl_c()
    how = {
        "max_length": arguments.max_length,
        "hub": arguments.hub,
        "overwrite": arguments.overwrite,
        "progress": sys.stderr.isatty(),
    }
    with quiet_loading(progress=arguments.checkpoint_path is not None):
        if is_gguf(arguments.out_path):
            return export_gguf(arguments.checkpoint_path, arguments.out_path, kind=arguments.type or "f16", **how)
        return export_qwen2(arguments.checkpoint_path, arguments.out_path, **how)
