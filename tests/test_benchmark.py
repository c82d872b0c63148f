"""benchmark/: launchers with runs that fail, are killed and carried on; tables and figures with known numbers."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter

import stac_ac
import stddpg
import stsac

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
import plot  # noqa: E402
import rates  # noqa: E402
import stsac_mean  # noqa: E402

SCRIPTS = {"stac_ac.sh": stac_ac, "stddpg.sh": stddpg, "stsac.sh": stsac}

# What a launcher needs of a script: a lock, a run of --total-timesteps steps that carries on where it was, and an end.
# A step is a line of DIR/steps. Some environments fail. A real process, too, takes a while to end.
FAKE = """
import fcntl, os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), os._exit(1)))
args = dict(zip(sys.argv[2:], sys.argv[3:]))
folder = pathlib.Path(args["--run-dir"])
folder.mkdir(parents=True, exist_ok=True)
lock = open(folder / "lock", "w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    print("another process is at work", file=sys.stderr)
    sys.exit(os.EX_TEMPFAIL)
print("threads", *(os.environ.get(f"{name}_NUM_THREADS") for name in ("OMP", "MKL", "OPENBLAS")), flush=True)
(folder / "group").write_text(str(os.getpgrp()))
if args["--env-id"] == "Bad":
    sys.exit("fake: error: no such environment")
steps = open(folder / "steps", "a")
for step in range(len(open(folder / "steps").readlines()), int(args["--total-timesteps"])):
    print(step, file=steps, flush=True)
    time.sleep(0.02)
with open(folder / "ends", "a") as ends:
    print("end", file=ends)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, with blanks in its name, and a `python` that is the fake."""
    folder = tmp_path / "a b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    python = folder / "python"
    (folder / "fake.py").write_text(FAKE)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -SE "{folder}/fake.py" "$@"\n')
    python.chmod(0o755)
    return folder


# Launchers
def environment(**variables):
    unset = set("ENVS VARIANTS SEEDS STEPS FLAGS TAG WORKERS SCRIPT SLURM_ARRAY_TASK_ID".split())
    unset |= {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    env = {name: value for name, value in os.environ.items() if name not in unset}
    return env | {"PYTHON": str(Path("python").absolute())} | variables


def start(launcher, *options, **variables):
    line = [ROOT / "benchmark" / launcher, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, env=environment(**variables), **pipes)


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def wait_for(condition):
    deadline = time.time() + 60
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def dry_run(launcher, **variables):
    """The commands, without the interpreter; of the script its path in the repository."""
    code, out, err = finish(start(launcher, "--dry-run", **variables))
    assert (code, err) == (0, "")
    commands = []
    for line in out.splitlines():
        python, script, *flags = shlex.split(line)
        assert python == str(Path("python").absolute())
        commands.append([str(Path(script).relative_to(ROOT)), *flags])
    return commands


COMMAND = "{script} --run-dir runs/{env}__{name}__{seed} --env-id {env} --exp-name {name} --seed {seed}"
COMMAND += " --total-timesteps {steps} {flags} --save-model"


def test_commands_of_stac(here):
    lam = {"CartPole-v1": 0, "Hopper-v4": 500}
    games = {"ac": "--leader none", "ac-2x": "--leader none --policy-lr 0.2"}
    games |= {f"stac-{s0}": f"--leader actor --start-states {s0}" for s0 in ("released", "every")}
    expected = []
    for seed, env, (name, game), m in itertools.product((1, 2), lam, games.items(), (1, 80)):
        flags = f"--lam {lam[env]} --policy-lr 0.1 --critic-lr 0.01 --grad-noise 0.05 --unroll {m} {game}"
        line = COMMAND.format(script="stac_ac.py", env=env, name=f"{name}-m{m}", seed=seed, steps=800000, flags=flags)
        expected.append(line.split())
    assert dry_run("stac_ac.sh", ENVS="CartPole-v1 Hopper-v4", SEEDS="1 2") == expected


@pytest.mark.parametrize("launcher, plain", [("stddpg.sh", "ddpg"), ("stsac.sh", "sac")])
def test_commands_of_the_off_policy_launchers(here, launcher, plain):
    games = {plain: "none", f"st{plain}-al": "actor", f"st{plain}-al-gn": "actor --curvature gauss-newton"}
    games[f"st{plain}-cl"] = "critic"
    envs = ["HalfCheetah-v4", "Hopper-v4", "Reacher-v4", "Walker2d-v4"]
    expected = []
    for seed, env, name in itertools.product(range(1, 6), envs, games):
        flags = f"--leader {games[name]}"
        script = f"st{plain}.py"
        line = COMMAND.format(script=script, env=env, name=name, seed=seed, steps=1000000, flags=flags)
        expected.append(line.split())
    assert dry_run(launcher) == expected


@pytest.mark.parametrize("launcher", SCRIPTS)
def test_the_scripts_understand_the_commands(here, launcher):
    script = SCRIPTS[launcher]
    for _, *flags in dry_run(launcher, SEEDS="1"):
        args = tyro.cli(script.Args, args=flags)
        script.check_args(args)
        assert args.save_model and args.run_dir == f"runs/{args.env_id}__{args.exp_name}__1"
        assert (args.leader == "none") == (not args.exp_name.startswith("st"))


def test_variables(here):
    variables = {"ENVS": "a:B-v0", "VARIANTS": "stddpg-cl", "SEEDS": "3", "STEPS": "7", "FLAGS": "--lam 1 --hidden 8 8"}
    line = "stddpg.py --run-dir runs/a-B-v0__stddpg-cl{0}__3 --env-id a:B-v0 --exp-name stddpg-cl{0} --seed 3"
    line += " --total-timesteps 7 --leader critic --lam 1 --hidden 8 8 --save-model"
    # flags make another experiment, with a name of its own
    assert dry_run("stddpg.sh", **variables) == [line.format("-lam-1-hidden-8-8").split()]
    assert dry_run("stddpg.sh", **variables, TAG="-x") == [line.format("-x").split()]
    assert dry_run("stddpg.sh", **variables, TAG="") == [line.format("").split()]


@pytest.mark.parametrize(
    "launcher, variant, control",
    [("stsac.sh", "stsac-al-gn", "stsac_mean.py"), ("stac_ac.sh", "stac-every-m1", "stac_ac_scaled.py")],
)
def test_controls(here, launcher, variant, control):
    variables = {"ENVS": "E", "SEEDS": "1", "VARIANTS": variant, "SCRIPT": f"benchmark/{control}"}
    ((script, _, run_dir, *flags),) = dry_run(launcher, **variables, TAG="-x")
    assert script == f"benchmark/{control}" and (ROOT / script).exists() and run_dir == f"runs/E__{variant}-x__1"
    code, out, err = finish(start(launcher, **variables))
    assert (code, out) == (1, "") and "TAG" in err and err.count("\n") == 1


def test_the_control_with_the_mean(monkeypatch):
    """Each sample's df1/dy is their mean. (stac_ac_scaled.py's test is in test_stac_ac.py.)"""
    exact = stsac.ridge_solver
    monkeypatch.setattr(stsac, "ridge_solver", exact)  # put back at the end
    monkeypatch.setattr(stsac, "main", lambda: None)
    stsac_mean.main()
    K, damping, c = torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.ones(3), torch.tensor([1.0, 5.0, 2.0])
    expected = exact(K, damping)(c).mean().expand(3)
    torch.testing.assert_close(stsac.ridge_solver(K, damping)(c), expected)


@pytest.mark.parametrize(
    "launcher, flags, variant",
    [
        ("stac_ac.sh", "--grad-noise 0 --policy-lr 0.4", "ac-2x-m1"),
        ("stac_ac.sh", "--policy_lr=0.4", "ac-2x-m1"),
        ("stsac.sh", "--leader critic", "sac"),
        ("stddpg.sh", "--curvature hessian", "stddpg-al-gn"),
    ],
)
def test_flags_must_not_undo_a_variant(here, launcher, flags, variant):
    """AC at twice the rate would have the rate of FLAGS, and its name."""
    code, out, err = finish(start(launcher, "--dry-run", FLAGS=flags))
    assert (code, out) == (1, "") and err.count("\n") == 1 and f"it is what makes {variant}" in err
    if launcher != "stsac.sh":
        commands = dry_run(launcher, FLAGS=flags, VARIANTS={"stac_ac.sh": "ac-m1", "stddpg.sh": "stddpg-al"}[launcher])
        assert commands and all(command[-1 - len(flags.split()) : -1] == flags.split() for command in commands)


@pytest.mark.parametrize(
    "options, variables, expected",
    [
        ([], {"VARIANTS": "stddpg-bl"}, "unknown variant 'stddpg-bl'"),
        ([], {"VARIANTS": "ddpg stddpg"}, "unknown variant 'stddpg'"),
        ([], {"STEPS": "1e6"}, "STEPS"),
        ([], {"STEPS": ""}, "STEPS"),
        ([], {"WORKERS": "0"}, "WORKERS"),
        ([], {"WORKERS": "two"}, "WORKERS"),
        ([], {"ENVS": ""}, "no runs"),
        ([], {"FLAGS": "--lam 1 --exp_name x"}, "--exp_name"),
        ([], {"FLAGS": "--exp-name=x"}, "--exp-name"),
        ([], {"FLAGS": "--seed=3"}, "--seed"),
        ([], {"FLAGS": "--run-dir x"}, "--run-dir"),
        ([], {"FLAGS": "--no-save-model"}, "--no-save-model"),
        (["--task", "80"], {}, "no runs"),
        (["--task"], {}, "number"),
        (["--help"], {}, "--help"),
    ],
)
def test_bad_input_of_a_launcher(here, options, variables, expected):
    code, out, err = finish(start("stddpg.sh", *options, **variables))
    assert code == 1 and out == "" and err.count("\n") == 1 and expected in err
    assert not Path("runs").exists()


def test_runs_that_fail_or_are_locked_do_not_stop_the_others(here):
    matrix = {"ENVS": "A Bad B", "VARIANTS": "sac", "SEEDS": "1 2", "STEPS": "3"}
    with open(here / "locked", "w") as lock:
        folder = Path("runs/B__sac__1")
        folder.mkdir(parents=True)
        (folder / "lock").symlink_to(here / "locked")
        subprocess.run([sys.executable, "-c", "import fcntl; fcntl.flock(0, fcntl.LOCK_EX)"], stdin=lock, check=True)
        code, out, err = finish(start("stsac.sh", **matrix))
    assert code == 1 and err == "stsac.sh: error: failed: Bad__sac__1 Bad__sac__2\n"
    failed = "failed: Bad__sac__{0} (fake: error: no such environment; see runs/logs/Bad__sac__{0}.log)"
    expected = ["finished: A__sac__1", failed.format(1), "left to another process: B__sac__1"]
    expected += ["finished: A__sac__2", failed.format(2), "finished: B__sac__2"]
    assert out.splitlines() == expected
    assert not (folder / "steps").exists() and lines(Path("runs/A__sac__2/steps")) == ["0", "1", "2"]
    command, *output = lines(Path("runs/logs/A__sac__1.log"))
    assert command.startswith("$ ") and "--run-dir runs/A__sac__1 " in command and output == ["threads 1 1 1"]

    code, out, err = finish(start("stsac.sh", **matrix | {"ENVS": "A B"}))
    assert (code, err) == (0, "") and out.count("finished: ") == 4
    assert lines(folder / "steps") == ["0", "1", "2"]  # whoever was at it has left it


def test_a_run_that_is_killed_is_named(here):
    process = start("stsac.sh", ENVS="A B", VARIANTS="sac", SEEDS="1", STEPS="5")
    Path("python").write_text("#!/bin/sh\nkill -9 $$\n")
    code, out, err = finish(process)
    assert code == 1 and "Killed" in out and err == "stsac.sh: error: failed: A__sac__1 B__sac__1\n"


def begun(*names):
    return all(lines(Path(f"runs/{name}/steps")) for name in names)


def is_locked(name):
    check = ["import fcntl; fcntl.flock(open(0), fcntl.LOCK_EX | fcntl.LOCK_NB)"]
    with open(f"runs/{name}/lock") as lock:
        return subprocess.run([sys.executable, "-SEc", *check], stdin=lock, stderr=subprocess.DEVNULL).returncode != 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_end_of_the_launcher_is_the_end_of_its_runs(here, number):
    process = start("stsac.sh", ENVS="A B C", VARIANTS="sac", SEEDS="1", STEPS="9999", WORKERS="2")
    wait_for(lambda: begun("A__sac__1", "B__sac__1"))
    assert is_locked("A__sac__1") and not Path("runs/C__sac__1").exists()
    process.send_signal(number)
    assert process.wait(timeout=60) == 130
    assert not is_locked("A__sac__1") and not is_locked("B__sac__1") and not Path("runs/C__sac__1").exists()
    assert finish(process) == (130, "", "stsac.sh: interrupted; the same command carries on\n")


def test_nothing_twice_and_nothing_lost(here):
    """Launcher and runs killed; then the launcher alone, its runs go on; then two launchers at once."""
    matrix = {"ENVS": "A", "VARIANTS": "sac", "SEEDS": "1 2 3 4", "STEPS": "60", "WORKERS": "2"}
    first = start("stsac.sh", **matrix)
    wait_for(lambda: begun("A__sac__1", "A__sac__2"))
    first.kill()
    os.killpg(int(Path("runs/A__sac__1/group").read_text()), signal.SIGKILL)
    finish(first)
    wait_for(lambda: not is_locked("A__sac__1") and not is_locked("A__sac__2"))
    assert not list(Path("runs").glob("*/ends"))  # killed in their midst

    done = [len(lines(Path(f"runs/A__sac__{seed}/steps"))) for seed in (1, 2)]
    second = start("stsac.sh", **matrix)
    for seed in (1, 2):
        wait_for(lambda: len(lines(Path(f"runs/A__sac__{seed}/steps"))) > done[seed - 1])  # noqa: B023
    second.kill()
    both = [finish(process) for process in [start("stsac.sh", **matrix) for _ in range(2)]]
    assert [(code, err) for code, _, err in both] == [(0, "")] * 2
    assert any("left to another process: A__sac__1" in out for _, out, _ in both)
    runs = [Path(f"runs/A__sac__{seed}") for seed in range(1, 5)]
    wait_for(lambda: all((run / "ends").exists() for run in runs))
    second.communicate()
    for run in runs:
        assert lines(run / "steps") == [str(step) for step in range(60)]

    code, out, err = finish(start("stsac.sh", **matrix | {"STEPS": "62"}))  # a finished run is made longer
    assert (code, err, out.count("finished: ")) == (0, "", 4)
    for run in runs:
        assert lines(run / "steps") == [str(step) for step in range(62)]


def test_slurm(here, monkeypatch):
    matrix = {"ENVS": "A B", "VARIANTS": "sac stsac-cl", "SEEDS": "1", "STEPS": "3"}
    Path("sbatch").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    Path("sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    launcher = str(ROOT / "benchmark" / "stsac.sh")
    code, out, err = finish(start("slurm.sh", launcher, "--time=2-0", **matrix))
    array = ["--array=0-3", "--output=runs/logs/slurm-%A_%a.out", "--time=2-0"]
    assert (code, err) == (0, "") and Path("runs/logs").is_dir()
    assert out.splitlines() == [*array, str(ROOT / "benchmark" / "slurm.sh"), launcher]

    code, out, err = finish(start("slurm.sh", launcher, **matrix, SLURM_ARRAY_TASK_ID="2"))
    assert (code, out, err) == (0, "finished: B__sac__1\n", "")
    assert [path.name for path in Path("runs").glob("*__*")] == ["B__sac__1"]
    code, out, err = finish(start("slurm.sh", launcher, VARIANTS="x"))
    assert code == 1 and "unknown variant" in err


def test_a_real_run(here, monkeypatch, capsys):
    """Interrupted after a checkpoint, carried on by the same command, and read."""
    matrix = {"ENVS": "CartPole-v1", "VARIANTS": "stac-released-m1", "SEEDS": "1", "STEPS": "6000", "TAG": ""}
    matrix |= {"PYTHON": sys.executable, "FLAGS": "--num-steps 200 --hidden 8 --checkpoint-every 200"}
    run, log = Path("runs/CartPole-v1__stac-released-m1__1"), Path("runs/logs/CartPole-v1__stac-released-m1__1.log")
    first = start("stac_ac.sh", **matrix)
    wait_for((run / "checkpoint.pt").exists)
    first.terminate()
    assert finish(first)[0] == 130 and not (run / "model.pt").exists()
    for _ in range(2):  # the second finds it finished
        assert finish(start("stac_ac.sh", **matrix)) == (0, f"finished: {run.name}\n", "")
    returns = [line for line in lines(log) if line.startswith("step ")]
    curves, flags = {}, {}
    plot.read([Path("runs")], curves, flags)
    assert capsys.readouterr().err == ""
    ((key, curve),) = curves.items()
    assert key == ("CartPole-v1", "stac-released-m1", 1) and flags[key[:2]]["start_states"] == "released"
    assert curve["step"].tolist() == list(range(200, 6001, 200)) and curve.ratio.notna().all()
    assert f"{curve['return'].iloc[-1]:.2f}" in returns[-1] and "step 6000:" in returns[-1]


# plot.py: reading
DDPG = {"env_id": "Hopper-v4", "leader": "none", "exploration_noise": 0.1, "lam": 500.0, "hidden": (8, 8)}
AC = {"env_id": "CartPole-v1", "leader": "none", "num_steps": 4000, "policy_lr": 0.1, "grad_noise": 0.05}
TERMS = ("direct_norm", "implicit_norm", "cosine")


def write_events(folder, returns, terms=None, tag="eval/episodic_return", start=0, clock=0):
    """An event file of {step: return} and {step: (|direct|, |implicit|, cosine)}, as of a process begun at `clock`."""
    writer = SummaryWriter(str(folder), purge_step=start + 1)
    (path,) = (path for path in Path(folder).glob("events*") if ".clock." not in path.name)
    for step, value in returns.items():
        writer.add_scalar(tag, value, step)
    for step, values in (terms or {}).items():
        for name, value in zip(TERMS, values):
            writer.add_scalar(f"stackelberg/{name}", value, step)
    writer.close()
    path.rename(path.with_name(f"events.out.tfevents.{clock:010}.clock.{clock}"))


def write_model(folder, experiment, seed, flags=DDPG, steps=1000, algorithm="stddpg"):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    args = flags | {"exp_name": experiment, "seed": seed, "total_timesteps": steps, "run_dir": str(folder)}
    torch.save({"algorithm": algorithm, "args": args}, folder / "model.pt")


def write_run(experiment, seed, returns, flags=DDPG, terms=None):
    """A finished run with a return every 10 steps."""
    folder = Path(f"runs/{flags['env_id']}-{experiment}-{seed}")
    write_model(folder, experiment, seed, flags)
    tag = "charts/batch_return" if "num_steps" in flags else "eval/episodic_return"
    write_events(folder, {10 * i + 10: value for i, value in enumerate(returns)}, terms, tag)
    return folder


def read(capsys):
    curves, flags = {}, {}
    plot.read([Path("runs")], curves, flags)
    return curves, flags, capsys.readouterr().err.splitlines()


def points(run):
    return dict(zip(run["step"], run["return"]))


def test_reads_every_point(here, capsys):
    """TensorBoard itself keeps a sample of ten thousand."""
    returns = np.arange(12_000)
    write_model("runs/x", "ddpg", 3, steps=120_000)
    write_events("runs/x", dict(zip(10 * returns + 10, returns)))
    curves, flags, notes = read(capsys)
    (run,) = curves.values()
    assert np.array_equal(run["step"], 10 * returns + 10) and np.array_equal(run["return"], returns)
    expected = {"env_id": "Hopper-v4", "leader": "none", "exploration_noise": "0.1", "lam": "500.0", "hidden": "(8, 8)"}
    assert flags == {("Hopper-v4", "ddpg"): expected} and notes == []


@pytest.mark.parametrize("clocks", [(1, 2, 3, 4), (4, 3, 2, 1), (2, 4, 1, 3)])
def test_a_run_in_parts(here, capsys, clocks):
    """Killed after its checkpoints at 30 and, twice, 50; whatever the clocks say, no point is lost and none is old."""
    parts = [(0, {10: 1, 20: 2, 30: 3, 40: 4, 45: 4, 50: 5}), (30, {40: 4.5, 50: 5.5, 60: 6.5})]
    parts += [(50, {60: 6.25}), (50, {60: 6.125, 70: 7.125})]
    write_model("runs/x", "ddpg", 1)
    for clock, (start, returns) in zip(clocks, parts):
        write_events("runs/x", returns, start=start, clock=clock)
    curves, _, _ = read(capsys)
    assert points(*curves.values()) == {10: 1, 20: 2, 30: 3, 40: 4.5, 50: 5.5, 60: 6.125, 70: 7.125}


def test_a_finished_run_that_is_made_longer(here, capsys):
    """Its model says how far it is finished."""
    write_model("runs/x", "ddpg", 1, steps=30)
    write_events("runs/x", {10: 1, 20: 2, 30: 3}, {5: (1, 2, 0), 30: (1, 1, 0)})
    write_events("runs/x", {40: 4}, {40: (1, 9, 0)}, start=30, clock=1)
    curves, _, _ = read(capsys)
    (run,) = curves.values()
    assert points(run) == {10: 1, 20: 2, 30: 3} and run.ratio.tolist() == pytest.approx([2, np.nan, 1], nan_ok=True)


def test_which_runs_count(here, capsys):
    """Those with a model.pt, under the names that it has; a file that is none costs one line."""
    names = {"a__sac": "Hopper-v4__a__sac__1__9", "b__sac": "Hopper-v4__b__sac__1__9", "ddpg": "z"}
    for seed, name in enumerate(names):
        write_model(f"runs/{names[name]}", name if "_" in name else "", seed)  # without a name the algorithm's
        write_events(f"runs/{names[name]}", {10: seed})
    for name in ("damaged", "foreign", "other", "unfinished", "empty", "again"):
        Path(f"runs/{name}").mkdir()
    whole = Path("runs/z/model.pt").read_bytes()
    Path("runs/damaged/model.pt").write_bytes(whole[: len(whole) // 2])
    torch.save(torch.nn.Linear(1, 1), "runs/foreign/model.pt")
    torch.save({"algorithm": "x", "args": {"env_id": "E", "exp_name": "", "leader": "none"}}, "runs/other/model.pt")
    Path("runs/unfinished/checkpoint.pt").touch()
    write_events("runs/unfinished", {10: 7})
    write_model("runs/again", "b__sac", 1)
    write_events("runs/again", {10: 8})
    write_model("runs/empty", "", 9, DDPG | {"leader": "critic"})
    curves, flags, notes = read(capsys)
    found = {key: points(run) for key, run in curves.items()}
    assert found == {("Hopper-v4", name, seed): {10: seed} for seed, name in enumerate(names)}
    left_out = {"damaged": "damaged", "foreign": "damaged", "other": "damaged", "unfinished": "not finished"}
    left_out |= {"again": "the same run as runs/Hopper-v4__b__sac__1__9", "empty": "no returns"}
    for name, reason in left_out.items():
        assert sum(f"runs/{name}" in note and reason in note for note in notes) == 1, name
    assert len(notes) == 6
    assert plot.read_model("runs/empty/model.pt")["exp_name"] == "stddpg-cl"
    runs = pd.concat(curves.values()).assign(family="DDPG")
    plot.write(runs, flags, here)
    again = plot.read_csv(here)
    assert again[0].keys() == curves.keys() and again[1] == {key: flags[key] for key in again[1]}


def test_runs_of_one_name_with_unequal_flags(here, capsys):
    stddpg_al = DDPG | {"leader": "actor"}
    write_run("ddpg", 1, [1])
    write_run("ddpg", 2, [1], DDPG | {"lam": 100.0, "eval_every": 7})  # which no plain run uses, and no result hangs on
    write_run("stddpg-al", 1, [1], stddpg_al)
    read(capsys)
    write_run("stddpg-al", 2, [1], stddpg_al | {"lam": 100.0})
    with pytest.raises(SystemExit) as error:
        read(capsys)
    assert "lam 100.0, another run of stddpg-al on Hopper-v4 has 500.0" in error.value.code


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=lambda script: script.__name__)
def test_the_flags_that_no_result_hangs_on(script):
    """Those that may change when a run is carried on; the game's are the last in Args, and `none` unrolls as well."""
    fields = [*script.Args.__dataclass_fields__]
    assert plot.NEUTRAL & set(fields) == {"seed", *script.MAY_CHANGE}
    assert plot.GAME & set(fields) == set(fields[fields.index("leader") + 1 :]) - {"unroll"}
    assert script.ALGORITHM in ("stac", "stddpg", "stsac") and plot.family_of(fields) in script.ALGORITHM.upper()


