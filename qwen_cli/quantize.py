"""Quantize a first-generation Qwen model to 4 or 8 bits (GPTQ), calibrated with conversations.

    qwen quantize --model_name_or_path merged_qwen --data_path data.json --out_path merged_qwen_int4
    qwen chat -c merged_qwen_int4

The data has the format of fine-tuning data. Without a model and data, the bundled toy is quantized with its own
conversations. The result is complete, and loads like the published -Int4 and -Int8 checkpoints.
"""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import add_hub_argument, add_overwrite_argument, make_parser, with_script_names
from .console import explain_errors, how_to_install, interrupt_message_for, print_message, print_starting

if TYPE_CHECKING:  # it takes seconds to import
    from qwen import Checkpoint
    from qwen.quantization import QuantizeResult


def parse_arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__, prog, allow_abbrev=False)

    def option(name: str, **settings) -> None:
        """Add an option that accepts both - and _ between its words."""
        parser.add_argument(
            *dict.fromkeys((name, "--" + name[2:].replace("_", "-"), "--" + name[2:].replace("-", "_"))), **settings
        )

    option("--model_name_or_path", metavar="MODEL", help="folder or hub id of a float model (default: the bundled toy)")
    add_hub_argument(parser)
    option("--data_path", metavar="FILE", help="conversations to calibrate with: a JSON list, or JSON Lines")
    option("--out_path", metavar="OUT", help="folder to write (default: output_qwen_int4 or output_qwen_int8)")
    option(
        "--max_len",
        type=int,
        default=8192,
        metavar="N",
        help="maximum length of a conversation in tokens (default: %(default)s)",
    )
    option("--bits", type=int, default=4, choices=(4, 8), help="bits per weight (default: %(default)s)")
    option("--group-size", type=int, default=128, metavar="N", help="weights that share a scale (default: %(default)s)")
    option(
        "--samples", type=int, default=128, metavar="N", help="maximum number of conversations (default: %(default)s)"
    )
    option("--seed", type=int, default=1234, metavar="N", help="random seed of the sampling (default: %(default)s)")
    option(
        "--max-shard-size", default="2GB", metavar="SIZE", help="maximum size of a weight file (default: %(default)s)"
    )
    add_overwrite_argument(parser)
    option("--cpu-only", action="store_true", help="run on the CPU even if there is a GPU")
    arguments = parser.parse_args(argv)
    if arguments.model_name_or_path is not None and arguments.data_path is None:
        parser.error(
            "--data_path is missing: name conversations like those that the model will be used for, its fine-tuning "
            "data or a part of it"
        )
    for name, minimum in (("max_len", 16), ("samples", 1)):
        if getattr(arguments, name) < minimum:
            parser.error(f"--{name} is {getattr(arguments, name)}: it must be at least {minimum}")
    if arguments.out_path is None:
        arguments.out_path = f"output_qwen_int{arguments.bits}"
    return arguments


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Quantize a model. Returns the exit status: 0 on success, 1 on error, 130 after Ctrl-C."""
    arguments = parse_arguments(argv, prog)
    print_starting()
    with explain_errors(
        install_hint=how_to_install("gptq", "quantize"),
        interrupt_message=interrupt_message_for(Path(arguments.out_path, "config.json")),
        prog=prog,
    ) as result:
        outcome = run(arguments)
    if not result.status:
        with contextlib.suppress(KeyboardInterrupt):  # too late to stop anything
            report(outcome, arguments.out_path, prog)
    return result.status


def run(arguments: argparse.Namespace) -> "QuantizeResult":
    """Quantize, and print the calibration data used."""
    from qwen import Checkpoint
    from qwen.checkpoint.staging import handle_signals_as_ctrl_c
    from qwen.quantization import check, quantize
    from qwen.quiet import quiet_loading

    handle_signals_as_ctrl_c()
    source, out = Checkpoint(arguments.model_name_or_path, hub=arguments.hub), Path(arguments.out_path)
    settings = {
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "max_shard_size": arguments.max_shard_size,
        "overwrite": arguments.overwrite,
    }
    with quiet_loading(progress=arguments.model_name_or_path is not None):
        config = check(source, out, **settings)
        samples, found = load_calibration_samples(arguments, source)
        tokens = sum(map(len, samples))
        print_message(
            f"{arguments.model_name_or_path or 'The bundled toy'} to {arguments.bits} bits, calibrated with "
            f"{len(samples)} of {found} conversations: {tokens:,} tokens."
        )
        if cut := sum(len(ids) == arguments.max_len for ids in samples):
            print_message(f"{cut} of them fill or exceed --max_len {arguments.max_len}: their ends are cut off.")
        if tokens < (widest := max(config.hidden_size, config.intermediate_size // 2)):
            print_message(
                f"That is little: matrices have up to {widest:,} inputs. Use more than that, the more the better."
            )
        return quantize(source, out, samples, **settings, cpu_only=arguments.cpu_only, progress=True)


def report(outcome: "QuantizeResult", out: str, prog: str | None) -> None:
    """Print the losses and what to do next."""
    from qwen import Checkpoint
    from qwen.quantization import format_bytes

    print_message(f"{'matrix':14}{'mean loss':>12}{'worst':>12}  in layer")
    for kind, loss in outcome.losses.items():
        print_message(f"{kind:14}{loss.mean:12.3g}{loss.worst:12.3g}  {loss.worst_layer + 1}")
    before, after = format_bytes(outcome.bytes_before), format_bytes(outcome.bytes_after)
    print_message(f"Done in {outcome.seconds:.0f} s: {out}, {after} of weights ({before} in 16 bits).")
    if Checkpoint(outcome.folder).is_chat:
        print_message(with_script_names(f"Talk to it: qwen chat -c {out}", prog))


def load_calibration_samples(arguments: argparse.Namespace, source: "Checkpoint") -> tuple[list[list[int]], int]:
    """Return the token ids of the calibration samples, and the number of all conversations."""
    from qwen.data.conversation_file import ConversationFile
    from qwen.quantization import calibration_samples

    # --data_path may be missing only for the bundled model.
    path = arguments.data_path or source.folder / "calibration.json"
    file = ConversationFile(path, progress=arguments.data_path is not None)
    for note in file.notes:
        print_message(note)
    tokenizer = source.tokenizer()
    return calibration_samples(file, tokenizer, arguments.max_len, arguments.samples, arguments.seed), len(file)
