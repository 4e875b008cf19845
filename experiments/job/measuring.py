"""Evaluators at work on pictures that are too many for the memory: one pass for all, which survives a kill."""

from collections.abc import Sequence
from pathlib import Path

from diffusion.files import set_aside
from diffusion.finite import require_finite_numbers
from diffusion.progress import progress_bar
from diffusion.training import read_saved, save_atomically
from evaluation.prompt_sets import PromptRow
from evaluation.quality import Evaluator
from experiments.job.cost import Cost, Meter
from experiments.job.pictures import Pictures
from experiments.job.store import Store

PART = 128
"""Pictures of each model that are in memory at a time."""

PARTS_BETWEEN_CHECKPOINTS = 8


class Measuring:
    """One evaluator's work, kept in ``folder``: how far it is, and its result in the end.

    Args:
        evaluator: What is measured.
        store: Where its result goes.
        folder: Of the store.
    """

    def __init__(self, evaluator: Evaluator, store: Store, folder: Path) -> None:
        self.measurement = evaluator.start()
        self.folder = folder
        self.done = 0
        self.cost = Cost()
        self._store = store
        self._checkpoint = folder / "work.checkpoint"
        if store.renews(self._checkpoint):
            self._checkpoint.unlink(missing_ok=True)
        if (kept := read_saved(self._checkpoint)) is not None:
            try:
                self.measurement.restore(kept["state"])
                self.done, self.cost = kept["done"], Cost.of(kept["cost"])
            except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
                set_aside(self._checkpoint, error)
                self.measurement, self.done, self.cost = evaluator.start(), 0, Cost()

    def save(self) -> None:
        """Write how far it is."""
        kept = {"state": self.measurement.state(), "done": self.done, "cost": self.cost.as_dict()}
        save_atomically(kept, self._checkpoint)

    def finish(self, meter: Meter) -> None:
        """Write the result."""
        measures = self.measurement.compute()
        require_finite_numbers(measures, "A measure of the retained pictures")
        cost = Cost.total([self.cost, meter.read()])
        self._store.write_result(self.folder, {"measures": measures, **cost.as_dict()})
        self._checkpoint.unlink(missing_ok=True)


def measure_pictures(
    waiting: Sequence[Measuring], base: Pictures, edited: Pictures, rows: Sequence[PromptRow], meter: Meter
) -> None:
    """Show the pictures of both models to every evaluator that has not seen them, and write down the results."""
    first = min(measuring.done for measuring in waiting)
    with progress_bar("measuring", len(rows), done=first) as bar:
        for number, start in enumerate(range(first, len(rows), PART), start=1):
            end = min(start + PART, len(rows))
            images, reference_images = edited.read(start, end), base.read(start, end)
            for measuring in waiting:
                if measuring.done <= start:
                    measuring.measurement.update(images, reference_images, rows[start:end])
                    measuring.done = end
                    # The first one carries the reading.
                    measuring.cost = Cost.total([measuring.cost, meter.read()])
                    if number % PARTS_BETWEEN_CHECKPOINTS == 0:
                        measuring.save()
            bar.advance(end - start)
    for measuring in waiting:
        measuring.finish(meter)
