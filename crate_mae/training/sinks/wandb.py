"""Weights & Biases."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from crate_mae.training.sinks.sink import Sink

_SECONDS_TO_CLOSE = 10.0
"""Time for what is still to be sent; less than torchrun leaves a run after telling it to stop."""
_LONGEST_GROUP = 128


class WandbSink(Sink):
    """A run of W&B, in the project $WANDB_PROJECT or "crate-mae"; its group is our run's folder.

    Each row is a row of its history, so that two rows of one step stay apart; charts show the step on their axis. wandb's own
    process sends rows and retries; it ends with ours.

    Without a key it is offline, unless $WANDB_MODE says otherwise: its files stay in the folder for `wandb sync`. These cannot
    add to an earlier part of a run, so an offline run always starts anew, with all rows.
    """

    name, place = "wandb", "wandb"
    library, installed_by = "wandb", "pip install 'crate-kernels[wandb]'"

    def __init__(self, out: Path, config: dict[str, Any], identity: str | None, say: Callable[[str], None]) -> None:
        super().__init__(out, config, identity, say)
        import wandb

        self._wandb = wandb
        with _process_left_alone():
            mode = os.environ.get("WANDB_MODE") or ("online" if _has_key(self._wandb) else "offline")
            offline = mode in ("offline", "dryrun")
            if offline or not identity:
                identity = None
                shutil.rmtree(out / self.place, ignore_errors=True)  # all rows are sent again
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "crate-mae",
                dir=str(out),
                name=out.absolute().name,
                group=str(out.absolute())[-_LONGEST_GROUP:],
                id=identity,
                resume="allow" if identity else None,
                config=config,
                mode=mode,  # type: ignore[arg-type]  # W&B itself refuses a $WANDB_MODE that there is not
                allow_val_change=True,  # a resumed run may have other settings
                reinit="create_new",  # leaves other runs of this process alone
                settings=self._wandb.Settings(
                    console="off", silent=True, finish_timeout=_SECONDS_TO_CLOSE, finish_timeout_raises=True
                ),
            )
        self._run.define_metric("*", step_metric="step")
        self.goes_on = bool(identity and self._run.resumed)
        self.identity = "" if offline else self._run.id
        if offline:
            say(f"wandb: offline; to send it, wandb sync {Path(self._run.dir).parent}")

    def row(self, step: int, scalars: dict[str, float]) -> None:
        self._log({"step": step, **scalars})

    def picture(self, step: int, name: str, path: Path) -> None:
        self._log({"step": step, name: self._wandb.Image(str(path))})

    def close(self, ended: str) -> None:
        self._run.finish(exit_code=1 if ended == "failed" else 0)

    def _log(self, row: dict[str, Any]) -> None:
        try:
            self._run.log(row)
        except ConnectionError:  # wandb's own process is gone
            with contextlib.suppress(ConnectionError):
                self._wandb.teardown()  # else it would be done at exit, with a traceback
            raise


def _has_key(wandb: ModuleType) -> bool:
    """Whether there is a key, or other credentials; nobody is asked for one."""
    if wandb.run:  # another user of wandb in this process
        return not wandb.run.offline
    with contextlib.redirect_stderr(io.StringIO()):
        return wandb.login(prompt=False, verify=False)


@contextlib.contextmanager
def _process_left_alone() -> Iterator[None]:
    """Undo the hooks that wandb installs."""
    before = sys.exit, sys.excepthook
    try:
        yield
    finally:
        sys.exit, sys.excepthook = before