def test_terms(here, capsys):
    """Medians over what came since the last return, that step included; a policy that has died has no gradient."""
    terms = {
        2: (1, 8, 0.5),
        5: (2, 2, 0.25),
        10: (4, 2, -1),
        11: (2, 6, 1),
        20: (4, 4, 0),
        33: (0, 0, 0),
        41: (1, 9, 1),
    }
    write_run("stddpg-al", 1, [1, 2, 3, 4], DDPG | {"leader": "actor"}, terms)
    write_run("ddpg", 1, [1, 2])
    curves, _, _ = read(capsys)
    run = curves["Hopper-v4", "stddpg-al", 1]
    assert np.array_equal(run[["ratio", "cosine"]], [[1, 0.25], [2, 0.5], [np.nan, np.nan], [0, 0]], equal_nan=True)
    assert curves["Hopper-v4", "ddpg", 1][["ratio", "cosine"]].isna().all(axis=None)


# plot.py: statistics
def test_interquartile_mean():
    assert plot.iqm(np.array([8.0, 1, 7, 2, 6, 3, 5, 4])) == 4.5  # 3, 4, 5, 6
    assert plot.iqm(np.array([100.0, 1, 2, 6, -99])) == 3.0  # one dropped at each end
    assert plot.iqm(np.array([1.0, 2, 6])) == 3.0  # a quarter of three is none
    # a task counts as one, however many seeds it has
    assert plot.iqm(np.array([1.0, 2, 6]), np.array([5.0])) == 4.0


