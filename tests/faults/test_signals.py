"""SIGTERM and Ctrl-C in every stage: a code of their own, everything saved, and the same command goes on."""

from __future__ import annotations

import signal

from rto.pipeline.stop import EXIT


def test_stopped_in_every_stage(run_in, stages, tmp_path):
    run = run_in(tmp_path / "run")
    for number, stage in enumerate(stages):
        name = ("SIGTERM", "SIGINT")[number % 2]
        attempt = run.start()
        attempt.until(lambda stage=stage: run.logged(stage) >= 2)
        attempt.strike(signal.Signals[name])
        code, said = attempt.ended()
        assert code == EXIT[name], said
        assert said.splitlines()[-1] == f"rto: stopped by {name}; the same command continues"
        # No step is lost: the last one that has a row has a checkpoint, or the stage its model.
        assert run.going() != stage or run.steps(stage)[-1] == run.logged(stage)
    code, said = run.go_on()
    assert code == 0, said
    assert not run.differs()
