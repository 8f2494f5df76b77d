"""Settings in any state: whatever has become of a file, the command takes it or refuses it in one line."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

pytest.importorskip("jsonargparse")
pytest.importorskip("hypothesis")

from fuzzing import fuzzed
from hypothesis import event, given
from hypothesis import strategies as st
from limits import no_hang

from crate_mae.cli import main
from crate_mae.training import PretrainConfig, demo_config

SETTINGS = {**demo_config(Path("runs/demo")).to_dict(), "out": "run", "data": "photographs \N{TULIP}"}
LEAVES = [
    *((name,) for name, value in SETTINGS.items() if not isinstance(value, dict)),
    *((section, name) for section, values in SETTINGS.items() if isinstance(values, dict) for name in values),
]
MARKER = "code was run"

PIECES = [
    *(
        "&a ",
        "*a",
        "&a [*a]",
        "<<: *a",
        "? ",
        ": ",
        "- ",
        "!!",
        "---\n",
        "...\n",
        "%YAML 1.1\n",
        "|\n",
        ">\n",
        "#",
        "\t",
        "\0",
    ),
    *(
        "[",
        "]",
        "{",
        "}",
        '"',
        "'",
        "\\",
        "\\ud83d",
        "\n",
        ",",
        "!!binary ",
        "!!set ",
        "!!timestamp ",
        "!!omap [",
        "null",
        "~",
    ),
    *(".nan", "-.inf", "1e999", "0x" + "f" * 400, "9" * 5000, "1:" * 300 + "1", "[" * 1000, "{a: " * 1000),
    f"!!python/object/apply:os.system ['touch \"{MARKER}\"']",
    f"!!python/object/new:os.mkdir ['{MARKER}']",
    '"class_path": "evil.X",',
    '{"class_path": "evil.X"}',
    "evil.X",
]
"""What means something to YAML, to JSON or to the parser."""

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, -(2**64), 10**30, 10**400, -(10**400)])
    | st.floats()
    | st.sampled_from([1e-320, 1e38, 1e39, 1e308, -1e308])
    | st.text(max_size=20)
    | st.sampled_from(["", "\0", "x" * 5000, "auto", "true", "1e-3", ".", "evil.X"])
    | st.just({"class_path": "evil.X", "init_args": {}}),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)

PLAUSIBLE = st.sampled_from(
    [0, 1, 2, 4, 16, 64, 0.1, 0.5, 1.0, 1e-3, 200.0, True, False, None, "auto", "cpu", "float32", [0.1, 0.9], [0.5] * 3]
)

AS_IT_IS = json.dumps(SETTINGS, indent=2).encode()


@st.composite
def broken_bytes(draw) -> bytes:
    """The file of settings, in JSON or YAML, after up to four accidents."""
    content = draw(st.sampled_from([AS_IT_IS, yaml.safe_dump(SETTINGS).encode()]))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        accident = draw(st.sampled_from(["flip", "truncate", "insert", "piece", "repeat"]))
        if accident == "flip" and content:
            flipped = content[place] ^ 1 << draw(st.integers(0, 7))
            content = content[:place] + bytes([flipped]) + content[place + 1 :]
        elif accident == "truncate":
            content = content[:place]
        elif accident == "repeat":
            content = content[:place] + content[place : place + draw(st.integers(1, 200))] + content[place:]
        else:
            new = draw(st.sampled_from(PIECES)).encode() if accident == "piece" else draw(st.binary(max_size=6))
            content = content[:place] + new + content[place:]
    return content


@st.composite
def other_values(draw) -> bytes:
    """The file of settings, with other values in up to two places, a section or a name among them."""
    content = deepcopy(SETTINGS)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from([*LEAVES, *((name,) for name in SETTINGS), ("archit",), ("run", "sed")]))
        inner = content
        for name in path[:-1]:
            inner = inner[name] if isinstance(inner.get(name), dict) else inner.setdefault("run", {})
            inner = inner if isinstance(inner, dict) else content
        inner[path[-1]] = draw(PLAUSIBLE | JSON)
    return json.dumps(content).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a module that says so when it is imported; sys.path begins with the folder one works in, for python -m."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "evil.py").write_text(f"open({MARKER!r}, 'w')\nclass X: pass\n")
    return folder


@pytest.fixture
def configs(folder, monkeypatch) -> list[PretrainConfig]:
    """What the command comes to, with which nothing is run."""
    configs = []
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("crate_mae.cli.pretraining.pretrain", lambda config, **_: configs.append(config))
    monkeypatch.setattr("crate_mae.cli.pretraining._report", lambda result: "")
    Path("run").mkdir()
    return configs


@fuzzed
@given(
    way=st.sampled_from(["resume", "config", "written out", "init", "value"]),
    content=broken_bytes() | other_values(),
)
def test_settings_in_any_state_are_taken_or_refused(configs, folder, capsys, way, content):
    Path("run", "config.json").write_bytes(content)
    text = content.decode(errors="surrogateescape")
    arguments = {
        "resume": ["--out", "run", "--resume"],
        "config": ["--out", "other", "--config", "run/config.json"],
        "written out": ["--out", "other", "--config", text],
        "init": ["--out", "other", "--init", "run"],
        "value": ["--out", "other", "--run.seed", text],
    }
    configs.clear()
    capsys.readouterr()
    with no_hang():
        status = main(["pretrain", *arguments[way]])
    event(f"{way}: {status}")
    error = capsys.readouterr().err
    if status == 0:
        assert len(configs) == 1 and isinstance(configs[0], PretrainConfig) and not error
        json.dumps(configs[0].to_dict(), allow_nan=False)
    else:
        assert status == 2 and not configs
        assert error.startswith("crate-mae: ") and error.endswith("\n")
        assert len(error.splitlines()) == 1 and len(error) <= 620
    assert {path.name for path in folder.iterdir()} == {"run", "evil.py"}, "code was run"
