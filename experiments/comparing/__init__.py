"""Parts of ``experiments/compare.py``: what is compared, where, what is measured, and shown."""
