"""The export command and what it writes: files that are loaded without our packages, and checked before they are there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("jsonargparse")  # lacking where nothing can be installed, as on some GPU machines

from support import small_classifier, small_model
from torch import nn
from torch.export.passes import move_to_device_pass

import crate_mae
from crate_mae.cli import main
from crate_mae.config import grid_of
from crate_mae.data import MissingLibrary
from crate_mae.evaluation import features_of
from crate_mae.exporting import writing
from crate_mae.exporting.check import TOLERANCE, WrongExport, compared
from crate_mae.exporting.form import ExportForm, positions_of
from crate_mae.exporting.writing import METADATA, Exported, export
from crate_mae.positions import resampled, sine_cosine

# Learned positions, and both fixed ones; the widest range of layers.
MODELS = {
    "crate_mae_mae": lambda: small_model(img_size=32, patch_size=8),
    "crate": lambda: small_classifier("crate", img_size=(32, 24), patch_size=8, pool="mean"),
    "crate_alpha": lambda: small_classifier("crate_alpha"),
    "crate_mae": lambda: small_classifier("crate_mae", pool="mean"),
}


def has_onnx() -> bool:
    try:
        writing._check_libraries()
    except MissingLibrary:
        return False
    return True


needs_onnx = pytest.mark.skipif(not has_onnx(), reason="needs onnx and its runtime")
FORMATS = ["pt2", pytest.param("onnx", marks=needs_onnx)]


def folder_of(model: nn.Module, folder: Path, **about: object) -> Path:
    crate_mae.save_model(model, folder, **about)
    return folder


def function_of(path: Path, inputs: Sequence[str]) -> Callable[..., list[torch.Tensor]]:
    """The file as a function of tensors, in the order of its inputs, to a list of tensors."""
    if path.suffix == ".pt2":
        program = torch.export.load(path).module()

        def run(*given: torch.Tensor) -> list[torch.Tensor]:
            found = program(*given)
            return list(found) if isinstance(found, tuple) else [found]
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(path)

        def run(*given: torch.Tensor) -> list[torch.Tensor]:
            named = {name: value.numpy() for name, value in zip(inputs, given, strict=True)}
            return [torch.from_numpy(value) for value in session.run(None, named)]

    return run


def loaded(exported: Exported) -> Callable[..., list[torch.Tensor]]:
    if exported.format == "onnx":
        graph = pytest.importorskip("onnx").load(exported.path).graph
        assert [each.name for each in graph.output] == list(exported.outputs)
    return function_of(exported.path, exported.inputs)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported is loaded here: the process without our packages takes seconds to start, and has tests of its own."""

    def outputs_of_file(file: Path, cases: Sequence[dict], outputs: int) -> list[list[torch.Tensor]]:
        run = function_of(file, list(cases[0]))
        found = [run(*case.values()) for case in cases]
        assert all(len(each) == outputs for each in found)
        return found

    monkeypatch.setattr(writing, "outputs_of_file", outputs_of_file)


HERE = pytest.mark.usefixtures("in_this_process")


def metadata_of(exported: Exported) -> dict:
    if exported.format == "pt2":
        extra = {METADATA: ""}
        torch.export.load(exported.path, extra_files=extra)
        return json.loads(extra[METADATA])
    session = pytest.importorskip("onnxruntime").InferenceSession(exported.path)
    return json.loads(session.get_modelmeta().custom_metadata_map[METADATA])


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= TOLERANCE * max(1, wanted.abs().max())


