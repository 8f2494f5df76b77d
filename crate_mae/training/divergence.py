"""Telling a run that diverges from one that learns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from crate_mae.training.metrics import StepAverages
from crate_mae.training.validation import ValidationErrors

_LOSS, _GRAD_NORM = 10.0, 100.0
"""How many times its running mean a value reaches in a run that diverges. Gradients jump without harm, as they are shortened."""

_FILL, _BEST = 10.0, 2.0
"""How many times the error of the mean fill, and of the best validation before, a validation has in such a run."""

_MEMORY = 0.98
"""Of the running means, from one reading to the next."""


@dataclass
class DivergenceWatch:
    """Holds losses, gradient norms and validations against what they were before; values that are finite, but out of all bounds.

    Attributes:
        loss, grad_norm: running means, in which no value counts for more than its bound: what was a jump is the new level after
            some dozen readings.
        of_steps, of_validation: why the last reading, the last validation, are those of a run that diverges; empty if not.
        best_step, best_val_loss: of the best validation of a run that did not.
    """

    loss: float | None = None
    grad_norm: float | None = None
    of_steps: str = ""
    of_validation: str = ""
    best_step: int | None = None
    best_val_loss: float | None = None

    @property
    def diverging(self) -> str:
        """Why the run is held to diverge; empty if it is not."""
        return self.of_steps or self.of_validation

    def read(self, averages: StepAverages) -> None:
        """Take a reading of the steps."""
        beyond = []
        for name, value, factor in (("loss", averages.loss, _LOSS), ("grad_norm", averages.grad_norm, _GRAD_NORM)):
            before = getattr(self, name)
            if before is None:
                setattr(self, name, value)
                continue
            bound = factor * before
            if value > bound:
                beyond.append(f"{name} {value:.4g}, running mean {before:.4g}")
            setattr(self, name, _MEMORY * before + (1 - _MEMORY) * min(value, bound))
        self.of_steps = ", ".join(beyond)

    def validated(self, step: int, errors: ValidationErrors) -> bool:
        """Take a validation; returns whether it is the best so far."""
        best = self.best_val_loss
        is_far = errors.val_loss > _FILL * errors.mean_fill_loss and (best is None or errors.val_loss > _BEST * best)
        self.of_validation = (
            f"validation error {errors.val_loss:.4g}, mean fill {errors.mean_fill_loss:.4g}" if is_far else ""
        )
        if self.diverging or (best is not None and errors.val_loss >= best):
            return False
        self.best_step, self.best_val_loss = step, errors.val_loss
        return True

    def state(self) -> dict[str, Any]:
        return asdict(self)
