"""benchmark/slurm.sh on a real Slurm, which slurm_cluster.sh starts."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDED = "sbatch slurmctld slurmd munged".split()
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
MISSING = [name for name in NEEDED if not shutil.which(name, path=PATH)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no Slurm here (Debian: slurm-wlm, munge): {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def slurm():
    """The environment in which Slurm's commands know the cluster."""
    line = [ROOT / "tests" / "slurm_cluster.sh", "sh", "-c", 'echo "$SLURM_CONF"; cat']
    cluster = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    conf = cluster.stdout.readline().strip()
    if not conf:
        pytest.fail(cluster.communicate()[1])
    yield {**os.environ, "SLURM_CONF": conf}
    cluster.communicate(timeout=60)  # its command ends with its input


def wait_for(condition, what):
    deadline = time.time() + 300
    while not condition():
        assert time.time() < deadline, what()
        time.sleep(0.1)


def test_requeued_task_carries_on(slurm, tmp_path):
    """A job array of three runs, one requeued in its midst; then the same array again, of which nothing remains."""
    matrix = {"ENVS": "point_env:Compass-v0", "VARIANTS": "ac-m1", "SEEDS": "1 2 3", "STEPS": "40000", "TAG": ""}
    matrix["FLAGS"] = "--num-steps 200 --hidden 8 --checkpoint-every 1000 --no-cuda"
    env = {**slurm, **matrix, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT / "tests")}

    def run(*line):
        result = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def story():
        logs = [path.read_text() for path in sorted(tmp_path.glob("runs/logs/*"))]
        return "\n".join([run("squeue", "--array"), *logs])

    def submit():
        out = run(ROOT / "benchmark" / "slurm.sh", ROOT / "benchmark" / "stac_ac.sh", "--comment=test")
        return re.fullmatch(r"Submitted batch job (\d+)\n", out).group(1)

    def queue_is_empty():
        return run("squeue", "--noheader") == ""

    job = submit()
    one = "runs/point_env-Compass-v0__ac-m1__1__*"
    wait_for(lambda: list(tmp_path.glob(f"{one}/checkpoint.pt")), story)
    run("scontrol", "requeue", f"{job}_0")
    assert not list(tmp_path.glob(f"{one}/model.pt"))  # it was in its midst
    wait_for(lambda: "BeginTime" in run("squeue", "--noheader", "--format=%r"), story)
    run("scontrol", "update", f"JobId={job}_0", "StartTime=now")  # Slurm itself would wait for two minutes
    wait_for(queue_is_empty, story)

    folders = sorted(tmp_path.glob("runs/*__*"))
    assert len(folders) == 3 and all((path / "model.pt").exists() for path in folders), story()
    for path in folders:
        steps = re.findall(r"(?m)^step (\d+):", (path / "log.txt").read_text())
        assert [int(step) for step in steps] == list(range(200, 40001, 200))
    logs = [path.read_text() for path in sorted(tmp_path.glob("runs/logs/point*.log"))]
    assert [log.count("$ ") for log in logs] == [2, 1, 1]
    assert f"--resume runs/{folders[0].name}" in logs[0]
    assert len(list(tmp_path.glob(f"runs/logs/slurm-{job}_*.out"))) == 3

    again = submit()
    wait_for(queue_is_empty, story)
    assert [path.read_text() for path in sorted(tmp_path.glob("runs/logs/point*.log"))] == logs
    outputs = [path.read_text() for path in tmp_path.glob(f"runs/logs/slurm-{again}_*.out")]
    assert len(outputs) == 3 and all("1/1 runs finished" in output for output in outputs)
