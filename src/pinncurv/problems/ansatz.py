"""A network whose values are prescribed where a factor vanishes."""

from collections.abc import Callable

from torch import nn

from pinncurv.problems.problem import TensorOrJet


class Ansatz(nn.Module):
    """A network that satisfies Dirichlet or initial conditions by construction.

    u(x) = offset(x) + factor(x) network(x)

    Args:
        network: The network that is trained, [N, d_in] -> [N, d_out].
        factor: A function that vanishes where u is prescribed, [N, d_in] -> [N, 1] or [N, d_out].
        offset: A function with the prescribed values there, [N, d_in] -> [N, d_out]. Both are made
            of torch functions; as modules, they may be trained.
    """

    def __init__(
        self,
        network: nn.Module,
        factor: Callable[[TensorOrJet], TensorOrJet],
        offset: Callable[[TensorOrJet], TensorOrJet],
    ) -> None:
        super().__init__()
        self.network, self.factor, self.offset = network, factor, offset

    def forward(self, x: TensorOrJet) -> TensorOrJet:
        """Return offset(x) + factor(x) network(x)."""
        return self.offset(x) + self.factor(x) * self.network(x)
