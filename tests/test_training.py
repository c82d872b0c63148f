"""The scripts as their users run them: learning, runs and their folders, evaluation, logging, odd tasks, bad input."""

import copy
import functools
import inspect
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from game import vector
from runs import (
    SMALL,
    assert_same_weights,
    checkpoint,
    command,
    files,
    finish,
    flags,
    next_second,
    run_main,
    scalars,
    weights,
)
from runs import args as small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import stddpg
import stsac

POINT = SMALL["env_id"]


def args(script=stsac, **changes):
    """A run of 120 steps with updates from step 90 on."""
    return small(script, **{"update_after": 90, **changes})


def load_actor(script, run_dir):
    env = script.make_env(POINT)
    actor = script.Actor(env.observation_space, env.action_space, SMALL["hidden"])
    actor.load_state_dict(torch.load(run_dir / "model.pt", weights_only=True)["actor"])
    return actor, env


def error_of(function, *arguments):
    """The one line with which a script ends."""
    with pytest.raises(SystemExit) as error:
        function(*arguments)
    message = error.value.code
    assert re.match(r"st(sac|ddpg)\.py: error: ", message)
    assert "\n" not in message
    return message


def record(monkeypatch, script, name):
    """Lists the arguments and the result of every call of one of a script's functions."""
    calls = []
    function = getattr(script, name)

    def recording(*arguments):
        result = function(*arguments)
        calls.append((arguments, result))
        return result

    monkeypatch.setattr(script, name, recording)
    return calls


# Learning
@pytest.mark.parametrize("leader", ["actor", "critic", "none"])
def test_learns(here, script, leader):
    """A random walk on Point-v0 returns -18 ± 8 and standing still -13; going straight to the origin -1.8."""
    rates = {"policy_lr": 3e-3, "q_lr": 3e-3, "lam": 1.0, "hidden": (32, 32), "batch_size": 32}
    run = args(script, leader=leader, total_timesteps=500, eval_every=500, eval_episodes=20, **rates)
    assert scalars(script.train(run))["eval/episodic_return"][500] > -4


def test_without_gradients_nothing_is_learned(here, script):
    """The control of the test above: its threshold is out of reach for a policy that never took a step."""
    for seed in (1, 2, 3):
        run = args(script, leader="none", policy_lr=0.0, q_lr=0.0, seed=seed, eval_every=120, eval_episodes=20)
        assert scalars(script.train(run))["eval/episodic_return"][120] < -8


# A run and its seed
@pytest.mark.parametrize("leader", ["actor", "critic", "none"])
def test_same_seed_same_run(here, script, leader):
    one, same = (script.train(args(script, leader=leader)) for _ in range(2))
    assert one != same  # a folder of its own, even within one second
    assert_same_weights(one, same)
    assert scalars(one) == scalars(same)
    state = checkpoint(one)
    for name, value in weights(one).items():
        net, parameter = name.split(".", 1)
        assert torch.equal(value, state[net][parameter])  # not its target network's
    other = script.train(args(script, leader=leader, seed=2, total_timesteps=90))
    assert not any(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(other).values()) if a.dim() == 2)


def test_logging_and_evaluation_do_not_change_the_run(here, script, monkeypatch):
    run_dir = script.train(args(script))
    assert_same_weights(run_dir, script.train(args(script, eval_every=37, eval_episodes=1, checkpoint_every=1000)))
    monkeypatch.setattr(script, "update_scalars", lambda *arguments: {})
    assert_same_weights(run_dir, script.train(args(script)))


def test_leaders_differ_in_nothing_but_the_gradient(here, script):
    """The same seed: the same networks and the same random actions, whoever leads and whatever is checked before."""
    runs = [{"leader": "none"}, {"leader": "actor"}, {"leader": "actor", "precondition": False}]
    runs += [{"leader": "critic"}, {"leader": "actor", "curvature": "gauss-newton"}]
    states = []
    for changes in runs:
        # the first update is at the last step: after it every generator has to be at the same place
        states.append(checkpoint(script.train(args(script, total_timesteps=60, update_after=60, **changes))))
    for state in states[1:]:
        for ours, theirs in zip(state["buffer"]["data"], states[0]["buffer"]["data"]):
            assert torch.equal(ours, theirs)
        assert torch.equal(state["rng"], states[0]["rng"])


def test_episodes_depend_on_their_key_alone(script):
    """And so does what an environment draws from the global generators."""
    for env_id in (POINT, "point_env:GlobalGenerators-v0"):
        env = script.make_env(env_id)
        starts = [script.reset(env, *key) for key in [(1, 0, 5), (1, 0, 6), (1, 1, 5), (2, 0, 5), (1, 0, 5)]]
        assert np.array_equal(starts[0], starts[4])
        for start in starts[1:4]:
            assert not np.array_equal(starts[0], start)


# The run's folder
KILLED = [
    (stsac, {"leader": "actor"}),
    (stsac, {"leader": "critic", "autotune": True, "unroll": 2}),
    (stddpg, {"leader": "actor", "curvature": "gauss-newton", "lam_decay": 100.0}),
    (stddpg, {"leader": "none", "target_policy": True}),
]


@pytest.mark.parametrize("script, changes", KILLED, ids=["actor", "autotune", "gauss-newton", "target-policy"])
def test_the_same_command_begins_carries_on_after_a_kill_and_ends(here, script, changes, monkeypatch, capsys):
    """SIGKILL in the middle of an episode, some steps after a checkpoint; the result is that of one run, bit for bit.

    The buffer wraps around, and evaluations are in the middle of an episode.
    """
    run = args(script, total_timesteps=200, buffer_size=100, checkpoint_every=60, eval_every=50, **changes)
    whole = script.train(run)
    run = replace(run, run_dir="killed")
    line = flags(run)
    code, _, _ = finish(command(*line, cwd=here, script=script.__file__, kill_at=170))
    assert code == -signal.SIGKILL
    killed = here / "killed"
    assert checkpoint(killed)["global_step"] == 120
    assert len(checkpoint(killed)["buffer"]["data"][0]) == 100
    assert not (killed / "model.pt").exists()
    next_second()
    capsys.readouterr()
    run_main(script, monkeypatch, *line)
    assert "from step 120: killed" in capsys.readouterr().out
    assert_same_weights(whole, killed)
    assert scalars(whole) == scalars(killed)

    before = files(killed)
    run_main(script, monkeypatch, *line)
    assert capsys.readouterr().out == "killed is finished, with 200 steps; a larger --total-timesteps makes it longer\n"
    assert files(killed) == before