def test_probability_of_improvement():
    x, y = np.array([1.0, 2]), np.array([0.0, 2])
    assert plot.improvement(x, y) == (1 + 0 + 1 + 0.5) / 4
    # a task counts as one, however many seeds it has
    assert plot.improvement(x, y, np.zeros(1), np.ones(9)) == (0.625 + 0) / 2


def all_resamples(values):
    """Every draw with replacement: [n^n, n]."""
    return np.array([*itertools.product(values, repeat=len(values))])


def test_intervals_are_those_of_all_resamples():
    x, y = np.array([3.0, 1, 7, 4, 4.5]), np.array([2.0, 3.5, 3.6])
    exact = np.percentile([plot.iqm(a) for a in all_resamples(x)], [2.5, 97.5])
    assert plot.interval([x], plot.iqm) == pytest.approx(exact, abs=0.1)
    assert plot.band(pd.Series(x)) == pytest.approx(exact, abs=0.1)
    wins = np.sign(x[:, None] - y) / 2 + 0.5
    exact = []
    for rows in itertools.product(range(5), repeat=5):
        exact += [wins[list(rows)][:, columns].mean() for columns in all_resamples(range(3))]
    exact = np.percentile(exact, [2.5, 97.5])
    assert plot.interval([x, y], plot.improvement) == pytest.approx(exact, abs=0.04)


