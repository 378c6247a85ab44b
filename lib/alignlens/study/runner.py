"""Many results at once: what has to be made in which order, on several processes, behind one progress bar."""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from multiprocessing import get_context, parent_process

from tqdm import tqdm

from alignlens import models
from alignlens.study.stages import STAGES
from alignlens.study.variants import Variant


def plan(study, groups) -> list[list[tuple[str, tuple]]]:
    """Steps of tasks (stage, arguments), one step after the other: what others need first, bases before variants."""
    names = [name for group in groups for name, stage in STAGES.items() if stage.group == group]
    steps = []
    for name in dict.fromkeys(n for asked in names for n in (*_before(asked), asked)):
        tasks = [(name, args) for args in STAGES[name].wanted(study)]
        of_bases = [task for task in tasks if _is_base(task[1])]
        steps += [of_bases, [task for task in tasks if task not in of_bases]]
    return [step for step in steps if step]


def _before(name: str) -> list[str]:
    return [n for first in STAGES[name].after for n in (*_before(first), first)]


def _is_base(args: tuple) -> bool:
    return len(args) == 1 and isinstance(args[0], Variant) and args[0].method == "base"


def run(study, steps: list[list[tuple[str, tuple]]]) -> None:
    """Make every task's result; results stay in the store."""
    total, start = sum(map(len, steps)), time.perf_counter()
    # A plain bar, not a widget: widgets stand at 0 % for ever in an executed copy.
    bar = tqdm(total=total, disable=not study.progress or not total, file=sys.stdout, leave=False)
    with bar, _pool(study, total) as pool:
        for tasks in steps:
            futures = {pool.submit(_work, type(study), study.preset, *task): task for task in tasks} if pool else {}
            try:
                for done in as_completed(futures) if pool else tasks:
                    name, args = futures[done] if pool else done
                    bar.set_description(f"{STAGES[name].title} {STAGES[name].label(study, *args)}")
                    done.result() if pool else study.get(name, *args)
                    bar.update()
            except BaseException:
                if pool:
                    pool.shutdown(cancel_futures=True)
                raise
    if study.progress and total:
        print(f"{total} results ready after {time.perf_counter() - start:.0f} s (made, or found in the store)")


def _pool(study, tasks: int):
    jobs = study.preset.jobs or (1 if study.device != "cpu" else min(2, os.cpu_count() or 1))
    if jobs == 1 or tasks < 2:
        return nullcontext()
    # Not joblib: its workers go on for a while when the notebook that started them is killed.
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    """A worker ends with the notebook that started it: a killed kernel leaves nobody training."""
    parent = parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    models.one_thread()


_studies: dict[str, object] = {}


def _work(kind: type, preset, name: str, args: tuple) -> None:
    """One task in a worker, on its own study of the preset; what it makes goes to the store: nothing is sent back."""
    key = repr(preset)
    if key not in _studies:
        _studies[key] = kind(preset, progress=False)
    _studies[key].get(name, *args)
