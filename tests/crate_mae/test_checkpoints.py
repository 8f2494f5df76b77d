"""Saving, loading, and official checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import fractions
import io
import json
import os
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from images_of_all_kinds import EXOTIC, EXPECTED
from limits import no_hang
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from support import SMALL, small_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from crate_mae import CrateMAE, create_model, load_model, load_transform, save_model
from crate_mae.checkpoints import load_weights
from crate_mae.data.reading import open_image, part, whole
from crate_mae.data.transforms import centred_box


def official_state(model: CrateMAE) -> dict[str, torch.Tensor]:
    """A state dict with the entries that official checkpoints carry and never use."""
    unused = dict(pos_embed=torch.randn(1, 17, 32), **{"decoder_embed.weight": torch.randn(32, 32)})
    return {**model.state_dict(), **unused, "decoder_embed.bias": torch.randn(32)}


def same(a: CrateMAE, b: CrateMAE) -> bool:
    other = b.state_dict()
    return a.config == b.config and all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


def prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


def sparse_step(model: CrateMAE) -> nn.Module:
    return model.blocks[0].layers[0][1].fn


def with_weight_norm() -> CrateMAE:
    model = small_model()
    parametrizations.weight_norm(sparse_step(model))
    return model


def test_round_trip_keeps_weights_lambda_and_step_size(tmp_path: Path) -> None:
    model = small_model(lambd=0.3, step_size=0.2, img_size=(8, 16))
    save_model(model, tmp_path)
    assert same(load_model(tmp_path), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_one_model_is_one_file_to_the_byte(tmp_path: Path) -> None:
    model, files = small_model(), set()
    for _ in range(10):
        save_model(model, tmp_path)
        files.add((tmp_path / "model.safetensors").read_bytes())
    assert len(files) == 1


def test_save_keeps_other_keys_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"seed": 7}')
    save_model(small_model(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 7


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_official_checkpoint_loads_strictly(suffix: str, tmp_path: Path) -> None:
    model, path = small_model(lambd=5.0), tmp_path / f"official{suffix}"
    if suffix == ".pth":
        torch.save({"model": official_state(model), "epoch": 3}, path)
    else:
        save_file(official_state(model), path)
    loaded = load_model(path, "crate_mae_tiny", lambd=5.0, step_size=0.1, **SMALL)
    assert same(loaded, model)


def test_unknown_entries_are_an_error() -> None:
    model = small_model()
    with pytest.raises(RuntimeError, match="rotary"):
        model.load_state_dict({**official_state(model), "rotary": torch.ones(1)}, strict=True)
    with pytest.raises(RuntimeError, match="mask_token"):
        model.load_state_dict({k: v for k, v in official_state(model).items() if k != "mask_token"}, strict=True)


def test_loading_does_not_change_the_callers_state_dict() -> None:
    state = official_state(small_model())
    names = set(state)
    small_model().load_state_dict(state, strict=True)
    assert set(state) == names


def test_weights_alone_need_lambda_and_step_size_named(tmp_path: Path) -> None:
    path = tmp_path / "official.safetensors"
    save_file(official_state(small_model()), path)
    with pytest.raises(ValueError, match="do not say lambd, step_size"):
        load_model(path, "crate_mae_tiny", **SMALL)
    with pytest.raises(ValueError, match="do not say name, lambd"):
        load_model(path, step_size=0.1)


def test_a_directory_knows_what_it_holds(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path)
    with pytest.raises(ValueError, match="pass no name, lambd"):
        load_model(tmp_path, lambd=0.1)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model"]["lambd"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks lambd"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_model(tmp_path / "nowhere.pth", "crate_mae_tiny", lambd=1.0, step_size=0.1)


def test_weights_are_as_readable_as_their_config(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


OFFICIAL = dict(lambd=0.5, step_size=0.1)


def test_weights_that_do_not_fit_are_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    state = small_model().state_dict()
    cases = [
        (create_model("crate_mae_tiny", depth=1, decoder_depth=1).state_dict(), "384 wide, as those of crate_mae_tiny"),
        (prefixed("encoder.module.", state) | {"head": torch.ones(1)}, "prefix 'encoder.module.': save {k[15:]: v for"),
        (prefixed("_orig_mod.model.", state), "prefix '_orig_mod.model.': save {k[16:]: v for"),
        ({**state, "module.mask_token": torch.ones(1, 1, 32)}, "has unknown module.mask_token"),
        ({**state, "_orig_mod.mask_token": torch.ones(1, 1, 32)}, "mask_token is there twice"),
        (with_weight_norm().state_dict(), "remove the parametrization first"),
        ({**state, "rotary": torch.ones(1)}, "has unknown rotary"),
        (
            {**state, "mask_token": torch.ones(1).expand(2**20, 2**20)},
            "mask_token is (1048576, 1048576) and not (1, 1, 32)",
        ),
        ({name: value for name, value in state.items() if name != "mask_token"}, "lacks mask_token"),
    ]
    for weights, told in cases:
        torch.save(weights, path)
        with pytest.raises(RuntimeError) as caught:
            load_model(path, "crate_mae_tiny", **OFFICIAL, **SMALL)
        message = str(caught.value)
        assert told in message and str(path) in message and "\n" not in message and len(message) < 400, message


def load_what_was_saved(content: object, path: Path) -> CrateMAE:
    torch.save(content, path)
    return load_model(path, "crate_mae_tiny", **OFFICIAL, **SMALL)


@pytest.mark.parametrize("entry", ["model", "state_dict", "model_state_dict", "module"])
def test_training_checkpoints_load(entry: str, tmp_path: Path) -> None:
    model, path = small_model(**OFFICIAL), tmp_path / "weights.pt"
    arguments = argparse.Namespace(lr=np.float64(1e-3), output_dir=Path("runs"), device=torch.device("cpu"))
    others = {"epoch": 3, "args": arguments, "best": np.float32(0.5), "optimizer": {"state": {}}, "scaler": None}
    allowed = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([argparse.Namespace]):  # a caller's own, which stay
        assert same(load_what_was_saved({entry: prefixed("module.", official_state(model)), **others}, path), model)
        assert set(torch.serialization.get_safe_globals()) == {*allowed, argparse.Namespace}
    assert same(load_what_was_saved({entry: official_state(model), **others}, path), model)
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_two_sets_of_weights_in_a_checkpoint_are_ambiguous(tmp_path: Path) -> None:
    state = small_model().state_dict()
    with pytest.raises(ValueError, match=r"weights\.pt: holds weights under model and state_dict"):
        load_what_was_saved({"state_dict": state, "model": state}, tmp_path / "weights.pt")


def test_what_could_run_code_is_named_and_not_loaded(tmp_path: Path) -> None:
    content = {"model": small_model().state_dict(), "args": argparse.Namespace(ratio=fractions.Fraction(3, 4))}
    with pytest.raises(
        ValueError, match=r"weights\.pt: .* found fractions\.Fraction, .* save the state_dict\(\) alone"
    ):
        load_what_was_saved(content, tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ("module._orig_mod.module.", ""),
        ("_orig_mod.module.", ""),
        ("", "_checkpoint_wrapped_module._orig_mod."),
        ("_fsdp_wrapped_module.", "_fsdp_wrapped_module."),
    ],
)
def test_names_that_wrappers_gave_load(outer: str, inner: str, tmp_path: Path) -> None:
    model = small_model(**OFFICIAL)
    state = prefixed(outer, official_state(model))
    state = {name.replace("blocks.0.", f"blocks.0.{inner}"): value for name, value in state.items()}
    assert same(load_what_was_saved(state, tmp_path / "weights.pth"), model)


@pytest.mark.parametrize("load", [load_model, lambda path: load_weights(small_model(), path)], ids=["model", "weights"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_of_other_dtypes_load_as_float32_and_are_told(
    dtype: str, load: Callable[[Path], CrateMAE | None], tmp_path: Path
) -> None:
    model = small_model().to(getattr(torch, dtype))
    save_model(model, tmp_path)
    with pytest.warns(UserWarning) as warned:
        loaded = load(tmp_path)
    (told,) = warned
    count = len(model.state_dict()) - (loaded is None)  # positions are no weights
    expected = f"{tmp_path / 'model.safetensors'}: {count} of 27 entries are {dtype}, and become float32 in the model"
    assert str(told.message) == expected and told.filename == __file__
    assert loaded is None or same(loaded, model.float())


def test_some_weights_of_another_dtype_are_counted(tmp_path: Path) -> None:
    state = small_model().state_dict()
    with pytest.warns(UserWarning, match=r"weights\.pth: 1 of 27 entries are float16, and become"):
        load_what_was_saved({**state, "mask_token": state["mask_token"].half()}, tmp_path / "weights.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_what_was_saved(state, tmp_path / "weights.pth")


def with_nan(dtype: torch.dtype, *values: float) -> torch.Tensor:
    token = torch.ones(1, 1, 32, dtype=dtype)
    token[0, 0, : len(values)] = torch.tensor(values, dtype=dtype)
    return token


NAN, INF = float("nan"), float("inf")
NO_WEIGHTS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "integers": (lambda: torch.ones(1, 1, 32, dtype=torch.int8), "a dense tensor .* got a Tensor of torch.int8"),
    "booleans": (lambda: torch.ones(1, 1, 32, dtype=torch.bool), "got a Tensor of torch.bool"),
    "complex": (lambda: torch.ones(1, 1, 32, dtype=torch.complex64), "got a Tensor of torch.complex64"),
    "8 bits": (lambda: torch.ones(1, 1, 32).to(torch.float8_e4m3fn), "got a Tensor of torch.float8_e4m3fn"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(1, 1, 32), 0.1, 0, torch.qint8), "torch.qint8"),
    "sparse": (lambda: torch.ones(1, 1, 32).to_sparse(), "torch.float32 .torch.sparse_coo, cpu"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(1, 32)]), "got a nested tensor"),
    "meta": (lambda: torch.ones(1, 1, 32, device="meta"), "torch.float32 .torch.strided, meta"),
    "NaN": (lambda: with_nan(torch.float32, NAN, INF, -INF), "3 of 32 values are not finite; take weights from before"),
    "NaN in 16 bits": (lambda: with_nan(torch.bfloat16, NAN), "1 of 32 values are not finite as torch.float32; "),
    "beyond float32": (lambda: with_nan(torch.float64, 1e300), "1 of 32 values are not finite as torch.float32; "),
}


@pytest.mark.filterwarnings("ignore:.*quantize", "ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize(("make", "told"), NO_WEIGHTS.values(), ids=NO_WEIGHTS)
def test_tensors_that_are_no_weights_are_named(make: Callable[[], torch.Tensor], told: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(ValueError, match=f"weights.pth: mask_token: .*{told}"):
        load_what_was_saved({**small_model().state_dict(), "mask_token": make()}, path)
    with pytest.raises(ValueError, match=f"weights.pth: mask_token: .*{told}"):
        load_weights(small_model(), path)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled_in_place(model: CrateMAE) -> CrateMAE:
    model.compile()
    return model


def with_a_compiled_block(model: CrateMAE) -> CrateMAE:
    model.blocks[0] = torch.compile(model.blocks[0])
    return model


def compiled_around_ddp_around_a_compiled_block(model: CrateMAE) -> nn.Module:
    return torch.compile(DistributedDataParallel(with_a_compiled_block(model)))


def ddp_around_compiled(model: CrateMAE) -> nn.Module:
    return DistributedDataParallel(torch.compile(model))


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        compiled_in_place,
        with_a_compiled_block,
        DistributedDataParallel,
        nn.DataParallel,
        AveragedModel,
        compiled_around_ddp_around_a_compiled_block,
        ddp_around_compiled,
    ],
)
def test_wrapped_models_are_saved_as_plain_ones(
    wrap: Callable[[CrateMAE], nn.Module], one_process: None, tmp_path: Path
) -> None:
    model = small_model()
    expected = small_model()
    expected.load_state_dict(model.state_dict())
    save_model(wrap(model), tmp_path)
    assert same(load_model(tmp_path), expected)


def with_a_tied_layer(model: CrateMAE) -> None:
    model.blocks[1] = model.blocks[0]


def with_a_tied_parameter(model: CrateMAE) -> None:
    model.mask_token = model.cls_token


def with_a_view_of_another_weight(model: CrateMAE) -> None:
    model.mask_token.data = sparse_step(model).weight.data[3].view(1, 1, -1)


def with_strided_weights(model: CrateMAE) -> None:
    model.mask_token.data = torch.randn(32, 2)[:, 1].view(1, 1, -1)
    sparse_step(model).weight.data = torch.randn(32, 32).t()
    model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "edit", [with_a_tied_layer, with_a_tied_parameter, with_a_view_of_another_weight, with_strided_weights]
)
def test_weights_that_share_memory_are_saved_whole(edit: Callable[[CrateMAE], None], tmp_path: Path) -> None:
    model = small_model(depth=2)
    edit(model)
    save_model(model, tmp_path)
    assert same(load_model(tmp_path), model)


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module, self.head = small_model(), nn.Linear(2, 2)


class Adapter(nn.Module):
    """A LoRA layer, by the names of peft."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})


