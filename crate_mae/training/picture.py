"""reconstructions.png: reconstructions of the same images with the same masks, at each save of a run."""

from __future__ import annotations

import math
from collections.abc import Callable

from crate_mae.config import grid_of
from crate_mae.data import CentreCropped, Normalization, readable_items, spread
from crate_mae.files import replaced
from crate_mae.model import CrateMAE
from crate_mae.pictures import reconstruction_sheet
from crate_mae.training.config import PretrainConfig
from crate_mae.training.run_folder import PICTURE
from crate_mae.training.validation import mask_noise


class Picture:
    """The picture of a run.

    Args:
        images: `run.pictures` of them are shown.
        say: takes a line for the user.
    """

    def __init__(
        self, images: CentreCropped, normalization: Normalization, config: PretrainConfig, say: Callable[[str], None]
    ) -> None:
        self.images, self.normalization, self.config, self.say = images, normalization, config, say

    def write(self, model: CrateMAE) -> None:
        """Draw the picture anew; if predictions are not finite, the last one stays, and a line says so.

        Raises:
            UnreadableImage: no image can be read.
            OSError: it cannot be written.
        """
        pixels = readable_items(self.images, spread(len(self.images), self.config.run.pictures))
        patches = math.prod(grid_of(self.config.model.image_shape, self.config.model.patch_size))
        noise = mask_noise(len(pixels), patches, self.config.run.seed)
        try:
            ratio = self.config.schedule.mask_ratio
            sheet = reconstruction_sheet(model, pixels, self.normalization, mask_ratio=ratio, noise=noise)
        except ValueError as error:  # the loss will show it, too
            self.say(f"no new {PICTURE}: {error}")
            return
        with replaced(self.config.out / PICTURE) as file:
            sheet.save(file, format="PNG")
