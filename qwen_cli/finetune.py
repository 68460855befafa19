"""Fine-tune a first-generation Qwen model on conversations: all weights, LoRA, or Q-LoRA.

    qwen finetune --data_path examples/identity.json --use_lora --output_dir output_qwen

Takes every argument of transformers' TrainingArguments; --help lists the common ones, --help-all lists all of them.
Runs in one process, under torchrun, with DeepSpeed (--deepspeed CONFIG.json) and with FSDP (--fsdp full_shard); the
scripts in finetune/ use the published settings.
"""

import os
import sys
from collections.abc import Sequence

from .arguments import make_parser, with_script_names
from .console import explain_errors, how_to_install, print_message, print_starting
from .finetune_options import add_options


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Train. Returns the exit status: 0 on success, 1 on error, 2 for invalid arguments, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        print_help(prog)
        return 0
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads free their cores
    is_rank_zero = os.environ.get("RANK", "0") == "0"
    if is_rank_zero:
        print_starting()
    with explain_errors(
        install_hint=how_to_install("finetune", "finetune"),
        # After a second Ctrl-C, or before training: during it, the first one saves a checkpoint.
        interrupt_message="\nStopped.",
        print_note=print_message if is_rank_zero else lambda text: None,
        errors=(),  # `run` prints the expected errors; others need their traceback
    ) as result:
        if "--help-all" in argv:
            print_help_of_all(prog)
        else:
            result.status = run(argv, prog)
            from qwen.finetuning.distributed import destroy_process_group

            destroy_process_group()
    return result.status


def print_help(prog: str | None) -> None:
    """Print the help of the common arguments, without slow imports."""
    parser = make_parser(__doc__, prog, usage="%(prog)s --data_path FILE [arguments]", add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="show the common arguments")
    parser.add_argument("--help-all", action="store_true", help="show all arguments (takes seconds)")
    add_options(parser)
    parser.print_help()


def print_help_of_all(prog: str | None) -> None:
    """Print the help of all arguments."""
    from qwen.finetuning.arguments import make_parser as make_full_parser

    parser = make_full_parser()
    parser.prog = prog or parser.prog
    parser.print_help()


def run(argv: list[str], prog: str | None) -> int:
    """Train with the given arguments and return the exit status."""
    from qwen.finetuning.distributed import ProcessFailed, barrier, delay_exit_on_workers, is_main_process
    from qwen.quiet import quiet_training

    quiet_training(main=is_main_process())
    from qwen.finetuning.arguments import ArgumentError, parse

    def print_on_main_process(text: str) -> None:
        if is_main_process():
            print_message(text)

    def fail(error: Exception, status: int) -> int:
        print_on_main_process(with_script_names(str(error), prog))
        delay_exit_on_workers()
        return status

    try:
        arguments, notes = parse(argv)
    except ArgumentError as error:
        return fail(error, 2)
    for note in notes:
        print_on_main_process(note)

    from safetensors import SafetensorError

    from qwen.data.conversation_file import DataFileError
    from qwen.data.samples import MalformedSample
    from qwen.finetuning.run import finetune

    try:
        outcome = finetune(arguments)
    except ArgumentError as error:
        return fail(error, 2)
    # SafetensorError is raised for a full disk; CheckpointError is an OSError.
    except (OSError, SafetensorError, DataFileError, MalformedSample, ProcessFailed) as error:
        return fail(error, 1)
    barrier()
    if outcome.interrupted:
        print_on_main_process(
            f"Stopped. Add --resume_from_checkpoint True to the same command to continue from {outcome.output_dir}."
        )
        return 130
    if "eval_loss" in outcome.metrics:
        print_on_main_process(
            "On {eval_data_path}: loss {eval_loss:.4f} nats per token, perplexity {eval_perplexity:.2f}.".format(
                eval_data_path=arguments.data.eval_data_path, **outcome.metrics
            )
        )
    print_on_main_process(
        with_script_names(f"Done: {outcome.output_dir}\nTalk to it: qwen chat -c {outcome.output_dir}", prog)
    )
    return 0