def test_the_bootstrap_draws_within_each_task_and_always_the_same():
    """Nothing varies within these tasks; between them everything does."""
    low, high, x = np.zeros(4), np.ones(4), np.array([3.0, 1, 7, 4, 4.5])
    assert [*plot.interval([low, high], plot.iqm)] == [0.5, 0.5]
    assert [*plot.interval([high, low, low, high], plot.improvement)] == [0.5, 0.5]
    assert plot.interval([x], plot.iqm) == plot.interval([x], plot.iqm)


def table_of(*runs, family="AC"):
    """Runs as plot.py has them: (environment, experiment, seed, {step: return})."""
    rows = []
    for environment, experiment, seed, returns in runs:
        leader = "actor" if experiment.startswith("st") else "none"
        for step, value in returns.items():
            rows.append([environment, experiment, seed, step, value, np.nan, np.nan, family, leader, 0.05])
    columns = [*plot.KEY, "step", "return", "ratio", "cosine", "family", "leader", "noise"]
    return plot.in_order(pd.DataFrame(rows, columns=columns))


def test_runs_are_compared_at_the_steps_common_to_all():
    runs = [("E", "a", 1, {20: 2, 30: 3, 40: 4}), ("E", "a", 2, {10: 1, 20: 5, 30: 5, 40: 5})]
    runs.append(("E", "b", 1, {10: 0, 30: 9}))  # nothing at 20: each run has points of its own
    scores, last = plot.score(table_of(*runs), ["a", "b"])
    assert last == 30 and scores.loc["a"].values.tolist() == [[3, 2.5], [5, (3 * 10 + 5 * 10) / 20]]
    assert scores.loc["b"].values.tolist() == [[9, 4.5]]
    scores, last = plot.score(table_of(*runs), ["a"])
    assert last == 40 and scores.loc["a"].values.tolist() == [[4, 3], [5, (3 * 10 + 5 * 20) / 30]]
    for returns in (
        {10: 1},
        {10: 1, 28: 3},
    ):  # step 10: before the other begins; step 28: the other has 20, long before
        with pytest.raises(SystemExit, match=r"E: a, seed \d, has no return shortly before step"):
            plot.score(table_of(runs[0], ("E", "b", 1, returns)), ["a", "b"])


