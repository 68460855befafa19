"""Fine-tune a first-generation Qwen model on conversations: all weights, LoRA, or Q-LoRA.

    python finetune.py --data_path examples/identity.json --use_lora --output_dir output_qwen

Takes the arguments of transformers' TrainingArguments besides its own; `--help` lists them. Runs in one process, under
torchrun, with DeepSpeed (`--deepspeed CONFIG.json`) and with FSDP (`--fsdp`); the scripts in finetune/ do that with the
published settings.
"""

import os
import sys


def main() -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to others
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print("Starting ...", file=sys.stderr)  # the libraries take seconds
    try:
        status = run(sys.argv[1:])
    except ModuleNotFoundError as error:
        print(
            f"{error}. Install the requirements (`pip install -r requirements.txt -r requirements_finetune.txt -c "
            "constraints.txt`), or start with `make finetune`.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:  # a second one, or before training: during it, the first one saves a checkpoint
        if os.environ.get("RANK", "0") == "0":
            print("\nStopped.", file=sys.stderr)
        return 130
    from qwen.finetuning.distributed import destroy_process_group

    destroy_process_group()
    return status


def run(argv: list[str]) -> int:
    from qwen.finetuning.distributed import ProcessFailed, barrier, is_main_process, let_main_process_speak
    from qwen.quiet import quiet_training

    quiet_training(main=is_main_process())
    from qwen.finetuning.arguments import ArgumentError, parse

    def say(text: str) -> None:
        if is_main_process():
            print(text, file=sys.stderr, flush=True)

    def fail(error: Exception, status: int) -> int:
        say(str(error))
        let_main_process_speak()
        return status

    try:
        arguments, notes = parse(argv)
    except ArgumentError as error:
        return fail(error, 2)
    for note in notes:
        say(note)

    from safetensors import SafetensorError

    from qwen.data.conversation_file import DataFileError
    from qwen.data.samples import MalformedSample
    from qwen.finetuning.run import finetune

    try:
        outcome = finetune(arguments)
    except ArgumentError as error:
        return fail(error, 2)
    # SafetensorError is a full disk's; CheckpointError an OSError.
    except (OSError, SafetensorError, DataFileError, MalformedSample, ProcessFailed) as error:
        return fail(error, 1)
    barrier()
    if outcome.interrupted:
        say(f"Stopped. The same command with --resume_from_checkpoint True goes on from {outcome.output_dir}.")
        return 130
    if "eval_loss" in outcome.metrics:
        say(
            "On {eval_data_path}: loss {eval_loss:.4f} nats a token, perplexity {eval_perplexity:.2f}.".format(
                eval_data_path=arguments.data.eval_data_path, **outcome.metrics
            )
        )
    say(f"Done: {outcome.output_dir}\nTalk to it: python cli_demo.py -c {outcome.output_dir}")
    return 0
