"""Write a first-generation Qwen checkpoint in a format that other engines read.

    python export.py -c Qwen/Qwen-7B-Chat -o qwen-7b-chat            # Qwen2's: vLLM, SGLang, transformers alone, ...
    python export.py -c Qwen/Qwen-7B-Chat -o qwen-7b-chat.gguf       # GGUF: llama.cpp, Ollama, ...

The name decides: what ends in .gguf is one file, anything else is a folder. Quantized checkpoints stay so in a folder
and are unpacked for GGUF. docs/deployment.md tells how to serve the result.
"""

import argparse
import sys
from pathlib import Path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "-c", "--checkpoint-path", metavar="NAME", help="a folder or a hub id (default: the bundled toy)"
    )
    parser.add_argument("-o", "--out-path", metavar="OUT", help="a folder, or a file that ends in .gguf (output_qwen2)")
    parser.add_argument(
        "--type", metavar="TYPE", help="of the weights in GGUF: f32, f16 (the default), bf16, q8_0 or q4_0"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="stretch the rotary embedding for prompts of N tokens, where that is beyond the trained length",
    )
    parser.add_argument(
        "--hub", choices=("huggingface", "modelscope"), help="where ids come from (default: QWEN_HUB, or huggingface)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what OUT holds already")
    arguments = parser.parse_args()
    if arguments.out_path is None:
        arguments.out_path = "output_qwen2"
    if arguments.type is not None and not is_gguf(arguments.out_path):
        parser.error("--type is for GGUF: name a file that ends in .gguf, or leave it out to keep the weights' type")
    return arguments


def is_gguf(out: str) -> bool:
    return Path(out).suffix.lower() == ".gguf"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    arguments = parse()
    if sys.stderr.isatty():
        say("Starting ...")  # the libraries take seconds
    try:
        remarks = run(arguments)
    except ModuleNotFoundError as error:
        say(
            f"{error}. Install the requirements (`pip install -r requirements.txt -r requirements_export.txt -c "
            "constraints.txt`), or start with `make export`."
        )
        return 1
    except (OSError, ValueError) as error:  # CheckpointError is among them
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("\nStopped. Nothing was written.")
        return 130
    for remark in remarks:
        say(remark)
    print(arguments.out_path)
    return 0


def run(arguments: argparse.Namespace) -> list[str]:
    from qwen.checkpoint.hub import use
    from qwen.checkpoint.staging import end_like_ctrl_c
    from qwen.export import export_gguf, export_qwen2
    from qwen.quiet import quiet_loading

    end_like_ctrl_c()
    use(arguments.hub)
    how = {"max_length": arguments.max_length, "overwrite": arguments.overwrite, "progress": sys.stderr.isatty()}
    with quiet_loading(progress=arguments.checkpoint_path is not None):
        if is_gguf(arguments.out_path):
            return export_gguf(arguments.checkpoint_path, arguments.out_path, kind=arguments.type or "f16", **how)
        return export_qwen2(arguments.checkpoint_path, arguments.out_path, **how)