def with_an_adapter() -> CrateMAE:
    model = small_model()
    attention = model.blocks[0].layers[0][0].fn
    attention.qkv = Adapter(attention.qkv)
    return model


def with_old_weight_norm() -> CrateMAE:
    model = small_model()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(sparse_step(model))
    return model


def pruned() -> CrateMAE:
    model = small_model()
    prune.l1_unstructured(sparse_step(model), "weight", 0.5)
    return model


def with_smaller_positions() -> CrateMAE:
    model = small_model(img_size=32)
    model.decoder_pos_embed = small_model().decoder_pos_embed
    return model


def with_another(name: str, value: object) -> CrateMAE:
    model = small_model()
    setattr(sparse_step(model), name, value)
    return model


def with_softmax(dim: int) -> CrateMAE:
    model = small_model()
    model.blocks[0].layers[0][0].fn.attend.dim = dim
    return model


def with_window(window: int) -> CrateMAE:
    model = small_model()
    model.blocks[0].layers[0][0].fn.window = window
    return model


def with_more_steps() -> CrateMAE:
    model = small_model()
    model.blocks[0].layers[0][0].fn.to_out.append(nn.Tanh())
    return model


def with_another_softmax() -> CrateMAE:
    model = small_model()
    model.blocks[0].layers[0][0].fn.attend = nn.Softmin(dim=-1)
    return model


