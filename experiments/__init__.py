"""The experiments: programs, each of which runs as ``python -m experiments.NAME``, and the studies below them.

Python loads this package before any program in it, so that the process is prepared before a program loads JAX.
"""

from dp_rmt import environment

environment.prepare()
