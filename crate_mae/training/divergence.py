"""Telling a run that diverges from one that learns."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from crate_mae.training.metrics import StepAverages

_LOSS, _GRAD_NORM = 10.0, 100.0
"""A value so many times its running mean tells divergence. Gradient norms may jump further: clipping makes that harmless."""

_BEST, _GUESS = 3.0, 2.0
"""A validation error so many times that of the best validation, and of the guess, tells divergence."""

_SAME = 1e-3
"""The relative difference of two guesses' errors up to which they are of the same images and masks."""

_MEMORY = 0.98
"""The decay of the running means from one reading to the next."""


def is_same_guess(error: float, other: float) -> bool:
    """Whether two errors of guesses are of the same images and masks: no model changes them, and rounding hardly does."""
    return math.isclose(error, other, rel_tol=_SAME)


class Measured(Protocol):
    """The result of a validation: a named tuple, whose fields are written to its row of metrics.jsonl."""

    @property
    def val_loss(self) -> float:
        """The error of the model."""

    @property
    def guess(self) -> tuple[str, float]:
        """A guess that needs no model, in words, and its error on the same images, which depends on the images alone."""

    def _asdict(self) -> dict[str, Any]: ...


@dataclass
class DivergenceWatch:
    """Compares losses, gradient norms and validation errors with earlier ones, to find values that are finite but far too large.

    Attributes:
        loss, grad_norm: running means, without the values that were too large.
        of_steps: why the last reading of steps tells divergence; empty if it does not.
        of_validation: likewise, of the last validation.
        last_step: the step of the last validation.
        best_step, best_val_loss: step and error of the best validation at which the run did not diverge.
        fill: the error of the guess (in pre-training, the mean fill) at the last validation. If another validation has a
            different one, the two are not on the same images and masks.
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
        """Why the run is said to diverge; empty if it is not."""
        return self.of_steps or self.of_validation

    def read(self, averages: StepAverages) -> None:
        """Take the averages of some steps into account."""
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

    def measures_anew(self, errors: Measured) -> bool:
        """Whether a validation is on other images, masks or scales than the one before; then the best starts over."""
        _, guess = errors.guess
        anew = self.fill is not None and not is_same_guess(self.fill, guess)
        if anew:
            self.loss = self.grad_norm = None
            self.forget_best()
            self.of_steps = ""
        self.fill = guess
        return anew

    def validated(self, step: int, errors: Measured) -> bool:
        """Take a validation into account; returns whether it is the best so far."""
        error, best, (name, guess) = errors.val_loss, self.best_val_loss, errors.guess
        # If the guess has no error, as in images of one colour, every error would be far above it.
        is_far = best is not None and guess > 0 and error > max(_BEST * best, _GUESS * guess)
        self.of_validation = f"validation error {error:.4g}, best {best:.4g}, {name} {guess:.4g}" if is_far else ""
        self.last_step = step
        if self.diverging or not self.is_better(errors):
            return False
        self.best_step, self.best_val_loss = step, error
        return True

    def is_better(self, errors: Measured) -> bool:
        """Whether a validation is better than the best before."""
        return self.best_val_loss is None or not errors.val_loss >= self.best_val_loss

    def forget_best(self) -> None:
        """Start over: the next validation will be the best."""
        self.best_step = self.best_val_loss = None

    def state(self) -> dict[str, Any]:
        return asdict(self)