@HERE
@pytest.mark.parametrize(
    ("family", "format"),
    [
        *((family, "pt2") for family in MODELS),
        *(pytest.param(one, "onnx", marks=needs_onnx) for one in ("crate_mae_mae", "crate_alpha")),
    ],
)
def test_it_gives_what_the_model_gives(family, format, tmp_path):
    """Of any batch and size, those included that the check has not seen: one image in a batch, two patches a side, and more than
    the model was configured for; and of no other."""
    model = MODELS[family]().eval()
    exported = export(folder_of(model, tmp_path), format=format)
    assert exported.path == tmp_path / f"model.{format}" and exported.size == exported.path.stat().st_size
    patch, run = model.config.patch_size, loaded(exported)
    height, width = model.config.image_shape
    checked = [(each.batch, each.height, each.width) for each in exported.checked]
    assert checked[0] == (1, height, width) and checked[1][0] == 3 and checked[1][1] != checked[1][2]
    assert checked[2][1:] == checked[3][1:] < (height, width) and [batch for batch, *_ in checked[2:]] == [1, 3]
    for batch, rows, columns in ((1, 2, 2), (5, 2, 9), (1, 11, 3), (2, *grid_of((height, width), patch))):
        images = torch.randn(batch, model.config.in_chans, rows * patch, columns * patch)
        with torch.no_grad():
            wanted = model.encode(images) if family == "crate_mae_mae" else model(images)
        (found,) = run(images)
        assert_near(found, wanted)
        assert not found.requires_grad
    for shape in ((height + 1, width), (height, width + patch - 1)):
        with pytest.raises(Exception, match=r"Guard failed|Reshape"):
            run(torch.randn(1, model.config.in_chans, *shape))


@HERE
@pytest.mark.parametrize("output, format", [("tokens", "pt2"), pytest.param("features", "onnx", marks=needs_onnx)])
def test_other_outputs(output, format, tmp_path):
    """Of a classifier whose final norm stands in its head."""
    model = small_classifier("crate_mae", pool="mean").eval()
    nn.init.normal_(model.fc_norm.weight)
    run = loaded(export(folder_of(model, tmp_path), format=format, output=output))
    images = torch.randn(2, 3, 20, 12)
    with torch.no_grad():
        wanted = model.forward_features(images) if output == "tokens" else features_of(model, images)
    assert_near(run(images)[0], wanted)


@HERE
@pytest.mark.parametrize("format", FORMATS)
def test_a_reconstruction(format, tmp_path):
    model = small_model().eval()
    exported = export(folder_of(model, tmp_path), format=format, output="reconstruction", mask_ratio=0.6)
    assert exported.inputs == ("images", "noise") and exported.outputs == ("pred", "mask")
    assert metadata_of(exported)["mask_ratio"] == 0.6
    images, noise = torch.randn(2, 3, 12, 28), torch.rand(2, 21)
    with torch.no_grad():
        wanted = model(images, 0.6, noise)
    pred, mask = loaded(exported)(images, noise)
    assert_near(pred, wanted.pred)
    assert torch.equal(mask, wanted.mask)


@pytest.mark.parametrize("format", FORMATS)
def test_images_of_the_usual_size(format, tmp_path):
    """224 pixels a side in patches of 16, as models are trained."""
    model = small_model(img_size=224, patch_size=16, embed_dim=48, num_heads=3)
    exported = export(folder_of(model, tmp_path), format=format)
    assert [(each.batch, each.height, each.width) for each in exported.checked] == [
        (1, 224, 224),
        (3, 160, 224),
        (1, 96, 96),
        (3, 96, 96),
    ]
    for each in exported.checked:
        assert each.difference <= TOLERANCE * max(1, each.largest) and 0 < each.relative < TOLERANCE


@HERE
@pytest.mark.parametrize("format", FORMATS)
def test_what_the_file_says_of_itself(format, tmp_path):
    model = small_classifier("crate", lambd=0.3, step_size=0.2)
    about = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], classes=["a", "b", "c", "d", "é"])
    said = metadata_of(export(folder_of(model, tmp_path, **about), format=format))
    assert {name: said[name] for name in about} == about
    assert said["patch_size"] == 4 and said["inputs"] == ["images"] and said["outputs"] == ["logits"]
    assert said["model"]["lambd"] == 0.3 and said["model"]["step_size"] == 0.2
    assert crate_mae.ClassifierConfig(**said["model"]) == model.config
    assert said["versions"]["crate_mae"] == crate_mae.__version__ and said["versions"]["torch"] == torch.__version__


