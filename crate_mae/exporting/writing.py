"""A trained model as one file that needs neither `crate_mae` nor `crate_kernels`: PyTorch's .pt2, or ONNX.

What is written is loaded in a process that cannot import either, and compared with the model, before it takes its place.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from crate_mae import __version__
from crate_mae.checkpoints import CONFIG_FILE, load_model, read_json
from crate_mae.classifiers import Classifier
from crate_mae.data import MissingLibrary
from crate_mae.exporting.check import (
    LEAST_SIDE,
    Checked,
    WrongExport,
    cases_of,
    compared,
    outputs_of_file,
    outputs_of_model,
)
from crate_mae.exporting.form import ExportForm, ReconstructionForm
from crate_mae.files import replaced
from crate_mae.model import CrateMAE
from crate_mae.preprocessing import read_statistics

Format = Literal["pt2", "onnx"]
Output = Literal["tokens", "features", "logits", "reconstruction"]
FORMATS: tuple[Format, ...] = get_args(Format)
OUTPUTS: tuple[Output, ...] = get_args(Output)

METADATA = "crate_mae.json"
"""The name of the metadata in the file: an extra file in a .pt2, an entry of the model's metadata in ONNX."""

DEFAULT_OPSET, OPSETS = 18, range(18, 24)

_LARGEST_ONNX = 2**31 - 2**20
"""The most bytes of weights: a Protocol Buffers file holds 2 GiB, and the graph needs some of them."""


class Exported(NamedTuple):
    """The file that was written.

    Attributes:
        path: the file.
        format: one of ``FORMATS``.
        output: one of ``OUTPUTS``.
        inputs, outputs: their names, in the file's order.
        size: the file's size in bytes.
        patch_size: height and width of images are multiples of it, at least twice as large.
        checked: the comparison with the model, for each size of images.
    """

    path: Path
    format: Format
    output: Output
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    size: int
    patch_size: int
    checked: tuple[Checked, ...]


def export(
    run: str | Path,
    out: str | Path | None = None,
    *,
    format: Format = "pt2",
    output: Output | None = None,
    mask_ratio: float = 0.75,
    opset: int = DEFAULT_OPSET,
    overwrite: bool = False,
) -> Exported:
    """Write a model as one file that is loaded without this package, and compare that with the model.

    The file takes float32 images [batch, channels, height, width], standardised, of any batch, and of any height and width that
    are multiples of the patch and two patches or more. It is of a model in evaluation, and its weights ask for no gradient. Its
    metadata, JSON under the name ``METADATA``, has ``mean`` and ``std`` of images of 0 to 1 (null where the folder does not
    say), ``patch_size``, the configuration ``model`` with lambda and step size, names of inputs and outputs, and versions.

    Before it takes its place it is loaded in a process that can import neither `crate_mae` nor `crate_kernels`. On random images
    of three sizes, of one and of three images a batch, ``max |difference| <= 1e-5 * max(1, max |model's output|)`` and
    ``||difference|| <= 1e-5 * ||model's output||`` must hold; where float32 is less exact than that for this model, thrice its
    own largest difference from itself in float64.

    Args:
        run: the folder of a run or model.
        out: the file; ``model.pt2`` or ``model.onnx`` in the folder if None.
        format: "pt2", for ``torch.export.load``, or "onnx".
        output: "tokens" [batch, 1 + patches, width], as of ``forward_features``, of a CrateMAE ``encode``; "features" [batch,
            width], the mean patch token behind the final norm; "logits" [batch, classes] of a classifier; or "reconstruction" of
            a CrateMAE, which takes ``noise`` [batch, patches], too, and gives ``pred`` and ``mask`` of ``MAEOutput``. If None
            "logits" where the model has a head, and else "tokens".
        mask_ratio: of "reconstruction", fixed in the file.
        opset: of ONNX.
        overwrite: in place of a file that is there.

    Raises:
        FileExistsError: there is such a file; or another OSError: it cannot be written.
        ValueError: an argument does not fit the model; or as of ``load_model``.
        MissingLibrary: an ImportError: one that ONNX needs is not installed.
        WrongExport: a RuntimeError: the file was not what it should be; it is gone.
    """
    run = Path(run)
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if opset not in OPSETS:
        raise ValueError(f"opset: expected {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio: expected at least 0 and below 1, got {mask_ratio}")
    if format == "onnx":
        _check_libraries()
    out = _path_of(run, out, format, overwrite)
    try:
        model = load_model(run)
    except RuntimeError as error:  # weights that are not its config's
        raise ValueError(str(error)) from error
    output = _output_of(model, output)
    _check_model(model, format)
    about = _metadata(run, model, output, format, mask_ratio)
    cases = cases_of(model, output)
    wanted = [outputs_of_model(model, case, output, mask_ratio) for case in cases]
    own = copy.deepcopy(model)  # the form may change its weights, and the model is compared with it
    form = (
        ReconstructionForm(own, mask_ratio)
        if isinstance(own, CrateMAE) and output == "reconstruction"
        else ExportForm(own, output)
    )
    with _quiet():
        program = _program(form, model, about["inputs"])
        content = (_onnx_of(program, about, opset) if format == "onnx" else _pt2_of(program, about)).getbuffer()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / f"model.{format}"
        file.write_bytes(content)
        found = outputs_of_file(file, cases, len(about["outputs"]))
    exactly = [partial(outputs_of_model, model, case, output, mask_ratio, torch.float64) for case in cases]
    checked = tuple(map(compared, cases, wanted, found, exactly))
    with replaced(out) as file:
        file.write(content)
    names = tuple(about["inputs"]), tuple(about["outputs"])
    return Exported(out, format, output, *names, len(content), model.config.patch_size, checked)


