"""The command of the demo: what is noticed before the work, and processes that are interrupted."""

import argparse
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest

from fusedonemoe.cli.demo import PICTURE, _exit_code_of, add_arguments, run

pytest.importorskip("rich")
pytest.importorskip("matplotlib")


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("device", ["meta", "xla", "", "\0", "cpu:0:0"])
def test_a_device_that_is_none_of_the_demos_is_named(device, capsys):
    assert run(parse("--quick", f"--device={device}")) == 2
    err = capsys.readouterr().err
    assert err.startswith("The demo cannot run here: ") and (
        device != "meta" or "--device must be cpu or cuda, got 'meta'" in err
    )


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_folder_that_cannot_be_written_is_noticed_before_the_work(processes, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / PICTURE).mkdir(parents=True)
    monkeypatch.setattr("fusedonemoe.cli.demo.program._build_trainer", None)
    monkeypatch.setattr("fusedonemoe.cli.demo._exit_code_of", None)
    for folder, reason in {"file": "Not a directory", "folder": "Is a directory", "n" * 300: "File name too long"}.items():
        path = tmp_path / folder
        assert run(parse("--quick", "--nproc", processes, "--output", str(path))) == 2
        assert capsys.readouterr().err == f"--output: cannot write {path / PICTURE}: {reason}\n"


@pytest.mark.parametrize("patient", [True, False])
def test_ctrl_c_waits_for_the_processes(patient, tmp_path, monkeypatch):
    process = Mock()
    process.wait.side_effect = [KeyboardInterrupt, 1 if patient else subprocess.TimeoutExpired("torchrun", 1)]
    started = Mock(__enter__=lambda self: process, __exit__=lambda self, *error: None)
    monkeypatch.setattr("fusedonemoe.cli.demo.subprocess.Popen", lambda *args, **options: started)
    with pytest.raises(KeyboardInterrupt):
        run(parse("--nproc", "2", "--output", str(tmp_path)))
    assert process.wait.call_count == 2 and process.terminate.called != patient and not process.kill.called


def test_processes_that_a_signal_ended_are_told_as_a_shell_does():
    for code, status in {"import os; os.kill(os.getpid(), 15)": 143, "raise SystemExit(3)": 3}.items():
        assert _exit_code_of([sys.executable, "-c", code], os.environ) == status