@pytest.mark.filterwarnings("ignore:.*is out of date")
def test_on_a_simulator_with_hidden_state(here):
    """Nothing of it is in the checkpoint, which therefore waits for the end of an episode."""
    run = args(env_id="Walker2d-v4", total_timesteps=200, checkpoint_every=50, eval_every=1000)
    whole = stsac.train(run)
    run_dir = here / "short"
    stsac.train(replace(run, run_dir=str(run_dir)))
    assert_same_weights(whole, run_dir)
    interrupted = here / "interrupted"
    with pytest.MonkeyPatch.context() as patch:
        to_box = record(patch, stsac, "to_box")
        patch.setattr(stsac, "to_float32", lambda x: stop_at(150, to_box, np.array(x, np.float32)))
        with pytest.raises(SystemExit):
            stsac.train(replace(run, run_dir=str(interrupted)))
    assert 50 <= checkpoint(interrupted)["global_step"] < 150
    stsac.train(replace(run, run_dir=str(interrupted)))
    assert_same_weights(whole, interrupted)


def stop_at(step, calls, x):
    if len(calls) == step:
        raise KeyboardInterrupt
    return x


def interrupted(script, monkeypatch, step, *line):
    """Runs a command line in which Ctrl-C comes at a step of this process's environment; what it has logged is kept."""
    writers = []
    new_writer = script.new_writer

    def recording(*arguments):
        writers.append(new_writer(*arguments))
        return writers[-1]

    with monkeypatch.context() as patch:
        patch.setattr(script, "new_writer", recording)
        patch.setenv("POINT_INTERRUPT_AT", str(step))
        with pytest.raises((SystemExit, KeyboardInterrupt)) as error:
            run_main(script, patch, *line)
    assert isinstance(error.value, SystemExit)
    assert error.value.code == 130
    writers[0].close()


def test_a_run_that_is_made_longer_loses_nothing(here, script, monkeypatch, capsys):
    """Nor if it is interrupted before it is further than it was; what was logged after a checkpoint is not doubled."""
    run = args(script, total_timesteps=200, run_dir="whole")
    script.train(run)
    run = replace(run, run_dir="short", total_timesteps=120)
    script.train(run)
    short = here / "short"
    curves = scalars(short)
    model = (short / "model.pt").read_bytes()
    # the run's own flags are the defaults of its command line
    line = ["--run-dir", "short", "--env-id", POINT, "--total-timesteps", "200"]
    next_second()
    capsys.readouterr()
    interrupted(script, monkeypatch, 25, *line)
    last = capsys.readouterr().err
    assert last == "\ninterrupted: the same command with --run-dir short carries on from the last checkpoint\n"
    for tag, curve in curves.items():
        assert scalars(short)[tag].items() >= curve.items()
    assert 140 in scalars(short)["charts/episodic_return"]  # after the checkpoint: it will be logged once more
    assert checkpoint(short)["global_step"] == 120
    assert (short / "model.pt").read_bytes() == model
    next_second()
    run_main(script, monkeypatch, *line)
    assert_same_weights(here / "whole", short)
    assert scalars(here / "whole") == scalars(short)


def test_a_finished_run_writes_the_model_that_was_not_asked_for(here, script, monkeypatch):
    line = flags(args(script, run_dir="run", save_model=False))
    run_main(script, monkeypatch, *line)
    assert not (here / "run/model.pt").exists()
    run_main(script, monkeypatch, *line, "--save-model")
    assert torch.equal(weights(here / "run")["actor.net.0.bias"], checkpoint(here / "run")["actor"]["net.0.bias"])


def test_interrupted_before_the_first_checkpoint(here, script, monkeypatch, capsys):
    interrupted(script, monkeypatch, 30, *flags(args(script, run_dir="run")))
    assert (
        capsys.readouterr().err == "\ninterrupted: before the first checkpoint, so there is nothing to carry on from\n"
    )


def test_two_processes_and_ctrl_c(here):
    """The second process has one line, a code that launchers know, and touches nothing; Ctrl-C is a line."""
    run_dir = here / "run"
    line = flags(args(total_timesteps=100_000, run_dir="run", checkpoint_every=20))
    process = command(*line, cwd=here)
    try:
        deadline = time.time() + 120
        while not (run_dir / "checkpoint.pt").exists():
            assert process.poll() is None
            assert time.time() < deadline
            time.sleep(0.02)
        names = {path.name for path in files(run_dir)} - {"checkpoint.pt.tmp"}
        code, out, err = finish(command(*line, cwd=here))
        assert (code, out, err) == (os.EX_TEMPFAIL, "", "stsac.py: another process is at work in run\n")
        assert {path.name for path in files(run_dir)} - {"checkpoint.pt.tmp"} == names
        process.send_signal(signal.SIGINT)
        code, out, err = finish(process)
        assert code == 130
        assert err == "\ninterrupted: the same command with --run-dir run carries on from the last checkpoint\n"
    finally:
        process.kill()
        process.communicate()


def test_a_locked_folder_is_left_alone(here, script, capsys):
    run_dir = script.train(args(script))
    before = files(run_dir)
    with script.run_folder(run_dir):
        with pytest.raises(SystemExit) as error:
            script.train(args(script, run_dir=str(run_dir), total_timesteps=200))
    assert error.value.code == os.EX_TEMPFAIL
    assert capsys.readouterr().err.count("\n") == 1
    assert files(run_dir) == before
    script.train(args(script, run_dir=str(run_dir), total_timesteps=140))  # the lock went with its process


def test_flags_that_make_it_another_run(here, script):
    """All are compared but for an explicit list, in which each name says that the numbers stay the same."""
    may_change = "exp_name cuda compile track capture_video save_model run_dir evaluate eval_every eval_episodes"
    may_change += " checkpoint_every total_timesteps"
    assert script.MAY_CHANGE == set(may_change.split())
    run = args(script)
    state = {"args": vars(run), "global_step": 120}
    for name, value in vars(run).items():
        other = copy.copy(run)
        setattr(other, name, not value if isinstance(value, bool) else "another")
        if name in script.MAY_CHANGE:
            other.total_timesteps = 200
            script.check_same_run("runs/x", state, other)
        else:
            message = error_of(script.check_same_run, "runs/x", state, other)
            assert f"--{name.replace('_', '-')} {value}, not " in message
    assert "beyond --total-timesteps 119" in error_of(
        script.check_same_run, "runs/x", state, args(script, total_timesteps=119)
    )


def test_another_run_is_refused(here, script, monkeypatch):
    """And every file stays as it was."""
    run_dir = script.train(args(script))
    before = files(run_dir)
    for line in (["--lam", "1"], ["--hidden", "8"], ["--total-timesteps", "100"], ["--seed", "2"]):
        message = error_of(run_main, script, monkeypatch, "--run-dir", run_dir, "--env-id", POINT, *line)
        assert line[0] in message
        assert files(run_dir) == before


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def write_malicious_module(path, state):
    Path("malicious.py").write_text("raise AssertionError('imported')")
    torch.save({**state, "args": {**state["args"], "env_id": "malicious:Point-v0"}}, path)


