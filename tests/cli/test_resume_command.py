"""`hasten train --resume` on the command line: bare, forced, misspelt, and of a run that is finished."""

import shutil
from pathlib import Path

from cli_kit import write_job
from typer.testing import CliRunner

from hasten.cli import app


def command(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["train", *map(str, arguments)])
    return done.exit_code, " ".join(done.output.split())


def test_resume_with_and_without_force(tmp_path: Path) -> None:
    often = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "constant"}
    path = write_job(tmp_path, train=often)
    code, said = command(path, "--resume")
    assert code == 2 and "no checkpoint" in said
    assert command(path)[0] == 0
    code, said = command(path)
    assert code == 2 and "earlier run" in said and "--resume" in said
    code, said = command(path, "--resume")
    assert code == 0 and "had finished at step 4; nothing to do" in said
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    (tmp_path / "out/summary.json").unlink()
    code, said = command("--resume", path)
    assert code == 0 and "resuming from" in said and "checkpoint-2, step 2 of 4" in said
    code, said = command(write_job(tmp_path, train={**often, "max_steps": 5, "seed": 9}), "--resume")
    assert code == 2 and "train.seed: 1 in the checkpoint, 9 now" in said and "--resume force" in said
    code, said = command(path, "--resume", "force")
    assert code == 0 and "checkpoint-4, step 4 of 5" in said
    assert "5 steps" in said


def test_other_values_of_resume(tmp_path: Path) -> None:
    path = write_job(tmp_path)
    assert command(path, "--resume=maybe")[0] == 2
    code, said = command(path, "--resume", "checkpoint-4")
    assert code == 2 and "checkpoint-4" in said
