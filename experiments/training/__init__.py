"""Training from the command line: from names to objects, to a run folder with table and figure.

- ``settings``: what can be set, as dataclasses; ``command_line``: how it is read.
- ``problems``, ``network``, ``optimizers``: where names become objects; ``names``: which there are.
- ``trainer``: one optimizer at work; ``loop``: until its budget is spent; ``progress``: shows it.
- ``run_folder``, ``metrics``, ``checkpoint``, ``environment``: what a run leaves behind.
- ``summary``, ``figure``: the closing table and picture, made from the run folder alone.
- ``main``: all of it, in order; ``program``, ``device``: what it shares with other programs.
"""
