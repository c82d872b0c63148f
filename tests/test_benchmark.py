"""benchmark/: the launchers on tiny runs that are killed and carried on, and plot.py against numbers known by hand."""

import csv
import dataclasses
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter

import stac_ac
import stddpg
import stsac

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
import launch  # noqa: E402
import plot  # noqa: E402
import rates  # noqa: E402


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Launchers
def start(launcher, *options, **variables):
    """A launcher as a user starts it, in a process group of its own."""
    unset = set("ENVS VARIANTS SEEDS STEPS FLAGS TAG WORKERS ARMS RATES UNROLLS SCRIPT".split())
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT / "tests"), **variables}
    line = [ROOT / "benchmark" / launcher, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, env=env, start_new_session=True, **pipes)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def dry_run(launcher, script=None, **variables):
    """The commands, without interpreter and path of the script."""
    code, out, err = finish(start(launcher, "--dry-run", **variables))
    assert code == 0 and err == ""
    lines = [shlex.split(line) for line in out.splitlines()]
    script = str(ROOT / (script or launcher.replace(".sh", ".py")))
    assert all(words[:2] == [sys.executable, script] for words in lines)
    return [" ".join(words[2:]) for words in lines]


def test_commands_of_stac(here):
    common = "--env-id {} --exp-name {} --seed {} --total-timesteps 800000 --leader {} --lam {} --policy-lr {}"
    common += " --critic-lr 0.01 --grad-noise 0.05 --unroll {} --save-model"
    rows = [("ac-m1", "none", 0.1, 1), ("ac-m80", "none", 0.1, 80), ("stac-al-m1", "actor", 0.1, 1)]
    rows += [("stac-al-m80", "actor", 0.1, 80), ("ac-lr0.2-m1", "none", 0.2, 1), ("ac-lr0.2-m80", "none", 0.2, 80)]
    expected = [
        common.format(env, name, seed, leader, 0 if env == "CartPole-v1" else 500, rate, unroll)
        for seed in (1, 2)
        for env in ("CartPole-v1", "Hopper-v4")
        for name, leader, rate, unroll in rows
    ]
    assert dry_run("stac_ac.sh", ENVS="CartPole-v1 Hopper-v4", SEEDS="1 2") == expected


def test_arms_rates_and_critic_steps_of_stac(here):
    games = {"ac": "none", "stac-al-initial": "actor --start-states initial"}
    games |= {"stac-al-batch": "actor --start-states batch", "stac-al-gn": "actor --curvature gauss-newton"}
    line = "--env-id CartPole-v1 --exp-name {0}-lr{2}-m{3} --seed 7 --total-timesteps 9 --leader {1} --lam 0"
    line += " --policy-lr {2} --critic-lr 0.01 --grad-noise 0.05 --unroll {3} --save-model"
    found = dry_run(
        "stac_ac.sh",
        **{"ENVS": "CartPole-v1", "SEEDS": "7", "STEPS": "9"},
        **{"ARMS": " ".join(games), "RATES": "0.03 1.6", "UNROLLS": "1 80"},
    )
    matrix = itertools.product((1, 80), (0.03, 1.6), games)
    assert found == [line.format(arm, games[arm], rate, m) for m, rate, arm in matrix]
    for variant in ("ac", "ac-lr0.1", "sac-m1", "stac-al-foo-m1"):
        code, out, err = finish(start("stac_ac.sh", "--dry-run", VARIANTS=variant))
        assert (code, out) == (2, "") and f"unknown variant '{variant}'" in err and err.count("\n") == 1


@pytest.mark.parametrize("launcher, plain", [("stddpg.sh", "ddpg"), ("stsac.sh", "sac")])
def test_commands_of_the_off_policy_launchers(here, launcher, plain):
    common = "--env-id {} --exp-name {} --seed {} --total-timesteps 1000000 --leader {} --save-model"
    games = {plain: "none", f"st{plain}-al": "actor", f"st{plain}-al-gn": "actor --curvature gauss-newton"}
    games[f"st{plain}-cl"] = "critic"
    envs = ["HalfCheetah-v4", "Hopper-v4", "Reacher-v4", "Walker2d-v4"]
    matrix = itertools.product(range(1, 6), envs, games)
    assert dry_run(launcher) == [common.format(env, name, seed, games[name]) for seed, env, name in matrix]


def test_commands_of_a_control(here):
    line = "--env-id HalfCheetah-v4 --exp-name stsac-al-gn-mean --seed 1 --total-timesteps 1000000 --leader actor"
    variables = {"SCRIPT": "benchmark/stsac_mean.py", "TAG": "-mean", "VARIANTS": "stsac-al-gn"}
    found = dry_run("stsac.sh", script=variables["SCRIPT"], SEEDS="1", ENVS="HalfCheetah-v4", **variables)
    assert found == [line + " --curvature gauss-newton --save-model"]


