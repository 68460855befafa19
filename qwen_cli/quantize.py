"""Quantize a first-generation Qwen model to 4 or 8 bits (GPTQ), calibrated with conversations.

    python run_gptq.py --model_name_or_path merged_qwen --data_path data.json --out_path merged_qwen_int4
    python cli_demo.py -c merged_qwen_int4

The data is that of fine-tuning. Without a model and data, the bundled toy is quantized with conversations of its own.
The folder that is written is complete, and loads as every published -Int4 or -Int8 checkpoint does.
"""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it takes seconds to import
    from qwen.quantization import Outcome


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def option(name: str, **settings) -> None:
        """One that is understood with - and with _ between its words."""
        parser.add_argument(
            *dict.fromkeys((name, "--" + name[2:].replace("_", "-"), "--" + name[2:].replace("-", "_"))), **settings
        )

    option(
        "--model_name_or_path",
        metavar="MODEL",
        help="a folder or a hub id of a float model; the bundled toy without it",
    )
    option("--hub", choices=("huggingface", "modelscope"), help="where ids come from (QWEN_HUB, or huggingface)")
    option("--data_path", metavar="FILE", help="conversations to calibrate with: a JSON list, or JSON Lines")
    option(
        "--out_path", metavar="OUT", help="the folder that is written; output_qwen_int4 or output_qwen_int8 without it"
    )
    option("--max_len", type=int, default=8192, metavar="N", help="longest conversation in tokens (8192)")
    option("--bits", type=int, default=4, choices=(4, 8), help="bits of a weight (4)")
    option("--group-size", type=int, default=128, metavar="N", help="weights that share a scale (128)")
    option("--samples", type=int, default=128, metavar="N", help="most conversations that are used (128)")
    option("--seed", type=int, default=1234, metavar="N", help="chooses the conversations where there are more (1234)")
    option("--max-shard-size", default="2GB", metavar="SIZE", help="most in one file of weights (2GB)")
    option("--overwrite", action="store_true", help="replace the model that OUT holds already")
    option("--cpu-only", action="store_true", help="stay off the GPU")
    arguments = parser.parse_args()
    if arguments.model_name_or_path is not None and arguments.data_path is None:
        parser.error(
            "--data_path is missing: name conversations such as the model will be used for, its fine-tuning data or a "
            "part of it"
        )
    for name, least in (("max_len", 16), ("samples", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} is {getattr(arguments, name)}: it must be at least {least}")
    if arguments.out_path is None:
        arguments.out_path = f"output_qwen_int{arguments.bits}"
    return arguments


def main() -> int:
    arguments = parse()
    if sys.stderr.isatty():
        print("Starting ...", file=sys.stderr)  # the libraries take seconds
    try:
        outcome = run(arguments)
    except ModuleNotFoundError as error:
        print(
            f"{error}. Install the requirements (`pip install -r requirements.txt -r requirements_gptq.txt -c "
            "constraints.txt`), or start with `make quantize`.",
            file=sys.stderr,
        )
        return 1
    except (OSError, ValueError) as error:  # CheckpointError, DataFileError and MalformedSample are among them
        print(error, file=sys.stderr)
        return 1
    except MemoryError as error:
        print(str(error) or "The main memory is full.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Nothing was written.", file=sys.stderr)
        return 130
    with contextlib.suppress(KeyboardInterrupt):  # it comes too late
        report(outcome, arguments.out_path)
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> "Outcome":
    from qwen.checkpoint.hub import use
    from qwen.checkpoint.loading import resolve
    from qwen.checkpoint.staging import end_like_ctrl_c
    from qwen.quantization import check, quantize
    from qwen.quiet import quiet_loading

    end_like_ctrl_c()
    use(arguments.hub)
    source, out = resolve(arguments.model_name_or_path), Path(arguments.out_path)
    how = {
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "max_shard_size": arguments.max_shard_size,
        "overwrite": arguments.overwrite,
    }
    with quiet_loading(progress=arguments.model_name_or_path is not None):
        config = check(source, out, **how)
        samples, found = conversations(arguments, source)
        tokens = sum(map(len, samples))
        say(
            f"{arguments.model_name_or_path or 'The bundled toy'} to {arguments.bits} bits, calibrated with "
            f"{len(samples)} of {found} conversations: {tokens:,} tokens."
        )
        if cut := sum(len(ids) == arguments.max_len for ids in samples):
            say(f"{cut} of them fill or exceed --max_len {arguments.max_len}: their ends are cut off.")
        if tokens < (widest := max(config.hidden_size, config.intermediate_size // 2)):
            say(f"That is little: matrices have up to {widest:,} inputs. The more tokens above that, the better.")
        return quantize(source, out, samples, **how, cpu_only=arguments.cpu_only, progress=True)


def report(outcome: "Outcome", out: str) -> None:
    from qwen.checkpoint.loading import chat_format
    from qwen.quantization import gigabytes

    say(f"{'matrix':14}{'mean loss':>12}{'worst':>12}  in layer")
    for kind, loss in outcome.losses.items():
        say(f"{kind:14}{loss.mean:12.3g}{loss.worst:12.3g}  {loss.worst_layer + 1}")
    before, after = gigabytes(outcome.bytes_before), gigabytes(outcome.bytes_after)
    say(f"Done in {outcome.seconds:.0f} s: {out}, {after} of weights, which are {before} in 16 bits.")
    if chat_format(str(outcome.folder)) == "chatml":
        say(f"Talk to it: python cli_demo.py -c {out}")


def conversations(arguments: argparse.Namespace, source: str) -> tuple[list[list[int]], int]:
    """Token ids of the conversations that calibrate, and how many there are to choose from."""
    from qwen.checkpoint.loading import BUNDLED_CHAT, load_tokenizer
    from qwen.data.conversation_file import ConversationFile
    from qwen.quantization import calibration_samples

    if arguments.data_path is None:
        from checkpoints.recipe.quantize import calibration

        samples = calibration(BUNDLED_CHAT, arguments.samples, arguments.max_len)
        return samples, len(samples)
    tokenizer = load_tokenizer(source)
    file = ConversationFile(arguments.data_path, progress=True)
    return calibration_samples(file, tokenizer, arguments.max_len, arguments.samples, arguments.seed), len(file)