@HERE
def test_the_graph_is_of_pytorch_alone(tmp_path):
    """No operator of ours, no path of this machine, and of the weights those that the tokens need."""
    model = small_model()
    exported = export(folder_of(model, tmp_path))
    program = torch.export.load(exported.path)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {target.namespace for target in targets if hasattr(target, "namespace")} == {"aten"}
    assert "crate" not in str(program.call_spec)
    assert not any("decoder" in name or "mask" in name for name in program.state_dict)
    assert str(Path(crate_mae.__file__).parent).encode() not in exported.path.read_bytes()
    encoder = sum(value.numel() for name, value in model.named_parameters() if "decoder" not in name)
    found = sum(value.numel() for value in program.state_dict.values())
    biases = model.config.depth * model.config.embed_dim
    assert encoder - model.mask_token.numel() + biases + model.config.embed_dim // 4 == found


@HERE
def test_a_file_can_be_moved_to_another_device(tmp_path):
    """By PyTorch's own pass; "meta" is as strict as a GPU on what is still on the CPU."""
    exported = export(folder_of(small_classifier("crate_mae"), tmp_path), output="tokens")
    program = move_to_device_pass(torch.export.load(exported.path), "meta").module()
    assert program(torch.zeros(3, 3, 8, 12, device="meta")).shape == (3, 7, 32)


@needs_onnx
@HERE
@pytest.mark.parametrize("opset", [23])
def test_onnx_is_of_its_own_operators_alone(opset, tmp_path):
    import onnx

    exported = export(folder_of(small_model(), tmp_path), format="onnx", opset=opset, output="reconstruction")
    model = onnx.load(exported.path)
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", opset)] and not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "images": ["batch", 3, "height", "width"],
        "noise": ["batch", "patches"],
        "pred": ["batch", "patches", 48],
        "mask": ["batch", "patches"],
    }


