"""Curvature of physics-informed neural networks: Gauss-Newton, KFAC and relatives in PyTorch."""

from importlib.metadata import version

__version__ = version("pinncurv")
