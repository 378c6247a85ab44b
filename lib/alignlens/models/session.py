"""How this process runs: on which device, on how many threads, and how much Transformers says meanwhile."""

import logging
import sys
import warnings
from contextlib import ExitStack, contextmanager

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def quietly():
    """Keep notes, progress bars and load reports of Hugging Face's libraries out of notebooks.

    Errors are raised as ever; what a load report would say of missing weights is checked by ``load`` instead."""
    with ExitStack() as after, warnings.catch_warnings(action="ignore"):
        for name in ("transformers", "datasets", "trl", "accelerate", "peft", "huggingface_hub"):
            logger, bars = logging.getLogger(name), sys.modules.get(f"{name}.utils.logging")
            after.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
            if hasattr(bars, "is_progress_bar_enabled") and bars.is_progress_bar_enabled():
                after.callback(bars.enable_progress_bar)
                bars.disable_progress_bar()
        yield


def default_device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def one_thread() -> None:
    """Keep this process to one CPU thread. Small matrices gain nothing from more, and on shared cores lose many times.

    PyTorch's threads wait for each other by spinning: on a busy machine two ran about ten times slower than one."""
    torch.set_num_threads(1)
    threadpool_limits(1)
