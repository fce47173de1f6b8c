"""Approximations of the exact Gauss-Newton matrix, compared along training and over the damping.

- ``settings``, ``command_line``: what can be set and how it is read.
- ``operators``: the approximations by name, one line each; ``channels``: other ways to propagate
  derivatives.
- ``points``: where to compare, along a training of its own or at the checkpoints of a run.
- ``exact``, ``rows``: the exact matrix and its step; ``block_part``: diagonal blocks.
- ``matrices``, ``inverses``: what is measured of an approximation without and with damping;
  ``continuation``, ``predictors``: where it leads, and what says so in advance.
- ``measure``: all of it at one point, and ``progress``.
- ``table``: rows as CSV, as Markdown and on the terminal.
- ``panels``, ``figures``: pictures, with medians and ranges over the trainings.
- ``main``: all of it, in order, into a run folder.
"""
