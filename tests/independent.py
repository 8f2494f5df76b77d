"""CRATE-MAE in NumPy and float64, by the formulas of the papers, and what they measure of its layers."""

from __future__ import annotations

import dataclasses

import numpy as np

import crate_mae


def rate(z: np.ndarray, eps: float = 0.01) -> float:
    """The official formula for one set of tokens [n, d], through the Gram matrix of the tokens whatever their number."""
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    count, width = z.shape
    return np.linalg.slogdet(np.eye(count) + width / (count * eps) * z @ z.T)[1] / 2


class OfficialInNumpy:
    """The official CRATE-MAE in NumPy and float64, on one whole image, and what the papers measure of each layer."""

    def __init__(self, model: crate_mae.CrateMAE) -> None:
        self.config = dataclasses.asdict(model.config)
        self.state = {name: value.double().numpy() for name, value in model.state_dict().items()}
        self.seen: dict[str, list[dict[str, float]]] = {"encoder": [], "decoder": []}

    def weight(self, name: str) -> np.ndarray:
        return self.state[name]

    def norm(self, x: np.ndarray, name: str, eps: float = 1e-5) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        return scaled * self.weight(f"{name}.weight") + self.weight(f"{name}.bias")

    def heads_of(self, x: np.ndarray, name: str) -> list[np.ndarray]:
        w = self.norm(x, f"{name}.norm") @ self.weight(f"{name}.fn.qkv.weight").T
        return np.split(w, self.config["num_heads"], axis=-1)

    def attention(self, x: np.ndarray, name: str) -> list[np.ndarray]:
        scores = [np.exp(w @ w.T * w.shape[-1] ** -0.5) for w in self.heads_of(x, name)]
        return [each / each.sum(-1, keepdims=True) for each in scores]

    def mssa(self, x: np.ndarray, name: str) -> np.ndarray:
        heads = zip(self.attention(x, name), self.heads_of(x, name), strict=True)
        out = (
            np.concatenate([attention @ w for attention, w in heads], -1) @ self.weight(f"{name}.fn.to_out.0.weight").T
        )
        return out + self.weight(f"{name}.fn.to_out.0.bias")

    def measure(
        self,
        stack: str,
        name: str,
        attended: np.ndarray,
        compressed: np.ndarray,
        normed: np.ndarray,
        step: np.ndarray,
    ) -> None:
        def subspace_rate(x: np.ndarray) -> float:
            return sum(rate(w) for w in self.heads_of(x, name))

        output = step if stack == "encoder" else compressed
        singular = np.linalg.svd(output, compute_uv=False)
        shares = singular / singular.sum()
        rows = np.split(self.weight(f"{name}.fn.qkv.weight"), self.config["num_heads"])
        bases = [np.linalg.qr(subspace.T)[0] for subspace in rows]
        cosines = [np.linalg.svd(a.T @ b, compute_uv=False) for a in bases for b in bases if a is not b]
        self.seen[stack].append(
            {
                "coding_rate_before": subspace_rate(attended),
                "coding_rate_after": subspace_rate(compressed),
                "token_coding_rate": rate(output),
                "rate_reduction": rate(output) - subspace_rate(output),
                "zeros": np.mean(step == 0),
                "l0": np.count_nonzero(step) / len(step),
                "l1": np.abs(step).sum() / len(step),
                "coherence": np.mean(np.square(cosines)),
                "effective_rank": np.exp(-(shares[shares > 0] * np.log(shares[shares > 0])).sum()),
                "attention_entropy": np.mean([-(a * np.log(a)).sum(-1).mean() for a in self.attention(attended, name)]),
                "sparse_update": np.linalg.norm(step - normed) / np.linalg.norm(normed),
                "compression_update": np.linalg.norm(compressed - attended) / np.linalg.norm(attended),
            }
        )
        if stack == "encoder":
            objective = rate(output) - subspace_rate(output) - self.config["lambd"] * np.count_nonzero(output)
            self.seen[stack][-1]["sparse_rate_reduction"] = objective

    def forward(self, image: np.ndarray) -> None:
        size, grid = self.config["patch_size"], self.config["img_size"] // self.config["patch_size"]
        patches = image.reshape(3, grid, size, grid, size).transpose(1, 3, 0, 2, 4).reshape(grid * grid, -1)
        kernel = self.weight("patch_embed.proj.weight")
        x = patches @ kernel.reshape(len(kernel), -1).T + self.weight("patch_embed.proj.bias")
        x = np.concatenate([self.weight("cls_token")[0], x]) + self.weight("decoder_pos_embed")[0]
        eta, lambd = self.config["step_size"], self.config["lambd"]
        for layer in range(self.config["depth"]):
            name = f"blocks.{layer}.layers.0"
            z = x + self.mssa(x, f"{name}.0")
            normed, weight = self.norm(z, f"{name}.1.norm"), self.weight(f"{name}.1.fn.weight")
            y = np.maximum(normed + eta * (normed @ weight - normed @ weight.T @ weight) - eta * lambd, 0)
            self.measure("encoder", f"{name}.0", x, z, normed, y)
            x = y
        x = self.norm(x, "norm", 1e-6)
        for layer in range(self.config["decoder_depth"]):
            name = f"decoder_blocks.{layer}.layers.0"
            normed = self.norm(x, f"{name}.0.norm")
            g = normed @ self.weight(f"{name}.0.fn.weight").T
            x = g - self.mssa(g, f"{name}.1")
            self.measure("decoder", f"{name}.1", g, x, normed, g)
