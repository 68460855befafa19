"""Write a first-generation Qwen checkpoint in a format that other engines read.

    qwen export -c Qwen/Qwen-7B-Chat -o qwen-7b-chat            # Qwen2's: vLLM, SGLang, transformers alone, ...
    qwen export -c Qwen/Qwen-7B-Chat -o qwen-7b-chat.gguf       # GGUF: llama.cpp, Ollama, ...

The name decides: what ends in .gguf is one file, anything else is a folder. Quantized checkpoints stay so in a folder
and are unpacked for GGUF. docs/deployment.md tells how to serve the result.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .arguments import add_checkpoint_argument, add_hub_argument, add_overwrite_argument, make_parser
from .console import NOTHING_WRITTEN, explain_errors, how_to_install, say, say_starting


def parse_arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, prog, allow_abbrev=False)
    add_checkpoint_argument(parser)
    parser.add_argument(
        "-o",
        "--out-path",
        default="output_qwen2",
        metavar="OUT",
        help="a folder, or a file that ends in .gguf (default: %(default)s)",
    )
    parser.add_argument(
        "--type", metavar="TYPE", help="of the weights in GGUF: f32, f16 (the default), bf16, q8_0 or q4_0"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="stretch the rotary embedding for prompts of N tokens, where that is beyond the trained length",
    )
    add_hub_argument(parser)
    add_overwrite_argument(parser)
    arguments = parser.parse_args(argv)
    if arguments.type is not None and not is_gguf(arguments.out_path):
        parser.error("--type is for GGUF: name a file that ends in .gguf, or leave it out to keep the weights' type")
    return arguments


def is_gguf(out: str) -> bool:
    """Whether a path names a GGUF file."""
    return Path(out).suffix.lower() == ".gguf"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Returns the exit status: 0 with an exported model, 1 without one, 130 after Ctrl-C."""
    arguments = parse_arguments(argv, prog)
    say_starting()
    with explain_errors(install=how_to_install("export", "export"), stopped=NOTHING_WRITTEN, prog=prog) as ending:
        remarks = run(arguments)
    if not ending.status:
        for remark in remarks:
            say(remark)
        print(arguments.out_path)
    return ending.status


def run(arguments: argparse.Namespace) -> list[str]:
    """Export; returns remarks on the result."""
    from qwen.checkpoint.staging import end_like_ctrl_c
    from qwen.export import export_gguf, export_qwen2
    from qwen.quiet import quiet_loading

    end_like_ctrl_c()
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