def replace_by_folder(path, state):
    path.unlink()
    path.mkdir()


def shorten(size):
    return lambda path, state: path.write_bytes(path.read_bytes()[:size])


def write(**changes):
    return lambda path, state: torch.save({**state, **changes}, path)


def write_other(content):
    return lambda path, state: torch.save(content, path)


def drop_a_flag(path, state):
    torch.save({**state, "args": {k: v for k, v in state["args"].items() if k != "tau"}}, path)


FILES = {
    "folder": (replace_by_folder, "is a folder"),
    "empty": (shorten(0), "is damaged"),
    "start": (shorten(100), "is damaged"),
    "all but the end": (shorten(-10), "is damaged"),
    "text": (lambda path, state: path.write_text("not a checkpoint"), "is damaged, or no checkpoint"),
    "another dictionary": (write_other({"a": torch.ones(3)}), "is damaged, or no checkpoint"),
    "a list": (write_other([1, 2]), "is damaged, or no checkpoint"),
    "flags are a list": (write(args=[1]), "is damaged, or no checkpoint"),
    "another script": (write(algorithm="ppo"), "is of another script: ppo"),
    "another version": (drop_a_flag, "is of another version of this script"),
    "code": (write(episode=Exploit()), "is damaged, or no checkpoint"),
    "a module": (write_malicious_module, "to allow that, say --env-id malicious:Point-v0"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_refused(here, script, kind, monkeypatch):
    """As a checkpoint and as a model: told apart, no code is run, and every file stays as it was."""
    change, reason = FILES[kind]
    run_dir = script.train(args(script, total_timesteps=20, update_after=100))
    for name, line in (("checkpoint.pt", ["--run-dir", run_dir]), ("model.pt", ["--evaluate", run_dir / "model.pt"])):
        change(run_dir / name, torch.load(run_dir / name, weights_only=True))
        before = files(here)
        message = error_of(run_main, script, monkeypatch, *line, "--env-id", POINT)
        assert f"{run_dir / name} {reason}" in message or (kind == "a module" and reason in message)
        assert files(here) == before
    assert not (here / "owned").exists()


def test_a_state_that_could_not_be_loaded_is_not_saved(here, script):
    """Said when it is saved, not when the run is to be carried on; the file that is there stays."""
    run_dir = script.train(args(script, total_timesteps=20, update_after=100))
    before = files(run_dir)
    state = checkpoint(run_dir)
    message = error_of(functools.partial(script.save, run_dir / "checkpoint.pt", **state, statistics=np.zeros(3)))
    assert "checkpoint.pt could not be read back" in message
    assert files(run_dir) == before


def test_files_of_the_wrong_kind(here, script, monkeypatch):
    run_dir = script.train(args(script, total_timesteps=20, update_after=100))
    other = stddpg if script is stsac else stsac
    message = error_of(run_main, other, monkeypatch, "--evaluate", run_dir / "model.pt", "--env-id", POINT)
    assert f"is of another script: {script.__name__}" in message
    message = error_of(run_main, script, monkeypatch, "--evaluate", "no/model.pt")
    assert "no/model.pt is missing" in message
    shutil.copy(run_dir / "model.pt", run_dir / "checkpoint.pt")
    message = error_of(run_main, script, monkeypatch, "--run-dir", run_dir, "--env-id", POINT)
    assert "a model cannot be carried on" in message
    message = error_of(run_main, script, monkeypatch, "--run-dir", run_dir / "model.pt")
    assert "File exists" in message or "Not a directory" in message


def tensors(value):
    """All tensors within dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def test_a_flipped_bit_is_found(here):
    """Anywhere: the file is refused, or it is one of the bits that mean nothing."""
    run = args(total_timesteps=60, update_after=50, hidden=(4,), save_model=False)
    path = stsac.train(run) / "checkpoint.pt"
    expected = tensors(stsac.load(path, run, "rng"))
    data = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for place in generator.integers(len(data), size=150):
        flipped = bytearray(data)
        flipped[place] ^= 1 << generator.integers(8)
        path.write_bytes(flipped)
        try:
            state = stsac.load(path, run, "rng")
        except SystemExit:
            refused += 1
            continue
        for ours, theirs in zip(tensors(state), expected, strict=True):
            assert torch.equal(ours, theirs)
        assert state["args"] == vars(run)
    assert refused > 40


def test_networks_that_have_changed(here, script):
    """A script that was edited since: torch's own exception, and every file as it was."""
    run_dir = script.train(args(script))
    state = checkpoint(run_dir)
    state["critic"]["q1.0.weight"] = torch.ones(2, 2)
    torch.save(state, run_dir / "checkpoint.pt")
    before = files(run_dir)
    with pytest.raises(RuntimeError, match="size mismatch"):
        script.train(args(script, run_dir=str(run_dir), total_timesteps=200))
    assert files(run_dir) == before


def test_atomic_save(here, script, monkeypatch):
    """A kill while a checkpoint is written leaves the one before."""
    script.save(here / "checkpoint.pt", args={}, global_step=1)

    def killed(state, file):
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        script.save(here / "checkpoint.pt", args={}, global_step=2)
    assert torch.load(here / "checkpoint.pt", weights_only=True)["global_step"] == 1


def test_nothing_of_a_checkpoint_stays_in_memory(here, script, monkeypatch):
    """Once its content is in the networks, the optimizers and the buffer."""
    run_dir = script.train(args(script))
    loaded = []
    alive = []
    load = script.load
    update = script.stackelberg_update

    def recording_load(*arguments):
        state = load(*arguments)
        loaded.extend(weakref.ref(tensor) for tensor in tensors(state))
        return state

    def recording_update(*arguments):
        alive.append(sum(ref() is not None for ref in loaded))
        return update(*arguments)

    monkeypatch.setattr(script, "load", recording_load)
    monkeypatch.setattr(script, "stackelberg_update", recording_update)
    script.train(args(script, run_dir=str(run_dir), total_timesteps=140))
    assert len(loaded) > 20
    assert alive == [0] * 20


# The buffer
def filled_buffer(script, size, count):
    spaces = script.make_env(POINT).observation_space, script.make_env(POINT).action_space
    buffer = script.ReplayBuffer(size, *spaces, torch.device("cpu"))
    for k in range(count):
        buffer.add(np.full(2, k, np.float32), np.full(2, -k, np.float32), 10.0 * k, np.full(2, k + 1), k % 2 == 0)
    return buffer


def test_buffer_keeps_the_last_transitions(script):
    """All of a row belongs together, and each of the last ones is drawn, equally often."""
    buffer = filled_buffer(script, 5, 12)
    torch.manual_seed(0)
    batch = buffer.sample(5000)
    k = batch.obs[:, 0]
    torch.testing.assert_close(k.unique(), torch.arange(7.0, 12.0))
    assert (k[:, None] == torch.arange(7, 12)).float().mean(0).sub(0.2).abs().max() < 0.03
    torch.testing.assert_close(batch.actions, -batch.obs)
    torch.testing.assert_close(batch.rewards, 10 * k)
    torch.testing.assert_close(batch.next_obs, batch.obs + 1)
    torch.testing.assert_close(batch.terminated, (k % 2 == 0).float())
    assert filled_buffer(script, 5, 2).sample(100).obs.max() == 1  # what has not been filled is not drawn


def test_buffer_is_saved_without_a_copy_and_without_what_is_empty(script):
    buffer = filled_buffer(script, 1000, 3)
    state = buffer.state_dict()
    for column, saved in zip(buffer.data, state["data"]):
        assert saved.data_ptr() == column.data_ptr()
        assert saved.untyped_storage().nbytes() == 3 * column[0].numel() * 4
    longer = filled_buffer(script, 2000, 0)
    longer.load_state_dict(state)
    assert longer.count == 3
    for ours, theirs in zip(longer.data, buffer.data):
        assert torch.equal(ours[:3], theirs[:3])


def test_a_buffer_larger_than_the_memory(here, script):
    """Said at the start: its memory is taken only when it is written to, hours later."""
    message = error_of(script.train, args(script, buffer_size=10**15, total_timesteps=10**15))
    assert re.search(r"--buffer-size 1000000000000000 takes 32000000\.0 GB, and there are \d+\.\d", message)


@pytest.mark.parametrize("env_id", ["Point", "PointInPlace"])
@pytest.mark.filterwarnings("ignore:.*share an object")
def test_transitions_are_the_environments(here, script, env_id):
    """What is stored: (s, a, r, s') of the task, consecutive within an episode, also from an array changed in place."""
    run = args(script, env_id=f"point_env:{env_id}-v0", leader="none", policy_lr=0.0, total_timesteps=400)
    run_dir = script.train(replace(run, start_steps=200, update_after=390))
    obs, actions, rewards, next_obs, _ = checkpoint(run_dir)["buffer"]["data"]
    assert len(obs) == 400
    torch.testing.assert_close(next_obs, (obs + 0.2 * actions).clamp(-2, 2))
    torch.testing.assert_close(rewards, -(next_obs**2).sum(-1))
    inner = torch.arange(400) % 20 != 19  # all but the last of each episode
    assert torch.equal(next_obs[inner], obs[1:][inner[:-1]])
    # uniform at first, then the policy with its noise
    assert actions[:200].abs().max() > 0.95
    assert actions[:200].std() == pytest.approx(3**-0.5, rel=0.1)
    if script is stddpg:
        noise = actions[200:] - load_actor(script, run_dir)[0](obs[200:]).detach()
        assert noise.std() == pytest.approx(run.exploration_noise, rel=0.2)
    else:
        actor = load_actor(script, run_dir)[0]
        assert actions[200:].std() == pytest.approx(actor(obs.repeat(20, 1))[0].std().item(), rel=0.15)


def test_a_time_limit_is_not_an_end(here, script):
    """`truncated` bootstraps, `terminated` does not; both end the episode."""
    for env_id, ends, episodes in (("Point", 0, 3), ("PointTerminal", 1, 60)):
        run = args(script, env_id=f"point_env:{env_id}-v0", total_timesteps=60, update_after=100)
        state = checkpoint(script.train(run))
        assert (state["buffer"]["data"][4] == ends).all()
        assert state["episode"] == episodes


def test_what_a_run_begins_with(here, script):
    """Targets that are copies, and each optimizer's own rate."""
    run = args(script, total_timesteps=20, update_after=100, policy_lr=2e-3, q_lr=5e-3)
    state = checkpoint(script.train(run))
    targets = [name for name in state if name.startswith("target_")]
    assert "target_critic" in targets
    for name in targets:
        for parameter, value in state[name.removeprefix("target_")].items():
            assert torch.equal(state[name][parameter], value)
    assert [state[f"{name}_optimizer"]["param_groups"][0]["lr"] for name in ("actor", "q")] == [2e-3, 5e-3]


def test_the_defaults(script):
    """The paper's, Appendix E, and where it is silent Spinning Up's; tests and launchers give most of them anew."""
    run = script.Args()
    assert (run.leader, run.curvature, run.precondition, run.unroll) == ("actor", "hessian", True, 1)
    assert (run.lam, run.lam_decay, run.cg_iters, run.cg_tol) == (500, None, 10, 0.01)
    assert (run.gamma, run.tau, run.policy_lr, run.q_lr, run.hidden) == (0.99, 0.005, 1e-3, 1e-3, (256, 256))
    assert (run.batch_size, run.buffer_size, run.start_steps, run.update_after) == (100, 10**6, 10_000, 1000)
    assert run.alpha == 0.2 if script is stsac else run.exploration_noise == 0.1


@pytest.mark.filterwarnings("ignore:.*share an object")
def test_the_first_batch_of_each_process_is_checked(here, script, monkeypatch):
    """Also that of a run that is carried on: its script can have been edited."""
    calls = record(monkeypatch, script, "check_first_batch")
    run = args(script, update_after=0, run_dir="run")
    script.train(run)
    script.train(replace(run, total_timesteps=140))
    assert len(calls) == 2


# What reaches the update
def test_lam_decay_and_fresh_batches_reach_the_update(here, script, monkeypatch):
    signature = inspect.signature(script.stackelberg_update)
    calls = record(monkeypatch, script, "stackelberg_update")
    script.train(args(script, unroll=3, lam=200.0, lam_decay=50.0))
    assert len(calls) == 31
    for step, (arguments, _) in enumerate(calls, start=90):
        bound = signature.bind(*arguments)
        batches = bound.arguments["batches"]
        assert float(bound.arguments["lam"]) == pytest.approx(200 * math.exp(-step / 50))
        assert len(batches) == 3
        assert not torch.equal(batches[0].obs, batches[1].obs)
        assert not torch.equal(batches[1].obs, batches[2].obs)


def test_entropy_coefficient_is_tuned_to_minus_the_dimension(here):
    """The loss of log α is that of the policy's entropy, and its sign lowers α while the entropy is above -2."""
    run = args(autotune=True, leader="none", policy_lr=0.0, q_lr=1e-2, batch_size=2000, total_timesteps=200)
    run_dir = stsac.train(run)
    found = scalars(run_dir)
    actor, _ = load_actor(stsac, run_dir)
    obs = checkpoint(run_dir)["buffer"]["data"][0]
    log_prob = actor(obs.repeat(100, 1))[1].mean().item()
    for step in (100, 200):
        alpha = found["losses/alpha"][step]
        # the loss is of α before its step
        assert found["losses/alpha_loss"][step] == pytest.approx(-alpha * (log_prob - 2), rel=0.05)
    assert found["losses/alpha"][200] < found["losses/alpha"][100] < 1


def test_the_fixed_entropy_coefficient(here):
    run_dir = stsac.train(args(alpha=0.07))
    assert scalars(run_dir)["losses/alpha"][100] == pytest.approx(0.07)
    assert "losses/alpha_loss" not in scalars(run_dir)


# TensorBoard and the terminal
def test_tensorboard(here, script, monkeypatch):
    """Values of one kind: of the update at which they are written."""
    calls = record(monkeypatch, script, "stackelberg_update")
    autotune = {"autotune": True} if script is stsac else {}
    run_dir = script.train(args(script, leader="actor", lam_decay=100.0, total_timesteps=200, **autotune))
    found = scalars(run_dir)
    losses = "qf1_values qf1_loss actor_loss qf_loss"
    losses += " qf2_values qf2_loss alpha alpha_loss" if script is stsac else ""
    health = "cg_residual cg_iterations negative_curvature direct_norm implicit_norm cosine lam"
    expected = {f"losses/{name}" for name in losses.split()} | {f"stackelberg/{name}" for name in health.split()}
    expected |= {"charts/episodic_return", "charts/episodic_length"}
    expected |= {"eval/episodic_return", "eval/episodic_return_std"}
    assert found.keys() == expected
    for step in (100, 200):
        f_actor, f_critic, info = calls[step - 90][1]
        values = {"actor_loss": f_actor, "qf_loss": f_critic / len(info["qs"])}
        for k, q in enumerate(info["qs"], 1):
            values[f"qf{k}_values"] = q.mean()
            values[f"qf{k}_loss"] = ((q - info["y"]) ** 2).mean()
        for name, value in values.items():
            assert found[f"losses/{name}"][step] == pytest.approx(float(value))
        for name in ("direct_norm", "implicit_norm", "cosine", "negative_curvature"):
            assert found[f"stackelberg/{name}"][step] == pytest.approx(float(info[name]))
        for name in ("residual", "iterations"):
            assert found[f"stackelberg/cg_{name}"][step] == pytest.approx(float(info[name]))
        assert found["stackelberg/lam"][step] == pytest.approx(500 * math.exp(-step / 100))
        if script is stsac:
            assert found["losses/alpha"][step] == pytest.approx(float(calls[step - 90][0][3]))
    assert list(found["charts/episodic_return"]) == list(range(20, 201, 20))
    assert set(found["charts/episodic_length"].values()) == {20}
    rewards = checkpoint(run_dir)["buffer"]["data"][2]
    for k, episodic_return in enumerate(found["charts/episodic_return"].values()):
        assert episodic_return == pytest.approx(float(rewards[20 * k : 20 * k + 20].sum()), rel=1e-5)
    events = EventAccumulator(str(run_dir))
    events.Reload()
    assert [event.step for event in events.Scalars("charts/SPS")] == [100, 200]
    text = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "|leader|actor|" in text
    assert "|lam|500.0|" in text


def test_speed_is_of_this_process(here, script, monkeypatch):
    """Of a run that is carried on: the steps since then."""
    run = args(script, total_timesteps=100, run_dir="run")
    script.train(run)
    clock = itertools.chain([0.0], itertools.repeat(10.0))
    monkeypatch.setattr(script.time, "perf_counter", lambda: next(clock))
    run_dir = script.train(replace(run, total_timesteps=200))
    events = EventAccumulator(str(run_dir))
    events.Reload()
    assert events.Scalars("charts/SPS")[-1].value == pytest.approx(100 / 10)


def test_the_plain_algorithm_has_no_game(here, script):
    assert not any(tag.startswith("stackelberg/") for tag in scalars(script.train(args(script, leader="none"))))


@pytest.mark.parametrize(
    "changes, first",
    [
        ({}, "{0}-al, hessian"),
        ({"leader": "critic"}, "{0}-cl, hessian"),
        ({"curvature": "gauss-newton"}, "{0}-al, gauss-newton"),
        ({"leader": "none"}, "{1}"),
    ],
)
def test_what_a_run_says(here, script, changes, first, capsys):
    run_dir = script.train(args(script, **changes))
    first = first.format(script.__name__, script.__name__.removeprefix("st"))
    returns = scalars(run_dir)
    mean, std = returns["eval/episodic_return"][100], returns["eval/episodic_return_std"][100]
    assert capsys.readouterr().out.splitlines() == [
        f"{first} on {POINT}, cpu, from step 0: {run_dir}",
        f"step 100: eval return {mean:.2f} ± {std:.2f} (2 episodes)",
        f"finished: {run_dir}",
    ]


def test_a_line_a_minute_where_there_is_no_terminal(here, script, monkeypatch, capsys):
    """A clock that goes on by ten seconds whenever it is read, and what is printed: speed now, time left."""
    clock = iter(range(0, 10**6, 10))
    fake = types.SimpleNamespace(perf_counter=lambda: next(clock), time=time.time, time_ns=time.time_ns)
    monkeypatch.setattr(script, "time", fake)
    script.train(args(script))
    lines = re.findall(r"step (\d+) of 120, (\d+) steps/s, (\S+) left", capsys.readouterr().out)
    assert 3 <= len(lines) <= 40
    # the clock is read once a step, at 70 s for the seventh; then for the speed, at 80, and for the next line, at 90
    assert lines[:2] == [("7", "0", "0:21:31"), ("14", "0", "0:20:11")]  # 113 and 106 steps at 7 steps in 80 s


def test_a_clock_that_is_behind_is_said(here, script, capsys):
    """TensorBoard goes by the time in the files' names."""
    run_dir = script.train(args(script))
    (events,) = run_dir.glob("events*")
    events.rename(run_dir / events.name.replace(f"tfevents.{events.name.split('.')[3]}", "tfevents.9999999999"))
    capsys.readouterr()
    script.train(args(script, run_dir=str(run_dir), total_timesteps=140))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "clock" in line]
    assert "the clock is behind" in line
    assert "tfevents.9999999999" in line


# From the command line
def test_the_copied_file_runs_alone(here, script):
    """In an empty folder, with no other file of the project in reach, on one of the paper's tasks, with a terminal that
    knows ASCII alone: nothing but its lines is printed, and no deprecation of the task's old id."""
    copied = shutil.copy(script.__file__, here)
    line = "--env-id Hopper-v4 --total-timesteps 120 --start-steps 50 --update-after 50 --eval-every 100".split()
    line += "--eval-episodes 1 --hidden 16 16 --no-cuda".split()
    code, out, err = finish(command(*line, cwd=here, script=copied, PYTHONPATH="", PYTHONIOENCODING="ascii"))
    assert (code, err) == (0, "")
    (run_dir,) = here.glob("runs/*")
    assert run_dir.name.startswith(f"Hopper-v4__{script.__name__}-al__1__")
    assert (run_dir / "checkpoint.pt").exists()
    first, evaluation, last = out.splitlines()
    assert first.endswith(f"on Hopper-v4, cpu, from step 0: runs/{run_dir.name}")
    assert re.fullmatch(r"step 100: eval return \d+\.\d\d \? 0\.00 \(1 episodes\)", evaluation)
    assert last == f"finished: runs/{run_dir.name}"


def test_help_on_a_terminal_that_knows_ascii_alone(here):
    line = [sys.executable, stsac.__file__, "--help"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    shown = subprocess.run(line, cwd=here, env=env, capture_output=True, text=True, check=True).stdout
    for flag in vars(args()):
        assert f"--{flag.replace('_', '-')}" in shown
    assert "who follows the total derivative" in shown


def test_bad_input_from_the_shell(here):
    code, out, err = finish(command("--lam", "nan", cwd=here))
    assert (code, out, err) == (1, "", "stsac.py: error: --lam must be between 0 and 1e12\n")
    assert list(here.iterdir()) == []


NUMBERS = {
    "--curvature": ["gauss-newton --lam 0", "gauss-newton --leader critic"],
    "--lam": ["-1", "nan", "inf", "1e300"],
    "--policy-lr": ["-1", "nan", "inf", "1e300"],
    "--q-lr": ["-1", "nan", "inf", "1e300"],
    "--lam-decay": ["0", "nan", "inf", "1e300"],
    "--seed": ["-1", str(2**31), "9" * 30],
    "--gamma": ["-0.1", "1.1", "nan", "0"],
    "--tau": ["-0.1", "1.1", "nan"],
    "--cg-tol": ["-0.1", "1", "nan"],
    "--start-steps": ["-1"],
    "--update-after": ["-1"],
    "--hidden": ["0"],
    "--run-dir": [""],
    "--evaluate": [""],
}
POSITIVE = "eval-every eval-episodes checkpoint-every max-episode-steps total-timesteps buffer-size batch-size unroll"
NUMBERS |= {f"--{name}": ["0", "-1"] for name in f"{POSITIVE} cg-iters".split()}
OF_ONE = {
    stsac: {"--alpha": ["-1", "nan", "inf"]},
    stddpg: {"--exploration-noise": ["-1", "nan", "inf"], "--target-policy": ["--leader critic"]},
}


def test_values_that_no_run_can_have(here, script, monkeypatch):
    """One line that names the flag, before anything is made."""
    for flag, values in (NUMBERS | OF_ONE[script]).items():
        for value in values:
            message = error_of(run_main, script, monkeypatch, flag, *(value.split() or [""]))
            assert flag in message
    assert list(here.iterdir()) == []


def test_edge_values_are_accepted(script):
    edges = {"seed": 0, "gamma": 1.0, "tau": 1.0, "start_steps": 0, "update_after": 0, "policy_lr": 0.0, "q_lr": 0.0}
    edges |= {"alpha": 0.0} if script is stsac else {"exploration_noise": 0.0}
    script.check_args(args(script, lam=0.0, cg_tol=0.99, max_episode_steps=1, **edges))
    script.check_args(args(script, seed=2**31 - 1, gamma=0.0, leader="none", tau=0.0, cg_tol=0.0))


TASKS = {
    "CartPole-v1": "actions in a bounded 1-d Box, not .*Discrete",
    "point_env:PointUnbounded-v0": "actions in a bounded 1-d Box",
    "point_env:PointMatrix-v0": "actions in a bounded 1-d Box",
    "point_env:PointNoFixedSize-v0": "flat observations",
    "point_env:PointNoTimeLimit-v0": "has no time limit, .* --max-episode-steps 1000 sets one",
}


def test_an_environment_that_is_not_registered(here, script, monkeypatch):
    """As somebody writes it instead of gym.make."""
    from point_env import Point

    monkeypatch.setattr(script.gym, "make", lambda env_id: gym.wrappers.TimeLimit(Point(), 20))
    assert f"{POINT} has no spec" in error_of(script.train, args(script, total_timesteps=20))


@pytest.mark.parametrize("env_id", TASKS)
def test_tasks_that_are_refused(here, script, env_id):
    # without evaluations, the first of which might not end
    assert re.search(TASKS[env_id], error_of(script.train, args(script, env_id=env_id, total_timesteps=20)))


def test_a_time_limit_of_ones_own(here, script):
    for env_id in ("point_env:PointNoTimeLimit-v0", POINT):
        run_dir = script.train(args(script, env_id=env_id, max_episode_steps=15))
        assert set(scalars(run_dir)["charts/episodic_length"].values()) == {15}


@pytest.mark.filterwarnings("ignore:.*is out of date")
@pytest.mark.parametrize(
    "env_id, words", [("Hoper-v4", "Did you mean: `Hopper`?"), ("Pusher-v4", "only supported on `mujoco<3`")]
)
def test_what_libraries_say_themselves(here, script, env_id, words):
    with pytest.raises(Exception, match=re.escape(words)):
        script.train(args(script, env_id=env_id))


# Odd tasks
@pytest.mark.filterwarnings("ignore:.*The reward returned by")
@pytest.mark.parametrize("changes", [{}, {"leader": "critic", "autotune": True}], ids=["actor", "critic"])
def test_the_same_task_in_another_guise(here, script, changes):
    """Actions changed in place, other units, an info that looks like a wrapper's, ...: the same losses and weights."""
    known = {name: value for name, value in changes.items() if name in script.Args.__dataclass_fields__}
    plain = script.train(args(script, **known))
    for env_id in ["Narrow"] if changes else ["Narrow", "ChangesAction", "OwnEpisodeInfo", "ArrayReward", "Int32Seed"]:
        odd = script.train(args(script, env_id=f"point_env:{env_id}-v0", **known))
        assert scalars(plain) == scalars(odd)
        for ours, theirs in zip(vector_parts(plain), vector_parts(odd)):
            assert torch.equal(ours, theirs)
        ours = checkpoint(plain)["buffer"]["data"]
        theirs = checkpoint(odd)["buffer"]["data"]
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], (16 if env_id == "Narrow" else 1) * theirs[1])