@pytest.mark.parametrize("grid", [(4, 6), (2, 2), (3, 4), (9, 7), (1, 5), (5, 1), (40, 31)])
def test_positions_of_any_grid(grid):
    fixed, learned = small_model(embed_dim=64), small_classifier("crate", img_size=(16, 24))
    assert torch.equal(positions_of(fixed)(*grid), sine_cosine(grid, 64))
    found, wanted = positions_of(learned)(*grid), resampled(learned.pos_embedding, (4, 6), grid)
    if grid == (4, 6):
        assert torch.equal(found, learned.pos_embedding)
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize(
    "old, new", [((14, 14), (10, 14)), ((14, 14), (6, 6)), ((16, 16), (15, 37)), ((3, 5), (64, 64))]
)
def test_resampled_positions_are_those_of_pytorch(old, new):
    model = small_classifier("crate", img_size=(4 * old[0], 4 * old[1]))
    wanted = resampled(model.pos_embedding, old, new)
    assert (positions_of(model)(*new) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


class TestWrongFiles:
    """They are found out, and nothing is left of them; what was there before is there still."""

    def failing(self, folder: Path, pattern: str) -> None:
        crate_mae.save_model(small_model(), folder)
        file = folder / "model.pt2"
        file.write_bytes(b"older")
        before = sorted(folder.iterdir())
        with pytest.raises(WrongExport, match=pattern):
            export(folder, overwrite=True)
        assert sorted(folder.iterdir()) == before and file.read_bytes() == b"older"

    @HERE
    def test_that_ignore_the_size(self, tmp_path, monkeypatch):
        make = positions_of

        class Transposed(nn.Module):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.made = make(model)

            def forward(self, rows: int, columns: int) -> torch.Tensor:
                return self.made(columns, rows)

        monkeypatch.setattr("crate_mae.exporting.form.positions_of", Transposed)
        # The first images are square, and pass.
        self.failing(tmp_path, r"images 3 x 12 x 16: the file is up to .* from the model")

    @HERE
    def test_that_are_a_little_off(self, tmp_path, monkeypatch):
        forward = ExportForm.forward
        monkeypatch.setattr(ExportForm, "forward", lambda self, images: forward(self, images) + 1e-4)
        self.failing(tmp_path, r"images 1 x 16 x 16: the file is up to 0.0001 from the model")

    @HERE
    def test_whose_form_spoils_the_weights(self, tmp_path, monkeypatch):
        """The model in float64, by which roundings are judged, is not spoilt with them."""
        make = ExportForm.__init__

        def spoiling(self, model, output):
            make(self, model, output)
            for parameter in self.model.encoder_layers[0].parameters():
                parameter.data.mul_(5)

        monkeypatch.setattr(ExportForm, "__init__", spoiling)
        self.failing(tmp_path, "images 1 x 16 x 16: the file is up to .* from the model")

    @HERE
    def test_whose_outputs_are_small(self, tmp_path, monkeypatch):
        """Logits of a fresh head, all below 1e-3: an error of some percent is far below 1e-5."""
        crate_mae.save_model(crate_mae.classifier_of(small_model(), 5), tmp_path)
        forward = ExportForm.forward
        monkeypatch.setattr(ExportForm, "forward", lambda self, images: forward(self, images) * 1.01)
        with pytest.raises(WrongExport, match=r"0\.01 of the norm"):
            export(tmp_path)

    @HERE
    def test_that_have_another_shape(self, tmp_path, monkeypatch):
        forward = ExportForm.forward
        monkeypatch.setattr(ExportForm, "forward", lambda self, images: forward(self, images)[:, 1:])
        self.failing(tmp_path, r"the model gives \(1, 17, 32\), and the file \(1, 16, 32\)")

    def test_that_need_our_package(self, tmp_path, monkeypatch):
        """An output of a class of ours, which the graph's own check does not see."""
        forward = ExportForm.forward

        def named(self, images):
            return crate_mae.MAEOutput(*[forward(self, images)] * 3)

        monkeypatch.setattr(ExportForm, "forward", named)
        self.failing(tmp_path, r"cannot be used without crate_mae: exit status 1: .*MAEOutput")

    def test_that_have_an_operator_of_ours(self, tmp_path, monkeypatch):
        library = torch.library.Library("crate_test", "DEF")
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
        forward = ExportForm.forward
        monkeypatch.setattr(ExportForm, "forward", lambda self, x: torch.ops.crate_test.double(forward(self, x)))
        self.failing(tmp_path, r"operators that are not PyTorch's own: crate_test.double")
        library._destroy()


class TestHowFarApart:
    case: ClassVar = {"images": torch.zeros(1, 3, 8, 8)}
    wanted: ClassVar = [torch.tensor([1000.0, 1.0])]

    def test_what_is_near_needs_no_float64(self):
        for found, difference in ((1.0, 0.0), (1.009, 0.009)):  # of the largest value, not of each
            checked = compared(self.case, self.wanted, [torch.tensor([1000.0, found])], exact=lambda: pytest.fail())
            assert checked[:3] == (1, 8, 8) and checked.difference == pytest.approx(difference, rel=1e-4)
            assert checked.relative == pytest.approx(difference / 1000, rel=1e-4)
            assert checked.largest == 1000 and checked.rounding is None

    def test_where_float32_is_no_nearer(self):
        found = [torch.tensor([1000.0, 1.05])]
        checked = compared(self.case, self.wanted, found, exact=lambda: [torch.tensor([1000.02, 1]).double()])
        assert checked.difference == pytest.approx(0.05, rel=1e-4)
        assert checked.rounding == pytest.approx(0.02, rel=1e-2)
        with pytest.raises(
            WrongExport, match=r"images 1 x 8 x 8: the file is up to 0.05 .* itself up to 0.01 from float64"
        ):
            compared(self.case, self.wanted, found, exact=lambda: [torch.tensor([1000.01, 1]).double()])

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_what_is_not_finite_is_not_near(self, value):
        with pytest.raises(WrongExport, match="images 1 x 8 x 8"):
            compared(self.case, self.wanted, [torch.tensor([1000, value])], exact=lambda: self.wanted)


class TestCommand:
    @pytest.fixture
    def run(self, tmp_path) -> Path:
        folder = folder_of(small_model(), tmp_path / "run", mean=[0.5] * 3, std=[0.2] * 3)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "schedule": {"mask_ratio": 0.5}}))
        return folder

    def test_what_it_prints_works(self, run, capfd):
        assert main(["export", str(run)]) == 0
        out, err = capfd.readouterr()
        assert not err and len(out.splitlines()) == 8
        assert "3 x 12 x 16" in out and f'torch.export.load("{run / "model.pt2"}").module()(images)' in out
        code = (
            f"import torch; images = torch.rand(2, 3, 16, 16); print({out.split('Use it as ')[1].split('; ')[0]}.shape)"
        )
        printed = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=run
        ).stdout
        assert "torch.Size([2, 17, 32])" in printed

    @needs_onnx
    def test_a_reconstruction_in_onnx_has_the_ratio_of_the_run(self, run, tmp_path, capfd):
        out = tmp_path / "mine.onnx"
        assert main(["export", str(run), "--format", "onnx", "--output", "reconstruction", "--out", str(out)]) == 0
        printed, err = capfd.readouterr()
        assert not err and '.run(None, {"images": images, "noise": noise})' in printed
        session = pytest.importorskip("onnxruntime").InferenceSession(out)
        given = {"images": np.zeros((1, 3, 16, 16), np.float32), "noise": np.random.rand(1, 16).astype(np.float32)}
        assert session.run(["mask"], given)[0].sum() == 8

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--format", "onxx"], "format: expected one of pt2, onnx, got"),
            (
                ["--output", "logits"],
                "output: expected one of tokens, features, reconstruction of a CrateMAE, got 'logits'",
            ),
            (["--opset", "9"], "opset: expected 18 to 23, got 9"),
            (["--out", "model.pth"], "out: expected a name that ends in .pt2, got model.pth"),
            (["--out", "nowhere/model.pt2"], "out nowhere/model.pt2: there is no folder nowhere"),
            (["--mask_ratio", "0.5"], "--mask_ratio: expected with --output reconstruction of a CRATE-MAE alone"),
            (["--output", "reconstruction", "--mask_ratio", "1"], "--mask_ratio: expected above 0"),
        ],
    )
    def test_mistakes(self, run, capsys, arguments, message):
        before = sorted(run.iterdir())
        assert main(["export", str(run), *arguments]) == 2
        assert message in capsys.readouterr().err
        assert sorted(run.iterdir()) == before

    def test_a_file_that_is_there(self, run, capsys):
        (run / "model.pt2").write_bytes(b"mine")
        assert main(["export", str(run)]) == 2
        assert "there is such a file; --overwrite (overwrite=True) puts another in its place" in capsys.readouterr().err
        assert (run / "model.pt2").read_bytes() == b"mine"
        assert main(["export", str(run), "--overwrite"]) == 0
        assert torch.export.load(run / "model.pt2").module()(torch.zeros(1, 3, 8, 8)).shape == (1, 5, 32)

    def test_no_run(self, tmp_path, capsys):
        assert main(["export", str(tmp_path / "none")]) == 2
        assert "RUN: expected the folder of a run" in capsys.readouterr().err

    def test_onnx_is_not_installed(self, run, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        assert main(["export", str(run), "--format", "onnx"]) == 2
        assert "pip install 'crate-kernels[export]'" in capsys.readouterr().err

    def test_a_model_of_one_row_of_patches(self, tmp_path, capsys):
        folder = folder_of(small_model(img_size=(4, 16)), tmp_path / "row")
        assert main(["export", str(folder)]) == 2
        assert "expected images of 2 patches a side or more" in capsys.readouterr().err