def test_variables_and_options(here):
    variables = {"ENVS": "a:B-v0", "VARIANTS": "stddpg-cl", "SEEDS": "3", "STEPS": "7", "FLAGS": "--lam 1 --hidden 8 8"}
    line = "--env-id a:B-v0 --exp-name stddpg-cl{} --seed 3 --total-timesteps 7 --leader critic --lam 1 --hidden 8 8"
    # flags make another experiment, with a name of its own
    assert dry_run("stddpg.sh", **variables) == [line.format("-lam-1-hidden-8-8") + " --save-model"]
    assert dry_run("stddpg.sh", **variables, TAG="-x") == [line.format("-x") + " --save-model"]
    assert dry_run("stddpg.sh", **variables, TAG="") == [line.format("") + " --save-model"]
    assert finish(start("stac_ac.sh", "--count")) == (0, f"{4 * 6 * 5}\n", "")


@pytest.mark.parametrize("script", [stac_ac, stddpg, stsac], ids=lambda script: script.__name__)
def test_the_scripts_understand_the_commands(here, script):
    for line in dry_run(f"{script.__name__}.sh", SEEDS="1"):
        args = tyro.cli(script.Args, args=line.split())
        script.check_args(args)
        assert args.save_model and args.leader == ("actor" if "-al" in args.exp_name else args.leader)


@pytest.mark.parametrize(
    "options, variables, expected",
    [
        ([], {"VARIANTS": "stddpg-bl"}, "stddpg-bl"),
        ([], {"SEEDS": "1 1"}, "seed"),
        ([], {"STEPS": "many"}, "STEPS"),
        ([], {"WORKERS": "0"}, "WORKERS"),
        ([], {"ENVS": ""}, "empty"),
        (["--task", "80"], {}, "--task"),
    ],
)
def test_bad_input_of_a_launcher(here, options, variables, expected):
    code, out, err = finish(start("stddpg.sh", *options, **variables))
    assert code == 2 and out == "" and err.count("\n") == 1 and expected in err
    assert not (here / "runs").exists()


def folder_of(name, when, *files, total_timesteps=100):
    folder = Path("runs") / f"{name}__{when}"
    folder.mkdir(parents=True)
    for number, file in enumerate(files):
        torch.save({"args": {"total_timesteps": total_timesteps}}, folder / file)
        os.utime(folder / file, (when, when + number))
    return str(folder)


def test_what_remains_of_a_run(here):
    (run,) = (launch.parse(f"stsac.py --env-id m:E-v0 --exp-name x --seed 1 --total-timesteps {n}") for n in [100])
    longer, name, resume = run._replace(steps=101), "m-E-v0__x__1", lambda folder: (*run.command, "--resume", folder)
    assert run.name == name and launch.remaining(run) == run.command
    folder_of("m-E-v0__x__11", 5, "model.pt")  # another seed
    folder_of("m-E-v0__x__1__2", 6, "model.pt")  # another experiment
    folder_of(name, 9)  # died before its first checkpoint
    assert launch.remaining(run) == run.command
    begun = folder_of(name, 1, "checkpoint.pt")
    assert launch.remaining(run) == resume(begun)
    begun = folder_of(name, 3, "checkpoint.pt")
    folder_of(name, 2, "checkpoint.pt")
    assert launch.remaining(run) == resume(begun)  # the newest
    ended = folder_of(name, 7, "checkpoint.pt", "model.pt")
    assert launch.remaining(run) is None
    assert launch.remaining(longer) == resume(ended)


def test_a_finished_run_without_a_checkpoint_is_made_longer_from_the_start(here):
    run = launch.Run("E__x__1", ("command",), 101)
    folder_of(run.name, 1, "model.pt")
    assert launch.remaining(run) == run.command
    assert launch.remaining(run._replace(steps=100)) is None


def test_the_lock_is_the_runs_own(here):
    """It outlives the launcher, and goes with the process of the run."""
    run = launch.Run("E__x__1", (), 1)
    log = launch.lock(run)
    assert launch.lock(run) is None
    process = launch.start(["sleep", "100"], log)
    log.close()  # as when a launcher is killed
    assert launch.lock(run) is None
    process.kill()
    process.wait()
    assert launch.lock(run) is not None
    assert launch.log_file(run).read_text() == "$ sleep 100\n"


# a run that takes no time, or much, or fails
FAKE = """
import pathlib, shutil, sys, time
args = dict(zip(sys.argv[1:], sys.argv[2:]))
folder = pathlib.Path(f"runs/{args['--env-id']}__{args['--exp-name']}__{args['--seed']}__{time.time_ns()}")
folder.mkdir(parents=True)
(folder / "checkpoint.pt").touch()
if args["--env-id"] == "Slow":
    time.sleep(1000)
if args["--env-id"] == "Bad":
    sys.exit("no such environment")
shutil.copy("finished.pt", folder / "model.pt")
"""