def vector_parts(run_dir):
    """The weights, without the buffers that hold the units."""
    return [value for name, value in weights(run_dir).items() if "action_" not in name]


def test_global_generators_are_seeded_with_each_episode(here, script):
    run = args(script, env_id="point_env:GlobalGenerators-v0", eval_every=40)
    one = script.train(run)
    np.random.random(7)
    other = script.train(replace(run, run_dir="other", total_timesteps=60))
    np.random.random(7)
    script.train(replace(run, run_dir="other"))
    assert_same_weights(one, other)


@pytest.mark.parametrize("side", [-100.0, 100.0])
def test_actions_stay_in_the_box(here, script, side, monkeypatch):
    """Of a saturated policy, in training and evaluation, on a task that asserts it."""

    class Saturated(script.Actor):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.net[-1].bias.data[:2] = side

    monkeypatch.setattr(script, "Actor", Saturated)
    run = args(script, env_id="point_env:StrictBox-v0", total_timesteps=120, policy_lr=0.0)
    actions = checkpoint(script.train(run))["buffer"]["data"][1]
    bound = torch.tensor([[-1.4, -0.3], [0.8, 0.9]][side > 0])
    assert (actions[60:] == bound).all(1).any()
    # the random ones fill the box, which is not symmetric
    for random_ones, low, high in zip(actions[:50].T, (-1.4, -0.3), (0.8, 0.9)):
        tenth = (high - low) / 10
        assert low <= random_ones.min() < low + tenth and high - tenth < random_ones.max() <= high


