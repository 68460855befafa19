"""Merge a LoRA adapter into its base model. The result loads without peft and without the base.

    qwen merge output_qwen merged_qwen
    qwen chat -c merged_qwen

The weights have the precision of the base unless --dtype names another. An adapter trained on a quantized model
(Q-LoRA) cannot be merged into it: use it as it is, or name the float model with --base, which is an approximation.
"""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from .arguments import add_hub_argument, add_overwrite_argument, file_size, make_parser
from .console import explain_errors, how_to_install, interrupt_message_for, print_message

DTYPES = ("float32", "bfloat16", "float16")


def parse_arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__, prog, allow_abbrev=False)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder written by training with --use_lora")
    parser.add_argument("out", metavar="OUT", help="folder for the merged model")
    parser.add_argument(
        "--base", metavar="MODEL", help="folder or hub id to merge into (default: the base recorded in the adapter)"
    )
    add_hub_argument(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="precision of the weights in OUT (default: precision of the base)"
    )
    parser.add_argument(
        "--max-shard-size",
        type=file_size,
        default="2GB",
        metavar="SIZE",
        help="maximum size of a weight file (default: %(default)s)",
    )
    add_overwrite_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Merge an adapter. Returns the exit status: 0 on success, 1 on error, 130 after Ctrl-C."""
    arguments = parse_arguments(argv, prog)
    with explain_errors(
        install_hint=how_to_install("peft"),
        interrupt_message=interrupt_message_for(Path(arguments.out, "config.json")),
        prog=prog,
    ) as result:
        run(arguments)
    if not result.status:
        with contextlib.suppress(KeyboardInterrupt):  # too late to stop anything
            report(arguments)
    return result.status


def run(arguments: argparse.Namespace) -> None:
    """Merge with the given arguments."""
    import torch

    from qwen.checkpoint.staging import handle_signals_as_ctrl_c
    from qwen.finetuning.merging import merge
    from qwen.quiet import quiet_loading

    handle_signals_as_ctrl_c()
    with quiet_loading():
        merge(
            arguments.adapter,
            arguments.out,
            base=arguments.base,
            hub=arguments.hub,
            dtype=arguments.dtype and getattr(torch, arguments.dtype),
            max_shard_size=arguments.max_shard_size,
            overwrite=arguments.overwrite,
        )


def report(arguments: argparse.Namespace) -> None:
    """Print the folder of the model, and a note if it is an approximation."""
    from qwen.finetuning.merging import is_approximate

    if is_approximate(arguments.adapter, arguments.hub):
        print_message(
            "The model is an approximation: the adapter was trained on quantized weights. Test whether it still does "
            "what it learned."
        )
    print(arguments.out)