def test_scores():
    scores, _ = plot.score(table_of(("E", "a", 1, {10: 0, 20: 10, 40: 4})), ["a"])
    assert scores.values.tolist() == [[4, (50 + 140) / 30]]  # intervals of unequal length
    scores, _ = plot.score(table_of(("E", "a", 1, {step: step for step in range(1, 101)})), ["a"])
    assert scores.values.tolist() == [[np.mean(range(91, 101)), 50.5]]
    scores, _ = plot.score(table_of(("E", "a", 1, {10: 7})), ["a"])
    assert scores.values.tolist() == [[7, 7]]


# plot.py: tables
def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def report_of(*runs):
    runs = table_of(*runs)
    flags = {}
    for environment, experiment, leader in zip(runs.environment, runs.experiment, runs.leader):
        flags[environment, experiment] = {"leader": leader, "policy_lr": "0.2" if "2x" in experiment else "0.1"}
    return rows(plot.report(runs, flags))


def test_a_shorter_experiment_does_not_cut_the_others():
    ends = {"ac": 40, "stac": 40, "stac-short": 20}
    runs = []
    for seed, (name, end) in enumerate(ends.items()):
        runs.append(("E", name, seed, {10: seed, **{step: seed + 9 for step in range(20, end + 1, 10)}}))
    table = report_of(*runs)
    expected = [("20", "ac", 9, 4.5), ("20", "stac", 10, 5.5), ("20", "stac-short", 11, 6.5)]
    expected += [("40", "ac", 9, 7.5), ("40", "stac", 10, 8.5)]
    assert [(*row[1:3], *map(float, row[4:])) for row in table[2:7]] == expected
    pairs = [("40", "stac over ac"), ("20", "stac-short over ac"), ("20", "stac-short over stac")]
    assert [tuple(row[1:3]) for row in table[9:]] == pairs


def two_tasks(*seeds):
    """Two tasks with so many seeds of `ac` and `stac`, whose returns are known."""
    runs = []
    for environment, number, low in (("A-v0", seeds[0], 0), ("B-v0", seeds[1], 3)):
        for seed in range(low, low + number):
            runs.append((environment, "ac", seed, {10: seed, 20: seed}))
            runs.append((environment, "stac", seed, {10: seed + 0.5, 20: seed + 0.5}))
    return runs