@pytest.mark.filterwarnings("ignore:.*maximum and minimum values are equal")
def test_odd_spaces(here, script):
    """Dictionary observations are flattened; bounds of a narrow integer type, and of width 0, do no harm."""
    actor = torch.load(script.train(args(script, env_id="point_env:PointSmall-v0")) / "model.pt", weights_only=True)[
        "actor"
    ]
    assert (actor["action_scale"] == 100).all()
    assert (actor["action_bias"] == 0).all()
    run_dir = script.train(
        args(script, env_id="point_env:PointFixed-v0", **{"autotune": True} if script is stsac else {})
    )
    assert all(math.isfinite(value) for curve in scalars(run_dir).values() for value in curve.values())


def test_actions_in_an_integer_box(script):
    """The nearest number, the bounds among them."""
    space = gym.spaces.Box(np.array([0, -1]), np.array([3, 1]), dtype=np.int64)
    for action, expected in (([0.4, -0.6], [0, -1]), ([2.6, 0.9], [3, 1]), ([9.0, -9.0], [3, -1])):
        box = script.to_box(np.float32(action), space)
        assert box.tolist() == expected and box.dtype == np.int64


# What is not finite
@pytest.mark.parametrize(
    "env_id, step, what",
    [
        ("NaN", 150, "the reward is not finite"),
        ("Huge", 150, "the reward is not finite"),
        ("HugeObservation", 150, "an observation is not finite in float32"),
        ("BadReset", 0, "the first observation of an episode is not finite"),
    ],
)
def test_environment_that_is_not_finite(here, script, env_id, step, what):
    """NaN, numbers that float32 cannot hold, a NaN of `reset`: named with their step, and never in a checkpoint.

    The policy acts from step 6 on: what it makes of a NaN is not its fault.
    """
    run = args(
        script, env_id=f"point_env:Point{env_id}-v0", run_dir=str(here / "run"), total_timesteps=200, start_steps=5
    )
    message = error_of(script.train, run)
    assert (f"step {step}: {what}" if step else f": {what}") in message
    assert (here / "run/checkpoint.pt").exists() == (step > 40)
    if step > 40:
        state = checkpoint(here / "run")
        assert state["global_step"] == 120
        assert all(column.isfinite().all() for column in state["buffer"]["data"])


