"""stac_ac.py as its users run it, and the pieces between the simulator and the surrogates."""

import fcntl
import functools
import importlib
import itertools
import math
import os
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from gymnasium.spaces import Box, Discrete
from point_env import Point
from runs import assert_same_weights, checkpoint, command, files, finish, flags, run_main, scalars

import stac_ac

# a run of a tenth of a second: ten batches of ten episodes
SMALL = {
    **{"env_id": "point_env:Point-v0", "hidden": (16, 16), "num_steps": 200, "total_timesteps": 2000, "gamma": 0.9},
    **{"checkpoint_every": 400, "save_model": True, "cuda": False, "unroll": 5, "critic_lr": 0.02, "lam": 1.0},
}
COMPASS = {"env_id": "point_env:Compass-v0"}
Q = {"critic": "q", "start_states": "every"}


def args(**changes):
    return stac_ac.Args(**{**SMALL, **changes})


@pytest.fixture(autouse=True)
def working_folder(here):
    return here


def refused(function, *arguments, **keywords):
    """The one line with which the script ends."""
    with pytest.raises(SystemExit) as error:
        function(*arguments, **keywords)
    message = error.value.code
    assert isinstance(message, str)  # so that python prints it on stderr, and the exit code is 1
    assert message.startswith("stac_ac.py: error: ") and "\n" not in message
    return message


