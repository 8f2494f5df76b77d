"""All measures of a model's layers on one page: first those that the papers plot, then the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image

from crate_mae.analysis import Analysis
from crate_mae.pictures.charts import FAINT, Box, Canvas, Series, Shape, blend, text_width

TRAINED, UNTRAINED = "trained", "untrained"
"""Names of models that have colours of their own."""

_STRONG, _PALE, _GREY = "#1766a6", "#cfe0ee", "#8a8a8a"

_WIDTH, _MARGIN, _AXIS, _TITLES, _NAMES = 1760, 40, 62, 66, 62


class _Panel(NamedTuple):
    """One plot of the page: a measure over the layers of each stack."""

    title: str
    detail: str
    stacks: Mapping[str, Sequence[Series]]
    together: bool = True


_APART = ("sparse_update", "l1")
"""Measures of a step that is another one in the decoder, and that have a y axis for each stack."""

_MEASURES = (
    ("token_coding_rate", "R of the tokens, R(Z) (nats)", "of each layer's output"),
    ("rate_reduction", "Rate reduction, R(Z) - R^c(Z) (nats)", "of each layer's output"),
    ("sparse_rate_reduction", "Sparse rate reduction (nats)", "R(Z) - R^c(Z) - lambda ||Z||_0; encoder only"),
    ("effective_rank", "Effective rank (dimensions)", "exp of the entropy of the output's singular values"),
    ("coherence", "Coherence between subspaces (0 to 1)", "mean squared cosine between the U_k of two heads"),
    ("attention_entropy", "Attention entropy (nats)", "mean over heads and queries"),
    ("attention_distance", "Attention distance (pixels)", "mean over heads and patches"),
    ("compression_update", "Size of MSSA's update (ratio)", "||MSSA|| / ||what it is added to||"),
    ("sparse_update", "Size of the sparse step's update (ratio)", "||step(Z) - Z|| / ||Z||; decoder: its linear step"),
    ("l1", "l1 norm after the sparse step", "||Z||_1 / n, of a token; decoder: its linear step"),
)


def layers_picture(analyses: Mapping[str, Analysis], *, caption: str) -> Image.Image:
    """The page, 1760 pixels wide.

    At the top is Figure 3 of arXiv 2306.01129: R^c of what MSSA makes (round markers) and the fraction of entries that are
    not zero after ISTA (square markers), layer by layer, means over images. The standard deviation over images is drawn where
    it stays readable: of ``TRAINED`` and ``UNTRAINED``, and of a model alone.

    Args:
        analyses: by the name of the model, one or more. ``TRAINED`` is drawn strong and ``UNTRAINED`` grey; all others, in
            their order, from pale to strong. Without ``TRAINED`` the last of them takes its place.
        caption: a line under the title.

    Raises:
        ValueError: there are none.
    """
    if not analyses:
        raise ValueError("analyses: expected one or more, got none")
    colours = _colours(list(analyses))
    shown = max(analyses, key=lambda name: (colours[name] == _STRONG, name != UNTRAINED))
    order = sorted(analyses, key=lambda name: (name == shown, name != UNTRAINED))  # what counts most is drawn last

    def panel(measure: str, title: str, detail: str) -> _Panel:
        stacks = _over_layers(analyses, measure, order, colours)
        return _Panel(title, detail, stacks, together=measure not in _APART)

    wide = [
        panel(
            "coding_rate_after",
            "Coding rate R^c of the MSSA output (nats)",
            "in the subspaces of all heads; less is more compressed",
        ),
        _Panel(
            "Entries not zero after ISTA (fraction)",
            "||Z||_0 / (d n); less is sparser; decoder: its linear step",
            _nonzeros(_over_layers(analyses, "zeros", order, colours, "square")),
            together=False,
        ),
    ]
    narrow = [_compression(analyses[shown], shown), _heads(analyses[shown], shown)]
    narrow += [panel(*measure) for measure in _MEASURES]

    rows = [([each for each in wide if each.stacks], 2, 300)]
    small = [each for each in narrow if each.stacks]
    rows += [(small[start : start + 4], 4, 190) for start in range(0, len(small), 4)]
    entries = [(name, colours[name]) for name in analyses]
    top = Canvas(1, 1).legend((_MARGIN, 120), entries, _WIDTH - _MARGIN) + 28
    canvas = Canvas(_WIDTH, round(top + sum(_TITLES + height + _NAMES for _, _, height in rows)))
    canvas.text((_MARGIN, 54), "CRATE-MAE: what each layer does to the tokens", 30)
    room = (_WIDTH - 2 * _MARGIN) / max(1.0, text_width(caption, 16))
    canvas.text((_MARGIN, 82), caption, 16 * min(1.0, room), FAINT)  # names of folders may be long
    canvas.legend((_MARGIN, 120), entries, _WIDTH - _MARGIN)
    for panels, columns, height in rows:
        width = (_WIDTH - 2 * _MARGIN + 24) / columns
        for column, each in enumerate(panels):
            left = _MARGIN + column * width
            box = (left + _AXIS, top + _TITLES, left + width - 24, top + _TITLES + height)
            _draw(canvas, box, each, big=columns == 2)
        top += _TITLES + height + _NAMES
    return canvas.finished()


def _colours(names: Sequence[str]) -> dict[str, str]:
    others = [name for name in names if name not in (TRAINED, UNTRAINED)]
    steps = len(others) if TRAINED in names else len(others) - 1
    colours = {name: blend(_PALE, _STRONG, place / max(1, steps)) for place, name in enumerate(others)}
    if TRAINED not in names and others:
        colours[others[-1]] = _STRONG
    return {TRAINED: _STRONG, UNTRAINED: _GREY} | colours


def _over_layers(
    analyses: Mapping[str, Analysis],
    measure: str,
    order: Sequence[str],
    colours: Mapping[str, str],
    shape: Shape = "round",
) -> dict[str, list[Series]]:
    stacks: dict[str, list[Series]] = {}
    for name in order:
        for stack, measures in analyses[name].stacks.items():
            if measure in measures:
                mean, deviation = measures[measure]
                spreads = deviation if name in (TRAINED, UNTRAINED) or len(analyses) == 1 else ()
                stacks.setdefault(f"{stack} layer", []).append(Series(mean, spreads, colours[name], shape))
    return dict(sorted(stacks.items(), reverse=True))  # the encoder first


def _nonzeros(stacks: Mapping[str, Sequence[Series]]) -> dict[str, list[Series]]:
    """The papers' form of ``zeros``."""
    return {
        name: [series._replace(values=[1 - zeros for zeros in series.values]) for series in stack]
        for name, stack in stacks.items()
    }