def test_a_policy_that_is_not_finite(here, script, monkeypatch):
    """A finite cost with a NaN gradient: the next action is named, not the environment that would get it."""
    actor_loss = script.actor_loss

    def finite_with_a_nan_gradient(actor, *arguments):
        return actor_loss(actor, *arguments) + (0 * next(actor.parameters())).sum().sqrt()

    monkeypatch.setattr(script, "actor_loss", finite_with_a_nan_gradient)
    run = args(script, leader="none", update_after=75, run_dir=str(here / "run"))
    assert "the policy's action is not finite" in error_of(script.train, run)
    assert checkpoint(here / "run")["global_step"] == 40
    run = replace(run, run_dir=str(here / "evaluated"), eval_every=75)
    assert "the policy's action is not finite" in error_of(script.train, run)
    assert not [value for value in scalars(here / "evaluated").get("eval/episodic_return", {}).values()]


def test_large_numbers_are_no_error(script):
    assert script.to_float32([1e20, -1e30]).tolist() == pytest.approx([1e20, -1e30])
    assert script.to_float32(1e300) == math.inf


def test_loss_that_becomes_infinite(here, script, monkeypatch):
    """The run stops at that step; the checkpoint is from before it and has finite weights."""
    actor_loss = script.actor_loss
    steps = []

    def diverging(*arguments):
        steps.append(1)
        return actor_loss(*arguments) * (math.inf if len(steps) == 42 else 1)

    monkeypatch.setattr(script, "actor_loss", diverging)
    message = error_of(script.train, args(script, leader="none", run_dir=str(here / "run"), total_timesteps=140))
    assert re.search(
        r"step 130: .*not finite.* -J = \S+, L = ", message
    )  # its 41st update; one call is the first one's check
    state = checkpoint(here / "run")
    assert state["global_step"] == 120
    assert all(value.isfinite().all() for value in state["actor"].values())