def _path_of(run: Path, out: str | Path | None, format: Format, overwrite: bool) -> Path:
    path = run / f"model.{format}" if out is None else Path(out)
    if path.suffix.lower() != f".{format}":
        raise ValueError(f"out: expected a name that ends in .{format}, got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"out {path}: expected the name of a file, and this is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"out {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"out {path}: {path.parent} cannot be written to")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"out {path}: there is such a file; --overwrite (overwrite=True) puts another in its place"
        )
    return path


def _output_of(model: CrateMAE | Classifier, output: Output | None) -> Output:
    """The output that was asked for, or the model's default."""
    has_head = isinstance(model, Classifier) and model.num_classes > 0
    if output is None:
        return "logits" if has_head else "tokens"
    of_model = ["tokens", "features", *["logits"] * has_head, *["reconstruction"] * isinstance(model, CrateMAE)]
    if output not in of_model:
        kind = f"{type(model).__name__}{' without a head' * (isinstance(model, Classifier) and not has_head)}"
        raise ValueError(f"output: expected one of {', '.join(of_model)} of a {kind}, got {output!r}")
    return output


def _check_model(model: CrateMAE | Classifier, format: Format) -> None:
    if min(model._configured_grid) < LEAST_SIDE:
        height, width = model.config.image_shape
        raise ValueError(
            f"model: expected images of {LEAST_SIDE} patches a side or more, which are those that an exported model takes, "
            f"got {height} x {width} with patches of {model.config.patch_size}"
        )
    weights = sum(value.nbytes for value in model.state_dict().values())
    if format == "onnx" and weights > _LARGEST_ONNX:
        raise ValueError(f"format: ONNX has at most 2 GiB in one file, and the weights are {weights:,} bytes; take pt2")


def _check_libraries() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingLibrary(
                f"format: ONNX needs a library ({error}): pip install 'crate-kernels[export]'"
            ) from error


def _metadata(
    run: Path, model: CrateMAE | Classifier, output: Output, format: Format, mask_ratio: float
) -> dict[str, Any]:
    config = read_json(run / CONFIG_FILE)
    mean, std = read_statistics(run) or (None, None)
    reconstructs = output == "reconstruction"
    libraries = ("torch", *("onnx", "onnxscript") * (format == "onnx"))
    return {
        "output": output,
        "inputs": ["images", "noise"] if reconstructs else ["images"],
        "outputs": ["pred", "mask"] if reconstructs else [output],
        **({"mask_ratio": mask_ratio} if reconstructs else {}),
        "mean": mean,
        "std": std,
        "patch_size": model.config.patch_size,
        "model": dataclasses.asdict(model.config),
        **({"classes": config["classes"]} if "classes" in config and output == "logits" else {}),
        "versions": {
            "crate_mae": __version__,
            **{name: str(importlib.import_module(name).__version__) for name in libraries},
        },
    }


