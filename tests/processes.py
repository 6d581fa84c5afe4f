"""Runs functions of a test module in processes that form a gloo group, and says which of them failed, and how.

One program imports torch and the module, then forks into the processes: what takes seconds happens once. They take the functions
in turn. After a failure a process is out of step with the others, so it stops there and they lose the connection; what came
after is reported as not run.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_RUN = "not run: a process had failed before"


def run_in_processes(module: str, names: list[str], world: int, folder: Path, timeout: float = 240.0) -> dict[str, str]:
    """Run ``module.name(rank, world, folder)`` for each name; the failures by name, an empty string for a success."""
    command = [sys.executable, "-m", "tests.processes", module, str(world), str(folder), *names]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = folder / "log"
    with log.open("w") as out:
        # A session of their own, so that nothing of it outlives the time limit.
        program = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True)
        try:
            program.wait(timeout)
            ending = f"ended with {program.returncode}"
        except subprocess.TimeoutExpired:
            ending = f"took more than {timeout:.0f} s"
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
                program.wait()
    reports = [json.loads(path.read_text()) if (path := folder / f"report{rank}").exists() else {} for rank in range(world)]
    failures = {}
    for name in names:
        said = [(rank, report.get(name, NOT_RUN)) for rank, report in enumerate(reports)]
        failures[name] = "\n".join(f"rank {rank}: {text}" for rank, text in said if text)
        if NOT_RUN in failures[name]:
            failures[name] += f"\n({ending})\n{log.read_text()[-3000:]}"
    return failures


def _process(rank: int, module_name: str, world: int, folder: Path, names: list[str]) -> int:
    import datetime as dt

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    module = importlib.import_module(module_name)
    timeout = dt.timedelta(seconds=getattr(module, "GROUP_TIMEOUT", 60))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timeout)
    report: dict[str, str] = {}
    for name in names:
        start = time.perf_counter()
        torch.manual_seed(0)
        try:
            getattr(module, name)(rank, world, folder)
            report[name] = ""
        except BaseException:
            report[name] = traceback.format_exc()
        print(f"rank {rank} {name}: {time.perf_counter() - start:.1f} s", flush=True)
        (folder / f"report{rank}").write_text(json.dumps(report))
        if report[name]:
            os._exit(1)  # without a goodbye to the group, which would wait for the others
    dist.barrier()
    dist.destroy_process_group()
    return 0


def main() -> int:
    module_name, world, folder, *names = sys.argv[1:]
    importlib.import_module(module_name)
    children = []
    for rank in range(int(world)):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _process(rank, module_name, int(world), Path(folder), names)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in children)


if __name__ == "__main__":
    sys.exit(main())