def start_fakes(here, *options, envs, workers=1):
    (here / "fake.py").write_text(FAKE)
    torch.save({"args": {"total_timesteps": 9}}, here / "finished.pt")
    lines = [f"{here}/fake.py --env-id {env} --exp-name x --seed 1 --total-timesteps 9" for env in envs]
    env = {**os.environ, "PYTHON": sys.executable, "WORKERS": str(workers)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    line = [sys.executable, ROOT / "benchmark" / "launch.py", *options]
    process = subprocess.Popen(line, env=env, start_new_session=True, **pipes)
    process.stdin.write("\n".join(lines))
    process.stdin.close()
    process.stdin = None
    return process


def test_a_run_that_fails_does_not_stop_the_others(here):
    code, out, err = finish(start_fakes(here, envs=["A", "Bad", "B"]))
    assert code == 1
    assert err.count("\n") == 1 and "Bad__x__1" in err and "A__x__1" not in err
    assert "failed: Bad__x__1 (no such environment; see runs/logs/Bad__x__1.log)" in out
    assert "2/3 runs finished" in out.splitlines()[-1] and str(here / "runs") in out
    assert len(list(here.glob("runs/[AB]__*/model.pt"))) == 2


def test_one_task_of_the_matrix(here):
    code, out, err = finish(start_fakes(here, "--task", "1", envs=["A", "B"]))
    assert (code, err) == (0, "")
    assert [path.parent.name[:6] for path in here.glob("runs/*/model.pt")] == ["B__x__"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_stops_the_runs(here, number):
    process = start_fakes(here, envs=["Slow"])
    run = launch.Run("Slow__x__1", (), 9)
    wait_for(lambda: list(here.glob("runs/*/checkpoint.pt")), process)
    assert launch.lock(run) is None
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 130 and err.count("\n") == 1
    assert launch.lock(run) is not None  # so nothing is left of it


def wait_for(condition, process):
    deadline = time.time() + 300
    while not condition():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)


def points(run_dir):
    """Steps and returns of a run, from its log."""
    lines = re.findall(r"(?m)^step (\d+): batch return (-?[\d.]+)", (run_dir / "log.txt").read_text())
    return [int(step) for step, _ in lines], [float(value) for _, value in lines]


def test_killed_launcher_carries_on(here):
    """SIGKILL of a launcher and all its runs, then two launchers at once: each run comes to its end, none twice."""
    matrix = {"ENVS": "point_env:Compass-v0", "VARIANTS": "stac-al-m1", "SEEDS": "1 2 3", "STEPS": "20000", "TAG": ""}
    matrix["FLAGS"] = "--num-steps 200 --hidden 8 --checkpoint-every 1000 --no-cuda"
    first = start("stac_ac.sh", **matrix, WORKERS="2")
    wait_for(lambda: len(list(here.glob("runs/*/checkpoint.pt"))) == 2, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    begun = list(here.glob("runs/*__*"))
    assert len(begun) == 2 and not list(here.glob("runs/*/model.pt"))  # killed in their midst
    resumed = [line for line in dry_run("stac_ac.sh", **matrix) if "--resume" in line]
    assert [line.rsplit(" ", 1)[1] for line in resumed] == [f"runs/{path.name}" for path in sorted(begun)]

    both = [start("stac_ac.sh", **matrix) for _ in range(2)]
    for code, out, err in map(finish, both):
        assert (code, err) == (0, ""), out
        assert "3/3 runs finished" in out.splitlines()[-1]
    runs = sorted(here.glob("runs/*__*"))
    assert len(runs) == 3 and set(begun) < set(runs) and all((path / "model.pt").exists() for path in runs)
    logs = [path.read_text() for path in sorted(here.glob("runs/logs/*.log"))]
    assert [log.count("$ ") for log in logs] == [2, 2, 1]
    assert [log.count("--resume runs/") for log in logs] == [1, 1, 0]
    assert all(points(path)[0] == list(range(200, 20001, 200)) for path in runs)

    assert dry_run("stac_ac.sh", **matrix) == []

    # and the curves are those of three whole runs
    for run, path in zip(plot.read([here / "runs"], unfinished=False), runs):
        steps, returns = points(path)
        assert list(run.steps) == steps and run.returns == pytest.approx(returns, abs=0.006)
        assert run[:3] == ("AC, STAC", "point_env:Compass-v0", "stac-al-m1")


# plot.py: reading
DDPG = {"env_id": "Hopper-v4", "leader": "none", "exploration_noise": 0.1, "lam": 500.0, "total_timesteps": 1000}
AC = {"env_id": "CartPole-v1", "leader": "none", "num_steps": 4000, "policy_lr": 0.1, "total_timesteps": 1000}


def write_run(experiment, seed, returns, flags=DDPG, when=1, files=("checkpoint.pt", "model.pt"), extra=()):
    """A run's folder with an evaluation every 10 steps; then what `extra` adds: (purge_step, {step: return})."""
    path = Path("runs") / f"{flags['env_id']}__{experiment}__{seed}__{when}"
    path.mkdir(parents=True)
    tag = "charts/batch_return" if "num_steps" in flags else "eval/episodic_return"
    for purge_step, points in [(None, {10 * i + 10: value for i, value in enumerate(returns)}), *extra]:
        writer = SummaryWriter(str(path), purge_step=purge_step, filename_suffix=str(purge_step))
        if purge_step is None:
            rows = {"exp_name": "", "seed": seed, **flags}
            table = "\n".join(f"|{name}|{value}|" for name, value in rows.items())
            writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        for step, value in points.items():
            writer.add_scalar(tag, value, step)
        writer.close()
    for file in files:
        (path / file).touch()
    return path


def read(capsys, unfinished=False):
    return plot.read([Path("runs")], unfinished), capsys.readouterr().err


def test_reads_every_point(here):
    """TensorBoard itself keeps a sample of ten thousand."""
    returns = np.arange(12_000)
    run = plot.read_run(write_run("ddpg", 3, returns))
    assert run[:4] == ("DDPG, STDDPG", "Hopper-v4", "ddpg", 3) and run.flags["lam"] == "500.0"
    assert np.array_equal(run.steps, 10 * returns + 10) and np.array_equal(run.returns, returns)


def test_resumed_run_has_no_point_twice(here, caplog):
    """The killed run wrote steps 40 and 50 after its checkpoint at 30, and was killed and resumed once more."""
    extra = [(31, {40: 4.5, 50: 5.5, 60: 6.5}), (51, {60: 6.25, 70: 7.25})]
    run = plot.read_run(write_run("ddpg", 1, [1, 2, 3, 4, 5], extra=extra))
    assert list(run.steps) == [10, 20, 30, 40, 50, 60, 70]
    assert list(run.returns) == [1, 2, 3, 4.5, 5.5, 6.25, 7.25]
    assert not caplog.records  # TensorBoard finds this worth a long warning


def test_which_runs_count(here, capsys):
    write_run("ddpg", 1, [1, 2, 3], when=5)
    write_run("ddpg", 1, [1, 2, 3, 4], when=6, files=())  # died before its first checkpoint
    write_run("ddpg", 2, [5, 6], files=["checkpoint.pt"])
    write_run("ddpg", 3, [7])
    write_run("ddpg", 3, [7, 8], when=2)
    write_run("ddpg", 4, [])
    (Path("runs") / "logs").mkdir()
    runs, err = read(capsys)
    assert [(run.seed, list(run.returns)) for run in runs] == [(1, [1, 2, 3]), (3, [7, 8])]
    assert "not finished: runs/Hopper-v4__ddpg__2__1 (step 20 of 1,000)" in err
    assert "more than one run of ddpg, Hopper-v4, seed 3" in err and "no returns yet: runs/Hopper-v4__ddpg__4" in err
    runs, err = read(capsys, unfinished=True)
    assert [(run.seed, len(run.steps)) for run in runs] == [(1, 3), (2, 2), (3, 2)] and "not finished" not in err


def test_runs_of_one_name_with_unequal_flags(here, capsys):
    write_run("ddpg", 1, [1])
    write_run("ddpg", 2, [1], {**DDPG, "lam": 100.0})
    with pytest.raises(SystemExit):
        plot.group(plot.read([Path("runs")], False))
    assert "lam is 500.0 with seed 1, 100.0 with seed 2" in capsys.readouterr().err


def write_terms(path, points):
    """Adds what a Stackelberg version logs: {step: (|direct|, |implicit|, cosine)}."""
    writer = SummaryWriter(str(path), filename_suffix="terms")
    for step, values in points.items():
        for tag, value in zip(("direct_norm", "implicit_norm", "cosine"), values):
            writer.add_scalar(f"stackelberg/{tag}", value, step)
    writer.close()


def test_terms(here):
    """Medians over what came since the last return, that step included; a policy that has died has no gradient."""
    path = write_run("stddpg-al", 1, [1, 2, 3, 4], {**DDPG, "leader": "actor"})
    points = {
        2: (1, 8, 0.5),
        5: (2, 2, 0.25),
        10: (4, 2, -1),
        11: (2, 6, 1),
        20: (4, 4, 0),
        33: (0, 0, 0),
        41: (1, 9, 1),
    }
    write_terms(path, points)
    run = plot.read_run(path)
    assert np.array_equal(run.terms, [[1, 0.25], [2, 0.5], [np.nan, np.nan], [0, 0]], equal_nan=True)
    assert np.isnan(plot.read_run(write_run("ddpg", 1, [1, 2])).terms).all()


def test_curves_csv(here):
    write_run("ddpg", 1, [0.1, -2e-7, 1234567.0])
    write_terms(write_run("stddpg-al", 2, [3.5], {**DDPG, "leader": "actor"}), {10: (2, 1, 0.1234567)})
    runs = plot.read([Path("runs")], False)
    plot.write(runs, here)
    rows = list(csv.DictReader(open("curves.csv")))
    assert list(rows[0]) == ["environment", "experiment", "seed", "step", "return", "ratio", "cosine"]
    assert [(row["ratio"], row["cosine"]) for row in rows] == [("", "")] * 3 + [("0.5", "0.1235")]
    back = [(row["environment"], row["experiment"], int(row["seed"]), int(row["step"])) for row in rows]
    expected = [("Hopper-v4", "ddpg", 1, step) for step in (10, 20, 30)] + [("Hopper-v4", "stddpg-al", 2, 10)]
    assert back == expected
    assert [float(row["return"]) for row in rows] == pytest.approx([0.1, -2e-7, 1234567.0, 3.5], rel=1e-6)
    again = plot.read([], False, plot.read_csv(here))
    assert [run[:4] for run in again] == [run[:4] for run in runs]
    assert again[1].flags["leader"] == "actor" and not plot.NEUTRAL & set(again[1].flags)
    plot.write(again, here)
    assert list(csv.DictReader(open("curves.csv"))) == rows


# plot.py: statistics
def test_interquartile_mean():
    assert plot.iqm(np.array([8.0, 1, 7, 2, 6, 3, 5, 4])) == 4.5  # 3, 4, 5, 6
    assert plot.iqm(np.array([100.0, 1, 2, 3, -100])) == 2.0  # one dropped at each end
    assert plot.iqm(np.array([1.0, 2, 6])) == 3.0  # a quarter of three is none
    assert list(plot.iqm(np.array([[0.0, 0, 2, 9], [9.0, 4, 4, 0]]))) == [1, 4]


def test_probability_of_improvement():
    assert plot.improvement(np.array([1, 2]), np.array([0, 2])) == (1 + 0 + 1 + 0.5) / 4
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 4, 7), rng.integers(0, 4, 5)
    wins = sum((a > b) + 0.5 * (a == b) for a in x for b in y)
    assert plot.improvement(x, y) == pytest.approx(wins / 35)
    assert plot.improvement(x, y) + plot.improvement(y, x) == pytest.approx(1)


def test_scores():
    steps, returns = np.array([10, 20, 40]), np.array([[0.0, 10, 4], [5, 5, 5]])
    assert list(plot.area_under_curve(steps, returns)) == [(50 + 140) / 30, 5]  # intervals of unequal length
    assert list(plot.area_under_curve(steps[:1], returns[:, :1])) == [0, 5]
    steps = np.arange(1, 101)
    assert plot.final_score(steps, np.array([steps]))[0] == np.mean(range(91, 101))
    assert plot.final_score(np.array([50, 100]), np.array([[1.0, 2]]))[0] == 2


def all_resamples(values):
    """Every draw with replacement: [n^n, n]."""
    return np.array(list(itertools.product(values, repeat=len(values))))


def test_intervals_are_those_of_all_resamples():
    rng, x, y = np.random.default_rng(2), np.array([3.0, 1, 7, 4, 4.5]), np.array([2.0, 3.5, 3.6])
    quantiles = [2.5, 97.5]
    exact = np.percentile(plot.iqm(all_resamples(x)), quantiles)
    value, interval = plot.iqm_interval([x], rng)
    assert value == plot.iqm(x) and interval == pytest.approx(exact, abs=0.1)
    returns = np.stack([x, -10 * x], axis=1)
    exact = np.percentile(all_resamples(x).mean(1), quantiles)
    assert plot.mean_interval(returns, rng)[:, 0] == pytest.approx(exact, abs=0.2)
    assert plot.mean_interval(returns, rng)[:, 1] == pytest.approx(-10 * exact[::-1], abs=2)
    exact = np.percentile([plot.improvement(a, b) for a in all_resamples(x) for b in all_resamples(y)], quantiles)
    value, interval = plot.improvement_interval([(x, y)], rng)
    assert value == plot.improvement(x, y) and interval == pytest.approx(exact, abs=0.04)


def test_the_bootstrap_draws_within_each_task():
    """Nothing varies within these tasks; between them everything does."""
    rng, low, high = np.random.default_rng(0), np.zeros(4), np.ones(4)
    value, interval = plot.iqm_interval([low, high], rng)
    assert value == 0.5 and list(interval) == [0.5, 0.5]
    value, interval = plot.improvement_interval([(high, low), (low, high)], rng)
    assert value == 0.5 and list(interval) == [0.5, 0.5]
    # and a task counts as one, however many seeds it has
    assert plot.improvement_interval([(high, low), (np.zeros(1), np.ones(9))], rng)[0] == 0.5


def fake(experiment, seed, steps, returns, environment="E-v0", **flags):
    flags = {"leader": "none", "policy_lr": "0.1", "gamma": "0.99", "lam": "0", **flags}
    terms = np.full((len(steps), 2), np.nan)
    return plot.Run("AC, STAC", environment, experiment, seed, flags, np.array(steps), np.array(returns, float), terms)


def test_runs_are_compared_at_the_steps_common_to_all():
    runs = [fake("a", 1, [20, 30, 40], [2, 3, 4]), fake("a", 2, [10, 20, 30, 40], [1, 5, 5, 5])]
    runs.append(fake("b", 1, [10, 30], [0, 9]))  # nothing at 20
    steps, returns = plot.align(runs)
    assert list(steps) == [20, 30] and returns.tolist() == [[2, 3], [5, 5], [4.5, 9]]
    scores, horizon = plot.score({"a": runs[:2], "b": runs[2:]})
    assert horizon == 30
    assert list(scores["a"]["final score"]) == [3, 5] and list(scores["b"]["area under the curve"]) == [6.75]


def test_a_shorter_experiment_does_not_cut_the_others():
    runs = {"ac": (40, {}), "stac": (40, {"leader": "actor"}), "stac-short": (20, {"leader": "actor"})}
    panel = {
        name: [fake(name, seed, range(10, last + 1, 10), [seed, *[seed + 9] * (last // 10 - 1)], **flags)]
        for seed, (name, (last, flags)) in enumerate(runs.items())
    }
    assert [list(part) for part in plot.by_length(panel)] == [["ac", "stac", "stac-short"], ["ac", "stac"]]
    table = rows(plot.report({"AC, STAC": {"E-v0": panel}}))
    scores = [row[1:2] + row[3:] for row in table if row[0] == "E-v0" and row[2] not in runs]
    expected = [("ac", 20, 9, 4.5), ("stac", 20, 10, 5.5), ("stac-short", 20, 11, 6.5)]
    expected += [("ac", 40, 9, 7.5), ("stac", 40, 10, 8.5)]
    assert [[row[0], *map(float, row[1:])] for row in scores] == [list(row) for row in expected]
    improvements = [row[1:5] for row in table if row[2] in runs]
    shorter = [["stac-short", other, "1 †", "20"] for other in ("ac", "stac")]
    assert improvements == [["stac", "ac", "1 †", "40"], *shorter]


def test_over_tasks_are_the_experiments_that_each_has():
    names = {"A-v0": ["ac", "stac", "stac-x"], "B-v0": ["ac", "stac"]}
    flags = {"ac": {}, "stac": {"leader": "actor"}, "stac-x": {"leader": "actor"}}
    panels = {
        task: {name: [fake(name, 1, [10, 20], [len(name)] * 2, task, **flags[name])] for name in mine}
        for task, mine in names.items()
    }
    table = rows(plot.report({"AC, STAC": panels}))
    # stac-x is the best run of A-v0, and does not count where the tasks are taken together
    both = [row for row in table if row[0] == "2 tasks, 0 to 1"]
    assert [row[1] for row in both] == ["ac", "stac"] and [float(row[4]) for row in both] == [0, 1]


def test_the_plain_version_has_the_same_other_flags():
    names = {"ac": {}, "ac-2x": {"policy_lr": "0.2"}, "stac": {"leader": "actor", "lam": "500"}}
    names["stac-2x"] = {"leader": "actor", "policy_lr": "0.2"}
    names["stac-3x"] = {"leader": "actor", "policy_lr": "0.3"}
    panel = {name: [fake(name, 1, [1], [1], **flags)] for name, flags in names.items()}
    found = {name: plot.plain(panel[name][0], panel) for name in names if "st" in name}
    assert found == {"stac": "ac", "stac-2x": "ac-2x", "stac-3x": None}


@pytest.mark.parametrize("script", [stac_ac, stddpg, stsac])
def test_the_flags_that_plain_versions_may_have_differently(script):
    """All of the game's, and those that no result hangs on: the ones that may change when a run is carried on."""
    fields = [field.name for field in dataclasses.fields(script.Args)]
    game = set(fields[fields.index("leader") :]) - {"unroll"}  # `none` takes m follower steps, too
    assert plot.GAME & set(fields) == game
    assert plot.NEUTRAL & set(fields) == {*fields[: fields.index("env_id")], "total_timesteps"}


def test_smoothing():
    assert plot.smoothed(np.array([[1.0, 2, 3, 10]]), 2).tolist() == [[1, 1.5, 2.5, 6.5]]
    assert plot.smoothed(np.array([[1.0, 2, 3, 10]]), 1).tolist() == [[1, 2, 3, 10]]


# plot.py: what it says
def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def report_of(*seeds):
    """The report on two tasks with so many seeds of `ac` and `stac`, whose returns are known."""
    runs = []
    for environment, number in zip(["A-v0", "B-v0"], seeds):
        for seed in range(number):
            runs.append(fake("ac", seed, [10, 20], [seed, seed], environment))
            runs.append(fake("stac", seed, [10, 20], [seed + 0.5] * 2, environment, leader="actor"))
    return plot.report(plot.group(runs))


def test_report():
    table = rows(report_of(5, 3))
    scores = {tuple(row[:2]): row[2:] for row in table if row[2] != "ac"}
    assert scores["A-v0", "ac"][:2] == ["5", "20"] and scores["A-v0", "ac"][2].startswith("2.000 (")
    assert scores["B-v0", "stac"][:2] == ["3 †", "20"] and scores["B-v0", "stac"][2].startswith("1.500 (")
    # ac: 0, 1, 2, 3, 4 of 0 to 4.5 and 0, 1, 2 of 0 to 2.5; without the best and the worst two
    pool = sorted([*(x / 4.5 for x in range(5)), *(x / 2.5 for x in range(3))])
    assert scores["2 tasks, 0 to 1", "ac"][2].startswith(f"{np.mean(pool[2:-2]):.3f} (")
    assert scores["2 tasks, 0 to 1", "ac"][0] == "3 to 5 †"
    improvements = {row[0]: row[1:] for row in table if row[2] == "ac"}
    assert improvements["A-v0"][2:4] == ["5", "20"] and improvements["A-v0"][4].startswith("0.60 (")  # 15 of 25 pairs
    assert improvements["B-v0"][2] == "3 †" and improvements["B-v0"][4].startswith("0.67 (")  # 6 of 9
    assert improvements["2 tasks"][2] == "3 to 5 †" and improvements["2 tasks"][4].startswith("0.63 (")


def test_a_version_is_compared_with_the_one_whose_name_it_extends():
    """`stac-gn-mean` is an experiment on `stac-gn`: this is what it has to be held against, beside the plain one."""
    names, runs = ["ac", "ac-2x", "stac", "stac-gn", "stac-gn-mean", "ac-al", "stac2"], []
    for i, name in enumerate(names):
        leader = "none" if name in ("ac", "ac-2x") else "actor"
        runs += [fake(name, seed, [10, 20], [10 * seed + i] * 2, leader=leader) for seed in range(2)]
    pairs = [row[1:3] for row in rows(plot.report(plot.group(runs))) if row[2] in names]
    over_plain = [[name, "ac"] for name in names if name not in ("ac", "ac-2x")]
    assert sorted(pairs) == sorted([*over_plain, ["stac-gn", "stac"], ["stac-gn-mean", "stac-gn"]])


def test_an_interval_does_not_depend_on_other_tasks():
    """A bootstrap is drawn, and a new run must not change what was published of the others."""
    before, after = ([row for row in rows(report_of(first, 20)) if row[0] == "B-v0"] for first in (5, 6))
    assert len(before) == 3 and before == after


def test_one_seed_has_no_interval():
    table = rows(report_of(1, 1))
    assert [row[4] for row in table if row[:2] == ["A-v0", "ac"]] == ["0.000"]
    assert all("(" not in cell for row in table for cell in row)


@pytest.mark.parametrize(
    "ac, stac, expected",
    [
        (5, 5, "5 seeds, 2k steps"),
        (3, 3, "3 seeds (fewer than 5), 2k steps"),
        (6, 4, "4 to 6 seeds (some fewer than 5), 2k steps"),
        (1, 1, "1 seed (fewer than 5), 2k steps"),
    ],
)
def test_panels_with_few_seeds_are_marked(ac, stac, expected):
    panel = {"ac": [fake("ac", i, [1000, 2000], [i**2, i]) for i in range(ac)]}
    panel["stac"] = [fake("stac", i, [1000, 2000], [i, 2 * i]) for i in range(stac)]
    figure, axes = plt.subplots()
    plot.draw_panel(axes, "E-v0", panel, {"ac": "r", "stac": "b"}, 1, np.random.default_rng(0))
    (text,) = axes.texts
    assert text.get_text() == expected
    assert (text.get_bbox_patch().get_facecolor()[3] > 0) == ("fewer" in expected)
    assert list(axes.lines[0].get_ydata()) == [np.mean([i**2 for i in range(ac)]), np.mean(range(ac))]
    plt.close(figure)


def test_terms_are_drawn_to_the_end_of_the_longest(here, monkeypatch):
    runs = [fake(name, 1, steps, [0] * len(steps), leader="actor") for name, steps in (("a", [1, 2]), ("b", [1, 2, 9]))]
    runs = [run._replace(terms=np.full((len(run.steps), 2), 0.5)) for run in runs]
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plot.draw_terms(plot.group(runs), "terms.png")
    assert all(axes.get_xlim()[0] == 0 and axes.get_xlim()[1] >= 9 for axes in plt.gcf().axes)
    monkeypatch.undo()
    plt.close("all")


def test_command_line(here, capsys, monkeypatch):
    for seed in (1, 2):
        write_run("ddpg", seed, [1, 2])
        write_run("stddpg-al", seed, [2, 3], {**DDPG, "leader": "actor"})
        write_run("ac-m1", seed, [2, 3], AC)
    monkeypatch.setattr(sys, "argv", ["plot.py", "runs", "--out", "a/b", "--smooth", "2"])
    plot.main()
    out, err = capsys.readouterr()
    assert out.strip() == Path("a/b/table.md").read_text().strip() and "6 runs" in err
    assert plt.imread("a/b/figure3.png").std() > 0.01 and not Path("a/b/terms.png").exists()
    assert len(Path("a/b/curves.csv").read_text().splitlines()) == 1 + 6 * 2

    # two more runs, one of them instead of an earlier one; the folder has no other
    shutil.move("runs", "earlier")
    stac = {**AC, "leader": "actor", "lam": 1}
    for seed in (1, 2):
        write_terms(write_run("stac-al-m1", seed, [3, 4], stac), {10: (1, 1, 0.5), 20: (1, 2 * seed, -0.5)})
    write_run("ac-m1", 2, [7, 9], AC)
    monkeypatch.setattr(sys, "argv", ["plot.py", "runs", "--out", "a/b", "--add"])
    plot.main()
    out, err = capsys.readouterr()
    assert "8 runs" in err and plt.imread("a/b/terms.png").std() > 0.01
    found = {(row[0], row[1]): row[2:] for row in rows(out)}
    assert found["CartPole-v1", "ac-m1"][2].startswith("6.000 (")  # (3 + 9) / 2
    assert found["CartPole-v1", "stac-al-m1"] == ["2 †", "2 to 4", "−0.5 to −0.5"]  # the last table
    improvement = next(row for row in rows(out) if row[1:3] == ["stac-al-m1", "ac-m1"])
    assert improvement[5].startswith("0.50 (")
    monkeypatch.setattr(sys, "argv", ["plot.py", "runs", "--out", "a/b"])
    plot.main()
    assert "3 runs" in capsys.readouterr().err
    for folder, expected in [("none", "no folder none"), ("a", "no finished run in a")]:
        monkeypatch.setattr(sys, "argv", ["plot.py", folder])
        with pytest.raises(SystemExit) as error:
            plot.main()
        message = capsys.readouterr().err
        assert error.value.code == 2 and expected in message and message.count("\n") == 1


# rates.py
def write_study_run(arm, rate, seed, returns, norms=(), m=1):
    """A run of the study: a return for each batch, and |implicit|, |direct| and the cosine for each, if it has them."""
    path = write_run(f"{arm}-lr{rate}-m{m}", seed, returns, AC)
    args = stac_ac.Args(policy_lr=rate, seed=seed, unroll=m, leader="none")
    if arm == "batch":
        args = dataclasses.replace(args, leader="actor", start_states="batch")
    torch.save({"args": vars(args)}, path / "model.pt")
    writer = SummaryWriter(str(path))
    for i, values in enumerate(norms):
        for tag, value in zip(("implicit_norm", "direct_norm", "cosine"), values):
            writer.add_scalar(f"stackelberg/{tag}", value, 10 * i + 10)
    writer.close()
    return path


def test_rates(here, monkeypatch, capsys):
    """The best rate is chosen by the seeds up to 10 and the others compared; rows of five batches; the CSV stays."""
    for seed, low in ((1, 10), (2, 12), (11, -40), (12, -30), (13, 0), (14, 500)):  # 0.1: the best of the first two
        write_study_run("ac", 0.1, seed, [low] * 5 + [low + 10] * 7)
        write_study_run("ac", 0.2, seed if seed < 10 else seed + 10, [10.0 * (seed < 10)] * 10)
    write_study_run("ac", 0.4, 1, [1.0] * 10)
    write_study_run("ac", 0.05, 11, [99.0] * 10)  # of a rate that was not tried by the seeds that choose
    write_study_run("ac", 0.8, 1, [99.0] * 10).joinpath("model.pt").unlink()  # not finished
    norms = [(value, 2, 0.5) for value in (1, 2, 30, 4, 5)] + [(0, 0, 0)] * 5  # medians: 2, and 0 of a dead policy
    for seed in (1, 2, 11, 12):  # one rate: all seeds are compared
        write_study_run("batch", 0.1, seed, [0.0] * 5 + [-25.0] * 5, norms)
    for rate, value in ((0.1, 5.0), (0.2, 7.0)):  # seeds that choose, and no others
        write_study_run("ac", rate, 3, [value] * 10, m=80)
    write_run("ddpg", 1, [1, 2])
    torch.save({"args": vars(stddpg.Args())}, here / "runs/Hopper-v4__ddpg__1__1/model.pt")
    monkeypatch.setattr(sys, "argv", ["rates.py", "runs", "--out", "out"])
    rates.main()
    text, err = capsys.readouterr()
    assert err.count("left out, not finished") == 1 and "ac-lr0.8" in err
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| CartPole")]
    head = next(line for line in text.splitlines() if line.startswith("| task")).split(" | ")
    assert head[2:] == ["seeds", "0.05", "0.1", "0.2", "0.4 |"]
    title = "CartPole-v1, m = 1"
    assert rows[0] == [title, "AC", "2", "", "**16 (15 to 17)**", "10 (10 to 10)", "1 (1 †)"]
    ac, batch = rows[2:4]
    assert ac[:4] == [title, "AC", "0.1 ‡", "4 †"] and ac[4].startswith("−5.0 (")  # without −30 and 510
    assert ac[5].startswith("−10.0 (")
    assert batch[:6] == [title, "STAC, batch", "0.1", "4 †", "−25.0 (−25.0 to −25.0)", "−12.5 (−12.5 to −12.5)"]
    assert batch[6].startswith("0.25 (") and batch[7].startswith("0.50 (")  # beats -30; beats -35 and -25
    assert batch[8:] == ["1 to 1", "0.25 to 0.25"]  # medians of the rows: 1, 0 and 0.5, 0, so 0.5 and 0.25
    assert rows[4][:4] == ["CartPole-v1, m = 80", "AC", "0.2 ‡ §", "1 †"]
    # at 0.1 the areas are 2 × -12.5, and AC's at 0.2 are 2 × 10
    assert rows[5] == [title, "STAC, batch", "0.1/0.2", "2 †", "0.00 (0.00 to 0.00)"]
    for name in ("stac_ac_rates.png", "stac_ac_curves.png"):  # m = 80, and m = 1 with an arm of one rate
        assert (here / "out" / name).stat().st_size > 10_000

    lines = (here / "out" / "stac_ac_rates.csv").read_text()
    assert "CartPole-v1,0.0,1,AC,0.1,1,50,10,,\nCartPole-v1,0.0,1,AC,0.1,1,100,20,,\n" in lines  # two are no row
    assert 'CartPole-v1,0.0,1,"STAC, batch",0.1,11,50,0,2,0.5\n' in lines and ",0.8," not in lines
    monkeypatch.setattr(sys, "argv", ["rates.py", "nothing", "--out", "out"])
    rates.main()  # of the CSV alone
    assert capsys.readouterr().out == text and (here / "out" / "stac_ac_rates.csv").read_text() == lines

    monkeypatch.setattr(sys, "argv", ["rates.py", "runs", "--out", "out"])
    other = write_study_run("ac", 0.3, 1, [1.0] * 20)
    with pytest.raises(SystemExit):
        rates.main()
    assert "another length" in capsys.readouterr().err
    shutil.rmtree(other)
    write_run("again", 1, [1.0] * 10, AC)
    torch.save({"args": vars(stac_ac.Args(leader="none"))}, here / "runs/CartPole-v1__again__1__1/model.pt")
    with pytest.raises(SystemExit):
        rates.main()
    assert "more than one run" in capsys.readouterr().err