def _program(form: nn.Module, model: CrateMAE | Classifier, inputs: Sequence[str]) -> ExportedProgram:
    """The form's graph, for any batch, height and width.

    Raises:
        WrongExport: it has an operator that is not PyTorch's own.
    """
    patch = model.config.patch_size
    batch = Dim("batch", min=1)
    rows, columns = (Dim(name, min=LEAST_SIDE) for name in ("rows", "columns"))
    # No size of the example is another's, nor 1, so that nothing is taken for equal or fixed.
    sizes = {"images": (2, model.config.in_chans, 3 * patch, 5 * patch), "noise": (2, 15)}
    # How many patches there are follows from height and width: a product, which Dim cannot say, and torch.export finds.
    dynamic = {"images": {0: batch, 2: patch * rows, 3: patch * columns}, "noise": {0: batch, 1: Dim.AUTO}}
    examples = tuple(torch.rand(sizes[name]) for name in inputs)
    program = torch.export.export(form, examples, dynamic_shapes=tuple(dynamic[name] for name in inputs), strict=False)
    foreign = {str(node.target) for node in program.graph.nodes if _namespace(node.target) not in ("", "aten")}
    if foreign:
        raise WrongExport(f"the graph has operators that are not PyTorch's own: {', '.join(sorted(foreign))}")
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths and lines of this machine's files
    _drop_unused_weights(program)
    return program


def _drop_unused_weights(program: ExportedProgram) -> None:
    """Drop weights that no output needs, such as the decoder's for tokens; torch.export keeps all weights of a module."""
    inputs = program.graph_signature.input_specs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for spec in [spec for spec in inputs if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)]:
        if not nodes[spec.arg.name].users:
            program.graph.erase_node(nodes[spec.arg.name])
            inputs.remove(spec)
            program.state_dict.pop(spec.target)
    program.graph_module.recompile()


def _namespace(target: Any) -> str:
    """The namespace of an operator; "" for Python's own functions, which compute sizes, and for names of inputs."""
    return getattr(target, "namespace", "")


def _pt2_of(program: ExportedProgram, about: Mapping[str, Any]) -> io.BytesIO:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA: json.dumps(about)})
    return file


def _onnx_of(program: ExportedProgram, about: Mapping[str, Any], opset: int) -> io.BytesIO:
    names = dict(input_names=about["inputs"], output_names=about["outputs"])
    made = torch.onnx.export(program, (), dynamo=True, opset_version=opset, external_data=False, verbose=False, **names)
    assert made is not None  # as dynamo=True has it
    model = made.model_proto
    if {(each.domain, each.version) for each in model.opset_import} != {("", opset)}:
        found = ", ".join(f"{each.domain or 'ONNX'} {each.version}" for each in model.opset_import)
        raise WrongExport(f"expected operators of ONNX {opset} alone, got {found}")
    _name_sizes(model.graph)
    for node in model.graph.node:
        del node.metadata_props[:]  # where in the source code the node comes from
    model.metadata_props.add(key=METADATA, value=json.dumps(about))
    return io.BytesIO(model.SerializeToString())


_SIZES = {
    "images": ("batch", None, "height", "width"),
    "noise": ("batch", "patches"),
    "tokens": ("batch", "tokens", None),
    "features": ("batch", None),
    "logits": ("batch", None),
    "pred": ("batch", "patches", None),
    "mask": ("batch", "patches"),
}
"""Names in ONNX of the sizes of inputs and outputs that are not fixed."""


def _name_sizes(graph: Any) -> None:
    del graph.value_info[:]  # shapes inside the graph, in symbols that would no longer be defined
    for value in (*graph.input, *graph.output):
        for size, name in zip(value.type.tensor_type.shape.dim, _SIZES[value.name], strict=True):
            if name is not None:
                size.dim_param = name


@contextmanager
def _quiet() -> Iterator[None]:
    """A block in which the exporters' own prints, warnings and logs are not shown."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