def parameters(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


# Odd environments; more of them are in point_env.py
class Recorded(gym.Wrapper):
    """An environment that counts its episodes itself."""

    def __init__(self):
        super().__init__(gym.wrappers.RecordEpisodeStatistics(Point()))


class Far(Point):
    """Coordinates up to 1e20: float32 has them, and not their squares."""

    observation_space = Box(-np.inf, np.inf, (2,))

    def observation(self):
        return 1e20 * self.position


class Wide(Point):
    """Large observations, where float32's rounding is large as well."""

    observation_space = Box(-np.inf, np.inf, (2,))

    def observation(self):
        return 1e5 * self.position


class Column(Point):
    action_space = Box(-1.0, 1.0, (2, 1))


class Double(Point):
    """Bounds that float32 does not have."""

    action_space = Box(np.array([-1.4, -0.3]), np.array([0.8, 0.9]), dtype=np.float64)

    def step(self, action):
        assert self.action_space.contains(action) and action.dtype == np.float64
        return super().step(action)


for cls in (Recorded, Far, Wide, Column, Double):
    gym.register(f"{cls.__name__}-v0", cls, max_episode_steps=20)


# Learning
@pytest.mark.parametrize(
    "changes",
    [
        {"policy_lr": 0.1},
        {"policy_lr": 0.05, "lam": 50.0, "start_states": "every"},
        {"policy_lr": 0.4, "leader": "none"},
        {"policy_lr": 0.3, **COMPASS},
        {"policy_lr": 0.01, "lam": 200.0, "unroll": 20, **Q},
        {"policy_lr": 0.1, "leader": "none", "unroll": 20, **Q},
        {"policy_lr": 0.01, "lam": 50.0, "unroll": 20, **COMPASS, **Q},
    ],
    ids=["released", "every", "none", "discrete", "q", "none-q", "discrete-q"],
)
def test_learns(changes):
    """The mean return of a batch, -20 (continuous) or -40 (discrete) at the start. (Proposition 1's gradient is several
    times as long as the plain one, and a Q critic, which the actor climbs directly, has to be near its best response:
    hence the rates.)"""
    returns = batch_returns(stac_ac.train(args(total_timesteps=8000, **changes)))
    assert np.mean(returns[-5:]) > np.mean(returns[:3]) / 2


def batch_returns(run_dir):
    return list(scalars(run_dir)["charts/batch_return"].values())


@pytest.mark.parametrize("task", [{}, COMPASS], ids=["continuous", "discrete"])
def test_without_gradients_nothing_is_learned(task):
    """The control of the test above."""
    returns = batch_returns(stac_ac.train(args(policy_lr=0.0, total_timesteps=6000, **task)))
    assert np.mean(returns[-5:]) < 0.7 * np.mean(returns[:3])


def test_the_first_example_learns(monkeypatch, capsys):
    """The docstring's first command, for its first ten batches. (`every` has 9 here, and random play 22.)"""
    first = next(line for line in stac_ac.__doc__.splitlines() if "python stac_ac.py" in line)
    line = first.split("#")[0].split()[2:]
    run_main(stac_ac, monkeypatch, *line, "--total-timesteps", 40_000)
    last = capsys.readouterr().out.splitlines()[-2]
    assert float(last.split()[4]) > 25


# Reproducibility
@pytest.mark.parametrize("task", [{}, {**COMPASS, "critic": "q", "start_states": "initial"}], ids=["", "discrete-q"])
def test_same_seed_same_run(task):
    runs = [
        args(seed=seed, total_timesteps=600, lam=50.0, policy_lr=0.02, grad_noise=0.1, **task) for seed in (1, 1, 2)
    ]
    first, second, other = (stac_ac.train(run) for run in runs)
    assert first != second
    assert_same_weights(first, second)
    with pytest.raises(AssertionError):
        assert_same_weights(first, other)


def test_checkpoints_do_not_change_the_run():
    assert_same_weights(stac_ac.train(args()), stac_ac.train(args(checkpoint_every=10_000)))


@pytest.mark.parametrize("kind", ["ChangesAction", "OwnEpisodeInfo", "ArrayReward", "Int32Seed"])
def test_what_an_environment_may_do(kind):
    """An action changed in place, statistics of its own, a reward of shape (1,), seeds that are an int32: the same."""
    plain = stac_ac.train(args())
    other = stac_ac.train(args(env_id=f"point_env:{kind}-v0"))
    assert_same_weights(plain, other)
    assert scalars(plain) == scalars(other)


def test_an_environment_that_records_its_statistics():
    plain, other = stac_ac.train(args()), stac_ac.train(args(env_id="Recorded-v0"))
    assert_same_weights(plain, other)
    assert scalars(plain)["charts/episodic_length"] == scalars(other)["charts/episodic_length"]


def test_an_environment_that_draws_from_the_global_generators():
    run = args(env_id="point_env:GlobalGenerators-v0")
    first = stac_ac.train(run)
    np.random.seed(7)
    second = stac_ac.train(run)
    assert_same_weights(first, second)


def test_seeds_are_an_int32():
    class Seeds(Point):
        def reset(self, seed=None, options=None):
            seeds.append(seed)
            return super().reset(seed=seed)

    seeds = []
    for episode in range(200):
        stac_ac.reset(Seeds(), 2**31 - 1, stac_ac.TRAIN, episode)
    assert max(seeds) < 2**31 and min(seeds) >= 0 and len(set(seeds)) == 200


# One folder, one command
def test_killed_and_carried_on(here, monkeypatch, capsys):
    """SIGKILL in the middle of a batch. The same command line carries on, and then says that it is finished."""
    run = args(num_steps=190, grad_noise=0.05, lam_decay=1e4, **COMPASS)
    whole = here / stac_ac.train(run)
    line = flags(replace(run, run_dir=str(here / "killed")))
    code, _, _ = finish(command(*line, cwd=here, script=stac_ac.__file__, kill_at=190 * 8 + 100))
    killed = here / "killed"
    assert code == -9 and checkpoint(killed)["global_step"] == 190 * 6 and not (killed / "model.pt").exists()

    capsys.readouterr()
    run_main(stac_ac, monkeypatch, *line)
    out = capsys.readouterr().out.splitlines()
    assert f"from step {190 * 6}" in out[0] and out[-1] == f"finished: {killed}"
    assert_same_weights(whole, killed)
    assert scalars(whole) == scalars(killed)  # nothing missing, nothing twice

    before = files(killed)
    run_main(stac_ac, monkeypatch, *line)
    assert "is finished, with 1900 steps" in capsys.readouterr().out
    assert files(killed).keys() == before.keys() and scalars(whole) == scalars(killed)


@pytest.mark.parametrize("changes", [{"leader": "none", **Q}, {"optimizer": torch.optim.Adam}], ids=["none-q", "adam"])
def test_interrupted_and_carried_on(changes, monkeypatch, capsys):
    """Ctrl-C, with a Q critic's ten samples of the policy; and with an optimizer that has a state."""
    optimizer = {"lr": 0.01, **changes}.pop("optimizer", torch.optim.SGD)
    changes = {name: value for name, value in changes.items() if name != "optimizer"}
    monkeypatch.setattr(torch.optim, "SGD", optimizer)
    whole = stac_ac.train(args(**changes))
    monkeypatch.setenv("POINT_INTERRUPT_AT", "1300")
    with pytest.raises(SystemExit) as error:
        stac_ac.train(args(run_dir="interrupted", **changes))
    assert error.value.code == 130
    assert "the same command with --run-dir interrupted carries on" in capsys.readouterr().err
    monkeypatch.delenv("POINT_INTERRUPT_AT")
    assert_same_weights(whole, stac_ac.train(args(run_dir="interrupted", **changes)))
    assert scalars(whole) == scalars(Path("interrupted"))


def test_interrupted_before_the_first_checkpoint(monkeypatch, capsys):
    monkeypatch.setenv("POINT_INTERRUPT_AT", "300")
    with pytest.raises(SystemExit) as error:
        stac_ac.train(args())
    assert error.value.code == 130 and "nothing to carry on from" in capsys.readouterr().err


def test_a_finished_run_is_made_longer(monkeypatch, capsys):
    """It has its last checkpoint at its end. What it has is not lost if the longer run is interrupted at once."""
    short = args(total_timesteps=1400, checkpoint_every=10_000, run_dir="run")
    run_dir = stac_ac.train(short)
    before = scalars(run_dir)
    assert checkpoint(run_dir)["global_step"] == 1400
    monkeypatch.setenv("POINT_INTERRUPT_AT", "10")
    with pytest.raises(SystemExit):
        stac_ac.train(replace(short, total_timesteps=2000))
    monkeypatch.delenv("POINT_INTERRUPT_AT")
    assert scalars(run_dir) == before and before["charts/batch_return"].keys() == set(range(200, 1401, 200))
    stac_ac.train(short)
    assert "run is finished, with 1400 steps" in capsys.readouterr().out
    stac_ac.train(replace(short, total_timesteps=2100))  # the last batch that fits ends at 2,000
    assert_same_weights(run_dir, stac_ac.train(args()))


def test_only_one_process_at_a_time(here, capsys):
    run_dir = here / "run"
    run_dir.mkdir()
    with open(run_dir / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as error:
            stac_ac.train(args(run_dir=str(run_dir)))
    assert error.value.code == os.EX_TEMPFAIL
    assert capsys.readouterr().err == f"stac_ac.py: another process is at work in {run_dir}\n"
    assert [path.name for path in run_dir.iterdir()] == ["lock"]


def test_what_may_change_when_a_run_is_carried_on(monkeypatch):
    """The run's own flags are the defaults; those that make it another run are refused."""
    run_dir = stac_ac.train(args(total_timesteps=400))
    before = files(run_dir)
    for changes in ({"seed": 2}, {"num_steps": 100}, {"critic": "q"}, {"start_states": "initial"}, {"lam": 2.0}):
        name = next(iter(changes)).replace("_", "-")
        assert f"--{name}" in refused(stac_ac.train, args(run_dir=str(run_dir), **changes))
    assert "beyond --total-timesteps 200" in refused(stac_ac.train, args(run_dir=str(run_dir), total_timesteps=200))
    changed = set(stac_ac.Args.__dataclass_fields__) - stac_ac.MAY_CHANGE
    names = "seed env_id max_episode_steps num_steps gamma gae_lambda norm_adv policy_lr critic_lr grad_noise hidden"
    assert changed == {*names.split(), *"critic leader lam lam_decay unroll start_states curvature".split()} | {
        *("cg_iters", "cg_tol")
    }
    assert files(run_dir) == before
    line = ["--run-dir", run_dir, "--total-timesteps", 2000, "--env-id", SMALL["env_id"], "--checkpoint-every", 1000]
    run_main(stac_ac, monkeypatch, *line)
    assert_same_weights(run_dir, stac_ac.train(args()))


def test_checkpoints_that_are_refused(here):
    run_dir = stac_ac.train(args(total_timesteps=400, hidden=(4,)))
    run = args(run_dir=str(run_dir), hidden=(4,), total_timesteps=800)
    path = run_dir / "checkpoint.pt"
    data = path.read_bytes()
    state = checkpoint(run_dir)

    def refused_with(text):
        before = files(run_dir)
        message = refused(stac_ac.train, run)
        assert "checkpoint.pt" in message and text in message
        assert files(run_dir) == before

    for size in (0, 100, len(data) // 2, len(data) - 10):
        path.write_bytes(data[:size])
        refused_with("damaged")
    torch.save([1], path)
    refused_with("damaged")
    torch.save({**state, "algorithm": "stsac"}, path)
    refused_with("of another script: stsac")
    torch.save({**state, "args": {"env_id": "x"}}, path)
    refused_with("another version")
    torch.save({**state, "args": {**state["args"], "env_id": "some_module:Point-v0"}}, path)
    refused_with("some_module")
    shutil.copy(run_dir / "model.pt", path)
    refused_with("no rng")
    path.unlink()
    path.mkdir()
    refused_with("a folder")


def test_a_flipped_bit_is_seen():
    """Or it changes nothing: a bit between the records of the archive."""
    run_dir = stac_ac.train(args(total_timesteps=400, hidden=(4,)))
    path = run_dir / "checkpoint.pt"
    data = path.read_bytes()
    state = stac_ac.load(path, args(), "rng")
    seen = 0
    for place in np.random.default_rng(0).integers(len(data), size=60):
        changed = bytearray(data)
        changed[place] ^= 1
        (run_dir / "changed.pt").write_bytes(changed)
        try:
            found = stac_ac.load(run_dir / "changed.pt", args(), "rng")
        except SystemExit:
            seen += 1
            continue
        for net in ("actor", "critic"):
            assert all(torch.equal(found[net][name], value) for name, value in state[net].items())
        assert torch.equal(found["rng"], state["rng"])
    assert seen > 20


# Bad input
BAD = {
    "other actions": (["--env-id", "point_env:TwoBoxes-v0"], "MultiDiscrete"),
    "actions with several axes": (["--env-id", "Column-v0"], "(2, 1)"),
    "observations of no fixed size": (["--env-id", "point_env:PointNoFixedSize-v0"], "Sequence"),
    "no time limit": (["--env-id", "point_env:PointNoTimeLimit-v0"], "--max-episode-steps"),
    "CliffWalking": (["--env-id", "CliffWalking-v1"], "--max-episode-steps"),
    "negative lam": (["--lam", "-1"], "--lam"),
    "lam not a number": (["--lam", "nan"], "--lam"),
    "huge lam": (["--lam", "1e300"], "--lam"),
    "infinite rate": (["--policy-lr", "inf"], "--policy-lr"),
    "huge rate": (["--critic-lr", "1e300"], "--critic-lr"),
    "long seed": (["--seed", "1" * 30], "--seed"),
    "seed that is no int32": (["--seed", str(2**31)], "--seed"),
    "no CG iterations": (["--cg-iters", "0"], "--cg-iters"),
    "no follower steps": (["--unroll", "0"], "--unroll"),
    "empty batch": (["--num-steps", "0"], "--num-steps"),
    "a batch longer than the run": (["--num-steps", "200", "--total-timesteps", "100"], "--num-steps"),
    "gae-lambda above one": (["--gae-lambda", "1.1"], "--gae-lambda"),
    "negative noise": (["--grad-noise", "-0.1"], "--grad-noise"),
    "evaluate of nothing": (["--evaluate", "no/such/model.pt"], "no/such/model.pt is missing"),
    "evaluate of a folder": (["--evaluate", "/"], "a folder"),
    "the released start state for a Q critic": (["--critic", "q"], "--start-states"),
    "video of the training": (["--capture-video"], "--evaluate"),
    "a folder without a name": (["--run-dir", ""], "--run-dir"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(here, case, monkeypatch):
    line, expected = BAD[case]
    message = refused(run_main, stac_ac, monkeypatch, "--no-cuda", *line)
    assert expected in message
    made = [path for path in here.rglob("*") if path.name not in ("runs", "lock") and not path.is_dir()]
    assert made == []


def test_cliff_walking_with_a_time_limit(monkeypatch, capsys):
    """One-hot observations, and no limit of its own: neither training nor --evaluate may hang."""
    run_main(stac_ac, monkeypatch, *flags(args(env_id="CliffWalking-v1", max_episode_steps=50, run_dir="run")))
    capsys.readouterr()
    run_main(stac_ac, monkeypatch, "--evaluate", "run/model.pt", "--eval-episodes", 2)
    assert "over 2 episodes" in capsys.readouterr().out
    state = torch.load("run/model.pt", weights_only=True)
    state["args"]["max_episode_steps"] = None
    torch.save(state, "run/model.pt")
    assert "no time limit" in refused(run_main, stac_ac, monkeypatch, "--evaluate", "run/model.pt")


def test_environments_that_return_what_is_not_finite(here):
    for env_id, step in (("PointNaN", 150), ("PointHuge", 150), ("PointBadReset", 20)):
        run = args(env_id=f"point_env:{env_id}-v0", num_steps=60, checkpoint_every=60, run_dir=env_id)
        message = refused(stac_ac.train, run)
        assert f"step {step}: " in message and "not finite" in message
    assert checkpoint(here / "PointNaN")["global_step"] == 120


def test_large_observations_are_finite():
    stac_ac.train(args(env_id="Far-v0", total_timesteps=400, leader="none"))
    stac_ac.train(args(env_id="Wide-v0", total_timesteps=400, leader="none"))


@pytest.mark.parametrize("spoiled, expected", [("critic_loss", "L = inf"), ("optimizer_step", "parameter is not")])
def test_numbers_that_become_infinite(here, monkeypatch, spoiled, expected):
    """The run stops at that step; the checkpoint is from before it and has finite weights."""
    calls, original = [], getattr(stac_ac, spoiled)

    def spoiling(*arguments):
        calls.append(1)
        if spoiled == "critic_loss":
            return original(*arguments) * (math.inf if len(calls) == 5 else 1)
        optimizer, parameters, grads = arguments
        return original(optimizer, parameters, [g * (math.nan if len(calls) == 10 else 1) for g in grads])

    monkeypatch.setattr(stac_ac, spoiled, spoiling)
    message = refused(stac_ac.train, args(leader="none", unroll=1, checkpoint_every=200))
    assert "step 1000: " in message and expected in message and "not finite" in message
    state = checkpoint(next(here.glob("runs/*")))
    assert state["global_step"] == 800 and all(value.isfinite().all() for value in state["actor"].values())


# What a run says
@pytest.mark.parametrize("leader", ["actor", "none"])
def test_tensorboard_and_output(leader, capsys):
    run_dir = stac_ac.train(args(leader=leader, num_steps=210, total_timesteps=2400, lam_decay=1000.0))
    out = capsys.readouterr().out.splitlines()
    found = scalars(run_dir)
    names = "cg_residual cg_iterations negative_curvature direct_norm implicit_norm cosine lam"
    game = {f"stackelberg/{name}" for name in names.split()} if leader == "actor" else set()
    losses = {f"losses/{name}" for name in ("policy_loss", "value_loss", "entropy")}
    charts = {f"charts/{name}" for name in ("episodic_return", "episodic_length", "batch_return")}
    assert found.keys() == game | losses | charts
    assert all(math.isfinite(value) for values in found.values() for value in values.values())
    # ten whole episodes a batch, of 20 steps, and one of 10 that is cut and does not count
    steps = [start + 20 * k for start in range(0, 2310, 210) for k in range(1, 11)]
    assert list(found["charts/episodic_return"]) == steps
    assert set(found["charts/episodic_length"].values()) == {20}
    assert list(found["charts/batch_return"]) == list(range(210, 2311, 210))
    episodic = list(found["charts/episodic_return"].values())
    for k, value in enumerate(found["charts/batch_return"].values()):
        assert value == pytest.approx(np.mean(episodic[10 * k : 10 * k + 10]), rel=1e-5)

    def line(k):  # after the tenth batch and at the end
        last = episodic[10 * k - 10 : 10 * k]
        return f"step {210 * k}: batch return {np.mean(last):.2f} ± {np.std(last):.2f} (10 episodes)"

    algorithm = {"actor": "stac-al, hessian", "none": "ac"}[leader]
    first = f"{algorithm} on point_env:Point-v0, cpu, from step 0: {run_dir}"
    assert out == [first, line(10), line(11), f"finished: {run_dir}"]
    assert run_dir.name.split("__")[1] == algorithm.split(",")[0]
    assert "log.txt" not in [path.name for path in run_dir.iterdir()]
    if leader == "actor":
        assert found["stackelberg/lam"][1050] == pytest.approx(math.exp(-1.05))
    assert found["losses/entropy"][210] == pytest.approx(2 * (0.5 + 0.5 * math.log(2 * math.pi) - 0.5), rel=0.01)


def test_a_batch_without_the_end_of_an_episode(capsys):
    run_dir = stac_ac.train(args(env_id="point_env:PointTimeout-v0", total_timesteps=600))
    assert "charts/batch_return" not in scalars(run_dir)
    assert "step 600: batch return unknown (no episode ended)" in capsys.readouterr().out


def test_it_says_how_far_it_is(monkeypatch, capsys):
    """A line for each minute where there is no terminal: the speed of now, and the time that is left."""
    clock = itertools.count(step=20.0)
    monkeypatch.setattr(
        stac_ac, "time", types.SimpleNamespace(**{**vars(stac_ac.time), "perf_counter": clock.__next__})
    )
    stac_ac.train(args())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" left")]
    assert 3 <= len(lines) <= 10
    assert lines[0].startswith("step ") and " of 2000, " in lines[0] and " steps/s, 0:" in lines[0]


def test_the_clock_was_set_back(capsys):
    run = args(total_timesteps=400, run_dir="run")
    stac_ac.train(run)
    event = next(Path("run").glob("events.*"))
    parts = event.name.split(".")
    parts[3] = str(int(parts[3]) + 1000)
    event.rename(event.with_name(".".join(parts)))
    capsys.readouterr()
    stac_ac.train(replace(run, total_timesteps=800))
    assert "the clock is behind" in capsys.readouterr().out


def test_tracking(monkeypatch, here):
    """W&B gets a name, also of a run in the folder `.`, and one and the same when the run is carried on."""
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **keywords: calls.append(keywords)))
    for total_timesteps in (400, 800):
        stac_ac.train(args(track=True, run_dir=".", total_timesteps=total_timesteps))
    first, second = calls
    assert first["name"] == here.name and first["id"] == second["id"] and first["resume"] == "allow"
    assert first["sync_tensorboard"] and second["config"]["total_timesteps"] == 800


def test_the_copied_file_runs_alone(here):
    """In an empty folder, with no other file of the project in reach, and on a stdout that knows ASCII alone."""
    copy = shutil.copy(stac_ac.__file__, here)
    line = "--env-id Hopper-v4 --total-timesteps 600 --num-steps 200 --no-cuda".split()
    variables = {"PATH": "", "PYTHONPATH": "", "PYTHONIOENCODING": "ascii"}
    code, out, err = finish(command(*line, cwd=here, script=copy, **variables))
    assert code == 0 and err == ""
    (run_dir,) = here.glob("runs/*")
    assert run_dir.name.startswith("Hopper-v4__stac-al__1__") and (run_dir / "checkpoint.pt").exists()
    first, batch, last = out.splitlines()
    assert first.startswith("stac-al, hessian on Hopper-v4, cpu, from step 0: runs/")
    assert batch.startswith("step 600: batch return ") and " ? " in batch
    assert last == f"finished: runs/{run_dir.name}"


# Evaluation
@pytest.mark.parametrize("task", [{}, {**COMPASS, **Q}], ids=["continuous", "discrete-q"])
def test_evaluate_plays_a_saved_model(task, capsys, monkeypatch):
    run = args(total_timesteps=400, **task)
    model = stac_ac.train(run) / "model.pt"
    capsys.readouterr()
    run_main(stac_ac, monkeypatch, "--evaluate", model, "--eval-episodes", 3, "--env-id", run.env_id)
    out = capsys.readouterr().out.splitlines()
    env = stac_ac.make_env(run.env_id)
    actor = stac_ac.Actor(env.observation_space, env.action_space, run.hidden)
    actor.load_state_dict(torch.load(model, weights_only=True)["actor"])
    returns = stac_ac.evaluate(actor, env, 3, 1, stac_ac.PLAY)
    np.testing.assert_allclose([float(text.split()[-1]) for text in out[1:4]], returns, atol=0.01)
    assert len(out) == 5 and f"mean return {returns.mean():.2f}" in out[4]


def test_evaluate_is_of_the_most_likely_action():
    env = stac_ac.make_env("point_env:Point-v0")
    actor = stac_ac.Actor(env.observation_space, env.action_space, ())
    actor.net[0].weight.data.copy_(-5 * torch.eye(2))
    actor.net[0].bias.data.zero_()
    returns = stac_ac.evaluate(actor, env, 5, 3)
    for episode, found in enumerate(returns):
        position, expected = stac_ac.reset(env, 3, episode).astype(float), 0.0
        for _ in range(20):
            position = position + 0.2 * np.clip(-5 * position, -1, 1)
            expected -= position @ position
        assert found == pytest.approx(expected, rel=1e-4)
    assert np.array_equal(stac_ac.evaluate(actor, stac_ac.make_env("point_env:OwnEpisodeInfo-v0"), 5, 3), returns)


def test_videos_are_never_overwritten(monkeypatch, here):
    run = args(env_id="point_env:PointRendering-v0", total_timesteps=200, run_dir="run")
    stac_ac.train(run)
    line = ["--evaluate", "run/model.pt", "--env-id", run.env_id, "--eval-episodes", 2, "--capture-video"]
    for _ in range(2):
        run_main(stac_ac, monkeypatch, *line)
    assert len(list(here.glob("run/videos/*/*.mp4"))) == 2


def test_videos_that_cannot_be_made():
    message = refused(stac_ac.make_env, "point_env:PointNotRendering-v0", video_folder="videos")
    assert "--capture-video" in message and "no OpenGL" in message


# From the simulator to the estimates
class TestActions:
    @pytest.mark.parametrize("env_id", ["point_env:StrictBox-v0", "Double-v0", "point_env:PointSmall-v0"])
    def test_a_saturated_policy_stays_in_the_box(self, env_id):
        """In the space's own dtype, to the last bit."""
        env = stac_ac.make_env(env_id)
        actor = stac_ac.Actor(env.observation_space, env.action_space, (8,))
        for bias in ([1e6, -1e6], [-1e6, 1e6]):
            actor.net[-1].bias.data.copy_(torch.tensor(bias))
            stac_ac.collect(env, actor, 20, 1, 0)
            stac_ac.evaluate(actor, env, 1, 1)

    def test_to_env(self):
        box = Box(np.array([-1.4, -0.3]), np.array([0.8, 0.9]), dtype=np.float64)
        action = np.array([0.25, 3.0], np.float32)
        found = stac_ac.to_env(action, box)
        assert found.dtype == np.float64 and found.tolist() == [0.25, 0.9]
        found[0] = 7
        assert action[0] == np.float32(0.25)
        assert stac_ac.to_env(np.int64(2), Discrete(4, start=-1)) == 1
        unbounded = Box(-np.inf, np.inf, (2,))
        assert np.array_equal(stac_ac.to_env(action, unbounded), action)


class TestCollect:
    def collect(self, env_id, num_steps, start=0):
        env = stac_ac.make_env(env_id)
        torch.manual_seed(0)
        actor = stac_ac.Actor(env.observation_space, env.action_space, (8,))
        return actor, *stac_ac.collect(env, actor, num_steps, 1, start)

    @pytest.mark.parametrize("kind", ["Point", "PointInPlace"])
    def test_trajectories(self, kind):
        """Episodes of 20 steps, the last one cut; what follows a step is the next one's start."""
        _, batch, episodes = self.collect(f"point_env:{kind}-v0", 50, start=100)
        assert batch.trajectory.tolist() == [0] * 20 + [1] * 20 + [2] * 10
        assert (batch.terminated == 0).all()  # a time limit is not terminal
        assert [(step, length) for step, _, length in episodes] == [(120, 20), (140, 20)]
        same = batch.trajectory[1:] == batch.trajectory[:-1]
        assert torch.equal(batch.obs[1:][same], batch.next_obs[:-1][same])
        assert not (batch.obs[1:] == batch.next_obs[:-1]).all(1)[~same].any()
        torch.testing.assert_close(batch.rewards, -(batch.next_obs**2).sum(1))
        for i, (_, episodic_return, _) in enumerate(episodes):
            assert episodic_return == pytest.approx(batch.rewards[batch.trajectory == i].sum().item(), rel=1e-5)
        assert {x.dtype for x in batch[:5]} == {torch.float32} and batch.trajectory.dtype == torch.int64

    def test_terminal(self):
        _, batch, episodes = self.collect("point_env:PointTerminal-v0", 5)
        assert (batch.terminated == 1).all() and batch.trajectory.tolist() == list(range(5)) and len(episodes) == 5

    def test_a_batch_depends_on_its_key_alone(self):
        first, second = (self.collect("point_env:Point-v0", 30, start=60)[1] for _ in range(2))
        assert torch.equal(first.obs, second.obs)
        assert not torch.equal(first.obs, self.collect("point_env:Point-v0", 30, start=90)[1].obs)

    def test_the_batch_has_the_gaussians_actions_and_the_environment_clipped_ones(self):
        _, batch, _ = self.collect("point_env:Point-v0", 200)
        assert batch.actions.shape == (200, 2) and (batch.actions.abs() > 1).any()
        inside = (batch.next_obs.abs() < 2).all(1)
        moved = batch.obs + 0.2 * batch.actions.clamp(-1, 1)
        torch.testing.assert_close(batch.next_obs[inside], moved[inside])


class TestFirstBatch:
    @pytest.mark.parametrize("space", [Discrete(3), Box(-1.0, 1.0, (2,))], ids=["discrete", "continuous"])
    def test_the_sampler_is_the_policy(self, space):
        torch.manual_seed(0)
        actor = stac_ac.Actor(Box(-1.0, 1.0, (3,)), space, (8, 8))
        if actor.discrete:
            actor.net[-1].bias.data.copy_(torch.tensor([0.0, 1.0, 2.0]))
        else:
            actor.log_std.data.copy_(torch.tensor([-1.0, 0.5]))
        n, obs = 20_000, torch.randn(3)
        sampler = actor.sampler(n)
        samples = torch.tensor(np.array([sampler(obs.numpy(), t) for t in range(n)]))
        policy = actor(obs)
        if actor.discrete:
            frequencies = torch.bincount(samples, minlength=3) / n
            assert ((frequencies - policy.probs).abs() < 5 * (policy.probs * (1 - policy.probs) / n).sqrt()).all()
        else:
            std = policy.base_dist.scale
            assert ((samples.mean(0) - policy.mean).abs() < 5 * std / n**0.5).all()
            torch.testing.assert_close(samples.std(0), std, rtol=0.03, atol=0)
            assert policy.log_prob(samples).shape == (n,)

    @pytest.mark.parametrize(
        "between",
        [nn.ReLU, nn.SiLU, nn.Hardtanh, lambda: nn.Sequential(nn.LayerNorm(16), nn.Tanh())],
        ids="ReLU SiLU hardtanh norm".split(),
    )
    def test_a_network_that_numpy_does_not_know(self, between, monkeypatch):
        """Somebody swaps the activation in `mlp`, and nothing else: one line, not a policy that nobody has."""

        def mlp(*sizes):
            layers = [(nn.Linear(n_in, n_out), between()) for n_in, n_out in zip(sizes[:-1], sizes[1:])]
            return nn.Sequential(*itertools.chain.from_iterable(layers[:-1]), layers[-1][0])

        monkeypatch.setattr(stac_ac, "mlp", mlp)
        for task in ({}, COMPASS):
            assert "numpy_mlp does not know" in refused(stac_ac.train, args(**task))

    @pytest.mark.parametrize("change", ["temperature", "normalised", "deviation"])
    def test_a_forward_that_the_sampler_does_not_know(self, change, monkeypatch):
        forward = stac_ac.Actor.forward

        def changed(self, obs):
            policy = forward(self, obs / 2 if change == "normalised" else obs)
            if change == "temperature":
                return torch.distributions.Categorical(logits=policy.logits / 2)
            if change == "deviation":
                return torch.distributions.Independent(
                    torch.distributions.Normal(policy.mean, policy.stddev + obs[..., :1] ** 2), 1
                )
            return policy

        monkeypatch.setattr(stac_ac.Actor, "forward", changed)
        task = COMPASS if change == "temperature" else {}
        assert "Actor.sampler" in refused(stac_ac.train, args(**task))

    def test_what_is_right_passes(self):
        """Also saturated, with a small deviation, and where observations are large."""
        for env_id in ("point_env:Point-v0", "point_env:Compass-v0", "Wide-v0", "Far-v0", "Hopper-v4"):
            env = stac_ac.make_env(env_id)
            for scale in (1, 10):
                actor = stac_ac.Actor(env.observation_space, env.action_space)
                critic = stac_ac.Critic(env.observation_space)
                for p in actor.parameters():
                    p.data *= scale
                batch, _ = stac_ac.collect(env, actor, 200, 1, 0)
                stac_ac.check_first_batch(actor, critic, batch)

    def test_values_of_another_shape_are_an_error(self):
        """[N, 1] less [N] would be [N, N], in silence."""
        env = stac_ac.make_env("point_env:Point-v0")
        actor = stac_ac.Actor(env.observation_space, env.action_space, (8,))
        critic = stac_ac.Critic(env.observation_space, (8,))
        batch, _ = stac_ac.collect(env, actor, 20, 1, 0)
        critic.forward = lambda obs, actions=None: critic.v(obs)
        assert "(20, 1)" in refused(stac_ac.check_first_batch, actor, critic, batch)

    def test_actor_and_critic_share_nothing(self):
        env = stac_ac.make_env("point_env:Point-v0")
        actor = stac_ac.Actor(env.observation_space, env.action_space, (8,))
        critic = stac_ac.Critic(env.observation_space, (8,))
        critic.v[0] = actor.net[0]
        batch, _ = stac_ac.collect(env, actor, 20, 1, 0)
        assert "share parameters" in refused(stac_ac.check_first_batch, actor, critic, batch)


class TestEstimates:
    def test_discounted_sum(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(200, generator=generator, dtype=torch.float64)
        trajectory = (torch.rand(200, generator=generator) < 0.05).cumsum(0)
        for discount in (0.0, 0.5, 0.99, 1.0):
            expected, total = x.clone(), 0.0
            for t in reversed(range(200)):
                total = x[t] + discount * (total if t < 199 and trajectory[t + 1] == trajectory[t] else 0.0)
                expected[t] = total
            torch.testing.assert_close(stac_ac.discounted_sum(x, discount, trajectory), expected)
        assert torch.equal(stac_ac.discounted_sum(x[:1], 0.5, trajectory[:1]), x[:1])

    def test_long_sums_in_single_precision(self):
        x, one = torch.rand(4000), torch.zeros(4000, dtype=torch.int64)
        exact = stac_ac.discounted_sum(x.double(), 1.0, one)
        torch.testing.assert_close(stac_ac.discounted_sum(x, 1.0, one).double(), exact, rtol=1e-6, atol=1e-5)

    @pytest.mark.parametrize("critic_kind", ["v", "q"])
    def test_are_spinning_ups(self, critic_kind):
        """`finish_path`, trajectory by trajectory: V_w after a cut, 0 after a terminal state."""
        torch.manual_seed(0)
        spaces = Box(-1.0, 1.0, (3,)), Discrete(2)
        actor = stac_ac.Actor(*spaces, (8,))
        critic = stac_ac.Critic(spaces[0], (8,)) if critic_kind == "v" else stac_ac.QCritic(*spaces, (8,))
        lengths, ends = (5, 1, 7, 4), (0.0, 1.0, 1.0, 0.0)
        trajectory = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
        n = len(trajectory)
        terminated = torch.zeros(n)
        terminated[torch.tensor(lengths).cumsum(0) - 1] = torch.tensor(ends)
        actions = torch.randint(2, (n,))
        batch = stac_ac.Rollout(torch.randn(n, 3), actions, torch.randn(n), torch.randn(n, 3), terminated, trajectory)

        def V(obs):
            if critic_kind == "v":
                return critic(obs)
            q = torch.stack([critic(obs, torch.full((len(obs),), a)) for a in (0, 1)], -1)
            return (actor(obs).probs * q).sum(-1)

        gamma, lam, returns, advantages = 0.9, 0.8, [], []
        with torch.no_grad():
            for i, end in enumerate(ends):
                mine = trajectory == i
                rewards, values = batch.rewards[mine].tolist(), V(batch.obs[mine]).tolist()
                last = 0.0 if end else V(batch.next_obs[mine])[-1].item()
                next_values = V(batch.next_obs[mine]).tolist()[:-1] + [last]
                for k in range(len(rewards)):
                    tail = range(k, len(rewards))
                    returns.append(sum(gamma ** (t - k) * rewards[t] for t in tail))
                    returns[-1] += gamma ** (len(rewards) - k) * last
                    deltas = [rewards[t] + gamma * next_values[t] - values[t] for t in tail]
                    advantages.append(sum((gamma * lam) ** j * delta for j, delta in enumerate(deltas)))
            if critic_kind == "q":  # (3)
                advantages = critic(batch.obs, actions) - V(batch.obs)
            run = stac_ac.Args(critic=critic_kind, gamma=gamma, gae_lambda=lam)
            found = stac_ac.estimate(actor, critic, batch, run)
            torch.testing.assert_close(found.returns, torch.tensor(returns))
            torch.testing.assert_close(found.mc_advantages, torch.tensor(returns) - V(batch.obs))
            torch.testing.assert_close(found.advantages, torch.as_tensor(advantages))

    def test_a_q_critics_state_values_are_the_policys_mean(self):
        torch.manual_seed(0)
        spaces = Box(-1.0, 1.0, (3,)), Box(-1.0, 1.0, (2,))
        actor, critic = stac_ac.Actor(*spaces, (8,)), stac_ac.QCritic(*spaces, ())
        obs = torch.randn(1, 3).expand(10_000, -1)
        linear = critic(obs[:1], actor(obs[:1]).mean)  # of a linear Q the mean is at the mean action
        torch.testing.assert_close(critic.state_values(obs, actor).mean(), linear[0], rtol=0, atol=0.01)


class TestUpdate:
    def make(self, critic="v", n=60, hidden=(8,)):
        env = stac_ac.make_env("point_env:Compass-v0")
        torch.manual_seed(1)
        spaces = env.observation_space, env.action_space
        actor = stac_ac.Actor(*spaces, hidden)
        critic = stac_ac.Critic(spaces[0], hidden) if critic == "v" else stac_ac.QCritic(*spaces, hidden)
        batch, _ = stac_ac.collect(env, actor, n, 1, 0)
        return actor, critic, batch

    def run(self, critic="v", **changes):
        start_states = {"v": "every", "q": "initial"}[critic]
        return args(**{"critic": critic, "start_states": start_states, "cg_iters": 50, "cg_tol": 1e-4, **changes})

    def update(self, critic="v", policy_lr=0.1, critic_lr=0.01, **changes):
        """One update; the steps that actor and critic took, and info."""
        run = self.run(critic, policy_lr=policy_lr, critic_lr=critic_lr, **changes)
        actor, critic, batch = self.make(critic)
        before = parameters(actor), parameters(critic)
        optimizers = torch.optim.SGD(actor.parameters(), policy_lr), torch.optim.SGD(critic.parameters(), critic_lr)
        torch.manual_seed(7)
        _, _, info = stac_ac.stackelberg_update(actor, critic, *optimizers, batch, run.lam, run)
        return parameters(actor) - before[0], parameters(critic) - before[1], info

    def surrogates(self, run, advantages=None):
        """Fresh networks and their batch, the estimates, f1 and f2."""
        actor, critic, batch = self.make(run.critic)
        est = stac_ac.estimate(actor, critic, batch, run)
        score = stac_ac.score_function(actor(batch.obs), batch.actions)
        f1 = stac_ac.actor_surrogate(critic, batch, score, est.advantages if advantages is None else advantages, run)
        return actor, critic, batch, est, f1, stac_ac.critic_surrogate(critic, batch, score, est, run)

    @pytest.mark.parametrize("critic_kind", ["v", "q"])
    @pytest.mark.parametrize("leader", ["none", "actor"])
    def test_is_algorithm_2(self, leader, critic_kind):
        """The actor's total derivative at (θ_k, w_k), and the critic's m steps at θ_k, step by step."""
        moved = self.update(critic_kind, leader=leader, unroll=3, norm_adv=False)
        actor, critic, batch, est, f1, f2 = self.surrogates(self.run(critic_kind))
        before = parameters(actor), parameters(critic)
        theta, w = list(actor.parameters()), list(critic.parameters())
        if leader == "actor":
            gradient, _ = stac_ac.stackelberg_gradient(f1, f2, theta, w, SMALL["lam"], 50, 1e-4)
        else:
            gradient = torch.autograd.grad(f1, theta)
        for _ in range(3):
            values = critic(batch.obs, batch.actions)
            for p, g in zip(w, torch.autograd.grad(((values - est.returns) ** 2).mean(), w)):
                p.data -= 0.01 * g
        for p, g in zip(theta, gradient):
            p.data -= 0.1 * g
        torch.testing.assert_close(moved[0], parameters(actor) - before[0], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(moved[1], parameters(critic) - before[1], rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("leader", ["none", "actor"])
    def test_normalization_divides_the_composed_gradient(self, leader):
        """By the advantages' standard deviation, the implicit term as well as the direct one."""
        advantages = self.surrogates(self.run())[3].advantages
        centred = advantages - advantages.mean()
        actor, critic, _, _, f1, f2 = self.surrogates(self.run(), centred)
        theta, w = list(actor.parameters()), list(critic.parameters())
        if leader == "actor":
            total, info = stac_ac.stackelberg_gradient(f1, f2, theta, w, SMALL["lam"], 50, 1e-4)
            assert info["implicit_norm"] > 0.2 * info["direct_norm"]
        else:
            total = torch.autograd.grad(f1, theta)
        expected = -0.1 * stac_ac.flatten(total) / advantages.std(correction=0)
        assert advantages.std() > 1.5 or advantages.std() < 0.7  # or the test would say little
        torch.testing.assert_close(self.update(leader=leader)[0], expected, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("norm_adv", [True, False])
    def test_is_the_released_estimator(self, norm_adv):
        """`--start-states released`, written down as the released code has it, with a dense solve."""
        lam = 100.0
        run = self.run(start_states="released")
        step = self.update(start_states="released", lam=lam, norm_adv=norm_adv, cg_tol=1e-6)[0]
        actor, critic, batch = self.make()
        theta, w = list(actor.parameters()), list(critic.parameters())
        returns, _, A = stac_ac.estimate(actor, critic, batch, run)
        A = (A - A.mean()) / (A.std(correction=0) + 1e-8) if norm_adv else A
        log_pi, V = actor(batch.obs).log_prob(batch.actions), critic(batch.obs)
        grad = functools.partial(torch.autograd.grad, retain_graph=True, allow_unused=True)
        direct = stac_ac.flatten(grad(-(V + log_pi * A).mean(), theta))
        grad_w = stac_ac.flatten(grad(((V - returns) ** 2).mean(), w, create_graph=True))
        H = torch.stack([stac_ac.flatten(stac_ac.grad(row, w)) for row in grad_w])
        assert torch.linalg.eigvalsh(H)[0] > -lam  # or the solve stops early
        v = torch.linalg.solve(H + lam * torch.eye(len(H)), -stac_ac.flatten(grad(V.mean(), w)))
        mixed = stac_ac.flatten(grad(2 * (log_pi * A).mean() * (returns[0] - V[0]), w, create_graph=True))
        implicit = -stac_ac.flatten(stac_ac.grad(mixed, theta, v))
        assert implicit.norm() > 0.03 * direct.norm()
        torch.testing.assert_close(step, -0.1 * (direct + implicit), rtol=1e-4, atol=1e-7)

    def test_noise_on_both_gradients(self):
        steps = {noise: self.update(grad_noise=noise, unroll=1)[:2] for noise in (0.0, 0.5)}
        for k, rate in ((0, 0.1), (1, 0.01)):
            noise = (steps[0.5][k] - steps[0.0][k]) / rate
            n = len(noise)
            assert abs(noise.mean()) < 5 * 0.5 / n**0.5
            assert noise.std().item() == pytest.approx(0.5, rel=5 / (2 * n) ** 0.5)

    def test_large_lam_is_leader_none(self):
        torch.testing.assert_close(self.update(lam=1e12)[0], self.update(leader="none")[0])

    def test_curvature(self):
        """The two give different but similar steps. With λ = 0 on CartPole the Hessian is indefinite, and every solve
        is cut short; (2/N) 𝒥ᵀ𝒥 has no negative eigenvalue."""
        gauss_newton, hessian = self.update(curvature="gauss-newton")[0], self.update()[0]
        assert 0.02 < (gauss_newton - hessian).norm() / hessian.norm() < 0.5
        env = stac_ac.make_env("CartPole-v1")
        for seed, curvature in itertools.product(range(5), ("hessian", "gauss-newton")):
            torch.manual_seed(seed)
            actor = stac_ac.Actor(env.observation_space, env.action_space)
            critic = stac_ac.Critic(env.observation_space)
            rates = torch.optim.SGD(actor.parameters(), 0.0), torch.optim.SGD(critic.parameters(), 0.0)
            batch, _ = stac_ac.collect(env, actor, 1000, seed, 0)
            run = stac_ac.Args(curvature=curvature, start_states="every", lam=0.0, cg_iters=50, cg_tol=1e-3)
            _, _, info = stac_ac.stackelberg_update(actor, critic, *rates, batch, 0.0, run)
            assert info["negative_curvature"].item() == (curvature == "hessian")

    @pytest.mark.parametrize("leader", ["none", "actor"])
    def test_critic_loss_is_written_once(self, leader, monkeypatch):
        """Half of the loss is half of the critic's first step and of those after it."""
        before = [self.update(leader=leader, unroll=m)[1] for m in (1, 3)]
        loss = stac_ac.critic_loss
        monkeypatch.setattr(stac_ac, "critic_loss", lambda *arguments: loss(*arguments) / 2)
        for step, m in zip(before, (1, 3)):
            torch.testing.assert_close(self.update(leader=leader, unroll=m, critic_lr=0.02)[1], step)

    def test_control_as_long_as_ac(self, monkeypatch):
        """benchmark/stac_ac_scaled.py: the direction of the one and the length of the other."""
        total, plain = self.update()[0], self.update(leader="none")[0]
        monkeypatch.syspath_prepend(Path(stac_ac.__file__).parent / "benchmark")
        scaled_derivative = importlib.import_module("stac_ac_scaled").scaled_derivative
        monkeypatch.setattr(stac_ac, "total_derivative", scaled_derivative)
        torch.testing.assert_close(self.update()[0], total * plain.norm() / total.norm())

    def test_start_states(self):
        steps = [self.update(start_states=kind)[0] for kind in ("released", "every", "initial")]
        for first, second in itertools.combinations(steps, 2):
            assert not torch.allclose(first, second, rtol=0.1)

    def test_the_default_is_the_released_estimator(self):
        assert stac_ac.Args().start_states == "released"

    @pytest.mark.parametrize("leader", ["none", "actor"])
    def test_every_parameter_group_takes_its_step(self, leader):
        run = self.run(leader=leader)
        expected = self.update(leader=leader)
        actor, critic, batch = self.make()
        before = parameters(actor), parameters(critic)
        optimizers = []
        for net, rate in ((actor, 0.1), (critic, 0.01)):
            first, *others = net.parameters()
            optimizers.append(torch.optim.SGD([{"params": [first]}, {"params": others}], rate))
        stac_ac.stackelberg_update(actor, critic, *optimizers, batch, run.lam, run)
        torch.testing.assert_close(parameters(actor) - before[0], expected[0])
        torch.testing.assert_close(parameters(critic) - before[1], expected[1])

    @pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
    @pytest.mark.parametrize("leader", ["none", "actor"])
    def test_frozen_parameters_are_left_alone(self, leader, curvature):
        """The game is between the others: with a frozen first layer it is that of the features that this makes."""
        run = self.run(leader=leader, curvature=curvature)
        actor, critic, batch = self.make()
        for net in (actor.net, critic.v):
            net[0].requires_grad_(False)
        before = parameters(actor), parameters(critic)
        optimizers = torch.optim.SGD(actor.parameters(), 0.1), torch.optim.SGD(critic.parameters(), 0.01)
        frozen = actor.net[0].weight.clone(), critic.v[0].weight.clone()
        stac_ac.stackelberg_update(actor, critic, *optimizers, batch, run.lam, run)
        assert torch.equal(frozen[0], actor.net[0].weight) and torch.equal(frozen[1], critic.v[0].weight)
        moved = parameters(actor) - before[0], parameters(critic) - before[1]

        small_actor, small_critic, _ = self.make()
        with torch.no_grad():
            features = [torch.tanh(net[0](obs)) for net in (actor.net, critic.v) for obs in (batch.obs, batch.next_obs)]
        for net in (small_actor.net, small_critic.v):
            net[0], net[1] = nn.Identity(), nn.Identity()
        small_actor.forward = types.MethodType(forward_of_features(features[0], stac_ac.Actor.forward), small_actor)
        small_critic.forward = lambda obs, actions=None: small_critic.v(
            features[2] if obs is batch.obs else features[3]
        ).squeeze(-1)
        before = parameters(small_actor), parameters(small_critic)
        optimizers = torch.optim.SGD(small_actor.parameters(), 0.1), torch.optim.SGD(small_critic.parameters(), 0.01)
        stac_ac.stackelberg_update(small_actor, small_critic, *optimizers, batch, run.lam, run)
        for found, net, old in zip(moved, (small_actor, small_critic), before):
            torch.testing.assert_close(found[-len(old) :], parameters(net) - old, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
    @pytest.mark.parametrize("start_states", ["released", "every"])
    def test_a_leader_without_influence_is_an_error(self, start_states, curvature, monkeypatch):
        """Not the plain algorithm in silence: here the critic's targets are constants, as usual code has them."""
        surrogate = stac_ac.critic_surrogate
        monkeypatch.setattr(
            stac_ac, "critic_surrogate", lambda c, b, score, e, a: surrogate(c, b, score.detach(), e, a)
        )
        assert "influence" in refused(self.update, start_states=start_states, curvature=curvature)


def forward_of_features(features, forward):
    return lambda self, obs: forward(self, features)
