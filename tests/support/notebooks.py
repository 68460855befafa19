"""Runs the notebooks in examples/ with nbclient.

Only the outputs of cells are saved, not times or the state of widgets.

    python -m tests.support.notebooks     # run all notebooks and update their saved outputs
"""

import asyncio
import contextlib
import json
import os
import re
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.support import ROOT
from tests.support.processes import forking_python

EXAMPLES = ROOT / "examples"
CELL_SECONDS = 180
# The test environment has GPTQModel and therefore torchao, which prints these lines while transformers is imported.
# Readers who follow the notebooks have neither.
TORCHAO = re.compile(r"^(Failed to load .*torchao|W\d.*torch/utils/_pytree\.py).*\n?", re.MULTILINE)
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebooks() -> list[Path]:
    """Return the paths of all notebooks."""
    return sorted(EXAMPLES.glob("*.ipynb"))


def run_notebooks(paths: list[Path]) -> list[NotebookNode | BaseException]:
    """Run notebooks in parallel. Returns each notebook with new outputs, or the exception if it failed."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qwen-notebooks-")))
        python = stack.enter_context(forking_python(folder, nested=True))
        (folder / KERNEL["name"]).mkdir()
        words = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (folder / KERNEL["name"] / "kernel.json").write_text(json.dumps({"argv": words, **KERNEL}))

        async def run_all() -> list[NotebookNode | BaseException]:
            return await asyncio.gather(*(_run(path, folder) for path in paths), return_exceptions=True)

        return asyncio.run(run_all())


async def _run(path: Path, folder: Path) -> NotebookNode:
    client = NotebookClient(
        nbformat.read(path, as_version=4),
        timeout=CELL_SECONDS,
        coalesce_streams=True,
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(EXAMPLES)}},
        km=AsyncKernelManager(
            kernel_name=KERNEL["name"],
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(folder)]),
            # Unix sockets, which other users cannot read; over TCP the kernel prints a warning about that.
            transport="ipc",
            ip=str(folder / path.stem),
        ),
    )
    variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder)}
    variables["CUDA_VISIBLE_DEVICES"] = ""  # the saved outputs were computed in float32
    return without_torchao(await client.async_execute(env={**os.environ, **variables}, cleanup_kc=True))


def without_torchao(notebook: NotebookNode) -> NotebookNode:
    """Remove what torchao and torch print on standard error if torchao is installed."""
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        for output in outputs:
            if output.get("name") == "stderr":
                output.text = TORCHAO.sub("", output.text)
        if outputs:
            cell.outputs = [output for output in outputs if output.get("text") != ""]
    return notebook


def clean(notebook: NotebookNode) -> NotebookNode:
    """Remove metadata that is not saved."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({key: value for key, value in cell.metadata.items() if key == "tags"})
    return notebook


if __name__ == "__main__":
    for path, notebook in zip(notebooks(), run_notebooks(notebooks()), strict=True):
        if isinstance(notebook, BaseException):
            raise notebook
        nbformat.write(clean(notebook), path)