def test_report():
    table = report_of(*two_tasks(5, 3), ("A-v0", "stac-x", 1, {10: 99, 20: 99}))  # the best of A-v0
    scores = {(row[0], row[2]): row[3:] for row in table if len(row) == 6 and " over " not in row[2]}
    assert scores["A-v0", "ac"][0] == "5" and scores["A-v0", "ac"][1].startswith("2.00 (")
    assert scores["A-v0", "stac-x"] == ["1 †", "99.00", "99.00"]  # one seed has no interval
    assert scores["B-v0", "stac"][0] == "3 †" and scores["B-v0", "stac"][1].startswith("4.500 (")
    # ac: 0, 1, 2, 3, 4 of 0 to 4.5 and 3, 4, 5 of 3 to 5.5
    assert scores["2 tasks", "ac"][0] == "3 to 5 †"
    assert scores["2 tasks", "ac"][1].startswith(f"{(2 / 4.5 + 1 / 2.5) / 2:.3f} (")
    assert ("2 tasks", "stac-x") not in scores
    improvements = {row[0]: row[3:] for row in table if row[2] == "stac over ac"}
    assert improvements["A-v0"][0] == "5" and improvements["A-v0"][1].startswith("0.60 (")  # 15 of 25 pairs
    assert improvements["B-v0"][0] == "3 †" and improvements["B-v0"][1].startswith("0.67 (")  # 6 of 9
    assert improvements["2 tasks"][0] == "3 to 5 †" and improvements["2 tasks"][1].startswith("0.63 (")
    # each seed of stac has 0.5 more than the same seed of ac, which is 0.5 / 4.5 and 0.5 / 2.5 when scaled
    assert improvements["A-v0"][3:] == improvements["B-v0"][3:] == ["0.500 (0.500 to 0.500)"] * 2
    assert improvements["2 tasks"][3:] == ["0.156 (0.156 to 0.156)"] * 2


def test_gains_are_of_the_seeds_that_both_have():
    """Also where all scores of a task are the same, and cannot be scaled."""
    runs = [("A-v0", "ac", seed, {10: seed}) for seed in range(5)]
    runs += [("A-v0", "stac", seed, {10: 2 * seed}) for seed in range(4, 9)]
    runs += [("B-v0", name, seed, {10: 7}) for name, seeds in (("ac", (1, 2)), ("stac", (3, 4))) for seed in seeds]
    pairs = {row[0]: row[3:] for row in report_of(*runs) if row[2] == "stac over ac"}
    assert pairs["A-v0"][0] == "1 to 5 †" and pairs["A-v0"][3:] == ["4.00"] * 2
    assert pairs["B-v0"] == ["0 to 2 †", "0.50 (0.50 to 0.50)", "0.50 (0.50 to 0.50)", "", ""]
    assert pairs["2 tasks"][0] == "0 to 5 †" and pairs["2 tasks"][1].startswith("0.75 (") and pairs["2 tasks"][3] == ""


def test_an_interval_does_not_depend_on_other_tasks():
    """A bootstrap is drawn, and a new run must not change what was published of the others."""
    before, after = (report_of(*two_tasks(first, 20)) for first in (5, 6))
    before, after = ([row for row in table if row[0] == "B-v0"] for table in (before, after))
    assert len(before) == 3 and before == after


def test_what_a_version_is_held_against():
    """The plain one with the same other flags; and `stac-gn-mean` is an experiment on `stac-gn`."""
    names = ["ac", "ac-2x", "stac", "stac-2x", "stac-gn", "stac-gn-mean", "stac2"]
    table = report_of(*(("E", name, seed, {10: seed}) for name in names for seed in range(2)))
    pairs = {row[2] for row in table if " over " in row[2]}
    expected = {"stac-2x over ac-2x", "stac-2x over stac", "stac-gn over stac", "stac-gn-mean over stac-gn"}
    expected.add("ac-2x over ac")
    assert pairs == expected | {f"{name} over ac" for name in ("stac", "stac-gn", "stac-gn-mean", "stac2")}


def test_leaders_are_held_against_each_other():
    """The actor against the critic, at the same λ and tau, however their systems are solved."""
    flags = {"none": {"leader": "none", "tau": "0.1"}}
    for lam in ("1", "500"):
        flags[f"actor-{lam}"] = {"leader": "actor", "lam": lam, "tau": "0.1", "curvature": "gauss-newton"}
        flags[f"critic-{lam}"] = {"leader": "critic", "lam": lam, "tau": "0.1", "curvature": "hessian"}
    flags["critic-7"] = flags["critic-1"] | {"tau": "0.2"}
    flags["actor-7"] = flags["actor-1"] | {"lam": "7"}
    found = {name: [*plot.others(name, flags)] for name in flags}
    assert found["actor-1"] == ["none", "critic-1"] and found["actor-500"] == ["none", "critic-500"]
    assert found["critic-1"] == found["critic-500"] == found["actor-7"] == ["none"]
    assert found["none"] == found["critic-7"] == []


# plot.py: the figure, the command line
def test_figure(here, monkeypatch):
    """Twelve panels, each with its seeds and steps; one colour a role, and its dashes tell the experiments apart."""
    runs = [
        ("CartPole-v1", name, seed, {4000 * i: i for i in range(1, 11)})
        for name in ("ac-m1", "ac-m80")
        for seed in (1, 2)
    ]
    runs += [("CartPole-v1", name, 1, {20000: 1}) for name in ("ac-2x-m80", "stac-released-m1", "stac-x")]
    runs = table_of(*runs)
    monkeypatch.setattr(plot.plt.Figure, "savefig", lambda *args, **options: None)
    plot.draw(runs, "figure3.png", "return", "return", {"estimator": plot.iqm, "errorbar": plot.band})
    figure = plot.plt.gcf()
    panels = [axes.get_title() for axes in figure.axes]
    assert panels[0] == "CartPole-v1\n1 to 2 seeds, 20k to 40k steps, noise 0.05"
    tasks = ["Hopper-v4", "Reacher-v4", "Walker2d-v4"]
    assert panels[1:] == [*tasks, "HalfCheetah-v4", *tasks, "HalfCheetah-v4", *tasks]
    assert [axes.texts[0].get_text() for axes in figure.axes[1:]] == ["no data"] * 11
    drawn = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    assert [[*line.get_xdata()] for line in drawn[:2]] == [[20000, 40000]] * 2  # five batches a point
    assert [*drawn[0].get_ydata()] == [3, 8]
    legend = {text.get_text(): line for text, line in zip(figure.legends[0].texts, figure.legends[0].get_lines())}
    colours = {name: line.get_color() for name, line in legend.items() if name.strip()}
    assert colours == {
        "AC, m = 1": plot.COLOURS["none"],
        "AC, m = 80": plot.COLOURS["none"],
        "STAC as released, m = 1": plot.COLOURS["actor"],
        "control: AC, 2 × the rate, m = 80": plot.COLOURS["control"],
        "stac-x": plot.COLOURS["actor"],
    }
    dashes = plot.styles(runs)["dashes"]
    assert dashes["ac-m1"] != dashes["ac-m80"] and dashes["stac-released-m1"] != dashes["stac-x"]
    plot.plt.close("all")


def test_lines_are_interquartile_means(monkeypatch):
    runs = table_of(
        *(("Hopper-v4", "sac", seed, {10: value}) for seed, value in enumerate([0, 1, 2, 100])), family="SAC"
    )
    monkeypatch.setattr(plot.plt.Figure, "savefig", lambda *args, **options: None)
    plot.draw(runs, "figure3.png", "return", "return", plot.LINES)
    (line,) = (line for axes in plot.plt.gcf().axes for line in axes.lines if len(line.get_xdata()))
    assert [*line.get_ydata()] == [1.5]
    plot.plt.close("all")


