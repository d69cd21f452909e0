"""Result: what a finished run measured, in a form that can be kept and read back."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastkd.utils.io import write_text

RESULT = "result.json"


@dataclass(frozen=True)
class Result:
    """What `fastkd.train` measured on the evaluation set; accuracies in %.

    Attributes:
        top1: of the raw weights after the last epoch; None where the evaluation set has no labels.
        top5: likewise; None below five classes.
        ema_top1: of the averaged weights after the last epoch; None without EMA.
        ema_top5: likewise.
        best_top1: the highest top-1 that `best_rule` saw; None where it goes by the loss.
        best_epoch: the epoch it belongs to, from 1.
        best_rule: how the best epoch was picked.
        epochs: epochs trained.
        images: images in the evaluation set.
        parameters: of the student, without projectors that are dropped at inference.
        eval_loss: after the last epoch: plain cross-entropy, or the objective where accuracy is not
            what the best epoch is picked by.
        output: the run's folder; None where nothing was written.
        last: the checkpoint after the last epoch; None where none was written.
        best: the checkpoint of the best epoch; None likewise.
        history: one record per epoch, as in epochs.csv.
    """

    top1: float | None
    top5: float | None
    ema_top1: float | None
    ema_top5: float | None
    best_top1: float | None
    best_epoch: int
    best_rule: str
    epochs: int
    images: int
    parameters: int
    eval_loss: float | None = None
    output: str | None = None
    last: str | None = None
    best: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result as JSON, atomically.

        Args:
            path: the file.
        """
        write_text(Path(path), json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Read a result that `save` wrote.

        Args:
            path: the file, or the folder of a run.

        Returns:
            The result.
        """
        path = Path(path)
        file = path / RESULT if path.is_dir() else path
        return cls(**json.loads(file.read_text(encoding="utf-8")))

    def summary(self) -> str:
        """Say in plain lines what was measured, on what, and how the best epoch was picked."""
        lines = []
        if self.top1 is not None:
            lines.append(
                f"top-1 after epoch {self.epochs}: {_accuracies(self.top1, self.top5)} (raw "
                f"weights, {self.images:,} evaluation images)"
            )
        if self.ema_top1 is not None:
            lines.append(f"with EMA weights: {_accuracies(self.ema_top1, self.ema_top5)}")
        if self.best_top1 is None:
            lines.append(
                f"loss after epoch {self.epochs}: {self.eval_loss:.4f} ({self.images:,} evaluation "
                f"images)"
            )
            lines.append(f"best: epoch {self.best_epoch} ({self.best_rule})")
        else:
            best = f"{self.best_top1:.2f} % at epoch {self.best_epoch}"
            lines.append(f"best: {best} ({self.best_rule})")
        lines.append(f"student: {self.parameters:,} parameters")
        if self.output is not None:
            lines.append(f"files: {self.output}")
        return "\n".join(lines)


def _accuracies(top1: float, top5: float | None) -> str:
    return f"{top1:.2f} %" if top5 is None else f"{top1:.2f} % (top-5 {top5:.2f} %)"
