"""`launch --rehearse`: the batch script under the stand-in for SLURM comes to the losses of a run without incidents."""

import re
from pathlib import Path

import forked
import pytest


def test_every_incident_leads_to_the_losses_of_an_unbroken_run(python: Path, tmp_path: Path):
    options = ("--executor", "slurm", "--start", "torchrun", "--python", str(python), "--rehearse")
    settings = ("gpt_oss_vision_20b_sft", f"out={tmp_path / 'run'}")
    output = tmp_path / "output"
    assert forked.run("launch", *settings, *options, output=output) == 0, output.read_text()
    said = output.read_text()
    assert "a task is killed" in said and "SIGTERM" in said and "time limit" in said and "a node is lost" in said
    assert "it was requeued 3 times" in said
    assert len(re.findall(r"^ +\d+ +\d\.\d{6} +\d\.\d{6}$", said, re.MULTILINE)) == 20
    assert "the losses are equal to within" in said
    job = (tmp_path / "run/rehearsal/broken/launch/job-1.txt").read_text()
    assert "restart 1 of 3 from the newest checkpoint" in job
    assert job.count("The run is saved; the job returns to the queue") == 2


def test_losses_that_differ_fail_the_rehearsal():
    from gpt_oss_vision.errors import UserError
    from gpt_oss_vision.recipes.launch.rehearse import _compared

    losses = {("", step): 1.0 / step for step in range(1, 4)}
    assert [*_compared(losses, losses)][-1] == "the losses are equal to within 0"
    with pytest.raises(UserError, match=r"the losses differ by up to 0\.1"):
        list(_compared(losses, losses | {("", 2): 0.6}))
    with pytest.raises(UserError, match="has 2 steps in place of 3"):
        list(_compared(losses, {("", 1): 1.0, ("", 2): 0.5}))
