"""The operators' namespace in ``torch.ops``, written here only: ``tools.hub_kernel`` gives each build a namespace of its own."""

import torch

NAMESPACE = "crate_kernels"

ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """The name by which ``torch.library`` knows an operator."""
    return f"{NAMESPACE}::{op_name}"