def test_a_start_far_below_all_else_is_cut_off(here, monkeypatch):
    """Not so where returns rise all the time."""
    steep = {10: -1000.0, **{10 * i: float(i) for i in range(2, 31)}}
    runs = table_of(
        ("Reacher-v4", "sac", 1, steep), ("Hopper-v4", "sac", 1, {10 * i: 50.0 * i for i in range(31)}), family="SAC"
    )
    monkeypatch.setattr(plot.plt.Figure, "savefig", lambda *args, **options: None)
    plot.draw(runs, "figure3.png", "return", "return", plot.LINES)
    bottoms = {axes.get_title().split()[0]: axes.get_ylim()[0] for axes in plot.plt.gcf().axes if axes.lines}
    assert 0 < bottoms["Reacher-v4"] < 5 and bottoms["Hopper-v4"] <= 0
    plot.plt.close("all")


def test_nothing_is_cut_off_where_panels_share_an_axis(here, monkeypatch):
    """Else the sizes of the implicit term in other panels could lie outside."""
    runs = table_of(("Hopper-v4", "stsac-al", 1, {10 * i: 1.0 for i in range(30)}), family="SAC")
    runs["ratio"] = [0.001, *[1.0] * 29]
    monkeypatch.setattr(plot.plt.Figure, "savefig", lambda *args, **options: None)
    plot.draw(runs, "terms.png", "ratio", "size", plot.LINES, "log")
    assert {axes.get_ylim()[0] < 0.001 for axes in plot.plt.gcf().axes} == {True}
    plot.plt.close("all")


def test_terms_that_rounding_hides_are_cut_off(here, monkeypatch):
    """Else those of a dead policy, 10⁻¹⁵ of the direct ones, would flatten the others."""
    runs = table_of(("Hopper-v4", "stsac-al", 1, {10 * i: 1.0 for i in range(30)}), family="SAC")
    runs["ratio"] = [1e-15, 0.0, *[1.0] * 28]
    monkeypatch.setattr(plot.plt.Figure, "savefig", lambda *args, **options: None)
    plot.draw(runs, "terms.png", "ratio", "size", plot.LINES, "log")
    low, high = zip(*(axes.get_ylim() for axes in plot.plt.gcf().axes))
    assert set(low) == {plot.ROUNDING} and min(high) > 1
    plot.plt.close("all")


def test_figure_of_terms(here, monkeypatch):
    """Only versions that have both terms, with the dashes that they have among all, and one scale for all panels."""
    runs = table_of(
        *(("Hopper-v4", name, 1, {10: 1, 20: 1}) for name in ("sac", "stsac-al", "stsac-al-gn")), family="SAC"
    )
    runs.loc[runs.experiment == "stsac-al-gn", "ratio"] = [0.5, 2]
    monkeypatch.setattr(plot.plt.Figure, "savefig", lambda *args, **options: None)
    plot.draw(runs, "terms.png", "ratio", "size", {"estimator": "median", "errorbar": ("pi", 100)}, "log")
    figure = plot.plt.gcf()
    panels = [axes for axes in figure.axes if axes.lines]
    assert [axes.get_title() for axes in panels] == ["Hopper-v4\n1 seeds, 20 steps"]
    (line,) = (line for line in panels[0].lines if len(line.get_xdata()))
    assert [*line.get_xdata()] == [10, 20] and [*line.get_ydata()] == pytest.approx([0.5, 2])
    (entry,) = (entry for entry in figure.legends[0].get_lines() if entry.get_label().strip())
    assert entry.get_label() == "STSAC-AL, Gauss–Newton"
    assert line._unscaled_dash_pattern == entry._unscaled_dash_pattern == (0, plot.DASHES[1])
    assert {axes.get_yscale() for axes in figure.axes} == {"log"}
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    plot.plt.close("all")


def test_the_committed_runs_in_the_figure():
    """MuJoCo's of AC come of the study; a role is one colour in all rows, and no experiment is without a name."""
    folder = ROOT / "benchmark" / "results"
    curves, flags = plot.read_csv(folder)
    assert {experiment for _, experiment, _ in curves} <= plot.LABELS.keys()
    runs = table_of(("CartPole-v1", "ac-m1", 1, {10: 1}))
    runs = plot.with_study(runs, flags, folder / "stac_ac_rates.csv")
    added = runs[runs.noise == 0].groupby(["environment", "experiment"], observed=True).seed.nunique()
    names = ["ac-m80", "stac-released-m80", "stac-every-gn-m80", "ac-1.15x-m80"]
    expected = {(task, name): 5 for task in ("Hopper-v4", "Reacher-v4", "Walker2d-v4") for name in names}
    assert added.to_dict() == expected
    assert set(runs.leader[runs.experiment == "stac-every-gn-m80"]) == {"actor"}
    mine = {name: flags["Hopper-v4", name] for name in names}
    found = {name: [*plot.others(name, mine)] for name in names}
    assert found["stac-released-m80"] == ["ac-m80", "ac-1.15x-m80"] and found["stac-every-gn-m80"] == ["ac-m80"]
    assert found["ac-m80"] == found["ac-1.15x-m80"] == []


def test_the_committed_tables_are_those_of_the_committed_runs(here, monkeypatch, capsys):
    """But for the intervals, which take a minute; and the figures are of these runs, in what they should show."""
    folder = ROOT / "benchmark" / "results"
    for name in ("curves.csv", "flags.json", "stac_ac_rates.csv"):
        shutil.copy(folder / name, here)
    drawn = []
    monkeypatch.setattr(plot, "interval", lambda *arguments: (0.0, 0.0))
    monkeypatch.setattr(plot, "draw", lambda runs, *how: drawn.append((len(runs), *how)))
    monkeypatch.setattr(rates, "draw", lambda *arguments: None)
    main(monkeypatch, capsys, "nothing", "--out", ".", "--add")
    monkeypatch.setattr(sys, "argv", ["rates.py", "."])
    rates.main()
    for name in ("table.md", "stac_ac_rates.md"):
        found, committed = (re.sub(r"\([^()]*\)", "()", (path / name).read_text()) for path in (Path(), folder))
        assert found.splitlines() == committed.splitlines()
    for name in ("curves.csv", "flags.json"):  # AC's runs on MuJoCo stay out of them
        assert Path(name).read_bytes() == (folder / name).read_bytes()
    middle = {"estimator": "median", "errorbar": ("pi", 100)}
    expected = [(Path("figure3.png"), "return", "return", plot.LINES)]
    expected += [(Path("terms.png"), "ratio", "|implicit| / |direct|", middle, "log")]
    assert [call[1:] for call in drawn] == expected
    assert min(call[0] for call in drawn) > len(pd.read_csv("curves.csv"))


