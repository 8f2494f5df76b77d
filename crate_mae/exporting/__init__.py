"""Trained models as files that need neither `crate_mae` nor `crate_kernels`: PyTorch's .pt2, and ONNX."""

from crate_mae.exporting.check import Checked, WrongExport
from crate_mae.exporting.writing import Exported, export

__all__ = ["Checked", "Exported", "WrongExport", "export"]
