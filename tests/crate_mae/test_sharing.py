"""Models for others: the folder with its card, the hub, and official checkpoints as such folders."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("jsonargparse")  # lacking where nothing can be installed, as on some GPU machines

from golden import Golden
from support import error, small_classifier, small_model
from tiny_runs import tiny_config, weights, write_photographs

import crate_mae
from crate_mae import Backbone, Classifier, CrateMAE, load_model, load_transform
from crate_mae.cli import main
from crate_mae.data.specification import without_folders
from crate_mae.evaluation.classes import TITLES

ROOT = Path(__file__).resolve().parents[2]

# What a process does that has the folder alone; Triton, and the hub's library, cannot be imported in it.
FRESH = """
import sys
sys.modules.update(triton=None, huggingface_hub=None)
import numpy, torch, crate_mae
torch.set_num_threads(1)
model = crate_mae.CrateMAE.from_pretrained("given")
transform = crate_mae.load_transform(crate_mae.download("given"))
images, noise = (torch.from_numpy(numpy.load(f"{name}.npy")) for name in ("images", "noise"))
with torch.no_grad():
    loss, pred, mask = model(images, noise=noise)
numpy.savez("out.npz", loss=loss, pred=pred, mask=mask, tokens=model.encode(images).detach())
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was evaluated, whose paths all have "secret" in them."""
    folder = tmp_path_factory.mktemp("secret")
    config = tiny_config(folder / "run", write_photographs(folder / "photographs"))
    crate_mae.pretrain(config)
    classes = folder / "classes"
    for part in ("train", "test"):
        for name in ("one", "two"):
            (classes / part).mkdir(parents=True, exist_ok=True)
            write_photographs(classes / part / name, 4 if part == "train" else 2)
            for number, path in enumerate(sorted((classes / part / name).iterdir())):  # no two images the same
                path.rename(path.with_name(f"{part} {name} {number}.png"))
    assert main(["evaluate", str(config.out), "--data", str(classes), "--seeds", "2"]) == 0
    return config.out


def metadata(folder: Path) -> dict[str, Any]:
    """Of the card, as the hub reads it."""
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


class TestFolder:
    def test_a_fresh_process_with_the_folder_alone_computes_the_same_to_the_bit(
        self, run: Path, tmp_path: Path
    ) -> None:
        model = CrateMAE.from_pretrained(run)
        model.save_pretrained(tmp_path / "given", run=run)
        images, noise = torch.randn(2, 3, 32, 40), torch.rand(2, 20)
        for name, value in (("images", images), ("noise", noise)):
            np.save(tmp_path / f"{name}.npy", value.numpy())
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", FRESH], cwd=tmp_path, check=True, env=env)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.no_grad():
            expected = {**model(images, noise=noise)._asdict(), "tokens": model.encode(images)}
        torch.set_num_threads(threads)
        with np.load(tmp_path / "out.npz") as found:
            for name, value in expected.items():
                assert np.array_equal(found[name], value.numpy()), name

    def test_weights_configuration_and_normalisation_are_those_of_the_run(self, run: Path, tmp_path: Path) -> None:
        CrateMAE.from_pretrained(run).save_pretrained(tmp_path, run=run)
        assert (tmp_path / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
        given, of_run = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, run))
        assert given["model"] == of_run["model"]
        assert given["images"] == {name: of_run["images"][name] for name in ("mean", "std")}
        assert given["recipe"]["optimizer"] == of_run["optimizer"]
        assert given["recipe"]["schedule"] == of_run["schedule"]

    def test_the_card_has_data_recipe_curves_and_evaluation(self, run: Path, tmp_path: Path) -> None:
        CrateMAE.from_pretrained(run).save_pretrained(tmp_path, run=run, license="mit")
        card, config = (tmp_path / "README.md").read_text(), json.loads((run / "config.json").read_text())
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found = json.loads((run / "evaluation.json").read_text())
        assert "Trained on photographs, 4 batches of 3 images an epoch, from random weights." in card
        assert f"| `optimizer.base_lr` | {config['optimizer']['base_lr']} |" in card
        assert "The run finished; it came to 12 steps of 3 images, less than a minute of training." in card
        assert "The weights are those of step 12, the last that was saved." in card
        assert f"At step 12: mean squared error {rows[-1]['val_loss']:.4f} on removed patches" in card
        assert f"the best blur of them {rows[-1]['blur_loss']:.4f}" in card
        assert "lambda 0.1 and step size 0.1" in card
        results = metadata(tmp_path)["model-index"][0]["results"]
        assert len(results) == len(found["summary"]) == 2
        for method, result in zip(found["summary"], results, strict=True):
            top1 = found["runs"][str(run)][method]["top1"]
            untrained = found["summary"][method]["untrained"]
            told = f"{untrained['top1']:.1%} +- {untrained['standard_deviation']:.1%}, 2 models"
            assert f"| {TITLES[method]} | classes | 8 / 4 | {top1:.1%} | {told} |" in card
            assert result["metrics"][0]["value"] == round(top1, 4)
        assert metadata(tmp_path)["license"] == "mit"
        assert "![" in card and (tmp_path / "curves.png").stat().st_size > 5_000

    def test_nothing_given_away_has_a_path_of_the_machine(self, run: Path, tmp_path: Path) -> None:
        CrateMAE.from_pretrained(run).save_pretrained(tmp_path, run=run)
        for path in tmp_path.iterdir():
            assert b"secret" not in path.read_bytes(), path.name

    def test_the_snippet_of_the_card_runs(self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        CrateMAE.from_pretrained(run).save_pretrained(tmp_path / "given", run=run)
        small_classifier("crate").save_pretrained(tmp_path / "other")
        shutil.copy(next((run.parent / "photographs").iterdir()), tmp_path / "photo.jpg")
        monkeypatch.chdir(tmp_path)
        for folder, expected in (("given", (1, 17, 32)), ("other", (1, 5))):
            snippet = re.search(r"```python\n(.*?)```", Path(folder, "README.md").read_text(), re.DOTALL)[1]
            names: dict[str, Any] = {}
            exec(snippet, names)
            assert names["tokens" if folder == "given" else "logits"].shape == expected

    def test_weights_of_another_model_get_no_card_of_the_run(self, run: Path, tmp_path: Path) -> None:
        model = CrateMAE.from_pretrained(run)
        with torch.no_grad():
            model.cls_token += 1e-3
        with pytest.raises(ValueError, match=r"run: the weights of the model are not those in .*run, nor in"):
            model.save_pretrained(tmp_path / "given", run=run)
        assert not (tmp_path / "given").exists()

    def test_an_evaluation_of_other_weights_is_left_out(self, run: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(run, tmp_path / "run")
        found = json.loads((copy / "evaluation.json").read_text())
        found["weights"] = dict.fromkeys(found["weights"], "00000000")
        (copy / "evaluation.json").write_text(json.dumps(found))
        CrateMAE.from_pretrained(copy).save_pretrained(tmp_path / "given", run=copy)
        assert "model-index" not in metadata(tmp_path / "given")
        assert "Evaluation" not in (tmp_path / "given" / "README.md").read_text()

    def test_the_model_of_the_best_validation_is_called_so(self, run: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(run, tmp_path / "run")
        model = CrateMAE.from_pretrained(copy / "best")
        with torch.no_grad():  # in so short a run the best is the last
            model.cls_token += 1
        crate_mae.save_model(model, copy / "best")
        assert main(["share", str(copy / "best"), "--out", str(tmp_path / "given")]) == 0
        assert (
            "The weights are those of step 12, the best validation." in (tmp_path / "given" / "README.md").read_text()
        )
        assert load_transform(tmp_path / "given")

    @pytest.mark.parametrize(
        "file, change",
        [
            ("evaluation.json", None),
            ("evaluation.json", {"weights": []}),
            ("evaluation.json", {"images": 5}),
            ("evaluation.json", {"summary": {}}),
            ("evaluation.json", {"data": {}}),
            ("config.json", None),
            ("config.json", {"recipe": 5}),
            ("config.json", {"images": [1]}),
            ("config.json", {"optimizer": [1]}),
            ("config.json", {"init": 5}),
        ],
    )
    def test_a_damaged_file_is_named(self, run: Path, tmp_path: Path, file: str, change: dict | None) -> None:
        copy = shutil.copytree(run, tmp_path / "run")
        model, content = CrateMAE.from_pretrained(copy), json.loads((copy / file).read_text())
        (copy / file).write_text("{" if change is None else json.dumps(content | change))
        with pytest.raises(ValueError, match=re.escape(str(copy / file))):
            model.save_pretrained(tmp_path / "given", run=copy)
        assert not (tmp_path / "given").exists()

    def test_what_the_run_came_to_is_told(self, run: Path, tmp_path: Path) -> None:
        """A run that was killed behind its last state, that had diverged for a while, and was resumed with another rate."""
        copy = shutil.copytree(run, tmp_path / "run")
        rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
        rows[1]["diverging"] = True
        rows.append({**rows[-2], "step": 13, "epoch": 3.25})
        (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = json.loads((copy / "config.json").read_text())
        config["schedule"]["epochs"] = 50
        (copy / "config.json").write_text(json.dumps(config))
        with (copy / "starts.jsonl").open("a") as starts:
            starts.write(
                json.dumps(
                    {"step": 8, "changed": "data 2 /home/me/x + 1 y -> /home/me/my own, optimizer.base_lr 0.3 -> 0.2"}
                )
                + "\n"
            )
        CrateMAE.from_pretrained(copy).save_pretrained(tmp_path / "given", run=copy)
        card = (tmp_path / "given" / "README.md").read_text()
        assert "The run stopped, at step 13, 3.25 of 50 epochs; it diverged at step 4" in card
        assert (
            "resumed at step 8" in card
            and "at step 8: data 2 (a path) -> (a path), optimizer.base_lr 0.3 -> 0.2; the recipe" in card
        )
        assert "The weights are those of step 12, the last that was saved." in card
        assert "home" not in card

    @pytest.mark.parametrize(
        "name, message", [("classes", "expected 0 names"), ("mean", "expected a number"), ("std", "finite")]
    )
    def test_what_is_given_must_fit(self, run: Path, tmp_path: Path, name: str, message: str) -> None:
        given: dict[str, Any] = dict(mean=[0.5] * 3, std=[0.5] * 3)
        given[name] = {"classes": ["one"], "mean": 0.5, "std": [float("nan")] * 3}[name]
        with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
            CrateMAE.from_pretrained(run).save_pretrained(tmp_path / "given", **given)

    def test_curves_of_others_stay(self, tmp_path: Path) -> None:
        (tmp_path / "curves.png").write_bytes(b"mine")
        small_model().save_pretrained(tmp_path)
        assert (tmp_path / "curves.png").read_bytes() == b"mine"

    def test_a_shared_model_can_be_shared_again(self, run: Path, tmp_path: Path) -> None:
        CrateMAE.from_pretrained(run).save_pretrained(tmp_path / "one", run=run)
        CrateMAE.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two", run=tmp_path / "one")
        one, two = ((tmp_path / name / "config.json").read_bytes() for name in ("one", "two"))
        assert one == two

    def test_files_of_another_model_are_replaced(self, run: Path, tmp_path: Path) -> None:
        CrateMAE.from_pretrained(run).save_pretrained(tmp_path, run=run)
        classifier = small_classifier("crate_alpha")
        classifier.save_pretrained(tmp_path, classes=[f"class {number}" for number in range(5)])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        config = json.loads((tmp_path / "config.json").read_text())
        assert config.keys() == {"model", "classes"} and config["model"]["family"] == "crate_alpha"
        assert torch.equal(Classifier.from_pretrained(tmp_path).cls_token, classifier.cls_token)

    def test_the_folder_of_a_run_is_refused(self, run: Path) -> None:
        for folder in (run, run / "best", run / "states"):
            with pytest.raises(FileExistsError, match="is the folder of a run"):
                CrateMAE.from_pretrained(run).save_pretrained(folder)

    def test_a_model_of_another_kind_is_refused(self, run: Path) -> None:
        with pytest.raises(TypeError, match=r"expected a Classifier, found a CrateMAE; CrateMAE\.from_pretrained"):
            Classifier.from_pretrained(run)
        assert type(Backbone.from_pretrained(run)) is CrateMAE

    def test_the_mask_of_training_is_known(self, run: Path, tmp_path: Path) -> None:
        from crate_mae.cli.runs import trained_ratio

        copy = shutil.copytree(run, tmp_path / "run")
        config = json.loads((copy / "config.json").read_text())
        config["schedule"]["mask_ratio"] = 0.5
        (copy / "config.json").write_text(json.dumps(config))
        CrateMAE.from_pretrained(copy).save_pretrained(tmp_path / "given", run=copy)
        assert trained_ratio(tmp_path / "given") == 0.5


@pytest.mark.parametrize(
    "what, name",
    [
        (None, "the flower photographs of crate_mae"),
        ("/home/me/photos", "photos"),
        ("/home/me/imagenet/train/", "imagenet/train"),
        ("cifar-10-batches-py/test", "cifar-10-batches-py/test"),
        ("/data/shards/images-{000000..000099}.tar", "images-{000000..000099}.tar"),
        ("hf:user/name,split=train", "hf:user/name,split=train"),
        ("hf:/home/me/beans.parquet,column=image", "hf:beans.parquet,column=image"),
        ("hf:data/me/beans.parquet", "hf:beans.parquet"),
        ("hf:../me/beans", "hf:beans"),
        ("hf:json,name=/home/me/x.json", "hf:json,name=x.json"),
        ("/home/me/train", "train"),
        ("/train", "train"),
        ("/", "a folder"),
        ("cats + dogs", "cats + dogs"),
        ("synthetic:100,size=3x4", "synthetic:100,size=3x4"),
        ("2 /home/me/photos + 1 hf:user/name", "2 photos + 1 hf:user/name"),
    ],
)
def test_data_is_named_without_folders(what: str | None, name: str) -> None:
    assert without_folders(what) == name


class TestHub:
    """By huggingface_hub itself, as far as it goes without its server."""

    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("huggingface_hub")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def test_a_model_that_was_downloaded_is_found(self, run: Path, tmp_path: Path) -> None:
        model, commit = CrateMAE.from_pretrained(run), "0123456789" * 4
        cached = tmp_path / "models--user--flowers"
        model.save_pretrained(cached / "snapshots" / commit, run=run, name="user/flowers")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(commit)
        found = CrateMAE.from_pretrained("user/flowers", cache_dir=tmp_path)
        assert torch.equal(found.cls_token, model.cls_token) and found.config == model.config
        folder = crate_mae.download("user/flowers", cache_dir=tmp_path, revision=commit)
        assert folder.name == commit
        assert load_transform(folder)
        card = (folder / "README.md").read_text()
        assert 'from_pretrained("user/flowers")' in card and "# flowers\n" in card

    @pytest.mark.parametrize("name", ["user/nothing", "nothing", "a/b/c", "/no/such/folder", "with blanks/in it"])
    def test_what_is_nowhere_is_said(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=f"^{name}: there is no such folder, and nothing by this name"):
            CrateMAE.from_pretrained(name, cache_dir=tmp_path)

    def test_a_push_makes_the_repository_when_the_files_are_whole(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub import HfApi

        asked: list[dict[str, Any]] = []

        class Made:
            repo_id = "user/flowers"

        def create_repo(api: HfApi, **options: Any) -> Made:
            asked.append(options)
            return Made()

        def upload_folder(api: HfApi, *, folder_path: Path, **options: Any) -> str:
            asked.append(options)
            shutil.copytree(folder_path, tmp_path / "sent")
            return "https://huggingface.co/user/flowers/commit/1"

        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
        model = CrateMAE.from_pretrained(run)
        assert model.push_to_hub("user/flowers", run=run, private=True, branch="new").endswith("commit/1")
        assert asked[0]["repo_id"] == "user/flowers" and asked[0]["private"] is True
        assert asked[1]["repo_id"] == "user/flowers" and asked[1]["revision"] == "new"
        model.save_pretrained(tmp_path / "given", run=run, name="user/flowers")
        assert sorted(path.name for path in (tmp_path / "sent").iterdir()) == sorted(os.listdir(tmp_path / "given"))
        for name in os.listdir(tmp_path / "given"):
            assert (tmp_path / "sent" / name).read_bytes() == (tmp_path / "given" / name).read_bytes()
        assert 'from_pretrained("user/flowers")' in (tmp_path / "sent" / "README.md").read_text()
        with pytest.raises(ValueError, match="expected the id of a repository"):
            model.push_to_hub("user//flowers", run=run)
        assert len(asked) == 2

        def unreachable(api: HfApi, **options: Any) -> str:
            raise RuntimeError("Name or service\nnot known")

        monkeypatch.setattr(HfApi, "create_repo", unreachable)
        with pytest.raises(
            OSError, match=r"^user/flowers: not put on the Hugging Face Hub \(RuntimeError: Name or service not"
        ):
            model.push_to_hub("user/flowers", run=run)
        with torch.no_grad():
            model.cls_token += 1
        with pytest.raises(ValueError, match="not those in"):
            model.push_to_hub("user/flowers", run=run)

    def test_without_the_library_a_line_says_how_to_get_it(
        self, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        monkeypatch.delitem(sys.modules, "crate_mae.sharing.hub", raising=False)
        monkeypatch.delattr("crate_mae.sharing.hub", raising=False)
        with pytest.raises(
            ImportError, match=r"user/name: there is no such folder.*pip install 'crate-kernels\[hub\]'"
        ):
            CrateMAE.from_pretrained("user/name")
        assert main(["share", str(run), "--push", "user/name"]) == 2
        assert "pip install 'crate-kernels[hub]'" in capsys.readouterr().err


# What a state dict may be wrapped in, by name.
NESTINGS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "optimizer": {"lr": 0.1}},
    "module": lambda state: {"module": state},
    "model_state_dict": lambda state: {"model_state_dict": state},
}
PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")


class TestImport:
    def test_golden(self, golden: Golden, tmp_path: Path) -> None:
        """What the official code computed of its checkpoint, of the folder that was made of it."""
        official = tmp_path / "official.pth"
        torch.save({"model": {f"module.{name}": value for name, value in golden.group("state/").items()}}, official)
        heads = ["--num_heads", str(golden.config["num_heads"])]
        numbers = ["--lambd", str(golden.config["lambd"]), "--step_size", str(golden.config["step_size"])]
        assert main(["import", str(official), *numbers, *heads, str(tmp_path / "out")]) == 0
        model = CrateMAE.from_pretrained(tmp_path / "out")
        fields = {name: value for name, value in golden.config.items() if hasattr(model.config, name)}
        assert {name: getattr(model.config, name) for name in fields} == fields
        images, noise = (golden.tensors[f"input/{name}"] for name in ("images", "noise"))
        loss, pred, mask = model(images, golden.config["mask_ratio"], noise)
        assert torch.equal(mask, golden.tensors["output/mask"])
        assert error(loss, golden.tensors["output/loss"]) <= 2e-5  # as in test_golden
        assert error(pred, golden.tensors["output/pred"]) <= 2e-5

    @pytest.mark.parametrize("prefix", PREFIXES)
    @pytest.mark.parametrize("nesting", NESTINGS)
    def test_every_prefix_and_nesting_loads(self, prefix: str, nesting: str, tmp_path: Path) -> None:
        model = small_model()
        state = {prefix + name: value for name, value in model.state_dict().items()}
        torch.save(NESTINGS[nesting](state), tmp_path / "official.pth")
        found = crate_mae.import_checkpoint(tmp_path / "official.pth", lambd=0.5, step_size=0.1, num_heads=2)
        assert found.config == model.config
        for name, value in model.state_dict().items():
            assert torch.equal(found.state_dict()[name], value)

    @pytest.mark.parametrize(
        "prefix, nesting, message",
        [
            ("encoder.", "bare", r"expected the weights of a CRATE-MAE .* found \d+ entries such as encoder\."),
            ("", "ema", r"expected tensors by name, or a checkpoint with them under model, state_dict"),
            ("", "two", r"holds weights under model and state_dict"),
        ],
    )
    def test_others_are_refused_by_name(self, prefix: str, nesting: str, message: str, tmp_path: Path) -> None:
        state = {prefix + name: value for name, value in small_model().state_dict().items()}
        others = {"ema": {"ema": state}, "two": {"model": state, "state_dict": state}, "bare": state}
        torch.save(others[nesting], tmp_path / "official.pth")
        with pytest.raises(ValueError, match=message):
            crate_mae.import_checkpoint(tmp_path / "official.pth", lambd=0.5, step_size=0.1, num_heads=2)

    def test_heads_that_do_not_belong_are_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        state = {**small_model().state_dict(), "head.weight": torch.randn(5, 32), "head.bias": torch.randn(5)}
        torch.save(state, tmp_path / "official.pth")
        given = ["--lambd", "0.5", "--step_size", "0.1", "--num_heads", "2"]
        assert main(["import", str(tmp_path / "official.pth"), str(tmp_path / "out"), *given]) == 2
        assert "has a head, head.bias, head.weight, which CrateMAE has not" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("family", ["crate", "crate_alpha", "crate_mae"])
    @pytest.mark.parametrize("classes", [5, 0])
    def test_classifiers(self, family: str, classes: int, tmp_path: Path) -> None:
        model = small_classifier(family, patch_size=8, img_size=32)
        if not classes:
            model.reset_classifier(0)
        torch.save({"state_dict": model.state_dict()}, tmp_path / "official.pth")
        numbers = dict(lambd=0.5, step_size=0.1) if family == "crate_mae" else {}
        found = crate_mae.import_checkpoint(tmp_path / "official.pth", num_heads=2, **numbers)
        assert found.config == model.config
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(found(images), model(images))

    @pytest.mark.parametrize(
        "name", ["crate_mae_tiny", "crate_mae_small", "crate_mae_base", "crate_tiny", "crate_base"]
    )
    def test_published_sizes_need_no_numbers_of_heads(self, name: str, tmp_path: Path) -> None:
        few = dict(depth=1) | (dict(decoder_depth=1) if "mae" in name else dict(num_classes=3))
        model = crate_mae.create_model(name, **few)
        torch.save(model.state_dict(), tmp_path / "official.pth")
        numbers = dict(lambd=0.5, step_size=0.1) if "mae" in name else {}
        assert crate_mae.import_checkpoint(tmp_path / "official.pth", **numbers).config == model.config

    @pytest.mark.parametrize(
        "change, given, message",
        [
            ({}, dict(step_size=0.1, num_heads=2), r"^lambd: .*official releases were trained with lambd 5\.0"),
            ({}, dict(lambd=0.5, num_heads=2), r"^step_size: "),
            ({}, dict(lambd=0.5, step_size=0.1), r"^num_heads: .* is 32 wide"),
            ({}, dict(lambd=0.5, step_size=0.1, num_heads=3), r"num_heads: expected a divisor of embed_dim 32, got 3"),
            (
                {"cls_token": torch.zeros(3)},
                dict(lambd=0.5, step_size=0.1),
                r"cls_token: expected a tensor of 3 dimensions",
            ),
            ({"cls_token": None}, dict(lambd=0.5, step_size=0.1), r"cls_token: expected .* found none"),
            (
                {"norm.weight": torch.full((32,), torch.nan)},
                dict(lambd=0.5, step_size=0.1, num_heads=2),
                r"norm.weight: 32 of 32",
            ),
            ({"norm.weight": None}, dict(lambd=0.5, step_size=0.1, num_heads=2), r"lacks norm\.weight"),
            ({"new": torch.zeros(1)}, dict(lambd=0.5, step_size=0.1, num_heads=2), r"has unknown new"),
            (
                {"blocks.9.layers.0.0.norm.weight": torch.zeros(32)},
                dict(lambd=0.5, step_size=0.1, num_heads=2),
                r"blocks\.9",
            ),
        ],
    )
    def test_what_does_not_fit_is_refused(self, change: dict, given: dict, message: str, tmp_path: Path) -> None:
        state = {name: value for name, value in {**small_model().state_dict(), **change}.items() if value is not None}
        torch.save(state, tmp_path / "official.pth")
        with pytest.raises((ValueError, RuntimeError), match=message):
            crate_mae.import_checkpoint(tmp_path / "official.pth", **given)

    def test_a_small_file_does_not_make_a_huge_model(self, tmp_path: Path) -> None:
        """Names and a token that claim a model of 2 ** 16 by 2 ** 16 weights a layer."""
        state = {"cls_token": torch.zeros(1, 1, 2**16), "mask_token": torch.zeros(1, 1, 2**16)}
        state |= {
            "patch_embed.proj.weight": torch.zeros(1, 3, 16, 16),
            "blocks.0.layers.0.0.norm.weight": torch.zeros(1),
            "decoder_blocks.0.layers.0.0.norm.weight": torch.zeros(1),
        }
        torch.save(state, tmp_path / "official.pth")
        with pytest.raises(RuntimeError, match="the weights are not this model's"):
            crate_mae.import_checkpoint(tmp_path / "official.pth", lambd=0.5, step_size=0.1, num_heads=16)

    def test_another_number_of_heads_than_published_is_told(self, tmp_path: Path) -> None:
        torch.save(crate_mae.create_model("crate_tiny", depth=1).state_dict(), tmp_path / "official.pth")
        with pytest.warns(
            UserWarning, match=r"num_heads: published models 384 wide have 6 heads, and this one is given 4"
        ):
            assert crate_mae.import_checkpoint(tmp_path / "official.pth", num_heads=4).config.num_heads == 4

    def test_what_shapes_do_not_tell_is_asked_for(self, tmp_path: Path) -> None:
        file = tmp_path / "official.pth"

        def imported(model: torch.nn.Module, **given: Any) -> CrateMAE | Classifier:
            torch.save(model.state_dict(), file)
            return crate_mae.import_checkpoint(file, num_heads=2, **given)

        four = small_classifier("crate", in_chans=4)
        with pytest.raises(
            ValueError, match=r"in_chans: .* may have 1 \(patches of 8\) or 4 \(patches of 4\) channels; say which"
        ):
            imported(four)
        assert imported(four, in_chans=4).config == four.config
        mean = small_classifier("crate", pool="mean")
        assert imported(mean, pool="mean").config == mean.config
        oblong, numbers = small_model(img_size=(8, 32)), dict(lambd=0.5, step_size=0.1)
        with pytest.raises(
            ValueError, match=r"img_size: decoder_pos_embed in .* is not the table of images of 16 x 16 pixels"
        ):
            imported(oblong, **numbers)
        assert imported(oblong, **numbers, img_size=(8, 32)).config == oblong.config
        with pytest.raises(ValueError, match="decoder_pos_embed"):
            imported(small_model(), **numbers, img_size=(8, 32))
        with pytest.raises(ValueError, match=r"decoder_num_heads: .* is of a CRATE, which has none to choose, got 7"):
            imported(mean, decoder_num_heads=7)
        with pytest.raises(ValueError, match=r"decoder_num_heads: expected at least 1"):
            imported(small_model(), **numbers, decoder_num_heads=0)

    def test_a_decoder_that_is_lost_is_missed(self, tmp_path: Path) -> None:
        state = {
            name: value for name, value in small_model().state_dict().items() if not name.startswith("decoder_blocks")
        }
        torch.save(state, tmp_path / "official.pth")
        with pytest.raises(ValueError, match="lacks decoder_blocks"):
            crate_mae.import_checkpoint(tmp_path / "official.pth", lambd=0.5, step_size=0.1, num_heads=2)

    def test_images_that_are_not_square(self, tmp_path: Path) -> None:
        model = small_model(img_size=(8, 16))
        torch.save(model.state_dict(), tmp_path / "official.pth")
        given = ["--lambd", "0.5", "--step_size", "0.1", "--num_heads", "2", "--img_size", "8", "16"]
        assert main(["import", str(tmp_path / "official.pth"), str(tmp_path / "out"), *given]) == 0
        assert load_model(tmp_path / "out").config == model.config

    def test_a_model_in_the_folder_stays(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        torch.save(small_model().state_dict(), tmp_path / "official.pth")
        small_model(lambd=0.3).save_pretrained(tmp_path / "out")
        given = [
            str(tmp_path / "official.pth"),
            str(tmp_path / "out"),
            "--lambd",
            "0.5",
            "--step_size",
            "0.1",
            "--num_heads",
            "2",
        ]
        assert main(["import", *given]) == 2
        assert "OUT: " in (said := capsys.readouterr().err) and "--overwrite replaces them" in said
        assert load_model(tmp_path / "out").config.lambd == 0.3
        assert main(["import", *given, "--overwrite", "--mean", "0.5", "0.5", "0.5", "--std", "1", "1", "1"]) == 0
        assert load_model(tmp_path / "out").config.lambd == 0.5
        assert load_transform(tmp_path / "out")


def test_share_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, lacking in (("share", "RUN, the folder of a run or of a model"), ("import", "FILE, OUT")):
        assert main([command]) == 2
        assert capsys.readouterr().err.endswith(f"required: {lacking}\n")
    assert main(["share", str(run)]) == 2
    assert "expected --out FOLDER, --push USER/NAME, or both" in capsys.readouterr().err
    assert main(["share", str(run), "--out", str(tmp_path / "given"), "--license", "cc-by-4.0"]) == 0
    assert "README.md is the card of" in capsys.readouterr().out
    assert metadata(tmp_path / "given")["license"] == "cc-by-4.0"
    expected = weights(run)
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "given").items())
    assert main(["share", str(run), "--out", str(run)]) == 2
