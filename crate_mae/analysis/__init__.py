"""The white-box view: what layers do to tokens, as functions on tensors and models, for notebooks and the commands."""

from __future__ import annotations

from crate_mae.analysis.attention import attention_distance, attention_entropy, most_attended
from crate_mae.analysis.components import PrincipalComponents
from crate_mae.analysis.measuring import MEASURES, Analysis, Measured, analyze, measures_of
from crate_mae.analysis.rates import (
    OFFICIAL_EPS,
    coding_rate,
    effective_rank,
    mean_coherence,
    projections,
    relative_update,
    sparse_rate_reduction,
    subspace_coherence,
    zero_fraction,
)
from crate_mae.analysis.tracing import LayerTrace, trace, traced
from crate_mae.analysis.views import ImageView, LayerView, view

__all__ = [
    "MEASURES",
    "OFFICIAL_EPS",
    "Analysis",
    "ImageView",
    "LayerTrace",
    "LayerView",
    "Measured",
    "PrincipalComponents",
    "analyze",
    "attention_distance",
    "attention_entropy",
    "coding_rate",
    "effective_rank",
    "mean_coherence",
    "measures_of",
    "most_attended",
    "projections",
    "relative_update",
    "sparse_rate_reduction",
    "subspace_coherence",
    "trace",
    "traced",
    "view",
    "zero_fraction",
]
