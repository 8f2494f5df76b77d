"""The operators in a model of one's own: a causal classifier of tokens, trained until it is right.

    python examples/own_model.py
    python examples/own_model.py --compile    # under torch.compile, which needs a C++ compiler

The task: a sequence of zeros and ones is read from left to right, and at each place the model says which of the two has
come up more often so far. No token knows that by itself; it must look at those before it, which is what attention is for.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_kernels import ISTA, mssa


class Layer(nn.Module):
    """z = x + MSSA(LN x), of the tokens up to each; then ISTA(LN z). Each is one call, its norm and the sum included."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.sparse_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.sparsify = ISTA(width)

    def forward(self, x: Tensor) -> Tensor:
        norm = dict(norm_weight=self.attention_norm.weight, norm_bias=self.attention_norm.bias)
        weights = self.qkv.weight, self.out.weight, self.out.bias
        z = mssa(x, *weights, num_heads=self.heads, is_causal=True, skip=x, **norm)
        return self.sparsify(z, norm=self.sparse_norm)


class Counter(nn.Module):
    """Tokens [batch, length] of zeros and ones -> logits [batch, length, 2]."""

    def __init__(self, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(2, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.tokens(tokens) + self.positions[: tokens.shape[1]]))


def draw(count: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Sequences, and which of the two leads after every odd number of tokens: there, they cannot be equal."""
    tokens = torch.randint(2, (count, length), device=device)
    ones = tokens.cumsum(1)[:, ::2]
    return tokens, (2 * ones > torch.arange(1, length + 1, 2, device=device)).long()


def loss_and_share(model: nn.Module, tokens: Tensor, leading: Tensor) -> tuple[Tensor, float]:
    """Cross-entropy, and the share of the places where the model is right."""
    logits = model(tokens)[:, ::2]
    right = (logits.argmax(-1) == leading).float().mean().item()
    return F.cross_entropy(logits.flatten(0, 1), leading.flatten()), right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = dict(steps=300, length=31, width=64, depth=2, heads=4)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--compile", action="store_true", help="train under torch.compile")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Counter(options.length, options.width, options.depth, options.heads).to(device)
    trained = torch.compile(model, fullgraph=True) if options.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    held_out = draw(500, options.length, device)
    for step in range(options.steps + 1):
        last = step == options.steps
        if step % 20 == 0 or last:
            with torch.no_grad():
                loss, right = loss_and_share(model, *held_out)
            print(f"step {step:3}: loss {loss:.4f}, right at {right:.1%} of the places of new sequences")
            if right > 0.995 or last:
                break
        loss, _ = loss_and_share(trained, *draw(100, options.length, device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("It has learnt to look back and count." if right > 0.995 else "It is not there yet: give it more --steps.")


if __name__ == "__main__":
    main()