def with_token(value: float) -> CrateMAE:
    model = small_model().double()
    model.cls_token.data.fill_(value)
    return model


UNSAVED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "another module": (lambda: nn.Linear(2, 2), TypeError, "model: expected a CrateMAE, .* got Linear"),
    "with a head": (WithHead, TypeError, "model: expected a CrateMAE, .* got WithHead"),
    "state dict": (lambda: small_model().state_dict(), TypeError, "model: expected a CrateMAE, .* got OrderedDict"),
    "parametrized": (with_weight_norm, ValueError, "weight.original0 .*remove the parametrization first"),
    "old weight norm": (with_old_weight_norm, ValueError, "0.1.fn.weight_g .*remove the weight norm first"),
    "adapter": (with_an_adapter, ValueError, "qkv.base_layer.weight .*merge the adapter first"),
    "pruned": (pruned, ValueError, "0.1.fn.weight_mask .*make the pruning permanent first"),
    "other shape": (with_smaller_positions, ValueError, "decoder_pos_embed is .*17, 32.* and not .*65, 32"),
    "meta": (lambda: small_model().to("meta"), ValueError, "cls_token: expected values, got none"),
    "diverged": (
        lambda: with_token(NAN),
        ValueError,
        "model: cls_token: 32 of 32 values are not finite as .*; take weights",
    ),
    "beyond float32": (
        lambda: with_token(1e300),
        ValueError,
        "cls_token: 32 of 32 values are not finite as torch.float32",
    ),
    "8 bits": (
        lambda: small_model().to(torch.float8_e5m2),
        ValueError,
        "cls_token: expected a dense tensor .*float8_e5m2",
    ),
    "sharded": (lambda: fully_shard(small_model()), ValueError, "cls_token: expected a plain tensor, got a DTensor"),
    "step size": (
        lambda: with_another("step_size", 0.3),
        ValueError,
        r"blocks\.0\..*step_size is 0\.3, .* makes it 0\.1 ",
    ),
    "softmax over rows": (lambda: with_softmax(dim=2), ValueError, r"0\.0\.fn\.attend\.dim is 2, .* makes it -1 "),
    "more steps": (with_more_steps, ValueError, r"0\.0\.fn\.to_out has 3 steps, and load_model makes it with 2"),
    "another softmax": (
        with_another_softmax,
        ValueError,
        r"0\.0\.fn\.attend is Softmin, and load_model makes it Softmax",
    ),
    "window": (
        lambda: with_window(2),
        ValueError,
        r"0\.0\.fn\.window is 2, and load_model makes it None .*set it again after loading",
    ),
    "threshold": (lambda: with_another("threshold", "soft"), ValueError, r"0\.1\.fn\.threshold is soft"),
}


