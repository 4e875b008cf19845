"""Several processes, one for each GPU, share the prompts of a job: ``python run.py processes=4 ...``.

Every process runs the same job on the same store. Pictures and attacks are divided, prompt by prompt; the first process
erases while the others wait, with as many threads as it would take alone. A prompt's result depends on the prompt, and
in its last digits on the batch that it is computed in, which their number changes as a batch size does.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import TypeVar

from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """The processes of a job, seen from one of them.

    Attributes:
        index: The number of this one, from 0.
        count: How many there are.
        barrier: Where they meet; None for one alone.
    """

    index: int = 0
    count: int = 1
    barrier: Barrier | None = None

    @property
    def first(self) -> bool:
        """Whether this one does what is done once."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every ``count``-th of ``items``: what is this process's to do."""
        return list(items[self.index :: self.count])

    def meet(self) -> None:
        """Wait until every process is here."""
        if self.barrier is not None:
            self.barrier.wait()

    @contextmanager
    def under(self, lock: AbstractContextManager[None]) -> Iterator[None]:
        """Work in one place, all at a time: the first process holds ``lock`` until the last one is done."""
        if self.first:
            with lock:
                self.meet()
                yield
                self.meet()
        else:
            self.meet()
            yield
            self.meet()


ALONE = Processes()
"""The one process of a job that is not shared."""


def run_in_processes(count: int, work: Callable[..., None], *arguments: object) -> None:
    """Run ``work(processes, *arguments)`` in ``count`` processes that share a job.

    There is no process group: torchmetrics would take each process's numbers for a part of the whole.

    Args:
        count: Number of processes.
        work: What each does; a function of a module.
        arguments: Handed to all of them.

    Raises:
        ChildProcessError: A process failed; it has said why.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # A fork server imports the project once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    # Closed when this process ends, however it ends; the others watch it.
    alive, lifeline = context.Pipe(duplex=False)
    shared = (count, context.Barrier(count), alive, work, arguments)
    spawned = start_processes(_run_one, shared, nprocs=count, join=False, start_method="forkserver")  # type: ignore[no-untyped-call]
    try:
        while not spawned.join():
            pass
    except ProcessExitedException as error:
        raise ChildProcessError(f"Process {error.error_index} of {count} failed; it says above why.") from error
    finally:
        lifeline.close()
        for process in spawned.processes:
            process.terminate()
            process.join()


def _run_one(
    index: int,
    count: int,
    barrier: Barrier,
    alive: Connection,
    work: Callable[..., None],
    arguments: tuple[object, ...],
) -> None:
    end_with(alive)
    work(Processes(index, count, barrier), *arguments)


def end_with(alive: Connection) -> None:
    """Let this process end as soon as the one at the other end of ``alive`` is gone."""
    threading.Thread(target=_wait_for_the_end, args=(alive,), daemon=True).start()


def _wait_for_the_end(alive: Connection) -> None:
    with suppress(EOFError, OSError):
        alive.recv()
    os._exit(1)
