"""The experiments: programs, each of which runs as ``python -m experiments.NAME``, and what they share.

Python loads this package before any program in it, and so the process is prepared before one of them loads JAX.
"""

from dp_rmt import environment

environment.prepare()
