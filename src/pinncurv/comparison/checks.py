"""What must hold of operators and numbers before they are compared."""

import torch
from torch import Tensor

from pinncurv.linops import PyTorchLinearOperator


def describe(operator: PyTorchLinearOperator) -> str:
    """Name an operator in error messages."""
    return f"{type(operator).__name__} {tuple(operator.shape)}"


def check_square(operator: PyTorchLinearOperator) -> int:
    """Return D after checking that an operator maps ℝᴰ to itself."""
    rows, D = operator.shape
    if rows != D:
        raise ValueError(
            f"The operator must be square, got {describe(operator)}. "
            "Pass a matrix on the parameters, such as JᵀJ instead of J."
        )
    return int(D)


def check_same_space(first: PyTorchLinearOperator, second: PyTorchLinearOperator) -> int:
    """Return D after checking that two operators map the same ℝᴰ to itself."""
    D = check_square(first)
    if check_square(second) != D:
        raise ValueError(
            f"The operators must act on the same space, got {describe(first)} and "
            f"{describe(second)}. Build both for the same parameters."
        )
    if first.device != second.device:
        raise ValueError(
            f"The operators must be on the same device, got {describe(first)} on "
            f"{first.device} and {describe(second)} on {second.device}."
        )
    return D


def check_count(name: str, value: int, smallest: int, largest: int | None = None) -> int:
    """Return a count after checking its range."""
    if value < smallest or (largest is not None and value > largest):
        bound = f">= {smallest}" if largest is None else f"in [{smallest}, {largest}]"
        raise ValueError(f"{name} must be an integer {bound}, got {value}.")
    return value


def check_finite(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor after checking that all of its entries are finite."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{name} must be finite, got {int((~tensor.isfinite()).sum())} of "
            f"{tensor.numel()} entries that are not. "
            "Look for a diverged loss, an overflow in the model, or too little damping."
        )
    return tensor
