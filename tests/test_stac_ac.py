"""stac_ac.py as its users run it, at its edges, and the pieces between the simulator and the surrogates."""

import copy
import dataclasses
import fcntl
import functools
import importlib
import itertools
import math
import os
import random
import shutil
import signal
import sys
import time
import types
import weakref
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from gymnasium.spaces import Box, Discrete
from point_env import Point
from runs import assert_same_weights, checkpoint, command, files, finish, flags, run_main, scalars, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import stac_ac

# a run of a second: twenty batches of ten episodes
SMALL = {
    **{"env_id": "point_env:Point-v0", "hidden": (16, 16), "num_steps": 200, "total_timesteps": 4000, "gamma": 0.9},
    **{"checkpoint_every": 400, "save_model": True, "cuda": False, "unroll": 5, "critic_lr": 0.02, "lam": 1.0},
    **{"start_states": "every"},
}
KINDS = {
    "continuous": {},
    "discrete": {"env_id": "point_env:Compass-v0"},
    "continuous-q": {"critic": "q"},
    "discrete-q": {"env_id": "point_env:Compass-v0", "critic": "q"},
}
SPACES = Box(-1.0, 1.0, (3,)), Box(-1.0, 1.0, (2,))


def args(**changes):
    return stac_ac.Args(**{**SMALL, **changes})


@pytest.fixture(autouse=True)
def working_folder(here):
    return here


def refused(call, *arguments):
    """The one line with which a program ends."""
    with pytest.raises(SystemExit) as error:
        call(*arguments)
    message = str(error.value.code)
    assert message.startswith("stac_ac.py: error: ") and "\n" not in message
    return message


def batch_returns(run_dir):
    return list(scalars(run_dir)["charts/batch_return"].values())


