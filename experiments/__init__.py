"""Command lines around the library; run them from the repository: python experiments/train.py."""
