"""benchmark/throughput.py on tiny networks, and the commands of benchmark/gpu.sh: no minute of a GPU is to be lost."""

import os
import re
import shlex
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

import stddpg
import stsac

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
import curvature  # noqa: E402
import throughput  # noqa: E402


@pytest.fixture(scope="module", params=[stddpg, stsac])
def checkpoint(request, tmp_path_factory):
    """A checkpoint of a short run of the script, with a full replay buffer."""
    run_dir = tmp_path_factory.mktemp(request.param.ALGORITHM)
    request.param.train(
        request.param.Args(
            env_id="Pendulum-v1",
            leader="none",
            hidden=(8,),
            total_timesteps=60,
            start_steps=30,
            update_after=50,
            buffer_size=40,
            cg_iters=2,
            run_dir=str(run_dir),
        )
    )
    return run_dir / "checkpoint.pt"


def test_table_and_profile(checkpoint, tmp_path, capsys, monkeypatch):
    """Every contestant has its row, and two versions of a script take turns."""
    line = ["throughput.py", str(checkpoint), "--updates", "2", "--rounds", "1", "--no-compile", "--batch-size", "10"]
    line += ["--against", str(ROOT), "--profile", str(tmp_path / "profile.txt")]
    monkeypatch.setattr(sys, "argv", line)
    throughput.main()
    out = capsys.readouterr()
    assert out.err.replace("\n", "") == "" or "profiler" in out.err
    rows = [row.split(" | ") for row in out.out.splitlines() if row.startswith("| st")]
    assert [row[1] for row in rows] == [name for name in throughput.CONTESTANTS for _ in range(2)]
    assert {row[0].strip("| ") for row in rows} == {
        checkpoint.parent.name[:-1],
        f"{checkpoint.parent.name[:-1]} before",
    }
    plain, plain_before = rows[0], rows[1]
    assert plain[4].startswith("1.00") and plain_before[4].startswith("1.00")
    assert plain[5] != "" and plain_before[5] == ""
    with_iterations = {row[1] for row in rows if row[6].strip(" |")}
    assert with_iterations == {name for name in throughput.CONTESTANTS if "Hessian" in name or name == "critic"}
    ten_products = next(row for row in rows if "10 products" in row[1])
    assert 2 < float(ten_products[6].strip(" |")) <= 10  # the checkpoint's own run makes two
    assert "aten::addmm" in (tmp_path / "profile.txt").read_text()


def test_the_numbers_of_the_table(capsys):
    """Medians of the rounds' speeds, and of their ratios, over three rounds."""
    names = ("s", "none"), ("s", "critic"), ("s before", "critic")
    found = [throughput.Contestant(script, name, "eager", None) for script, name in names]
    speed = np.array([[4.0, 2.0, 8.0], [4.0, 1.0, 8.0], [4.0, 1.0, 2.0]])
    throughput.print_table(found, speed, np.full((3, 3), np.nan), throughput.Args(()))
    row = "| s | critic | eager | 1 (1 to 2) | 0.25 (0.25 to 0.50) | 0.25 (0.12 to 0.50) |  |"
    assert row in capsys.readouterr().out.splitlines()


def test_two_versions_are_two_files(checkpoint, tmp_path, monkeypatch):
    script = checkpoint.parent.name[:-1]
    (tmp_path / f"{script}.py").write_bytes((ROOT / f"{script}.py").read_bytes())
    monkeypatch.setattr(throughput, "training_update", lambda script, *rest: Path(script.__file__).parent)
    args = throughput.Args((checkpoint,), compile=False, only=("none",), against=tmp_path)
    assert [contestant.update for contestant in throughput.contestants(args)] == [ROOT, tmp_path]


def test_a_contestant_that_fails_does_not_take_the_others_along(checkpoint, monkeypatch, capsys):
    """Nor one that the script refuses."""

    def refuse():
        stsac.stop("refused")

    def update():
        return torch.tensor(3.0)

    found = [throughput.Contestant("s", name, "eager", what) for name, what in (("none", refuse), ("critic", update))]
    monkeypatch.setattr(throughput, "contestants", lambda args: found)
    monkeypatch.setattr(sys, "argv", ["throughput.py", str(checkpoint), "--updates", "2", "--rounds", "1"])
    throughput.main()
    out, err = capsys.readouterr()
    assert "| s | critic | eager |" in out and "| s | none |" not in out
    assert err == "s, none, eager: SystemExit: stsac.py: error: refused\n"
    found.pop()
    with pytest.raises(SystemExit, match="no contestant is left"):
        throughput.main()


def test_curvature_of_a_checkpoint(checkpoint, monkeypatch, capsys):
    """The implicit term is the total derivative less the direct term of the same noise: as λ grows nothing is left."""
    script, args, nets, buffer, step = curvature.load(checkpoint.parent)
    batch = buffer.sample(20)
    batch = type(batch)(*(column.double() for column in batch))
    term, _ = curvature.implicit_term(script, nets, batch, 1.0, replace(args, curvature="gauss-newton"), 0)
    small, _ = curvature.implicit_term(script, nets, batch, 1e12, replace(args, curvature="gauss-newton"), 0)
    assert step == 60 and small.norm() < 1e-9 * term.norm()
    for name, changes in curvature.SOLVES.items():
        if "product" in name:  # preconditioned, one to start from
            assert f", {changes['cg_iters'] + changes.get('precondition', True)} product" in name
    monkeypatch.setattr(sys, "argv", ["curvature.py", str(checkpoint.parent), "--batches", "2", "--lam", "1"])
    curvature.main()
    rows = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {checkpoint.parent.name} | 60 |")
    ]
    assert [row.split(" | ")[3] for row in rows] == [*curvature.SOLVES]


