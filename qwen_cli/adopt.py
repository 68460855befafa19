"""Write this package's code beside downloaded weights, so that the folder loads without this package.

    hf download Qwen/Qwen-7B-Chat --local-dir qwen-7b-chat
    qwen adopt qwen-7b-chat
    qwen adopt qwen-7b-chat --undo

Any program on transformers 5 then loads the folder with trust_remote_code=True. The files that are replaced are kept in
the subfolder before_adopt; weights and vocabulary stay as they are. A folder in the cache of the Hugging Face Hub is
adopted with --to only.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import make_parser
from .console import explain_errors, how_to_install, interrupt_message_for, print_message, print_starting

if TYPE_CHECKING:  # takes seconds to import
    from qwen.checkpoint.adoption import AdoptResult


def parse_arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__, prog, allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", help="folder of a first-generation Qwen model")
    parser.add_argument(
        "--to", metavar="OUT", help="leave FOLDER as it is and write to OUT, with links to the weights where possible"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model in OUT")
    parser.add_argument("--undo", action="store_true", help="restore FOLDER to what it was before")
    arguments = parser.parse_args(argv)
    if arguments.undo and arguments.to is not None:
        parser.error("--undo restores FOLDER itself: omit --to")
    if arguments.overwrite and arguments.to is None:
        parser.error("--overwrite is for --to: omit it, since a second run replaces what an older version wrote")
    return arguments


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Adopt a folder. Returns the exit status: 0 on success, 1 on error, 130 after Ctrl-C."""
    arguments = parse_arguments(argv, prog)
    out = arguments.folder if arguments.to is None else arguments.to
    print_starting()
    with explain_errors(
        install_hint=how_to_install(None), interrupt_message=interrupt_message_for(Path(out, "config.json")), prog=prog
    ) as result:
        texts = run(arguments)
    if not result.status:
        for text in texts:
            print_message(text)
        print(out)
    return result.status


def run(arguments: argparse.Namespace) -> list[str]:
    """Adopt a folder, or undo that, and return remarks about the result."""
    from qwen.checkpoint.adoption import adopt, undo
    from qwen.checkpoint.staging import handle_signals_as_ctrl_c
    from qwen.quiet import quiet_loading

    handle_signals_as_ctrl_c()
    with quiet_loading():
        if arguments.undo:
            return [f"{len(undo(arguments.folder))} files are as they were before."]
        return remarks(
            adopt(arguments.folder, to=arguments.to, overwrite=arguments.overwrite, progress=sys.stderr.isatty())
        )


def remarks(result: "AdoptResult") -> list[str]:
    """Return what the user should know about the result."""
    from qwen.checkpoint.adoption import KEPT

    texts = []
    if result.written:
        replaced = result.folder / KEPT
        texts.append(f"Wrote {len(result.written)} files. Those that they replace are kept in {replaced} for --undo.")
    else:
        texts.append(f"Nothing had to be changed: {result.folder} has this version's code and settings.")
    if result.linked_to is not None:
        texts.append(f"The weights are symbolic links to {result.linked_to}: keep that folder.")
    return texts