def _compression(analysis: Analysis, name: str) -> _Panel:
    stacks = {}
    for stack, measures in analysis.stacks.items():
        before, after = (measures[f"coding_rate_{when}"].mean for when in ("before", "after"))
        stacks[f"{stack} layer"] = [
            Series(after, (), _STRONG, joined=False, origins=before),
            Series(before, (), _STRONG, "ring", joined=False),
        ]
    return _Panel(f"R^c before and after MSSA, {name} (nats)", "ring: before; filled: after", stacks)


def _heads(analysis: Analysis, name: str) -> _Panel:
    pale = blend("#ffffff", _STRONG, 0.4)
    stacks = {
        f"{stack} layer": [
            Series(of_head, (), pale, joined=False)
            for of_head in zip(*measures["coding_rate_after_by_head"].mean, strict=True)
        ]
        for stack, measures in analysis.stacks.items()
    }
    return _Panel(f"R^c after MSSA by head, {name} (nats)", "a marker for each head; their sum is R^c", stacks)


def _draw(canvas: Canvas, box: Box, panel: _Panel, *, big: bool) -> None:
    left, top, *_ = box
    start = left - _AXIS + 8
    canvas.text((start, top - 36), panel.title, 19 if big else 16)
    canvas.text((start, top - 17), panel.detail, 14 if big else 13, FAINT)
    canvas.profiles(box, panel.stacks, together=panel.together)
