"""Parts of ``experiments/compare.py``.

- ``operators``: what is compared, by name; ``channels``: derivatives propagated in other ways.
- ``job``: what can be set, and the trainings to compare along, its own or those of earlier runs.
- ``measure``: everything that is measured at one point of a training, as rows of tables.
- ``pictures``: the tables as pictures, with medians and ranges over the trainings.
"""
