"""Arrays that may be larger than memory, and the two files in which streams are stored."""

import json
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from alignlens.core.errors import ActivationError
from alignlens.core.store import write_arrays, write_json

MEMORY_LIMIT = 4 * 2**30  # bytes of result above which it is kept in a temporary file instead of memory


def allocate(shape: tuple[int, ...], dtype=np.float32, folder: str | Path | None = None) -> np.ndarray:
    """An array in memory; in a file without a name if it is large, or in a folder if one is given."""
    size = np.dtype(dtype).itemsize * math.prod(shape)
    if folder is None and size <= MEMORY_LIMIT:
        return np.empty(shape, dtype)
    # A full disk would otherwise end the process while it writes into the map.
    if size > (free := shutil.disk_usage(folder or tempfile.gettempdir()).free):
        sizes = f"{size / 1e9:,.1f} GB of streams do not fit on the disk, which has {free / 1e9:,.1f} GB free"
        raise ActivationError(f"{sizes}: ask for fewer layers, or set a limit")
    with tempfile.TemporaryFile(dir=folder) as file:  # the mapping keeps the nameless file until the array is gone
        return np.memmap(file, dtype, "w+", shape=shape)


def write(folder: str | Path, name: str, arrays: dict[str, np.ndarray], facts: dict) -> None:
    """NAME.safetensors and NAME.json in an existing folder."""
    write_arrays(Path(folder) / f"{name}.safetensors", arrays)
    write_json(Path(folder) / f"{name}.json", facts)


def load(folder: str | Path, name: str) -> dict:
    """What ``write`` wrote, the arrays mapped. ActivationError if a file is missing or damaged."""
    try:  # as torch's, which stay on disk until they are used; numpy's would be loaded
        arrays = {key: tensor.numpy() for key, tensor in load_file(Path(folder) / f"{name}.safetensors").items()}
        facts = json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ActivationError(f"{folder} holds no readable {name}: {error}") from error
    return arrays | facts | {"prompt_id": np.array(facts["prompt_id"], dtype=str)}


def place_of(layer: int, layers: list[int]) -> int:
    """Where a layer stands among those that were read."""
    if layer not in layers:
        raise ActivationError(f"layer {layer} was not read; these were: {layers}")
    return layers.index(layer)
