"""Many results at once: what has to be made in which order, on several processes, behind one progress bar."""

import os
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import active_children, get_context, parent_process

from IPython.display import display
from tqdm import tqdm

from alignlens import models
from alignlens.core.errors import AlignlensError
from alignlens.core.store import PROGRESS
from alignlens.study.stages import STAGES, Variant

TERMINAL = "ALIGNLENS_TERMINAL"  # names the terminal, for kernels that are started from a notebook and have none
with suppress(OSError, ValueError):
    os.environ.setdefault(TERMINAL, os.ttyname(sys.stderr.fileno()))


def plan(study, groups) -> list[list[tuple[str, tuple]]]:
    """Steps of tasks (stage, arguments), one step after the other: what others need first, bases before variants."""
    names = [name for group in groups for name, stage in STAGES.items() if stage.group == group]
    steps, bases = [], [(Variant(family, "base"),) for family in study.families]
    for name in dict.fromkeys(n for asked in names for n in _with_earlier(asked)):
        tasks = [(name, args) for args in STAGES[name].wanted(study)]
        of_bases = [task for task in tasks if task[1] in bases]
        steps += [of_bases, [task for task in tasks if task not in of_bases]]
    return [step for step in steps if step]


def _with_earlier(name: str) -> list[str]:
    return [*(n for first in STAGES[name].after for n in _with_earlier(first)), name]


def run(study, steps: list[list[tuple[str, tuple]]]) -> None:
    """Make every task's result; results stay in the store.

    What fails, or whose process is killed, is named once all others of its step are made: AlignlensError."""
    total, start, running = sum(map(len, steps)), time.perf_counter(), []
    quiet = not study.progress or not total
    file = _Line() if "ipykernel" in sys.modules and not quiet else sys.stdout
    # A plain bar, not a widget: widgets stand at 0 % for ever in an executed copy.
    bar = tqdm(total=total, disable=quiet, file=file, leave=False)
    threading.Thread(target=_describe, args=(bar, study, running), daemon=True).start()
    with bar, _processes(study, total) as pools:
        for tasks in steps:
            failed = {}
            for task, error in (_side_by_side if pools else _one_by_one)(study, tasks, running, pools):
                bar.update()
                failed |= {task: error} if error else {}
            _raise(study, failed)
    if not quiet:
        print(f"{total} results ready after {time.perf_counter() - start:.0f} s (made, or found in the store)")


def _one_by_one(study, tasks, running, _):
    """(task, its error or None) of every task, made here."""
    for name, args in tasks:
        running[:] = [(name, args)]
        try:
            study.get(name, *args)
            yield (name, args), None
        except Exception as error:
            yield (name, args), error


def _side_by_side(study, tasks, running, pools):
    """The same, made by processes; each is a pool of its own, so it is known whose process was killed."""
    waiting, free, busy = list(reversed(tasks)), list(pools), {}
    while waiting or busy:
        while waiting and free:
            task, pool = waiting.pop(), free.pop()
            work = _work, type(study), study.preset, *task
            try:
                busy[pool.submit(*work)] = task, pool
            except BrokenProcessPool:  # it was killed while it had nothing to do
                pool = _renewed(pools, pool)
                busy[pool.submit(*work)] = task, pool
        running[:] = [task for task, _ in busy.values()]
        for future in wait(busy, return_when=FIRST_COMPLETED).done:
            (task, pool), error = busy.pop(future), future.exception()
            if isinstance(error, BrokenProcessPool):
                error = AlignlensError("its process was killed, perhaps for want of memory (then use jobs 1)")
                pool = _renewed(pools, pool)
            free.append(pool)
            yield task, error


def _renewed(pools: list, pool) -> ProcessPoolExecutor:
    pools[pools.index(pool)] = new = _process()
    return new


def _raise(study, failed: dict) -> None:
    """One error with the names of all tasks that failed, and why."""
    if failed:
        reasons: dict[str, list[str]] = {}
        for task, error in failed.items():
            reasons.setdefault(str(error) or type(error).__name__, []).append(_title(study, task))
        first = min(failed.values(), key=lambda error: isinstance(error, AlignlensError))  # what nobody expected
        kind = type(first) if isinstance(first, AlignlensError) else AlignlensError
        raise kind("; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())) from first


def _title(study, task) -> str:
    stage = STAGES[task[0]]
    return f"{stage.title} {stage.label(study, *task[1])}"


def _describe(bar, study, running: list) -> None:
    """Until the bar is closed: what is being made, and how far the training runs among it are."""
    while not bar.disable:
        bar.set_description("; ".join(_title(study, task) + _progress(study, *task) for task in list(running)))
        time.sleep(0.5)


def _progress(study, name: str, args: tuple) -> str:
    if STAGES[name].resumes:
        with suppress(OSError, AlignlensError):
            return f" ({(study.working(name, *args) / PROGRESS).read_text()})"
    return ""


class _Line:
    """Where a bar is drawn from a notebook: one output of its cell, overwritten, and the terminal behind its kernel.

    Papermill shows nothing of a cell before the cell has ended."""

    def __init__(self):
        self.output = display({"text/plain": ""}, raw=True, display_id=True)

    def write(self, text: str) -> None:
        self.output.update({"text/plain": text.strip()}, raw=True)
        with suppress(OSError), open(os.environ.get(TERMINAL, os.devnull), "w") as terminal:
            terminal.write(text)

    def flush(self) -> None: ...


@contextmanager
def _processes(study, tasks: int):
    """Pools of one process each; none where results are made one by one. An interrupt ends them at once."""
    jobs = study.preset.jobs or (1 if study.device != "cpu" else min(2, os.cpu_count() or 1))
    others, pools = active_children(), [_process() for _ in range(jobs)] if jobs > 1 and tasks > 1 else []
    try:
        yield pools
    except BaseException:
        for child in set(active_children()) - set(others):
            child.terminate()
        raise
    finally:
        for pool in pools:
            pool.shutdown()


def _process() -> ProcessPoolExecutor:
    # Not joblib: its workers go on for a while when the notebook that started them is killed.
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    """A worker ends with the notebook that started it: a killed kernel leaves nobody training."""
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    models.one_thread()


_studies: dict[str, object] = {}


def _work(kind: type, preset, name: str, args: tuple) -> None:
    """One task in a worker, on its own study of the preset; what it makes goes to the store: nothing is sent back."""
    key = repr(preset)
    if key not in _studies:
        _studies[key] = kind(preset, progress=False)
    _studies[key].get(name, *args)
