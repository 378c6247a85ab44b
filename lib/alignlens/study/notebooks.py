"""Run the study's notebooks through papermill, one after another, executed copies beside the figures."""

import logging
import os
import time
from base64 import b64decode, b64encode
from pathlib import Path

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from alignlens.core import settings
from alignlens.core.errors import AlignlensError
from alignlens.core.style import shrink

# Kernels that start side by side can take each other's TCP port; sockets in the file system cannot collide.
SOCKETS = Config({"KernelManager": {"transport": "ipc"}})

# Papermill warns of each parameter that a notebook's cell does not list; ours are checked, and a wrong one is refused.
logging.getLogger("papermill").addFilter(lambda record: "unknown parameter" not in record.getMessage())


class NotebookError(AlignlensError):
    """A notebook stopped with an error."""


def run(name: str, parameters: dict, *, folder: str | Path | None = None) -> Path:
    """Execute ``notebooks/<name>.ipynb`` with parameters and keep the executed copy beside the figures.

    The copy takes its place only once the notebook has run to its end; a failed run leaves ``<name>.failed.ipynb``
    and raises NotebookError with the failing cell's error."""
    preset = settings.resolve(**({"preset": "tiny"} | parameters))
    source = settings.home() / "notebooks" / f"{name}.ipynb"
    folder = Path(folder or settings.place(preset.figures)) / preset.name
    folder.mkdir(parents=True, exist_ok=True)
    target, failed, start = folder / f"{name}.ipynb", folder / f"{name}.failed.ipynb", time.perf_counter()
    print(f"{name} ...", end=" ", flush=True)
    options = {"kernel_name": "python3", "progress_bar": False, "config": SOCKETS}
    try:
        papermill.execute_notebook(str(source), str(failed), parameters=parameters, **options)
    except PapermillExecutionError as error:
        what = f"{name}.ipynb stopped in cell {error.exec_count}: {error.ename}: {error.evalue}"
        raise NotebookError(f"{what}. Open {os.path.relpath(failed)} to see where") from None
    _tidy(failed, name, preset.name)
    os.replace(failed, target)
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    return target


def _tidy(path: Path, name: str, preset: str) -> None:
    """Make an executed copy readable anywhere: no full paths, small pictures, of a progress bar what was left."""
    done = nbformat.read(path, as_version=4)
    done.metadata.papermill.update(input_path=f"notebooks/{name}.ipynb", output_path=f"{preset}/{name}.ipynb")
    for cell in done.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = "\n".join(line.rsplit("\r", 1)[-1] for line in output.text.split("\n"))
            elif "image/png" in output.get("data", {}):
                output.data["image/png"] = b64encode(shrink(b64decode(output.data["image/png"]))).decode()
    nbformat.write(done, path)


def given(names: dict) -> dict:
    """The parameters that a driver notebook was given, checked, as it passes them on: fields left at None are out."""
    settings.from_notebook(names)
    fields = {*settings.Preset.model_fields, "preset"} - {"name"}
    return {k: v for k, v in names.items() if k in fields and v is not None}
