"""tensorboard/, for `tensorboard --logdir`."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from crate_mae.files import make_folder, remove_tree, sync
from crate_mae.training.sinks.sink import Sink

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary


class TensorBoardSink(Sink):
    """A file of events, one for each row, with numbers in float64; a resumed run adds a file. Settings are shown as text.

    Events are written at once, with TensorBoard's writer of records. Its usual writer has a thread, whose errors would come late
    and with a traceback.
    """

    name, place, in_files = "tensorboard", "tensorboard", True
    library, installed_by = "tensorboard", "pip install 'crate-kernels[log]'"

    def __init__(self, out: Path, config: dict[str, Any], identity: str | None, say: Callable[[str], None]) -> None:
        super().__init__(out, config, identity, say)
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self._event, self._summary, self._make = event_pb2.Event, summary_pb2.Summary, summary
        self._described: set[str] = set()
        folder = out / self.place
        self.goes_on = identity is not None and any(folder.glob("*.tfevents.*"))
        if not self.goes_on:
            remove_tree(folder)
        make_folder(folder)
        now = time.time()
        self.path = (
            folder / f"events.out.tfevents.{now:020.6f}.{socket.gethostname()}.{os.getpid()}"
        )  # TensorBoard reads files in the order of their names
        self._file = open(self.path, "xb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        settings = f"```json\n{json.dumps(config, indent=2)}\n```"  # shown as Markdown
        self._write(summary=summary.text("config", settings))

    def row(self, step: int, scalars: dict[str, float]) -> None:
        values = [self._scalar(name, value) for name, value in scalars.items()]
        self._write(step=step, summary=self._summary(value=values))

    def picture(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as picture:
            width, height = picture.size
        image = self._summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes()
        )  # 3 is RGB
        self._write(step=step, summary=self._summary(value=[self._summary.Value(tag=name, image=image)]))

    def close(self, ended: str) -> None:
        self._file.close()
        sync(self.path)

    def _scalar(self, name: str, value: float) -> Summary.Value:
        (scalar,) = self._make.scalar(name, value, new_style=True, double_precision=True).value
        if name in self._described:  # one description a file is enough, and halves the others
            scalar.ClearField("metadata")
        self._described.add(name)
        return scalar

    def _write(self, **event: Any) -> None:
        try:
            self._records.write(self._event(wall_time=time.time(), **event).SerializeToString())
            self._file.flush()
        except OSError as error:
            named = type(error)(f"cannot write {self.path}: {error.strerror or error}")
            named.errno = error.errno
            raise named from error