def parameters(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def load_actor(run_dir, run):
    env = stac_ac.make_env(run.env_id)
    actor = stac_ac.Actor(env.observation_space, env.action_space, run.hidden)
    actor.load_state_dict(torch.load(run_dir / "model.pt", weights_only=True)["actor"])
    return actor, env


# Learning
@pytest.mark.parametrize("leader", ["actor", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_learns(kind, leader):
    """The mean return of a batch, -20 (continuous) or -40 (discrete) at the start.

    The total derivative is several times as long as the plain gradient: hence its lower rate. A Q critic, of whose
    values the actor's advantages are, has to be near its best response: hence its 20 steps and λ = 500. With these
    numbers seeds 1 to 8 learn, so that another processor's rounding does not matter.
    """
    changes = {"policy_lr": 0.2 if leader == "none" else 0.05, "lam": 50.0, **KINDS[kind]}
    if "critic" in changes:
        changes |= {"unroll": 20, "lam": 500.0}
    if (kind, leader) == ("continuous-q", "none"):
        changes["policy_lr"] = 0.05
    returns = batch_returns(stac_ac.train(args(leader=leader, total_timesteps=12_000, **changes)))
    assert np.mean(returns[-5:]) > np.mean(returns[:3]) / 2


def test_released_learns():
    """The default."""
    run = args(start_states="released", policy_lr=0.1, total_timesteps=10_000, lam=50.0)
    returns = batch_returns(stac_ac.train(run))
    assert np.mean(returns[-5:]) > np.mean(returns[:3]) / 2
    assert stac_ac.Args().start_states == "released"


def test_without_gradients_nothing_is_learned():
    """The control of the tests above."""
    for kind in KINDS.values():
        returns = batch_returns(stac_ac.train(args(policy_lr=0.0, total_timesteps=4000, **kind)))
        assert np.mean(returns[-5:]) < 0.7 * np.mean(returns[:3])


def test_the_first_example_learns(monkeypatch, capsys):
    """The docstring's first command, for its first ten batches. (`every` has 9 here, and random play 22.)"""
    example = next(line for line in stac_ac.__doc__.splitlines() if "python stac_ac.py" in line)
    line = example.split("#")[0].split()[2:]
    run_main(stac_ac, monkeypatch, *line, "--total-timesteps", 40_000)
    batch_return = capsys.readouterr().out.splitlines()[-2]
    assert batch_return.startswith("step 40000: batch return ")
    assert float(batch_return.split()[4]) > 25


# The same run again
@pytest.mark.parametrize("kind", ["continuous-q", "discrete"])
@pytest.mark.parametrize("leader", ["actor", "none"])
def test_same_seed_same_run(kind, leader):
    run = args(leader=leader, total_timesteps=600, lam=50.0, policy_lr=0.02, grad_noise=0.1, **KINDS[kind])
    first, second = stac_ac.train(run), stac_ac.train(run)
    assert first != second
    assert_same_weights(first, second)
    with pytest.raises(AssertionError):
        assert_same_weights(first, stac_ac.train(dataclasses.replace(run, seed=2)))
    assert first.name.split("__")[1] == {"actor": "stac-al", "none": "ac"}[leader]


def test_lam_decay_reaches_the_gradient():
    """λ that has gone at the first batch is λ = 0."""
    run = args(total_timesteps=400, policy_lr=1e-3, lam=50.0)
    decayed = stac_ac.train(dataclasses.replace(run, lam_decay=1e-3))
    assert_same_weights(decayed, stac_ac.train(dataclasses.replace(run, lam=0.0)))
    with pytest.raises(AssertionError):
        assert_same_weights(decayed, stac_ac.train(run))


def test_saving_does_not_change_the_run():
    short = args(total_timesteps=1000)
    assert_same_weights(stac_ac.train(short), stac_ac.train(dataclasses.replace(short, checkpoint_every=10_000)))


def test_killed_and_carried_on_by_the_same_command(here, monkeypatch, capsys):
    """SIGKILL in the middle of a batch; nothing in the curves is missing or twice. A third time it is finished."""
    run = args(env_id="point_env:Compass-v0", num_steps=190, grad_noise=0.05, lam_decay=1e4, total_timesteps=2000)
    whole = stac_ac.train(run)
    killed = here / "killed"
    line = flags(dataclasses.replace(run, run_dir=str(killed)))
    code, _, _ = finish(command(*line, cwd=here, script=stac_ac.__file__, kill_at=1400))
    assert code == -signal.SIGKILL
    assert checkpoint(killed)["global_step"] == 3 * 2 * 190  # checkpoints at 570 and 1140
    assert not (killed / "model.pt").exists()
    capsys.readouterr()
    time.sleep(1)  # TensorBoard reads the files of a run in the order of their seconds
    run_main(stac_ac, monkeypatch, *line)
    assert "from step 1140" in capsys.readouterr().out
    assert_same_weights(whole, killed)
    run_main(stac_ac, monkeypatch, *line)
    assert "is finished, with 1900 steps" in capsys.readouterr().out
    assert scalars(whole) == scalars(killed)


def test_an_optimizer_with_a_state_is_carried_on(monkeypatch):
    """SGD has none; somebody puts in another."""
    monkeypatch.setattr(torch.optim, "SGD", torch.optim.Adam)
    run = args(total_timesteps=800, policy_lr=0.01, run_dir="run")
    stac_ac.train(dataclasses.replace(run, total_timesteps=400))
    assert_same_weights(stac_ac.train(run), stac_ac.train(dataclasses.replace(run, run_dir="whole")))


def test_interrupted_and_carried_on(here, monkeypatch, capsys):
    """Ctrl-C before the first checkpoint and after it: one line that says how to carry on."""
    run = args(leader="none", critic="q", total_timesteps=2000, run_dir="run")
    whole = stac_ac.train(dataclasses.replace(run, run_dir="whole"))
    for step, word in ((150, "nothing to carry on from"), (1100, "the same command with --run-dir run carries on")):
        monkeypatch.setenv("POINT_INTERRUPT_AT", str(step))
        with pytest.raises(SystemExit) as error:
            stac_ac.train(run)
        assert error.value.code == 130
        message = capsys.readouterr().err.strip()
        assert word in message and "\n" not in message
    monkeypatch.delenv("POINT_INTERRUPT_AT")
    assert_same_weights(whole, stac_ac.train(run))
    found, expected = scalars(here / "run"), scalars(whole)
    assert found == expected


def test_a_finished_run_is_finished_and_can_be_made_longer(here, monkeypatch, capsys):
    """Longer, it is what a long run is; interrupted before its next checkpoint, it has lost nothing."""
    run = args(total_timesteps=2100, checkpoint_every=10**6, run_dir="run")  # 2,000 steps: the last batch that fits
    run_dir = stac_ac.train(run)
    before = files(run_dir)
    assert checkpoint(run_dir)["global_step"] == 2000
    capsys.readouterr()
    stac_ac.train(dataclasses.replace(run, save_model=False))
    assert capsys.readouterr().out == "run is finished, with 2000 steps; a larger --total-timesteps makes it longer\n"
    assert files(run_dir) == before

    longer = dataclasses.replace(run, total_timesteps=3000)
    monkeypatch.setenv("POINT_INTERRUPT_AT", "500")
    with pytest.raises(SystemExit):
        stac_ac.train(longer)
    monkeypatch.delenv("POINT_INTERRUPT_AT")
    assert max(scalars(run_dir)["charts/batch_return"]) >= 2000
    stac_ac.train(longer)
    whole = stac_ac.train(dataclasses.replace(longer, run_dir="whole"))
    assert_same_weights(whole, run_dir)
    assert scalars(whole) == scalars(run_dir)


def test_a_finished_run_gives_the_model_that_was_not_asked_for():
    run = args(total_timesteps=400, save_model=False, run_dir="run")
    run_dir = stac_ac.train(run)
    assert not (run_dir / "model.pt").exists()
    stac_ac.train(dataclasses.replace(run, save_model=True))
    assert_same_weights(run_dir, stac_ac.train(args(total_timesteps=400)))


def test_the_folder_alone_carries_a_run_on(monkeypatch, capsys):
    """Its flags are the defaults; a module that only the checkpoint names is not imported."""
    run = args(total_timesteps=400, run_dir="run", lam=3.0)
    stac_ac.train(run)
    message = refused(run_main, stac_ac, monkeypatch, "--run-dir", "run", "--total-timesteps", "800")
    assert "--env-id point_env:Point-v0" in message
    line = ["--run-dir", "run", "--total-timesteps", "800", "--env-id", run.env_id]
    run_main(stac_ac, monkeypatch, *line)
    assert_same_weights(stac_ac.train(args(total_timesteps=800, lam=3.0)), Path("run"))


def test_only_one_process_is_at_work_in_a_folder(capsys):
    run = args(total_timesteps=400, run_dir="run")
    run_dir = stac_ac.train(run)
    before = files(run_dir)
    capsys.readouterr()
    with open(run_dir / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as error:
            stac_ac.train(dataclasses.replace(run, total_timesteps=800))
    assert error.value.code == os.EX_TEMPFAIL
    assert capsys.readouterr().err == "stac_ac.py: another process is at work in run\n"
    assert files(run_dir) == before


def test_flags_that_would_make_another_run(capsys):
    run = args(total_timesteps=400, run_dir="run")
    run_dir = stac_ac.train(run)
    before = files(run_dir)
    other = {"seed": 2, "num_steps": 100, "critic": "q", "start_states": "initial", "lam": 2.0, "max_episode_steps": 9}
    for name, value in other.items():
        message = refused(stac_ac.train, dataclasses.replace(run, **{name: value}))
        assert f"--{name.replace('_', '-')} {getattr(run, name)}, not {value}" in message
    assert "beyond --total-timesteps" in refused(stac_ac.train, dataclasses.replace(run, total_timesteps=200))
    assert files(run_dir) == before
    free = {"exp_name": "other", "save_model": False, "eval_episodes": 3, "checkpoint_every": 600}
    stac_ac.train(dataclasses.replace(run, total_timesteps=800, **free))
    # each flag is one or the other
    assert stac_ac.MAY_CHANGE < vars(run).keys()
    assert not stac_ac.MAY_CHANGE & {"env_id", "gamma", "grad_noise", "hidden", "curvature", "leader", "unroll", *other}


def test_files_that_are_refused(here):
    run = args(total_timesteps=400, run_dir="run")
    run_dir = stac_ac.train(run)
    path = run_dir / "checkpoint.pt"
    data, state = path.read_bytes(), torch.load(path, weights_only=True)

    def message():
        before = files(run_dir)
        found = refused(stac_ac.train, dataclasses.replace(run, total_timesteps=800))
        assert "checkpoint.pt" in found and files(run_dir) == before
        return found

    for size in (0, 100, len(data) // 2, len(data) - 10):
        path.write_bytes(data[:size])
        assert "damaged" in message()
    torch.save([1], path)
    assert "damaged, or no checkpoint" in message()
    torch.save({**state, "algorithm": "stsac"}, path)
    assert "another script: stsac" in message()
    torch.save({**state, "args": {"env_id": "x"}}, path)
    assert "another version" in message()
    shutil.copy(run_dir / "model.pt", path)
    assert "a model cannot be carried on" in message()
    path.unlink()
    path.mkdir()
    assert "a folder" in message()
    assert "missing" in refused(stac_ac.play, args(evaluate="no/such/model.pt"))


def test_a_flipped_bit_is_seen(here):
    """Wherever it is: either the file is refused or nothing in it is different."""
    run_dir = stac_ac.train(args(total_timesteps=400))
    path = run_dir / "checkpoint.pt"
    data, expected = path.read_bytes(), checkpoint(run_dir)
    positions = np.random.default_rng(0).integers(len(data), size=60)
    seen = 0
    for k in positions:
        damaged = bytearray(data)
        damaged[k] ^= 1 << int(k) % 8
        path.write_bytes(damaged)
        try:
            found = stac_ac.load(path, args(), "rng")
        except SystemExit:
            seen += 1
            continue
        for net in ("actor", "critic"):
            torch.testing.assert_close(found[net], expected[net], rtol=0, atol=0)
        assert torch.equal(found["rng"], expected["rng"])
        assert (found["args"], found["global_step"]) == (expected["args"], expected["global_step"])
    assert seen > 10


def test_what_was_loaded_does_not_stay_in_memory(monkeypatch):
    run = args(total_timesteps=400, run_dir="run")
    stac_ac.train(run)
    load, collect = stac_ac.load, stac_ac.collect
    loaded = []

    class State(dict):  # a dict has no weak references
        pass

    def watched_load(*arguments):
        state = State(load(*arguments))
        loaded.append(weakref.ref(state))
        return state

    def watched_collect(*arguments):
        assert loaded[0]() is None
        return collect(*arguments)

    monkeypatch.setattr(stac_ac, "load", watched_load)
    monkeypatch.setattr(stac_ac, "collect", watched_collect)
    stac_ac.train(dataclasses.replace(run, total_timesteps=600))
    assert len(loaded) == 1


# What is said at the start
BAD = {
    "negative lam": (["--lam", "-1"], "--lam"),
    "lam not a number": (["--lam", "nan"], "--lam"),
    "huge lam": (["--lam", "1e300"], "--lam"),
    "infinite rate": (["--policy-lr", "inf"], "--policy-lr"),
    "huge rate": (["--policy-lr", "1e300"], "--policy-lr"),
    "huge critic's rate": (["--critic-lr", "1e300"], "--critic-lr"),
    "seed of 30 digits": (["--seed", "1" * 30], "--seed"),
    "seed that an int32 cannot hold": (["--seed", str(2**31)], "--seed"),
    "negative seed": (["--seed", "-1"], "--seed"),
    "tiny decay": (["--lam-decay", "1e-300"], "--lam-decay"),
    "no CG iterations": (["--cg-iters", "0"], "--cg-iters"),
    "tolerance": (["--cg-tol", "1"], "--cg-tol"),
    "nothing of V": (["--gamma", "0", "--start-states", "initial"], "--gamma 0"),
    "no follower steps": (["--unroll", "0"], "--unroll"),
    "no hidden units": (["--hidden", "8", "0"], "--hidden"),
    "empty batch": (["--num-steps", "0"], "--num-steps"),
    "no steps": (["--total-timesteps", "-5"], "--total-timesteps"),
    "a batch longer than the run": (["--num-steps", "200", "--total-timesteps", "100"], "--num-steps"),
    "gamma above one": (["--gamma", "1.1"], "--gamma"),
    "gae-lambda above one": (["--gae-lambda", "1.1"], "--gae-lambda"),
    "negative noise": (["--grad-noise", "-0.1"], "--grad-noise"),
    "no time": (["--max-episode-steps", "0"], "--max-episode-steps"),
    "no checkpoints": (["--checkpoint-every", "0"], "--checkpoint-every"),
    "no episodes": (["--eval-episodes", "0", "--evaluate", "model.pt"], "--eval-episodes"),
    "no folder": (["--run-dir", ""], "--run-dir"),
    "no model": (["--evaluate", "", "--env-id", "point_env:TwoBoxes-v0"], "--evaluate"),
    "evaluate of nothing": (["--evaluate", "no/such/model.pt"], "no/such/model.pt"),
    "one start state for a Q critic": (["--start-states", "released", "--critic", "q"], "--critic v"),
    "video of the training": (["--capture-video"], "--evaluate"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(here, case, monkeypatch):
    line, expected = BAD[case]
    assert expected in refused(run_main, stac_ac, monkeypatch, *line)
    assert list(here.iterdir()) == []


def test_edge_values_are_accepted():
    stac_ac.check_args(stac_ac.Args(critic="q", leader="none"))  # it has no start states
    edges = {"gamma": 1.0, "gae_lambda": 1.0, "lam": 0.0, "cg_tol": 0.0, "policy_lr": 0.0, "critic_lr": 0.0}
    stac_ac.check_args(stac_ac.Args(seed=0, num_steps=800_000, **edges))
    stac_ac.check_args(stac_ac.Args(seed=2**31 - 1, gamma=0.0, gae_lambda=0.0, cg_tol=0.99))
    stac_ac.check_args(stac_ac.Args(gamma=0.0, start_states="every", critic="q", max_episode_steps=1))


def test_the_defaults():
    """The released code's on CartPole, but for λ, which is the paper's for MuJoCo."""
    run = stac_ac.Args()
    assert (run.leader, run.critic, run.curvature, run.start_states) == ("actor", "v", "hessian", "released")
    assert (run.lam, run.lam_decay, run.unroll, run.cg_iters, run.cg_tol) == (500, None, 1, 10, 0.01)
    assert (run.policy_lr, run.critic_lr, run.grad_noise, run.norm_adv) == (0.1, 0.01, 0, True)
    assert (run.num_steps, run.gamma, run.gae_lambda, run.hidden) == (4000, 0.99, 0.97, (64, 32))


def test_what_a_run_begins_with():
    run = args(total_timesteps=200, policy_lr=0.0, critic_lr=0.0, hidden=(7,), grad_noise=0.0)
    for critic in ("v", "q"):
        state = checkpoint(stac_ac.train(dataclasses.replace(run, critic=critic)))
        assert len(state["actor"]["net.0.bias"]) == len(state["critic"][f"{critic}.0.bias"]) == 7
        assert state["actor"]["log_std"].tolist() == [-0.5, -0.5]
    other = checkpoint(stac_ac.train(dataclasses.replace(run, critic="q", seed=2)))
    for net in ("actor", "critic"):  # no step was taken: the networks' own start
        for name, value in other[net].items():
            assert value.dim() == 1 or not torch.equal(value, state[net][name])
    state = checkpoint(stac_ac.train(dataclasses.replace(run, policy_lr=0.02, critic_lr=0.03)))
    rates = [state[f"{net}_optimizer"]["param_groups"][0]["lr"] for net in ("actor", "critic")]
    assert rates == [0.02, 0.03]


@pytest.mark.parametrize(
    "env_id, word",
    [
        ("TwoBoxes-v0", "MultiDiscrete"),
        ("PointMatrix-v0", "1-d Box"),
        ("PointNoFixedSize-v0", "flat observations"),
        ("PointNoTimeLimit-v0", "no time limit, so an episode may never end: --max-episode-steps 1000 sets one"),
    ],
)
def test_environments_that_are_refused(env_id, word):
    assert word in refused(stac_ac.train, args(env_id=f"point_env:{env_id}"))


def test_a_run_folder_that_cannot_be_made(here):
    Path("file").touch()
    assert "--run-dir file" in refused(stac_ac.train, args(run_dir="file"))


def test_a_time_limit_by_flag(capsys):
    """An environment that has none: in training, and in --evaluate with what the model was trained with."""
    run_dir = stac_ac.train(args(env_id="point_env:PointNoTimeLimit-v0", max_episode_steps=10, total_timesteps=400))
    assert set(scalars(run_dir)["charts/episodic_length"].values()) == {10}
    stac_ac.play(args(evaluate=str(run_dir / "model.pt"), env_id="point_env:PointNoTimeLimit-v0", eval_episodes=2))
    assert "over 2 episodes" in capsys.readouterr().out
    env = stac_ac.make_env("CliffWalking-v1", 30)  # gymnasium's own, whose registration has no limit
    actor = stac_ac.Actor(env.observation_space, env.action_space, (4,))
    assert stac_ac.evaluate(actor, env, 1, 0) < -29


def test_start_progress_and_end_without_a_terminal(monkeypatch, capsys):
    """One line that says what runs and where, a line a minute on how far it is and how fast now, and the end."""
    clock = itertools.count()
    monkeypatch.setattr(stac_ac.time, "perf_counter", lambda: 10.0 * next(clock))
    run_dir = stac_ac.train(args(curvature="gauss-newton", run_dir="run"))
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "stac-al, gauss-newton on point_env:Point-v0, cpu, from step 0: run"
    assert lines[-1] == f"finished: {run_dir}"
    batches = [line for line in lines if "batch return" in line]
    assert [line.split(":")[0] for line in batches] == ["step 2000", "step 4000"]
    progress = [line for line in lines if " left" in line]
    assert len(lines) == 2 + 2 + len(progress) and len(progress) > 4
    assert progress[0].startswith("step 800 of 4000, ") and "steps/s, 0:" in progress[0]
    assert err == ""
    stac_ac.train(args(leader="none", total_timesteps=200, run_dir="plain"))
    assert capsys.readouterr().out.startswith("ac on point_env:Point-v0, cpu, from step 0: plain\n")


def test_speed_is_of_this_process(monkeypatch):
    """Of a run that is carried on: the steps since then."""
    run = args(total_timesteps=400, run_dir="run")
    stac_ac.train(run)
    clock = itertools.chain([0.0], itertools.repeat(10.0))
    monkeypatch.setattr(stac_ac.time, "perf_counter", lambda: next(clock))
    run_dir = stac_ac.train(dataclasses.replace(run, total_timesteps=600))
    events = EventAccumulator(str(run_dir))
    events.Reload()
    assert events.Scalars("charts/SPS")[-1].value == pytest.approx(200 / 10)


def test_a_clock_that_is_behind(capsys):
    run = args(total_timesteps=400, run_dir="run")
    stac_ac.train(run)
    run_dir = stac_ac.train(dataclasses.replace(run, total_timesteps=600))
    assert "clock" not in capsys.readouterr().out
    future = run_dir / f"events.out.tfevents.{int(time.time()) + 1000}.host.1.0"
    next(run_dir.glob("events.out.tfevents.*")).rename(future)
    stac_ac.train(dataclasses.replace(run, total_timesteps=800))
    out = capsys.readouterr().out
    assert f"the clock is behind {future}" in out and out.count("clock") == 1


def test_a_state_that_could_not_be_loaded_is_not_saved(here):
    """Said when it is saved, not when the run is to be carried on; the file that is there stays."""
    path = stac_ac.train(args(total_timesteps=200)) / "checkpoint.pt"
    before = path.read_bytes()
    state = torch.load(path, weights_only=True)
    message = refused(functools.partial(stac_ac.save, path, **state, statistics=np.zeros(3)))
    assert "checkpoint.pt could not be read back" in message
    assert path.read_bytes() == before


def test_wandb_in_folders_of_any_name(here, monkeypatch):
    """`.` is a name that it refuses, and folders of one name are several runs."""
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **known: calls.append(known)))
    for folder in ("a/run", "b/run"):
        Path(folder).mkdir(parents=True)
        monkeypatch.chdir(here / folder)
        stac_ac.train(args(total_timesteps=200, track=True, run_dir="."))
        monkeypatch.chdir(here)
    stac_ac.train(args(total_timesteps=400, track=True, run_dir="a/run"))
    assert [call["name"] for call in calls] == ["run", "run", "run"]
    assert calls[0]["id"] == calls[2]["id"] != calls[1]["id"]
    assert calls[0]["resume"] == "allow" and calls[0]["sync_tensorboard"]


# Odd environments
@pytest.mark.parametrize("env_id", ["ChangesAction", "OwnEpisodeInfo", "ArrayReward", "Int32Seed", "PointInPlace"])
def test_the_same_task_however_its_environment_behaves(env_id, capsys):
    """Same weights, same curves, and the same evaluation."""
    point = args(total_timesteps=600, env_id="point_env:Point-v0")
    odd = dataclasses.replace(point, env_id=f"point_env:{env_id}-v0")
    dirs = [stac_ac.train(run) for run in (point, odd)]
    assert_same_weights(*dirs)
    assert scalars(dirs[0]) == scalars(dirs[1])
    returns = [stac_ac.evaluate(*load_actor(d, run), 3, 1) for d, run in zip(dirs, (point, odd))]
    np.testing.assert_array_equal(*returns)


class Recorded(gym.Wrapper):
    """An environment that records the statistics of its episodes itself."""

    def __init__(self):
        super().__init__(gym.wrappers.RecordEpisodeStatistics(Point()))


def test_an_environment_that_records_its_statistics():
    gym.register("Recorded-v0", Recorded, max_episode_steps=20)
    first, second = (stac_ac.train(args(env_id=kind, total_timesteps=600)) for kind in (SMALL["env_id"], "Recorded-v0"))
    assert_same_weights(first, second)
    assert scalars(first) == scalars(second)


class Double(Point):
    """Bounds that float32 does not have."""

    action_space = Box(np.array([-1.4, -0.3]), np.array([0.8, 0.9]), dtype=np.float64)

    def step(self, action):
        assert self.action_space.contains(action) and action.dtype == np.float64
        return super().step(action)


gym.register("Double-v0", Double, max_episode_steps=20)


def test_actions_are_within_the_box_to_the_last_bit():
    """And in its dtype: the environments assert it, in training and in evaluation."""
    for env_id in ("point_env:StrictBox-v0", "point_env:PointSmall-v0", "Double-v0"):
        run = args(env_id=env_id, total_timesteps=400)
        actor, env = load_actor(stac_ac.train(run), run)
        for bias in (-1e3, 1e3):
            actor.net[-1].bias.data.fill_(bias)
            stac_ac.evaluate(actor, env, 1, 0)
            stac_ac.collect(env, actor, 20, 1, 0)


def test_actions_in_an_integer_box():
    """The nearest number, the bounds among them."""
    space = Box(np.array([0, -1]), np.array([3, 1]), dtype=np.int64)
    for action, expected in (([0.4, -0.6], [0, -1]), ([2.6, 0.9], [3, 1]), ([9.0, -9.0], [3, -1])):
        box = stac_ac.to_env(np.float32(action), space)
        assert box.tolist() == expected and box.dtype == np.int64


def test_a_box_without_bounds():
    run = args(env_id="point_env:PointUnbounded-v0", total_timesteps=400)
    assert all(value.isfinite().all() for value in weights(stac_ac.train(run)).values())


def test_global_generators_are_seeded():
    """An environment that draws from numpy's and python's own is the same from run to run."""
    run = args(env_id="point_env:GlobalGenerators-v0", total_timesteps=400)
    first = stac_ac.train(run)
    np.random.seed(5)
    random.seed(5)
    assert_same_weights(first, stac_ac.train(run))


@pytest.mark.parametrize("env_id, step", [("PointNaN-v0", 150), ("PointHuge-v0", 150), ("PointBadReset-v0", 0)])
def test_environment_that_returns_nan(env_id, step, here):
    run = args(env_id=f"point_env:{env_id}", num_steps=60, checkpoint_every=60, policy_lr=0.01, run_dir="run")
    message = refused(stac_ac.train, run)
    assert "not finite in float32" in message
    assert (f"step {step}: " if step else "the first observation of an episode") in message
    if step:
        assert checkpoint(here / "run")["global_step"] == 120


def test_large_numbers_are_no_error():
    """1e20, whose square is none in float32."""
    assert stac_ac.to_float32([1e20, -1e30]).tolist() == pytest.approx([1e20, -1e30])
    assert stac_ac.to_float32(1e300) == math.inf
    obs = np.zeros(3, np.float32)
    assert not np.shares_memory(stac_ac.to_float32(obs), obs)  # environments may change it in place


def test_a_policy_that_is_not_finite():
    """Before the environment gets its action."""
    space = Box(-1.0, 1.0, (2,))
    for number in (np.nan, np.inf):
        assert "the policy's action is not finite" in refused(stac_ac.to_env, np.float32([0, number]), space)


@pytest.mark.parametrize(
    "spoiled, call, word",
    [("critic_loss", 5, "number"), ("optimizer_step", 9, "parameter"), ("optimizer_step", 10, "parameter")],
    ids=["loss", "critic", "actor"],
)
def test_numbers_that_become_infinite(here, monkeypatch, spoiled, call, word):
    """The run stops at that step; the checkpoint is from before it and has finite weights."""
    calls, original = [], getattr(stac_ac, spoiled)

    def spoiling(*arguments):
        calls.append(1)
        if spoiled == "critic_loss":
            return original(*arguments) * (math.inf if len(calls) == call else 1)
        optimizer, players_parameters, grads = arguments
        original(optimizer, players_parameters, [g * (math.nan if len(calls) == call else 1) for g in grads])

    monkeypatch.setattr(stac_ac, spoiled, spoiling)
    message = refused(stac_ac.train, args(leader="none", unroll=1, checkpoint_every=200, run_dir="run"))
    assert f"step 1000: a {word} is not finite" in message
    state = checkpoint(here / "run")
    assert state["global_step"] == 800
    assert all(value.isfinite().all() for net in ("actor", "critic") for value in state[net].values())


def test_a_first_solve_that_breaks_down(monkeypatch):
    """It keeps its start, 0, and all that is logged is finite: the leader would be a plain player."""
    solve = stac_ac.conjugate_gradient

    def broken(matvec, *arguments):
        return solve(lambda v: matvec(v) * math.nan, *arguments)

    monkeypatch.setattr(stac_ac, "conjugate_gradient", broken)
    assert "the first solve met a number that is not finite" in refused(stac_ac.train, args())


def test_an_implicit_term_that_becomes_infinite(monkeypatch):
    """Without it, the leader's gradient would be spoiled one step before anything is seen."""
    total_derivative = stac_ac.total_derivative

    def spoiling(direct, implicit):
        return total_derivative(direct, [i * math.nan for i in implicit])

    monkeypatch.setattr(stac_ac, "total_derivative", spoiling)
    assert "step 200: a number is not finite" in refused(stac_ac.train, args())


# What a run leaves behind
@pytest.mark.parametrize("leader", ["actor", "none"])
def test_curves_and_lines(leader, capsys):
    run_dir = stac_ac.train(args(leader=leader, num_steps=210, total_timesteps=2300, lam_decay=1000.0))
    out = capsys.readouterr().out.splitlines()
    found = scalars(run_dir)
    names = "cg_residual cg_iterations negative_curvature direct_norm implicit_norm cosine lam"
    game = {f"stackelberg/{name}" for name in names.split()} if leader == "actor" else set()
    losses = {f"losses/{name}" for name in ("policy_loss", "value_loss", "entropy")}
    charts = {f"charts/{name}" for name in ("episodic_return", "episodic_length", "batch_return")}
    assert found.keys() == game | losses | charts
    assert all(math.isfinite(value) for values in found.values() for value in values.values())
    # ten whole episodes a batch, of 20 steps, and one of 10 that is cut and does not count
    starts = range(0, 2100, 210)
    steps = [start + 20 * k for start in starts for k in range(1, 11)]
    assert [step for step in found["charts/episodic_return"] if step <= 2100] == steps
    assert set(found["charts/episodic_length"].values()) == {20}
    assert list(found["charts/batch_return"]) == [start + 210 for start in starts]
    returns = found["charts/episodic_return"]
    for start in starts:
        mine = [returns[start + 20 * k] for k in range(1, 11)]
        assert found["charts/batch_return"][start + 210] == pytest.approx(np.mean(mine), rel=1e-5)
    # the last batch that fits ends at 2,100: it is the tenth as well, and has one line
    line = f"step 2100: batch return {np.mean(mine):.2f} ± {np.std(mine):.2f} (10 episodes)"
    assert out[1:] == [line, f"finished: {run_dir}"]
    if leader == "actor":
        assert found["stackelberg/lam"][1050] == pytest.approx(math.exp(-1.05))
    assert checkpoint(run_dir)["global_step"] == 2100


def test_the_curves_are_of_the_update(monkeypatch):
    """Made in it, of the values that it had: no network runs again."""
    updates, original = [], stac_ac.stackelberg_update

    def recording(actor, critic, *arguments):
        batch, run = arguments[2], arguments[4]
        entropy = actor(batch.obs).entropy().mean().item()
        # -J by (2), with what stands there for Q, and L: those of before the update
        costs = [-critic.action_values(batch, run.gamma).mean().item()]
        targets = stac_ac.estimate(actor, critic, batch, run).returns
        costs.append(((critic(batch.obs) - targets) ** 2).mean().item())
        found = original(actor, critic, *arguments)
        assert [found[0].item(), found[1].item()] == pytest.approx(costs, rel=1e-5)
        updates.append((entropy, *found))
        return found

    monkeypatch.setattr(stac_ac, "stackelberg_update", recording)
    found = scalars(stac_ac.train(args(total_timesteps=600)))
    for k, (entropy, f_actor, f_critic, info) in enumerate(updates, 1):
        logged = {tag: values[200 * k] for tag, values in found.items() if tag.split("/")[0] != "charts"}
        assert logged["losses/policy_loss"] == pytest.approx(f_actor.item())
        assert logged["losses/value_loss"] == pytest.approx(f_critic.item())
        assert logged["losses/entropy"] == pytest.approx(entropy)
        for name in ("direct_norm", "implicit_norm", "cosine", "negative_curvature"):
            assert logged[f"stackelberg/{name}"] == pytest.approx(float(info[name]))
        for name in ("residual", "iterations"):
            assert logged[f"stackelberg/cg_{name}"] == pytest.approx(float(info[name]))


def test_a_batch_that_is_shorter_than_an_episode(capsys):
    """Only what ends early in it would count."""
    for num_steps, said in ((19, True), (20, False)):
        stac_ac.train(args(num_steps=num_steps, total_timesteps=num_steps))
        assert ("a batch is shorter than the time limit" in capsys.readouterr().out) == said


def test_a_batch_without_the_end_of_an_episode(capsys):
    run_dir = stac_ac.train(args(env_id="point_env:PointTimeout-v0", total_timesteps=400))
    assert "charts/batch_return" not in scalars(run_dir)
    assert "step 400: batch return unknown (no episode ended)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["continuous", "discrete-q"])
def test_evaluate_plays_a_saved_model(kind, capsys, monkeypatch):
    run = args(total_timesteps=400, **KINDS[kind])
    run_dir = stac_ac.train(run)
    line = ["--evaluate", str(run_dir / "model.pt"), "--eval-episodes", "3"]
    assert f"--env-id {run.env_id}" in refused(run_main, stac_ac, monkeypatch, *line)
    capsys.readouterr()
    run_main(stac_ac, monkeypatch, *line, "--env-id", run.env_id)
    out = capsys.readouterr().out.splitlines()
    returns = stac_ac.evaluate(*load_actor(run_dir, run), 3, 1, stac_ac.PLAY)
    assert out[0] == f"{run_dir / 'model.pt'} on {run.env_id}, seed 1"
    np.testing.assert_allclose([float(text.split()[-1]) for text in out[1:4]], returns, atol=0.01)
    assert len(set(returns)) == 3 and stac_ac.TRAIN != stac_ac.PLAY
    assert len(out) == 5 and f"mean return {returns.mean():.2f} ± {returns.std():.2f}" in out[4]


def test_evaluation_is_the_mean_policys_return():
    """Undiscounted, without noise, added up by hand."""
    env = stac_ac.make_env("point_env:Point-v0")
    torch.manual_seed(0)
    actor = stac_ac.Actor(env.observation_space, env.action_space, (8,))
    expected = []
    for episode in range(3):
        position = torch.from_numpy(stac_ac.reset(env, 5, 6, episode))
        total = 0.0
        for _ in range(20):
            mean = actor.net(position).detach()
            position = (position + 0.2 * mean.clamp(-1, 1)).clamp(-2, 2)
            total -= float(position @ position)
        expected.append(total)
    np.testing.assert_allclose(stac_ac.evaluate(actor, env, 3, 5, 6), expected, rtol=1e-5)


def test_an_evaluation_keeps_the_modes():
    """Of a part that is not training for good, such as an encoder that its user froze."""
    env = stac_ac.make_env("point_env:Point-v0")
    actor = stac_ac.Actor(env.observation_space, env.action_space, (8,))
    actor.net[0].eval()
    modes = []
    actor.net[1].register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    stac_ac.evaluate(actor, env, 1, 1)
    assert modes and not any(modes)
    assert actor.training and actor.net[1].training and not actor.net[0].training


def test_evaluate_plays_the_models_task(monkeypatch, capsys):
    """Not the default one. Nobody swings up in 20 steps."""
    run_dir = stac_ac.train(args(env_id="Acrobot-v1", max_episode_steps=20, total_timesteps=200))
    capsys.readouterr()
    run_main(stac_ac, monkeypatch, "--evaluate", run_dir / "model.pt", "--eval-episodes", 1)
    assert "on Acrobot-v1, seed 1\nepisode 1: return -20.00\n" in capsys.readouterr().out


def test_videos(monkeypatch):
    """The first episode's; a second evaluation overwrites nothing; without OpenGL one line, and nothing is played."""
    pytest.importorskip("moviepy")
    run = args(env_id="point_env:PointRendering-v0", total_timesteps=200)
    run_dir = stac_ac.train(run)
    play = args(env_id=run.env_id, evaluate=str(run_dir / "model.pt"), capture_video=True, eval_episodes=2)
    for times in (1, 2):
        stac_ac.play(play)
        assert len(list(run_dir.rglob("*.mp4"))) == times
    state = torch.load(run_dir / "model.pt", weights_only=True)
    state["args"]["env_id"] = "point_env:PointNotRendering-v0"
    torch.save(state, run_dir / "model.pt")
    message = refused(stac_ac.play, dataclasses.replace(play, env_id="point_env:PointNotRendering-v0"))
    assert "--capture-video" in message and "no OpenGL" in message
    assert len(list(run_dir.rglob("*.mp4"))) == 2


def test_the_copied_file_runs_alone(here):
    """In an empty folder, with no other file of the project in reach, where stdout knows ASCII alone; nothing but its
    lines is printed."""
    copy = shutil.copy(stac_ac.__file__, here)
    line = "--env-id Hopper-v4 --total-timesteps 3000 --num-steps 1000 --no-cuda".split()
    code, out, err = finish(command(*line, cwd=here, script=copy, PYTHONPATH="", PYTHONIOENCODING="ascii"))
    assert code == 0 and err == ""
    (run_dir,) = here.glob("runs/*")
    assert run_dir.name.startswith("Hopper-v4__stac-al__1__") and (run_dir / "checkpoint.pt").exists()
    first, batch_return, last = out.splitlines()
    assert first == f"stac-al, hessian on Hopper-v4, cpu, from step 0: runs/{run_dir.name}"
    assert batch_return.startswith("step 3000: batch return ") and " ? " in batch_return
    assert last == f"finished: runs/{run_dir.name}"


def test_help_says_what_the_start_states_are(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(stac_ac, monkeypatch, "--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for word in ("released the batch's first state alone", "every every visited state", "initial the first state"):
        assert word in text
    assert "m of Algorithm 2: critic steps on a batch" in text  # the trailing comments


class TestCollect:
    def collect(self, env_id, num_steps, start=0, seed=1):
        env = stac_ac.make_env(env_id)
        torch.manual_seed(0)
        actor = stac_ac.Actor(env.observation_space, env.action_space, (8,))
        return actor, *stac_ac.collect(env, actor, num_steps, seed, start)

    def test_trajectories(self):
        """Episodes of 20 steps, the last one cut; what follows a step is the next one's start."""
        _, batch, episodes = self.collect("point_env:Point-v0", 50, start=100)
        assert batch.trajectory.tolist() == [0] * 20 + [1] * 20 + [2] * 10
        assert (batch.terminated == 0).all()  # a time limit is not terminal
        assert [(step, length) for step, _, length in episodes] == [(120, 20), (140, 20)]
        same = batch.trajectory[1:] == batch.trajectory[:-1]
        assert torch.equal(batch.obs[1:][same], batch.next_obs[:-1][same])
        assert not (batch.obs[1:] == batch.next_obs[:-1]).all(1)[~same].any()
        torch.testing.assert_close(batch.rewards, -(batch.next_obs**2).sum(1))
        for i, (_, episodic_return, _) in enumerate(episodes):
            assert episodic_return == pytest.approx(batch.rewards[batch.trajectory == i].sum().item(), rel=1e-5)

    def test_terminal(self):
        _, batch, episodes = self.collect("point_env:PointTerminal-v0", 5)
        assert (batch.terminated == 1).all() and batch.trajectory.tolist() == list(range(5)) and len(episodes) == 5

    def test_a_batch_depends_on_its_key_alone(self):
        first, second = (self.collect("point_env:Point-v0", 30, start=60)[1] for _ in range(2))
        assert torch.equal(first.obs, second.obs)
        for other in ({"start": 90}, {"start": 60, "seed": 2}):
            assert not torch.equal(first.obs[0], self.collect("point_env:Point-v0", 30, **other)[1].obs[0])

    def test_the_batch_has_the_gaussians_actions_and_the_environment_clipped_ones(self):
        _, batch, _ = self.collect("point_env:Point-v0", 200)
        assert batch.actions.shape == (200, 2) and (batch.actions.abs() > 1).any()
        inside = (batch.next_obs.abs() < 2).all(1)
        moved = batch.obs + 0.2 * batch.actions.clamp(-1, 1)
        torch.testing.assert_close(batch.next_obs[inside], moved[inside])

    def test_dtypes(self):
        for env_id, action_dtype in (("Point-v0", torch.float32), ("Compass-v0", torch.int64)):
            _, batch, _ = self.collect(f"point_env:{env_id}", 30)
            floats = {batch.obs.dtype, batch.rewards.dtype, batch.next_obs.dtype, batch.terminated.dtype}
            assert floats == {torch.float32}
            assert (batch.actions.dtype, batch.trajectory.dtype) == (action_dtype, torch.int64)
            assert batch.rewards.shape == batch.terminated.shape == batch.trajectory.shape == (30,)

    @pytest.mark.parametrize("space", [Discrete(3), Box(-1.0, 1.0, (2,))], ids=["discrete", "continuous"])
    def test_the_numpy_sampler_is_the_policy(self, space):
        torch.manual_seed(0)
        actor = stac_ac.Actor(SPACES[0], space, (8, 8))
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
        acted = actor.acting_distribution(obs.expand(n, 3))
        torch.testing.assert_close(acted.log_prob(samples), policy.log_prob(samples), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("n_out", [1, 2])
    @pytest.mark.parametrize("n_hidden", [1, 8])
    def test_the_numpy_sampler_has_the_parameters_of_its_making(self, n_hidden, n_out):
        """An optimizer's step in place does not change it, not even where a matrix and its transpose look alike."""
        actor = stac_ac.Actor(SPACES[0], Box(-1.0, 1.0, (n_out,)), (n_hidden,))
        sampler = actor.sampler(1)
        obs = np.ones(3, dtype=np.float32)
        before = sampler(obs, 0)
        with torch.no_grad():
            for p in actor.parameters():
                p += 1
        assert np.array_equal(sampler(obs, 0), before)

    @pytest.mark.parametrize(
        "between",
        [nn.ReLU, nn.SiLU, lambda: nn.LayerNorm(8), lambda: nn.Dropout(0.5)],
        ids="ReLU SiLU norm drop".split(),
    )
    def test_the_numpy_sampler_refuses_layers_that_it_does_not_know(self, between, monkeypatch):
        """Somebody changes `mlp`, and nothing else."""

        def mlp(n_in, n_hidden, n_out):
            return nn.Sequential(nn.Linear(n_in, n_hidden), nn.Tanh(), between(), nn.Linear(n_hidden, n_out))

        monkeypatch.setattr(stac_ac, "mlp", mlp)
        message = refused(stac_ac.train, args(hidden=(8,)))
        assert "numpy_mlp does not know" in message

    CHANGED = {
        "no tanh": lambda self, obs: self.original(obs.tanh()),
        "what does nothing at first": lambda self, obs: self.original(obs - self.mean),
        "a clamp that few observations meet": lambda self, obs: self.original(obs.clamp(max=0.95)),
        "temperature": lambda self, obs: stac_ac.Categorical(logits=self.original(obs).logits / 2),
        "another deviation": lambda self, obs: stac_ac.Independent(
            stac_ac.Normal(self.original(obs).mean, self.log_std.clamp(max=-1).exp()), 1
        ),
    }

    @pytest.mark.parametrize("change", CHANGED)
    def test_a_forward_that_is_not_what_is_sampled(self, change, monkeypatch):
        """Never two policies: refused at the first batch."""
        monkeypatch.setattr(stac_ac.Actor, "original", stac_ac.Actor.forward, raising=False)
        made = stac_ac.Actor.__init__

        def with_statistics(self, *arguments):
            made(self, *arguments)
            self.register_buffer("mean", torch.zeros(2))

        monkeypatch.setattr(stac_ac.Actor, "__init__", with_statistics)
        monkeypatch.setattr(stac_ac.Actor, "forward", self.CHANGED[change])
        env_id = "Compass-v0" if change == "temperature" else "Point-v0"
        message = refused(stac_ac.train, args(env_id=f"point_env:{env_id}"))
        assert "they are two policies" in message

    def test_a_policy_that_is_changed_in_both_places(self, monkeypatch):
        """No refusal: the class says what its sampler draws from."""
        run = args(env_id="point_env:Compass-v0", total_timesteps=200)

        def change(name):
            original = getattr(stac_ac.Actor, name)

            def warmer(self, obs):
                return stac_ac.Categorical(logits=original(self, obs).logits / 2)

            monkeypatch.setattr(stac_ac.Actor, name, warmer)

        change("acting_distribution")
        assert "they are two policies" in refused(stac_ac.train, run)
        change("forward")
        stac_ac.train(run)

    def test_rounding_is_no_other_policy(self):
        """Large observations have large rounding errors."""
        for space in (Discrete(3), SPACES[1]):
            actor, critic = stac_ac.Actor(SPACES[0], space, (8, 8)), stac_ac.Critic(SPACES[0])
            obs = 10 ** torch.linspace(-8, 20, 300).reshape(100, 3)
            actions = actor(obs).sample()
            batch = stac_ac.Rollout(obs, actions, obs[:, 0], obs, None, torch.zeros(100, dtype=torch.int64))
            stac_ac.check_first_batch(actor, critic, batch)


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
        spaces = SPACES[0], Discrete(2)
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
            found = stac_ac.estimate(actor, critic, batch, args(critic=critic_kind, gamma=gamma, gae_lambda=lam))
            torch.testing.assert_close(found.returns, torch.tensor(returns))
            torch.testing.assert_close(found.mc_advantages, torch.tensor(returns) - V(batch.obs))
            torch.testing.assert_close(found.advantages, torch.as_tensor(advantages))

    def test_state_values_of_a_gaussian_policy(self):
        """For a Q critic: a mean of samples of the policy."""
        torch.manual_seed(0)
        actor, critic = stac_ac.Actor(*SPACES, (8,)), stac_ac.QCritic(*SPACES, (8,))
        with torch.no_grad():
            actor.log_std.fill_(-1.0)
            obs = torch.randn(1, 3).expand(4000, -1)
            found = critic.state_values(obs, actor)
            samples = critic(obs, actor(obs).sample())
        assert found.mean().item() == pytest.approx(samples.mean().item(), abs=5 * samples.std().item() / 4000**0.5)
        assert found.std().item() == pytest.approx(samples.std().item() / 10**0.5, rel=0.1)


class TestSolver:
    def solve(self, eigenvalues, b, max_iters=100, tol=1e-10):
        torch.manual_seed(0)
        q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64))
        A = (q * torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T
        products = []

        def matvec(v):
            products.append(v)
            return A @ v

        x, info = stac_ac.conjugate_gradient(matvec, b, max_iters, tol)
        return A, x, info, len(products)

    def test_positive_definite(self):
        """To the tolerance, relative to b, and no further."""
        b = torch.randn(20, dtype=torch.float64)
        for scale in (1e-6, 1.0, 1e6):
            for tol in (1e-10, 1e-2):
                A, x, info, products = self.solve(range(1, 21), scale * b, tol=tol)
                residual = ((scale * b - A @ x).norm() / (scale * b).norm()).item()
                assert residual == pytest.approx(info["residual"].item(), rel=1e-3, abs=1e-13) and residual < tol
                assert products == info["iterations"].item() and not info["negative_curvature"]
        assert products < 20
        assert self.solve(range(1, 21), b, max_iters=3)[3] == 3
        # with a tolerance of 0 to what float64 can tell, not on and on
        _, _, info, products = self.solve(range(1, 21), b, max_iters=1000, tol=0.0)
        assert 0 < info["residual"] < 1e-14 and products < 100 and not info["negative_curvature"]

    def test_negative_curvature(self):
        """It stops and keeps what it has: on -I the start."""
        b = torch.randn(20, dtype=torch.float64)
        _, x, info, products = self.solve([-1.0] * 20, b)
        assert products == 1 and (x == 0).all() and info["negative_curvature"] and info["residual"] == 1
        A, x, info, _ = self.solve([-1.0, *range(1, 20)], b)
        assert info["negative_curvature"] and 0 < x.norm() < 10 and x @ A @ x > 0

    def test_nothing_to_solve_and_numbers_that_are_not_finite(self):
        b = torch.randn(20, dtype=torch.float64)
        _, x, info, products = self.solve([1.0] * 20, 0 * b)
        assert products == 0 and (x == 0).all() and info["residual"] == 0
        _, x, info, _ = self.solve([math.nan] * 20, b)
        assert (x == 0).all() and info["residual"] == math.inf and not info["negative_curvature"]


class TestUpdate:
    def make(self, critic="v", n=60):
        env = stac_ac.make_env("point_env:Compass-v0")
        torch.manual_seed(1)
        spaces = env.observation_space, env.action_space
        actor = stac_ac.Actor(*spaces, (8,))
        critic = stac_ac.Critic(spaces[0], (8,)) if critic == "v" else stac_ac.QCritic(*spaces, (8,))
        batch, _ = stac_ac.collect(env, actor, n, 1, 0)
        return actor, critic, batch

    def update(self, critic="v", policy_lr=0.1, critic_lr=0.01, change=lambda actor, critic: None, **changes):
        """One update; the steps that actor and critic took, and its info."""
        run = args(
            critic=critic, policy_lr=policy_lr, critic_lr=critic_lr, **{"cg_iters": 50, "cg_tol": 1e-3, **changes}
        )
        actor, critic, batch = self.make(critic)
        change(actor, critic)
        before = parameters(actor), parameters(critic)
        rates = torch.optim.SGD(actor.parameters(), policy_lr), torch.optim.SGD(critic.parameters(), critic_lr)
        torch.manual_seed(7)
        _, _, info = stac_ac.stackelberg_update(actor, critic, *rates, batch, run.lam, run)
        return parameters(actor) - before[0], parameters(critic) - before[1], info

    @pytest.mark.parametrize("critic_kind", ["v", "q"])
    @pytest.mark.parametrize("leader", ["none", "actor"])
    def test_is_algorithm_2(self, leader, critic_kind):
        """The actor's total derivative at (θ_k, w_k), and the critic's m steps at θ_k, step by step."""
        moved = self.update(critic_kind, leader=leader, unroll=3, norm_adv=False)
        run = args(critic=critic_kind)
        actor, critic, batch = self.make(critic_kind)
        before = parameters(actor), parameters(critic)
        theta, w = list(actor.parameters()), list(critic.parameters())
        est = stac_ac.estimate(actor, critic, batch, run)
        score = stac_ac.score_function(actor(batch.obs), batch.actions)
        f1 = stac_ac.actor_surrogate(critic, batch, score, est.advantages, run)
        f2 = stac_ac.critic_surrogate(critic, batch, score, est, run)
        if leader == "actor":
            gradient, _ = stac_ac.stackelberg_gradient(f1, f2, theta, w, SMALL["lam"], 50, 1e-3)
        else:
            gradient = torch.autograd.grad(f1, theta)
        for _ in range(3):
            V = critic(batch.obs) if critic_kind == "v" else critic(batch.obs, batch.actions)
            for p, g in zip(w, torch.autograd.grad(((V - est.returns) ** 2).mean(), w)):
                p.data -= 0.01 * g
        for p, g in zip(theta, gradient):
            p.data -= 0.1 * g
        torch.testing.assert_close(moved[0], parameters(actor) - before[0], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(moved[1], parameters(critic) - before[1], rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("leader", ["none", "actor"])
    def test_normalization_divides_the_composed_gradient(self, leader):
        """By the advantages' standard deviation, the implicit term as well as the direct one."""
        actor, critic, batch = self.make()
        theta, w = list(actor.parameters()), list(critic.parameters())
        est = stac_ac.estimate(actor, critic, batch, args())
        advantages = est.advantages
        score = stac_ac.score_function(actor(batch.obs), batch.actions)
        f1 = stac_ac.actor_surrogate(critic, batch, score, advantages - advantages.mean(), args())
        if leader == "actor":
            f2 = stac_ac.critic_surrogate(critic, batch, score, est, args())
            total, info = stac_ac.stackelberg_gradient(f1, f2, theta, w, SMALL["lam"], 50, 1e-3)
            assert info["implicit_norm"] > 0.2 * info["direct_norm"]
        else:
            total = torch.autograd.grad(f1, theta)
        expected = -0.1 * torch.cat([g.reshape(-1) for g in total]) / advantages.std(correction=0)
        assert advantages.std() > 1.5 or advantages.std() < 0.7  # or the test would say little
        torch.testing.assert_close(self.update(leader=leader)[0], expected, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("norm_adv", [True, False])
    def test_is_the_released_estimator(self, norm_adv):
        """`--start-states released`, written down as the released code has it, with a dense solve."""
        lam = 100.0
        step = self.update(start_states="released", lam=lam, norm_adv=norm_adv, cg_tol=1e-6)[0]
        actor, critic, batch = self.make()
        theta, w = list(actor.parameters()), list(critic.parameters())
        returns, _, A = stac_ac.estimate(actor, critic, batch, args())
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

    def test_noise_on_every_step_of_the_critic(self, monkeypatch):
        """What makes the noise makes zeros here, and nobody moves."""
        monkeypatch.setattr(stac_ac, "with_noise", lambda grads, std: [0 * g for g in grads])
        actor_step, critic_step, _ = self.update(unroll=3)
        assert (actor_step == 0).all() and (critic_step == 0).all()

    def test_large_lam_is_leader_none(self):
        torch.testing.assert_close(self.update(lam=1e12)[0], self.update(leader="none")[0])

    def test_info_is_of_the_terms(self):
        """The cosine is between the terms as they are added: minus the implicit one of the formula."""
        direct, implicit = (
            [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])],
            [torch.tensor([-3.0, 0.0]), torch.zeros(1, 1)],
        )
        total, info = stac_ac.total_derivative(direct, implicit)
        assert [t.tolist() for t in total] == [[6.0, 0.0], [[4.0]]]
        assert (info["direct_norm"], info["implicit_norm"]) == (5, 3)
        assert info["cosine"].item() == pytest.approx(0.6)

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
            run = stac_ac.Args(curvature=curvature, lam=0.0, cg_iters=50, cg_tol=1e-3, start_states="every")
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
        scaled = importlib.import_module("stac_ac_scaled")
        monkeypatch.setattr(stac_ac, "total_derivative", stac_ac.total_derivative)  # put back at the end
        monkeypatch.setattr(stac_ac, "main", lambda: None)
        scaled.main()
        torch.testing.assert_close(self.update()[0], total * plain.norm() / total.norm())
        assert (total.norm() / plain.norm() - 1).abs() > 0.1

    def test_start_states(self):
        steps = [self.update(start_states=kind)[0] for kind in ("released", "every", "initial")]
        for a, b in itertools.combinations(steps, 2):
            assert not torch.allclose(a, b, rtol=0.1)

    @pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
    @pytest.mark.parametrize("leader", ["none", "actor"])
    def test_frozen_parameters_are_left_alone(self, leader, curvature):
        """With frozen first layers the game is that of two smaller networks, of the features that these make."""
        run = args(leader=leader, curvature=curvature, cg_iters=50, cg_tol=1e-3)

        def step(actor, critic):
            before = parameters(actor), parameters(critic)
            optimizers = torch.optim.SGD(actor.parameters(), 0.1), torch.optim.SGD(critic.parameters(), 0.01)
            stac_ac.stackelberg_update(actor, critic, *optimizers, batch, run.lam, run)
            return parameters(actor) - before[0], parameters(critic) - before[1]

        actor, critic, batch = self.make()
        small = copy.deepcopy((actor, critic))
        for net, small_net in ((actor.net, small[0].net), (critic.v, small[1].v)):
            net[0].requires_grad_(False)
            small_net[0] = Constant(net[0])
        for found, expected in zip(step(actor, critic), step(*small)):
            n_frozen = len(found) - len(expected)
            assert n_frozen > 0 and (found[:n_frozen] == 0).all()
            torch.testing.assert_close(found[n_frozen:], expected, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("leader", ["none", "actor"])
    def test_every_parameter_group_takes_its_step(self, leader):
        """The first layer's weight has a rate of its own, twice the others'."""
        run = args(leader=leader, unroll=1, cg_iters=50, cg_tol=1e-3)
        whole = self.update(leader=leader, unroll=1)[:2]
        actor, critic, batch = self.make()
        before = parameters(actor), parameters(critic)
        optimizers = []
        for net, rate in ((actor, 0.1), (critic, 0.01)):
            first, *others = net.parameters()
            optimizers.append(torch.optim.SGD([{"params": [first], "lr": 2 * rate}, {"params": others, "lr": rate}]))
        stac_ac.stackelberg_update(actor, critic, *optimizers, batch, run.lam, run)
        for net, old, expected in zip((actor, critic), before, whole):
            n_first = next(net.parameters()).numel()
            expected[:n_first] *= 2
            torch.testing.assert_close(parameters(net) - old, expected, rtol=1e-4, atol=1e-6)

    SEVERED = {
        "critic_loss": lambda values, targets, ratio=1: ((values - targets.detach()) ** 2).mean(),
        "score_function": lambda policy, actions: torch.zeros(len(actions)),
        "actor_surrogate": lambda critic, batch, score, advantages, args: -(score * advantages).mean(),
    }

    @pytest.mark.parametrize("loss", SEVERED)
    def test_a_leader_without_influence_is_an_error(self, loss, monkeypatch):
        """Not a zero, which would be the plain algorithm under another name."""
        monkeypatch.setattr(stac_ac, loss, self.SEVERED[loss])
        assert "the leader cannot influence the follower" in refused(self.update)

    def test_what_is_frozen_during_a_run_stays(self):
        """Its last gradient is not applied again."""
        actor, critic, batch = self.make()
        run = args(cg_iters=50, cg_tol=1e-3)
        optimizers = torch.optim.Adam(actor.parameters()), torch.optim.Adam(critic.parameters())
        stac_ac.stackelberg_update(actor, critic, *optimizers, batch, run.lam, run)
        frozen = actor.net[0].requires_grad_(False), critic.v[0].requires_grad_(False)
        before = [parameters(net) for net in (*frozen, actor, critic)]
        stac_ac.stackelberg_update(actor, critic, *optimizers, batch, run.lam, run)
        moved = [not torch.equal(parameters(net), old) for net, old in zip((*frozen, actor, critic), before)]
        assert moved == [False, False, True, True]

    def test_a_player_that_is_frozen(self):
        actor, critic, batch = self.make()
        critic.requires_grad_(False)
        assert "or of the critic are frozen" in refused(stac_ac.check_first_batch, actor, critic, batch)

    def test_trajectories_that_are_mixed(self):
        """As of environments side by side; what numbers the trajectories have is free."""
        actor, critic, batch = self.make(n=60)
        stac_ac.check_first_batch(actor, critic, batch._replace(trajectory=7 - 3 * batch.trajectory))
        mixed = torch.arange(60).reshape(2, 30).T.reshape(-1)
        batch = stac_ac.Rollout(*(column[mixed] for column in batch))
        assert "not trajectory after trajectory" in refused(stac_ac.check_first_batch, actor, critic, batch)

    def test_players_that_share_parameters(self):
        actor, critic, batch = self.make()
        stac_ac.check_first_batch(actor, critic, batch)
        critic.v[0] = actor.net[0]
        assert "no two players" in refused(stac_ac.check_first_batch, actor, critic, batch)

    def test_a_critic_of_another_shape(self, monkeypatch):
        """[N, 1] less [N] is [N, N]."""
        monkeypatch.setattr(stac_ac.Critic, "forward", lambda self, obs, actions=None: self.v(obs))
        actor, critic, batch = self.make()
        assert "(60, 1), not (60,)" in refused(stac_ac.check_first_batch, actor, critic, batch)


class Constant(nn.Module):
    """A layer whose parameters are none of the network's."""

    def __init__(self, layer):
        super().__init__()
        self.layer = [layer]

    def forward(self, x):
        return self.layer[0](x)


def test_one_axis_of_actions_is_a_box_and_discrete_ones_start_anywhere():
    space = Discrete(4, start=3)
    assert stac_ac.to_env(np.int64(2), space) == 5 and space.contains(stac_ac.to_env(np.int64(2), space))
    box = gym.spaces.Box(np.float32([-1.4]), np.float32([0.8]))
    action = np.float32([0.80000007])
    found = stac_ac.to_env(action, box)
    assert box.contains(found) and found is not action
    inside = np.float32([0.5])
    found = stac_ac.to_env(inside, box)
    found *= 5
    assert inside == np.float32(0.5)