def main(monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["plot.py", *options])
    plot.main()
    return capsys.readouterr()


def test_command_line(here, capsys, monkeypatch):
    for seed in (1, 2):
        write_run("ddpg", seed, [0.1 + seed, -2e-7, 1234567.0])
        write_run("ac-m1", seed, [2, 3], AC)
    out, err = main(monkeypatch, capsys, "runs", "--out", "a/b")
    assert out == Path("a/b/table.md").read_text() + "\n" and "4 runs" in err
    assert plot.plt.imread("a/b/figure3.png").std() > 0.01 and not Path("a/b/terms.png").exists()
    curves = Path("a/b/curves.csv").read_text().splitlines()
    assert curves[0] == "environment,experiment,seed,step,return,ratio,cosine" and len(curves) == 1 + 10
    expected = ["10,1.1,,", "20,-2e-07,,", "30,1234567,,"]
    assert curves[5:8] == [f"Hopper-v4,ddpg,1,{row}" for row in expected]

    # three more runs, one of them instead of an earlier one; the folder has no other
    Path("runs").rename("earlier")
    for seed in (1, 2):
        write_run("stac-every-m1", seed, [3, 4], AC | {"leader": "actor"}, {10: (1, 1, 0.5), 20: (3, 2 * seed, -0.5)})
    write_run("ac-m1", 2, [7, 9], AC)
    out, err = main(monkeypatch, capsys, "runs", "--out", "a/b", "--add")
    assert "6 runs" in err and plot.plt.imread("a/b/terms.png").std() > 0.01
    (terms,) = (
        row for row in rows(out) if row[2] == "STAC, every state, m = 1" and len(row) == 6 and "(" not in row[4]
    )
    assert terms == ["CartPole-v1", "20", "STAC, every state, m = 1", "2 †", "0.67 to 1.3", "−0.5 to −0.5"]
    (ac,) = (row for row in rows(out) if row[2] == "AC, m = 1")
    assert ac[4].startswith("6.000 (")  # (3 + 9) / 2
    curves = Path("a/b/curves.csv").read_text()
    assert "CartPole-v1,stac-every-m1,2,20,4,1.333,-0.5\n" in curves
    flags = json.loads(Path("a/b/flags.json").read_text())
    assert flags["CartPole-v1__stac-every-m1"]["leader"] == "actor" and flags["Hopper-v4__ddpg"]["lam"] == "500.0"
    again, _ = main(monkeypatch, capsys, "a/b", "--out", "a/b", "--add")  # of the CSV alone
    assert again == out and Path("a/b/curves.csv").read_text() == curves
    assert "3 runs" in main(monkeypatch, capsys, "runs", "--out", "a/b")[1]
    with pytest.raises(SystemExit, match="no finished run in none"):
        main(monkeypatch, capsys, "none")


# rates.py
def test_an_unknown_arm_is_not_left_out(here):
    row = {"environment": "E", "noise": 0.0, "m": 1, "arm": "STAC, other", "rate": 0.1, "seed": 1, "step": 1}
    pd.DataFrame([row | {"return": 0.0, "ratio": 1.0, "cosine": 1.0}]).to_csv("stac_ac_rates.csv", index=False)
    with pytest.raises(SystemExit, match="unknown arms: STAC, other"):
        rates.read("stac_ac_rates.csv")


def test_rates(here, monkeypatch, capsys):
    """The best rate is chosen by the seeds up to 10, and the others are compared."""
    study = []

    def add(arm, rate, seed, returns, ratios=(np.nan, np.nan), m=1):
        for i, (value, ratio) in enumerate(zip(returns, ratios)):
            study.append(["CartPole-v1", 0.0, m, arm, rate, seed, 50 * i + 50, value, ratio, ratio / 4])

    for seed, low in ((1, 10), (2, 12), (11, -40), (12, -30), (13, 0), (14, 500)):  # 0.1: the best of the first two
        add("AC", 0.1, seed, [low, low + 10])
        add("AC", 0.2, seed if seed < 10 else seed + 10, [10.0 * (seed < 10)] * 2)
    add("AC", 0.4, 1, [1, 1])
    for seed in (1, 2, 11, 12):  # one rate: all seeds are compared
        add("STAC, batch", 0.1, seed, [12, 12] if seed < 10 else [0, -25], [2, 0])
    for rate, value in ((0.1, 5.0), (0.2, 7.0)):  # seeds that choose, and no others
        add("AC", rate, 3, [value] * 2, m=80)
    columns = ["environment", "noise", "m", "arm", "rate", "seed", "step", "return", "ratio", "cosine"]
    pd.DataFrame(study, columns=columns).to_csv("stac_ac_rates.csv", index=False)
    monkeypatch.setattr(sys, "argv", ["rates.py", "."])
    rates.main()
    table = [row for row in rows(capsys.readouterr().out) if row[0] != "---"]
    title = "CartPole-v1, m = 1"
    assert table[0] == ["task", "run", "seeds", "0.1", "0.2", "0.4"]
    assert table[1] == [title, "AC", "2", "**16.0 (15.0 to 17.0)**", "10.0 (10.0 to 10.0)", "1.0 (1.0 to 1.0) (1 †)"]
    assert table[2] == ["CartPole-v1, m = 80", "AC", "1", "5.00 (5.00 to 5.00)", "**7.00 (7.00 to 7.00)**", ""]
    ac, released, ac_80 = table[4:7]
    assert ac[:4] == [title, "AC", "0.1 ‡", "4 †"] and ac[4].startswith("−5.0 (")  # without −30 and 510
    assert ac[5].startswith("−10.0 (") and ac[6:] == [""] * 4
    assert released[:4] == [title, "STAC, released", "0.1", "4 †"]
    # beats 3 and 1 of -30, -20, 10, 510, and in the area 3 and 2 of -35, -25, 5, 505
    starts = ["−6.5 (", "−0.2 (", "0.50 (", "0.62 ("]
    assert all(cell.startswith(start) for cell, start in zip(released[4:8], starts))
    assert released[8:] == ["1 to 1", "0.25 to 0.25"]
    assert ac_80[:4] == ["CartPole-v1, m = 80", "AC", "0.2 ‡ §", "1 †"]
    # at 0.1 the areas are 2 × 12, and AC's at 0.2 are 2 × 10 (and at 0.1 more)
    assert table[8] == [title, "STAC, released", "2 †", "0.1/0.2", "1.00 (1.00 to 1.00)"]
    for name in ("stac_ac_rates.png", "stac_ac_curves.png"):  # m = 80, and m = 1 with an arm of one rate
        assert plot.plt.imread(name).std() > 0.01
