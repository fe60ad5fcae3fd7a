"""What a run is does not depend on how many devices it has."""

from __future__ import annotations

import dataclasses

import pytest

from dp_rmt.finetuning import assemble
from dp_rmt.finetuning.workdir import check_workdir, claim_workdir


def test_the_mechanism_is_that_of_one_device(make_config):
    """But for the microbatch, which is rounded up so that every device has a part of it."""
    config = make_config({"train.microbatch_size": 6})
    one, delta = assemble.build_mechanism(config, 120)
    eight, same_delta = assemble.build_mechanism(config, 120, num_devices=8)
    assert (one.microbatch_size, eight.microbatch_size) == (6, 8)
    assert dataclasses.replace(eight, microbatch_size=6) == one
    assert delta == same_delta
    assert (eight.sampling(3).indices(1) == one.sampling(3).indices(1)).all()


def test_a_run_goes_on_with_another_mesh_and_keeps_other_checkpoints(make_config, tmp_path):
    claim_workdir(tmp_path / "run", make_config())
    check_workdir(tmp_path / "run", make_config({"mesh.fsdp": 4, "checkpoints.keep": 5}))
    with pytest.raises(ValueError, match=r"train\.num_steps: there 3, now 4"):
        check_workdir(tmp_path / "run", make_config({"mesh.fsdp": 4, "train.num_steps": 4}))


def test_a_mesh_that_does_not_fit_is_refused(make_config):
    config = make_config({"mesh.fsdp": 64, "mesh.data": 1})
    with pytest.raises(ValueError, match="mesh data=1, fsdp=64, tensor=1 does not fit"):
        assemble.build_run(config, assemble.load_task(config), name="run")