@pytest.mark.parametrize(("make", "error", "told"), UNSAVED.values(), ids=UNSAVED)
def test_what_could_not_be_loaded_is_not_saved(
    make: Callable[[], Any], error: type[Exception], told: str, one_process: None, tmp_path: Path
) -> None:
    save_model(small_model(lambd=0.3), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = make()
    with pytest.raises(error, match=told) as caught:
        save_model(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_setting_of_all_layers_is_saved_by_way_of_the_config(tmp_path: Path) -> None:
    model = with_another("step_size", 0.3)
    model.config = dataclasses.replace(model.config, step_size=0.3)
    save_model(model, tmp_path)
    assert sparse_step(load_model(tmp_path)).step_size == 0.3


def test_a_save_that_fails_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(small_model(lambd=0.3), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("crate_mae.files.os.fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*: No space"):
        save_model(small_model(lambd=0.4), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_draws_no_random_numbers(tmp_path: Path) -> None:
    model, before = small_model(), torch.get_rng_state()
    save_model(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_flipped_bit_or_two_names_swapped_are_told(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    for place in (begin, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=f"{path}: damaged: crc32 of its weights is .{{8}}, and was .{{8}} when"):
            load_model(tmp_path)
    one, other = b"decoder_blocks.0.layers.0.0.fn.weight", b"decoder_blocks.0.layers.0.1.fn.qkv.weight"
    assert one in content[:begin] and other in content[:begin]
    swapped = content[:begin].replace(one, b"#").replace(other, one).replace(b"#", other)
    path.write_bytes(swapped + content[begin:])
    with pytest.raises(ValueError, match="damaged"):
        load_model(tmp_path)


def test_files_without_our_checksum_load(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "model.safetensors"
    save_model(model, tmp_path)
    with safe_open(path, "pt") as file:
        assert file.metadata().keys() == {"crc32"}
    for metadata in (None, {"format": "pt", "made by": "another"}):
        save_file(model.state_dict(), path, metadata)
        assert same(load_model(tmp_path), model)


def test_a_flipped_bit_of_an_archive_is_told(tmp_path: Path) -> None:
    model, path = small_model(**OFFICIAL), tmp_path / "weights.pth"
    load_what_was_saved(model.state_dict(), path)
    content = bytearray(path.read_bytes())
    content[content.index(model.decoder_pred.weight.detach().numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{path}: expected a file that torch.save wrote, whole \(BadZipFile: Bad CRC"
    ):
        load_model(path, "crate_mae_tiny", **OFFICIAL, **SMALL)


def test_archives_without_checksums_load(tmp_path: Path) -> None:
    model = small_model(**OFFICIAL)
    torch.serialization.set_crc32_options(False)
    try:
        assert same(load_what_was_saved(model.state_dict(), tmp_path / "weights.pth"), model)
    finally:
        torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save(small_model(), path),
        lambda path: torch.save({"args": fractions.Fraction(1, 2)}, path),
        lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path),
        lambda path: tarfile.open(path, "w").close(),
        lambda path: path.write_bytes(b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R."),
    ],
    ids=["module", "fraction", "script", "tar", "call"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:'torch.load' received a zip")
def test_no_advice_to_run_what_is_in_a_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(ValueError, match=f"{path}: expected") as caught:
        load_model(path, "crate_mae_tiny", **OFFICIAL, **SMALL)
    message = str(caught.value)
    assert message.isprintable() and not re.search(r"weights_only\W*(=|to)\W*False|trust|two options", message), message


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (os.mkfifo, "expected a file, found a pipe"),
        (Path.mkdir, "expected a file, found a folder|its config.json says"),
        (lambda path: path.symlink_to("/dev/zero"), "expected a file, found a device"),
        (lambda path: path.symlink_to(path), "cannot be read .Too many levels of symbolic links"),
        (lambda path: path.symlink_to(path.with_name("nowhere")), "no such file"),
        (lambda path: path.symlink_to("/dev/null/model"), "no such file"),
        (Path.touch, "not whole JSON|not a whole safetensors file|expected a file that torch.save wrote"),
    ],
    ids=["pipe", "folder", "device", "loop", "dangling", "through a device", "empty"],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "weights.pth"])
def test_what_is_no_file_is_told_and_not_waited_for(
    name: str, make: Callable[[Path], None], told: str, tmp_path: Path
) -> None:
    save_model(small_model(), tmp_path)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    make(path)
    with no_hang(), pytest.raises((ValueError, FileNotFoundError), match=f"{name}.*: ({told})") as caught:
        if name == "weights.pth":
            load_model(path, "crate_mae_tiny", **OFFICIAL, **SMALL)
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [1, "mask\ntoken", "a" * 10**6])
def test_odd_names_are_told_in_a_line(name: object, tmp_path: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"weights\.pth: ") as caught:
        load_what_was_saved({**small_model().state_dict(), name: torch.ones(1)}, tmp_path / "weights.pth")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_no_checkpoint_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    contents: list[bytes] = [b"", b"hello", b"\xff\xd8\xff\xe0"]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"weights{suffix}: "):
            load_model(path, "crate_mae_tiny", **OFFICIAL, **SMALL)
    if suffix == ".pth":
        for content in (small_model(), [torch.ones(1)], {"epoch": 3}):
            torch.save(content, path)
            with pytest.raises(ValueError, match=r"weights\.pth: expected"):
                load_model(path, "crate_mae_tiny", **OFFICIAL, **SMALL)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"model": ', "not whole JSON"),
        ("\xff", "not whole JSON"),
        ("[" * 10**5, "not whole JSON"),
        ('{"model": ' + "1" * 5000 + "}", "not whole JSON"),
        ('{"model": {"lambd": 0.5, "step_size": 0.1, "a\\nb": 1}}', r"has a\\nb, which no ModelConfig has"),
        ("[]", "expected a JSON object"),
        ('{"model": {"foo": 1}}', "lacks lambd, step_size"),
        ('{"model": 3}', "model: expected a section"),
        ('{"model": {"lambd": 0.5, "step_size": 0.1, "img_size": "96"}}', "model.img_size: expected an integer"),
    ],
)
def test_a_config_that_says_nothing_is_named(content: str, told: str, tmp_path: Path) -> None:
    save_model(small_model(), tmp_path)
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=f"config.json: .*{told}") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_unknown_fields_of_a_config_are_named(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model": config["model"] | {"depht": 3}}))
    with pytest.raises(ValueError, match="has depht"):
        load_model(tmp_path)


def test_transform_standardises_the_centre_as_the_run_did(tmp_path: Path) -> None:
    save_model(small_model(img_size=8), tmp_path)
    with pytest.raises(ValueError, match=r"section images .*save_model\(model, directory, mean=..., std=...\)"):
        load_transform(tmp_path)
    save_model(small_model(img_size=8), tmp_path, mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 2.0])
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    expected = torch.tensor(pixels[:, 2:10]).permute(2, 0, 1) / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    expected /= torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
    found = load_transform(tmp_path)(Image.fromarray(pixels))
    torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError, match=r"image: expected a Pillow image, .* got str"):
        load_transform(tmp_path)("a.jpg")
    grey = Image.fromarray(pixels[..., 0])
    assert load_model(tmp_path).encode(load_transform(tmp_path)(grey)[None]).isfinite().all()


@pytest.mark.parametrize("name", ["grey_16.png", "rgba.png", "turned_6.jpg", "turned_6.tif", "measured.tif"])
def test_transform_sees_what_training_sees(tmp_path: Path, name: str) -> None:
    save_model(small_model(img_size=8), tmp_path, mean=[0.0] * 3, std=[1.0] * 3)
    height, width = EXPECTED[name].shape[:2]
    box = centred_box((width, height), 1)
    expected = part(open_image(EXOTIC[name], name), box, (8, 8), 3, name)
    for image in (Image.open(io.BytesIO(EXOTIC[name])), whole(open_image(EXOTIC[name], name), 3, name)):
        torch.testing.assert_close(load_transform(tmp_path)(image), expected / 255)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(mean=[0.5] * 3), "mean and std: expected both or neither"),
        (dict(mean=[0.5], std=[0.5]), "mean: expected 3 values"),
        (dict(mean=[0.5] * 3, std=[0.0] * 3), "std: expected positive"),
    ],
)
def test_a_normalisation_that_is_none_is_not_saved(given: dict, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        save_model(small_model(), tmp_path / "model", **given)
    assert not (tmp_path / "model").exists()
