"""What a run is does not depend on how many devices it has."""

from __future__ import annotations

import jax
import pytest

from dp_rmt.clipping.execution import Execution
from dp_rmt.finetuning import assemble
from dp_rmt.finetuning.workdir import check_workdir, claim_workdir
from dp_rmt.training.microbatches import microbatch_size_on
from dp_rmt.training.partitioning import AXES


def test_the_microbatch_alone_is_rounded_up_for_the_devices(make_config):
    """So that every device has a part of it; samples, accounting and what a checkpoint is compared with stay."""
    config = make_config({"train.microbatch_size": 6})
    task = assemble.load_task(config)
    run = assemble.build_run(config, task, name="run")
    mechanism, _ = assemble.build_mechanism(config, 120)
    assert run.loop.mechanism == mechanism
    assert mechanism.max_batch_size % 6 == 0
    assert (run.loop.microbatch_size, run.identity["microbatch_size"]) == (6, "6")
    eight = jax.sharding.AbstractMesh((8, 1, 1), AXES)
    assert microbatch_size_on(eight, Execution("auto", 6), task, mechanism) == 8


def test_a_run_goes_on_with_another_mesh_and_keeps_other_checkpoints(make_config, tmp_path):
    claim_workdir(tmp_path / "run", make_config())
    check_workdir(tmp_path / "run", make_config({"mesh.fsdp": 4, "checkpoints.keep": 5}))
    with pytest.raises(ValueError, match=r"train\.num_steps: there 3, now 4"):
        check_workdir(tmp_path / "run", make_config({"mesh.fsdp": 4, "train.num_steps": 4}))


def test_a_mesh_that_does_not_fit_is_refused(make_config):
    config = make_config({"mesh.fsdp": 64, "mesh.data": 1})
    with pytest.raises(ValueError, match="mesh data=1, fsdp=64, tensor=1 does not fit"):
        assemble.build_run(config, assemble.load_task(config), name="run")
