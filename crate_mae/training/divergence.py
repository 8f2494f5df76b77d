"""Telling a run that diverges from one that learns."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from crate_mae.training.metrics import StepAverages
from crate_mae.training.validation import ValidationErrors

_LOSS, _GRAD_NORM = 10.0, 100.0
"""How many times its running mean a value reaches in a run that diverges. Gradients jump without harm, as they are shortened."""

_BEST, _FILL = 3.0, 2.0
"""How many times the error of the best validation before, and of the mean fill, a validation has in such a run."""

_SAME = 1e-3
"""Relative difference up to which the error of the mean fill, which no model changes, is of the same images and masks."""

_MEMORY = 0.98
"""Of the running means, from one reading to the next."""


@dataclass
class DivergenceWatch:
    """Holds losses, gradient norms and validations against what they were before; values that are finite, but out of all bounds.

    Attributes:
        loss, grad_norm: running means of the values within their bounds.
        of_steps, of_validation: why the last reading, the last validation, are those of a run that diverges; empty if not.
        last_step: of the last validation.
        best_step, best_val_loss: of the best validation of a run that did not.
        fill: the mean fill's error of that validation, by which another measure is known.
    """

    loss: float | None = None
    grad_norm: float | None = None
    of_steps: str = ""
    of_validation: str = ""
    last_step: int | None = None
    best_step: int | None = None
    best_val_loss: float | None = None
    fill: float | None = None

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
            if value > factor * before > 0:
                beyond.append(f"{name} {value:.4g}, running mean {before:.4g}")
            else:
                setattr(self, name, _MEMORY * before + (1 - _MEMORY) * value)
        self.of_steps = ", ".join(beyond)

    def measures_anew(self, errors: ValidationErrors) -> bool:
        """Whether a validation is of other images, masks or scales than those before, so that the best starts over."""
        anew = self.fill is not None and not math.isclose(self.fill, errors.mean_fill_loss, rel_tol=_SAME)
        if anew:
            self.loss = self.grad_norm = self.best_step = self.best_val_loss = None
            self.of_steps = ""
        self.fill = errors.mean_fill_loss
        return anew

    def validated(self, step: int, errors: ValidationErrors) -> bool:
        """Take a validation; returns whether it is the best so far."""
        error, fill, best = errors.val_loss, errors.mean_fill_loss, self.best_val_loss
        # Where the fill has no error, as in images of one colour, everything would be far above it.
        is_far = best is not None and fill > 0 and error > max(_BEST * best, _FILL * fill)
        self.of_validation = f"validation error {error:.4g}, best {best:.4g}, mean fill {fill:.4g}" if is_far else ""
        self.last_step = step
        if self.diverging or (best is not None and error >= best):
            return False
        self.best_step, self.best_val_loss = step, error
        return True

    def state(self) -> dict[str, Any]:
        return asdict(self)
