"""The settings that a command line gives, for programs that start others and want to know what these will read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dp_rmt.finetuning.checks import arm_settings
from dp_rmt.finetuning.settings import Settings


def read_settings(arguments: Sequence[str]) -> Settings:
    """Reads ``--config=FILE`` and ``--config.KEY=VALUE`` as `experiments.finetune` does.

    Args:
      arguments: of the command line.

    Returns:
      The settings; those of every arm are checked, too.

    Raises:
      ValueError, AttributeError, KeyError, OSError: there is no such file or key, or a value cannot be used.
    """
    values, argv = flags.FlagValues(), ["config", *arguments]
    config_flags.DEFINE_config_file("config", None, "What is read.", flag_values=values, sys_argv=argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of how ml_collections imports a file
            values(argv)
    except flags.Error as error:
        raise ValueError(str(error)) from error
    settings = Settings.from_config(values["config"].value)
    arm_settings(settings)
    return settings
