"""Make an official CRATE faster: swap its modules in place, see that it computes the same, measure, and swap back.

    python examples/accelerate_official.py
    python examples/accelerate_official.py --dim 768 --depth 12 --heads 12 --batch 256    # CRATE-Base's layers; for a GPU

The model has the structure of its authors' code, in plain PyTorch: nothing in it knows of crate_kernels.
"""

import argparse
import copy
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from crate_kernels import accelerate


class PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.attend = nn.Softmax(dim=-1)
        self.qkv = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        w = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attention = self.attend(w @ w.mT * self.scale)
        return self.to_out((attention @ w).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, step_size: float = 0.1, lambd: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(dim, dim)))
        self.step_size, self.lambd = step_size, lambd

    def forward(self, x: Tensor) -> Tensor:
        descent = F.linear(x, self.weight.t()) - F.linear(F.linear(x, self.weight), self.weight.t())
        return F.relu(x + self.step_size * descent - self.step_size * self.lambd)


class Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention, sparsify = Attention(dim, heads, dim // heads), FeedForward(dim)
            self.layers.append(nn.ModuleList([PreNorm(dim, attention), PreNorm(dim, sparsify)]))

    def forward(self, x: Tensor) -> Tensor:
        for attention, sparsify in self.layers:
            x = sparsify(x + attention(x))
        return x


def step(model: nn.Module, tokens: Tensor, *, bfloat16: bool = False) -> list[Tensor]:
    """Forward and backward: the output, and the gradient of each parameter."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bfloat16):
        output = model(tokens)
    return [output, *torch.autograd.grad(output.square().mean(), list(model.parameters()))]


def main() -> None:
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = dict(dim=384, depth=4, heads=6, tokens=197, batch=256 if on_gpu else 8, repeats=5)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    options = parser.parse_args()

    torch.manual_seed(0)
    official = Transformer(options.dim, options.depth, options.heads).to(device)
    tokens = torch.randn(options.batch, options.tokens, options.dim, device=device)
    model = copy.deepcopy(official)  # the other stays as it is, to be held against
    swapped = accelerate(model)
    print(swapped)

    results = zip(step(official, tokens), step(model, tokens), strict=True)
    difference = max(((ours - theirs).norm() / theirs.norm()).item() for theirs, ours in results)
    if not difference < 1e-4:  # NaN is none, either
        raise SystemExit(f"They differ by {difference:.1e} of the norm: please report that.")
    print(f"Output and gradients agree: the largest difference is {difference:.1e} of the norm.")

    def timer(model: nn.Module) -> Timer:
        names = dict(step=step, model=model, tokens=tokens, bfloat16=on_gpu)  # as one trains on a GPU
        return Timer("step(model, tokens, bfloat16=bfloat16)", globals=names, num_threads=torch.get_num_threads())

    # In turns, so that what else the machine does slows both.
    timers = timer(official), timer(model)
    times = [[each.timeit(1).median for each in timers] for _ in range(options.repeats)]
    theirs, ours = (1000 * median(column) for column in zip(*times, strict=True))
    ratio = median(before / after for before, after in times)
    print(f"Forward and backward: official {theirs:.1f} ms, accelerated {ours:.1f} ms: {ratio:.2f} times as fast.")
    if ratio < 1.1:
        print("No gain here: these sizes are small for this device, or something else is computing on it.")

    swapped.undo()
    same = all(type(a) is type(b) for a, b in zip(model.modules(), official.modules(), strict=True))
    print(f"Undone: the model is made of {'the official' if same else 'other'} classes again.")


if __name__ == "__main__":
    main()
