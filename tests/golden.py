"""What the official code computed, in float64, for one small CRATE-MAE."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crate_mae import CrateMAE, create_model


class Golden:
    """The numbers by their names, and the model that they are of."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            self.config = json.loads(str(arrays["config"]))
            self.tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "config"}

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    def model(self, device: str = "cpu") -> CrateMAE:
        fields = "img_size patch_size embed_dim depth num_heads decoder_depth decoder_num_heads lambd step_size norm_pix_loss"
        model = create_model("crate_mae_tiny", **{name: self.config[name] for name in fields.split()})
        model.load_state_dict(self.group("state/"), strict=True)
        return model.to(device)