def test_implicit_term_that_is_not_finite(here, script, monkeypatch):
    """Though both costs are finite."""
    norms = functools.partial(dict, direct_norm=torch.tensor(1.0), implicit_norm=torch.tensor(math.nan))
    monkeypatch.setattr(script, "total_derivative", lambda direct, implicit: (direct, norms()))
    message = error_of(script.train, args(script, run_dir=str(here / "run")))
    assert re.search("step 90: .*not finite", message)
    assert "norm of the implicit term nan" in message


@pytest.mark.parametrize("bad", [61, 62], ids=["critic", "actor"])
def test_parameters_that_are_not_finite_are_not_saved(here, script, monkeypatch, bad):
    """Finite costs can have gradients that are not: the checkpoint before them stays."""
    optimizer_step = script.optimizer_step
    calls = []

    def spoiling(optimizer, parameters, grads):
        calls.append(1)
        optimizer_step(optimizer, parameters, [g * (math.nan if len(calls) == bad else 1) for g in grads])

    # two steps an update: the last ones before step 120's checkpoint
    monkeypatch.setattr(script, "optimizer_step", spoiling)
    message = error_of(script.train, args(script, leader="none", run_dir=str(here / "run")))
    assert "step 120: a parameter is not finite" in message
    assert checkpoint(here / "run")["global_step"] == 80


