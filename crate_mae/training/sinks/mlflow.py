"""MLflow."""

from __future__ import annotations

import contextlib
import io
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from crate_mae.training.sections import by_name
from crate_mae.training.sinks.sink import Sink

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_SECONDS_TO_ANSWER = 10.0
_SECONDS_TO_CLOSE = {"finished": 300.0, "stopped": 10.0, "failed": 10.0}
"""Time for what is still to be sent; torchrun does not leave a run much more after telling it to stop."""
_ROWS_ON_THEIR_WAY = 10_000
_PARAMS_AT_ONCE, _METRICS_AT_ONCE = 100, 1000
"""The most that MLflow takes at once."""
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflowSink(Sink):
    """A run of MLflow, in the experiment $MLFLOW_EXPERIMENT_NAME or "crate-mae"; its tag "group" is our run's folder.

    It is on the server $MLFLOW_TRACKING_URI, or else in files in our run's folder. A thread of its own sends rows, since a server
    may be slow. Settings are MLflow's parameters, which cannot be changed: if a resumed run has other settings, these are tags of
    the same names.
    """

    name, place = "mlflow", "mlflow"
    library, installed_by = "mlflow", "pip install 'crate-kernels[mlflow]'"

    def __init__(self, out: Path, config: dict[str, Any], identity: str | None, say: Callable[[str], None]) -> None:
        super().__init__(out, config, identity, say)
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri:
            _ask(uri)
            client = MlflowClient(tracking_uri=uri)
        else:
            folder = (out / self.place).absolute()
            if identity is None or not _is_of(folder, identity):
                identity = None
                shutil.rmtree(folder, ignore_errors=True)  # all rows are sent again
            # MLflow makes this folder itself, but not if this process had opened the store before.
            (folder / ".trash").mkdir(parents=True, exist_ok=True)
            with _files_allowed():
                client = MlflowClient(tracking_uri=folder.as_uri())
        before = _params_of(client, identity) if identity else None
        self.goes_on = before is not None
        if identity and self.goes_on:
            self.identity = identity
            client.update_run(identity, status="RUNNING")
        else:
            tags = {"group": str(out.absolute())}
            self.identity = client.create_run(_experiment(client), run_name=out.absolute().name, tags=tags).info.run_id
        self._send_settings(client, config, before or {})
        self._metric = Metric
        self._sending = _Sending(client, self.identity)

    def row(self, step: int, scalars: dict[str, float]) -> None:
        now = int(1000 * time.time())
        self._sending.add([self._metric(name, value, now, step) for name, value in scalars.items()])

    def picture(self, step: int, name: str, path: Path) -> None:
        self._sending.add(_Artifact(f"step_{step}", path.name, path.read_bytes()))

    def close(self, ended: str) -> None:
        self._sending.close(_STATUS[ended], _SECONDS_TO_CLOSE[ended])

    def _send_settings(self, client: MlflowClient, config: dict[str, Any], before: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

        settings = {name: str(value) for name, value in by_name(config).items()}
        for name, value in settings.items():
            if len(value) > MAX_PARAM_VAL_LENGTH:
                settings[name] = value[:MAX_PARAM_VAL_LENGTH]
                self.say(
                    f"mlflow: the parameter {name} has {len(value)} characters; the first {MAX_PARAM_VAL_LENGTH} are kept"
                )
        params = [Param(name, value) for name, value in settings.items() if name not in before]
        changed = [RunTag(name, value) for name, value in settings.items() if before.get(name, value) != value]
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            client.log_batch(self.identity, params=params[start : start + _PARAMS_AT_ONCE])
        for start in range(0, len(changed), _PARAMS_AT_ONCE):
            client.log_batch(self.identity, tags=changed[start : start + _PARAMS_AT_ONCE])


class _Artifact(NamedTuple):
    folder: str
    file: str
    content: bytes


class _Status(NamedTuple):
    """The status with which a run ends; the last item that the thread sends."""

    status: str


class _Sending(threading.Thread):
    """Sends items in the background, in order. It ends with the first error, which the next call raises.

    A process that ends without `close` does not wait for it.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        super().__init__(name="mlflow", daemon=True)
        self._client, self._run_id = client, run_id
        self._waiting: queue.Queue[list[Metric] | _Artifact | _Status] = queue.Queue(_ROWS_ON_THEIR_WAY)
        self._error: Exception | None = None
        self.start()

    def add(self, item: list[Metric] | _Artifact | _Status) -> None:
        """Send an item; this waits only if very many are still to be sent.

        Raises:
            Exception: an earlier item could not be sent.
        """
        while True:
            if self._error:
                raise self._error
            with contextlib.suppress(queue.Full):
                self._waiting.put(item, timeout=1.0)
                return

    def close(self, status: str, seconds: float) -> None:
        """Wait until all is sent, for at most so many seconds.

        Raises:
            Exception: not all was sent.
        """
        self.add(_Status(status))
        self.join(seconds)
        if self.is_alive():
            raise TimeoutError(f"not everything was sent in {seconds:g} seconds")
        if self._error:
            raise self._error

    def run(self) -> None:
        try:
            self._send()
        except Exception as error:
            self._error = error

    def _send(self) -> None:
        metrics: list[Metric] = []
        while True:
            item = self._waiting.get()
            if isinstance(item, list):
                metrics += item
            if len(metrics) >= _METRICS_AT_ONCE or self._waiting.empty() or isinstance(item, _Status):
                for start in range(0, len(metrics), _METRICS_AT_ONCE):
                    self._client.log_batch(self._run_id, metrics=metrics[start : start + _METRICS_AT_ONCE])
                metrics = []
            if isinstance(item, _Artifact):
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder, item.file)
                    path.write_bytes(item.content)
                    self._client.log_artifact(self._run_id, str(path), item.folder)
            if isinstance(item, _Status):
                with contextlib.redirect_stdout(io.StringIO()):  # it prints a link to the run
                    self._client.set_terminated(self._run_id, item.status)
                return


def _ask(uri: str) -> None:
    """Raise an error at once if the server cannot be reached; MLflow would retry for minutes first."""
    if not uri.startswith(("http://", "https://")):
        return
    import requests  # which MLflow uses

    with contextlib.suppress(requests.exceptions.SSLError):  # the server is there; MLflow has settings for certificates
        requests.head(uri, timeout=_SECONDS_TO_ANSWER)


@contextlib.contextmanager
def _files_allowed() -> Iterator[None]:
    """Allow runs in files, which MLflow does only if asked; its databases would need the full mlflow package."""
    name = "MLFLOW_ALLOW_FILE_STORE"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _is_of(folder: Path, run_id: str) -> bool:
    """Whether a run's artifacts are in this folder: MLflow stores their path, which is wrong once the folder is moved."""
    return any(folder.as_uri() in meta.read_text(encoding="utf-8") for meta in folder.glob(f"*/{run_id}/meta.yaml"))


def _experiment(client: MlflowClient) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "crate-mae"
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name)


def _params_of(client: MlflowClient, run_id: str) -> dict[str, str] | None:
    """The parameters of a run; None if the run was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run.data.params if run.info.lifecycle_stage == "active" else None
