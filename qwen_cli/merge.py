"""Merge a LoRA adapter into its base model: a folder that loads without peft and without the base.

    python finetune/merge_lora.py output_qwen merged_qwen
    python cli_demo.py -c merged_qwen

The weights have the precision of the base unless --dtype names another. An adapter that was trained on a quantized
model (Q-LoRA) cannot be merged into it: use it as it is, or name the float model with --base, which approximates it.
"""

import argparse
import re
import sys

DTYPES = ("float32", "bfloat16", "float16")


def file_size(text: str) -> str:
    """An argparse type: a number and a unit, as transformers reads them."""
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]B", text.strip(), re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write a number and KB, MB, GB or TB, such as 2GB")
    return text.strip()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="the folder that training with --use_lora wrote")
    parser.add_argument("out", metavar="OUT", help="the folder that the model is written to")
    parser.add_argument(
        "--base", metavar="MODEL", help="folder or hub id to merge into, where the recorded one is not it"
    )
    parser.add_argument(
        "--hub", choices=("huggingface", "modelscope"), help="where ids come from (QWEN_HUB, or huggingface)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the weights in OUT; that of the base by default")
    parser.add_argument("--max-shard-size", type=file_size, default="2GB", help="most in one file of weights (2GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that OUT holds already")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    try:
        import torch

        from qwen.checkpoint.hub import use
        from qwen.finetuning.merging import is_approximate, merge
        from qwen.quiet import quiet_loading

        use(arguments.hub)
        with quiet_loading():
            merge(
                arguments.adapter,
                arguments.out,
                base=arguments.base,
                dtype=arguments.dtype and getattr(torch, arguments.dtype),
                max_shard_size=arguments.max_shard_size,
                overwrite=arguments.overwrite,
            )
        if is_approximate(arguments.adapter):
            print(
                "An approximation: the adapter was trained on quantized weights. Try whether the model still does what "
                "it learned.",
                file=sys.stderr,
            )
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Stopped. {arguments.out} is incomplete: start again with --overwrite.", file=sys.stderr)
        return 130
    print(arguments.out)
    return 0