# Evaluation, video, Weights & Biases
def test_evaluate_plays_a_saved_model(here, script, capsys, monkeypatch):
    """One line an episode and one of the mean: the saved model's returns, in episodes that training did not use."""
    run_dir = script.train(args(script, eval_every=120))
    capsys.readouterr()
    run_main(script, monkeypatch, "--evaluate", run_dir / "model.pt", "--eval-episodes", 4, "--env-id", POINT)
    first, *lines, mean = capsys.readouterr().out.splitlines()
    assert first == f"{run_dir / 'model.pt'} on {POINT}, seed 1"
    returns = script.evaluate(*load_actor(script, run_dir), 4, 1, script.PLAY)
    np.testing.assert_allclose([float(line.split()[-1]) for line in lines], returns, atol=0.01)
    assert mean == f"mean return {returns.mean():.2f} ± {returns.std():.2f} over 4 episodes"
    assert len(set(returns)) == 4
    assert len({script.TRAIN, script.EVAL, script.PLAY}) == 3
    last = script.evaluate(*load_actor(script, run_dir), 2, 1, script.EVAL, 120)  # the run's own evaluation
    assert scalars(run_dir)["eval/episodic_return"] == {120: pytest.approx(last.mean(), rel=1e-5)}


def test_evaluate_plays_the_models_task(here, script, monkeypatch):
    """Not the default one."""
    run_dir = script.train(args(script, env_id="Pendulum-v1", max_episode_steps=20))
    made = record(monkeypatch, script, "make_env")
    run_main(script, monkeypatch, "--evaluate", run_dir / "model.pt", "--eval-episodes", 1)
    assert [arguments[:2] for arguments, _ in made] == [("Pendulum-v1", 20)]


def test_evaluation_is_the_mean_policys_return(script):
    """Undiscounted, without noise, added up by hand."""
    env = script.make_env(POINT)
    torch.manual_seed(0)
    actor = script.Actor(env.observation_space, env.action_space, (8,))
    expected = []
    for episode in range(3):
        position = torch.from_numpy(script.reset(env, 5, 6, episode))
        total = 0.0
        for _ in range(20):
            mean = actor.net(position)[:2].detach()
            position = (position + 0.2 * torch.tanh(mean)).clamp(-2, 2)
            total -= float(position @ position)
        expected.append(total)
    np.testing.assert_allclose(script.evaluate(actor, env, 3, 5, 6), expected, rtol=1e-5)


def test_an_evaluation_keeps_the_modes(script):
    """Of a part that is not training for good, such as an encoder that its user froze."""
    env = script.make_env(POINT)
    actor = script.Actor(env.observation_space, env.action_space, (8,))
    actor.net[0].eval()
    modes = []
    actor.net[1].register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    script.evaluate(actor, env, 1, 1)
    assert not any(modes)
    assert actor.training and actor.net[1].training and not actor.net[0].training


def test_video(here, monkeypatch):
    """The first episode of each evaluation, and of `--evaluate`; nothing is overwritten."""
    pytest.importorskip("moviepy", reason="pip install moviepy")
    env_id = "point_env:PointRendering-v0"
    run_dir = stsac.train(args(env_id=env_id, capture_video=True, eval_every=60))
    assert [path.name for path in sorted(run_dir.glob("videos/*/*.mp4"))] == [
        "rl-video-episode-0.mp4",
        "rl-video-episode-2.mp4",
    ]
    for _ in range(2):
        run_main(stsac, monkeypatch, "--evaluate", run_dir / "model.pt", "--env-id", env_id, "--capture-video")
    played = list(run_dir.glob("videos/evaluate-*/*.mp4"))
    assert len(played) == 2
    assert all(path.stat().st_size > 0 for path in played)


def test_video_that_cannot_be_made(here, script, monkeypatch):
    """Said before any step, in one line: no renderer, or no moviepy."""
    message = error_of(script.train, args(script, env_id="point_env:PointNotRendering-v0", capture_video=True))
    assert "--capture-video: " in message
    assert "RuntimeError: no OpenGL" in message
    monkeypatch.setitem(sys.modules, "moviepy", None)
    message = error_of(script.train, args(script, env_id="point_env:PointRendering-v0", capture_video=True))
    assert "MoviePy is not installed" in message


def test_weights_and_biases(here, script, monkeypatch):
    """A name also for `.`, one id for a folder that is carried on, another one for a namesake or if it begins anew."""
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: calls.append(kwargs)))
    for folder, steps in (("a/run", 20), ("a/run", 40), ("b/run", 20), (".", 20)):
        script.train(args(script, track=True, run_dir=folder, total_timesteps=steps))
    assert [call["name"] for call in calls] == ["run", "run", "run", here.name]
    assert calls[0]["id"] == calls[1]["id"]
    shutil.rmtree("b/run")
    script.train(args(script, track=True, run_dir="b/run", total_timesteps=20))
    assert len({call["id"] for call in calls}) == 4
    for call in calls:
        assert call["sync_tensorboard"] and call["resume"] == "allow" and call["config"]["lam"] == 500


@pytest.mark.slow
def test_weights_and_biases_offline(here):
    """Run it with: pytest -m slow tests/test_training.py"""
    pytest.importorskip("wandb", reason="pip install wandb")
    code, _, err = finish(command(*flags(args()), "--track", cwd=here))
    assert code == 0, err
    (log,) = here.glob("wandb/offline-run-*/*.wandb")
    assert b"eval/episodic_return" in log.read_bytes()


# Compiled
def test_compile_changes_no_number(here, script, monkeypatch):
    """The whole run, with the eager backend in place of the one that takes a minute."""
    compiled = []
    compile_ = torch.compile

    def eager_backend(function, fullgraph, options):
        compiled.append((fullgraph, options))
        return compile_(function, fullgraph=fullgraph, backend="eager")

    run = args(script, total_timesteps=100, cg_tol=0.0, lam=1.0)
    plain = script.train(run)
    monkeypatch.setattr(torch, "compile", eager_backend)
    torch._dynamo.reset()
    run_dir = script.train(replace(run, compile=True))
    assert compiled == [(True, {"fallback_random": True, "triton.cudagraphs": False})]
    torch.testing.assert_close(vector(vector_parts(run_dir)), vector(vector_parts(plain)), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"curvature": "gauss-newton"}, {"leader": "critic"}, {"leader": "none"}], ids=str
)
def test_compiled_in_earnest(here, script, changes):
    """By the default backend, a minute each. Run it with: pytest -m slow tests/test_training.py"""
    run = args(script, total_timesteps=100, cg_tol=0.0, cg_iters=2, **changes)
    plain = script.train(run)
    torch._dynamo.reset()
    run_dir = script.train(replace(run, compile=True))
    torch.testing.assert_close(vector(vector_parts(run_dir)), vector(vector_parts(plain)), rtol=1e-3, atol=1e-4)