def test_curvature_with_a_coefficient_that_was_learned(tmp_path):
    run = {"env_id": "Pendulum-v1", "hidden": (8,), "total_timesteps": 60, "start_steps": 30, "update_after": 50}
    stsac.train(stsac.Args(**run, leader="none", autotune=True, run_dir=str(tmp_path)))
    args = curvature.load(tmp_path)[1]
    learned = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["log_alpha"]["0"].exp().item()
    assert args.alpha == learned and 0.9 < learned < 1


def test_an_update_is_that_of_training(checkpoint):
    """From the checkpoint's networks and buffer, with the batch and the flags of the contestant."""
    state = throughput.torch.load(checkpoint, weights_only=True)
    script = throughput.load_script(state["algorithm"], ROOT)
    seen = {}
    update = script.stackelberg_update

    def noticing(nets, optimizers, batches, *rest):
        seen["actor"] = {name: p.clone() for name, p in nets[0].state_dict().items()}
        seen["batch"] = len(batches[0].obs)
        seen["args"] = rest[-2]
        return update(nets, optimizers, batches, *rest)

    script.stackelberg_update = noticing
    args = throughput.Args((checkpoint,), batch_size=7)
    throughput.training_update(script, state, {"leader": "critic"}, "eager", args)()
    assert seen["batch"] == 7 and seen["args"].leader == "critic"
    for name, p in state["actor"].items():
        assert throughput.torch.equal(seen["actor"][name], p)


def fake_python(folder):
    """An interpreter that notes its command, and makes what the next commands want."""
    path = folder / "python"
    path.write_text(
        '#!/bin/sh\necho "$@" >>"$COMMANDS"\n'
        'while [ $# -gt 0 ]; do [ "$1" != --run-dir ] || { mkdir -p "$2"; touch "$2/checkpoint.pt"; }; shift; done\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_commands_of_the_gpu_script(tmp_path):
    """Each is one that its program takes."""
    (tmp_path / "wheels").mkdir()
    environment = os.environ | {"PYTHON": str(fake_python(tmp_path)), "COMMANDS": str(tmp_path / "commands")}
    line = [ROOT / "benchmark/gpu.sh", tmp_path / "wheels", tmp_path / "out"]
    subprocess.run(line, env=environment, check=True, stdout=subprocess.DEVNULL)
    text = (tmp_path / "commands").read_text()
    assert text.count("-m pytest") == 1 and text.count("--cuda-graphs") == 4 and text.count("--profile") == 1
    parsers = {"throughput.py": throughput.Args, "stsac.py": stsac.Args}
    parsed = 0
    for command in text.splitlines():
        program = re.match(r"(?:benchmark/)?(\w+\.py) ", command)
        if program:
            words = shlex.split(
                re.sub(r"(actor, [\w-]+(?:, (?:preconditioned|plain, 10 products))?)", r"'\1'", command)
            )
            args = tyro.cli(parsers[program[1]], args=words[1:])
            parsed += 1
            if program[1] == "throughput.py":
                assert set(args.only) <= throughput.CONTESTANTS.keys()
    assert parsed == 9 + 11 + 15  # runs, tables, seeds
    summary = (tmp_path / "out/summary.txt").read_text()
    assert summary.count("exit code 0") == len(summary.splitlines())
    again = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "is not empty" in again.stderr


def gpu_tests_on_a_cpu(*options):
    environment = os.environ | {"GPU_TEST_DEVICE": "cpu"}
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, ROOT / "tests/test_gpu.py"]
    return subprocess.run(line, env=environment, capture_output=True, text=True, cwd=ROOT)


def test_the_gpu_tests_on_a_cpu():
    """Those that take no compiler and no runs."""
    done = gpu_tests_on_a_cpu("-k", "of_the_cpu or on_the_device")
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]


@pytest.mark.slow
def test_all_gpu_tests_on_a_cpu():
    """In about two minutes: python -m pytest -m slow tests/test_throughput.py"""
    done = gpu_tests_on_a_cpu()
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.slow
def test_the_gpu_script_on_a_cpu(tmp_path):
    """All of it, in about four minutes: python -m pytest -m slow tests/test_throughput.py"""
    (tmp_path / "wheels").mkdir()
    environment = os.environ | {"PYTHON": sys.executable, "DEVICE": "cpu", "UPDATES": "2", "ROUNDS": "1"}
    environment |= {"STEPS": "1100", "PYTEST_FLAGS": "-k solver"}
    line = [ROOT / "benchmark/gpu.sh", tmp_path / "wheels", tmp_path / "out"]
    subprocess.run(line, env=environment, check=True, stdout=subprocess.DEVNULL)
    summary = (tmp_path / "out/summary.txt").read_text().splitlines()
    failed = [row for row in summary if "exit code 0" not in row and not row.startswith("seeds-8")]
    assert not failed
