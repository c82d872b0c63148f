"""The scripts as their users run them: learning, reproducibility, resuming, evaluation, logging, bad input."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import stddpg
import stsac

ROOT = Path(__file__).parent.parent
# a run of a few seconds: small networks, updates from step 100
SMALL = {
    **{"env_id": "point_env:Point-v0", "hidden": (32, 32), "batch_size": 32, "buffer_size": 10_000, "alpha": 0.02},
    **{"start_steps": 200, "learning_starts": 100, "eval_every": 200, "eval_episodes": 3, "checkpoint_every": 200},
    **{"save_model": True, "cuda": False, "gamma": 0.9, "cg_iters": 3},
}


def args(script=stsac, **changes):
    known = {name: value for name, value in SMALL.items() if name in script.Args.__dataclass_fields__}
    return script.Args(**{**known, "total_timesteps": 400, **changes})


@pytest.fixture(params=[stsac, stddpg], ids=lambda script: script.__name__)
def script(request):
    return request.param


def flags(arguments):
    """The command line of an Args."""
    line = []
    for name, value in vars(arguments).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None and value != "":
            line += [f"--{flag}", *(str(v) for v in (value if isinstance(value, tuple) else (value,)))]
    return line


def command(*line, cwd, script=stsac.__file__, kill_at=0, **kwargs):
    """Starts a script as a user would, with the test environments in reach; they kill it at a step, if asked to."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    env["POINT_KILL_AT"] = str(kill_at)
    kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": cwd, "env": env, **kwargs}
    return subprocess.Popen([sys.executable, str(script), *map(str, line)], **kwargs)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def weights(run_dir):
    state = torch.load(run_dir / "model.pt", weights_only=True)
    return {f"{net}.{name}": value for net in ("actor", "critic") for name, value in state[net].items()}


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def scalars(run_dir):
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load_actor(script, run_dir):
    env = script.make_env(SMALL["env_id"])
    actor = script.Actor(env.observation_space, env.action_space, SMALL["hidden"])
    actor.load_state_dict(torch.load(run_dir / "model.pt", weights_only=True)["actor"])
    return actor, env


def mean_return(script, run_dir):
    return script.evaluate(*load_actor(script, run_dir), 20, 7).mean()


@pytest.mark.parametrize("leader", ["actor", "critic", "none"])
def test_learns(here, script, leader):
    """A random walk on Point-v0 returns -18 ± 8 and standing still -13; going straight to the origin -1.8."""
    run = args(script, leader=leader, total_timesteps=1000, lam=1.0, policy_lr=3e-3, q_lr=3e-3)
    assert mean_return(script, script.train(run)) > -4


def test_without_gradients_nothing_is_learned(here, script):
    """The control of the test above: its threshold is out of reach for a policy that never took a step."""
    for seed in (1, 2, 3):
        run = args(script, leader="none", total_timesteps=150, policy_lr=0.0, q_lr=0.0, seed=seed)
        assert mean_return(script, script.train(run)) < -8


@pytest.mark.parametrize("leader", ["actor", "critic", "none"])
def test_same_seed_same_run(here, script, leader):
    runs = [args(script, leader=leader, seed=seed, total_timesteps=300) for seed in (1, 1, 2)]
    first, second, other = (script.train(run) for run in runs)
    assert first != second  # a folder of its own, even within one second
    assert_same_weights(first, second)
    assert not all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(other).values()))


def test_logging_and_evaluation_do_not_change_the_run(here):
    a = stsac.train(args())
    b = stsac.train(args(eval_every=130, eval_episodes=2, checkpoint_every=1000))
    assert_same_weights(a, b)


def test_mujoco_run_resumes(here):
    """On a simulator with much hidden state: nothing of it is in the checkpoint."""
    run = args(env_id="Walker2d-v4", total_timesteps=300, checkpoint_every=100, eval_every=250, eval_episodes=1)
    whole = stsac.train(run)
    short = stsac.train(replace(run, total_timesteps=200))
    assert_same_weights(whole, stsac.train(replace(run, resume=str(short))))


@pytest.mark.parametrize(
    "script, changes",
    [
        (stsac, {"leader": "actor"}),
        (stsac, {"leader": "critic", "autotune": True, "unroll": 2}),
        (stddpg, {"leader": "actor"}),
        (stddpg, {"leader": "none", "target_policy": True}),
    ],
    ids=["stsac-actor", "stsac-critic", "stddpg-actor", "stddpg-none"],
)
def test_killed_and_resumed_ends_with_the_same_weights(here, script, changes):
    """SIGKILL in the middle of an episode, some steps after a checkpoint; then `--resume`."""
    # the buffer wraps around; at the checkpoint, step 360, there are 60 updates whose diagnostics are not yet written
    run = args(script, total_timesteps=600, buffer_size=300, checkpoint_every=170, learning_starts=150, **changes)
    whole = here / script.train(run)
    code, _, _ = finish(command(*flags(run), cwd=here, script=script.__file__, kill_at=530))
    assert code == -signal.SIGKILL
    (killed,) = (path for path in here.glob("runs/*") if path != whole)
    assert torch.load(killed / "checkpoint.pt", weights_only=True)["global_step"] == 360
    assert not (killed / "model.pt").exists()
    code, out, err = finish(command("--resume", killed, "--env-id", run.env_id, cwd=here, script=script.__file__))
    assert code == 0, err
    assert_same_weights(whole, killed)
    # and its curves are those of one run: nothing missing, nothing twice
    a, b = scalars(whole), scalars(killed)
    a.pop("charts/SPS"), b.pop("charts/SPS")
    assert a.keys() == b.keys()
    for tag in a:
        assert [step for step, _ in a[tag]] == [step for step, _ in b[tag]]
        assert [value for _, value in a[tag]] == [value for _, value in b[tag]]  # also the means over 100 updates
    steps = [line.split(":")[0] for line in (killed / "log.txt").read_text().splitlines()]
    assert steps == [f"step {step}" for step in range(200, 601, 200)]


def test_a_longer_run_can_be_made_of_a_shorter_one(here):
    short = stsac.train(args(total_timesteps=400))
    resumed = stsac.train(args(total_timesteps=600, resume=str(short)))
    assert resumed == short
    assert_same_weights(resumed, stsac.train(args(total_timesteps=600)))


class TestCheckpointsThatAreRefused:
    @pytest.fixture
    def run_dir(self, here):
        return stsac.train(args())

    def refused(self, capsys, run_dir, **changes):
        """Exit code 2, one line, and every file as it was."""
        before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
        with pytest.raises(SystemExit) as error:
            stsac.train(args(**{"resume": str(run_dir), "total_timesteps": 600, **changes}))
        assert error.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before
        return message

    def test_truncated(self, run_dir, capsys):
        checkpoint = run_dir / "checkpoint.pt"
        for size in (0, 100, checkpoint.stat().st_size // 2, checkpoint.stat().st_size - 10):
            data = checkpoint.read_bytes()
            checkpoint.write_bytes(data[:size])
            assert "checkpoint.pt" in self.refused(capsys, run_dir)
            checkpoint.write_bytes(data)

    def test_foreign(self, run_dir, capsys):
        state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        malformed = [{"algorithm": "stddpg"}, {"args": {}}, {"args": [1]}, {"args": {**state["args"], "hidden": "x"}}]
        for content in [{"a": torch.ones(3)}, [1, 2], *({**state, **change} for change in malformed)]:
            torch.save(content, run_dir / "checkpoint.pt")
            self.refused(capsys, run_dir)
        (run_dir / "checkpoint.pt").write_text("not a checkpoint")
        self.refused(capsys, run_dir)
        shutil.copy(run_dir / "model.pt", run_dir / "checkpoint.pt")
        self.refused(capsys, run_dir)

    def test_never_runs_code(self, run_dir, capsys, here):
        class Exploit:
            def __reduce__(self):
                return (Path.touch, (here / "owned",))

        state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        torch.save({**state, "episode": Exploit()}, run_dir / "checkpoint.pt")
        self.refused(capsys, run_dir)
        assert not (here / "owned").exists()
        # an environment id can name a module to import: only the user may do that
        state["args"]["env_id"] = "malicious:Point-v0"
        (here / "malicious.py").write_text("raise AssertionError('imported')")
        torch.save(state, run_dir / "checkpoint.pt")
        assert "--env-id" in self.refused(capsys, run_dir)

    @pytest.mark.parametrize("changes", [{"seed": 2}, {"leader": "none"}, {"hidden": (16, 16)}, {"lam": 1.0}])
    def test_mismatched(self, run_dir, capsys, changes):
        message = self.refused(capsys, run_dir, **changes)
        assert next(iter(changes)) in message

    def test_beyond_the_end(self, run_dir, capsys):
        """A run cannot be made shorter than its checkpoint."""
        assert "--total-timesteps" in self.refused(capsys, run_dir, total_timesteps=300)

    def test_wrong_shapes(self, run_dir):
        """Of a script that was changed since: torch's own exception, and every file as it was."""
        state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        state["critic"]["q1.0.weight"] = torch.ones(2, 2)
        torch.save(state, run_dir / "checkpoint.pt")
        before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
        with pytest.raises(RuntimeError, match="size mismatch"):
            stsac.train(args(resume=str(run_dir), total_timesteps=600))
        assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before


def test_atomic_save(here, monkeypatch):
    """A kill while a checkpoint is written leaves the one before."""
    stsac.save(here / "checkpoint.pt", args={}, global_step=1)

    def killed(state, file):
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        stsac.save(here / "checkpoint.pt", args={}, global_step=2)
    assert torch.load(here / "checkpoint.pt", weights_only=True)["global_step"] == 1


BAD = {
    "discrete actions": (["--env-id", "CartPole-v1"], "Discrete"),
    "unbounded actions": (["--env-id", "point_env:PointUnbounded-v0"], "a bounded 1-d Box"),
    "negative lam": (["--lam", "-1"], "--lam"),
    "lam not a number": (["--lam", "nan"], "--lam"),
    "no CG iterations": (["--cg-iters", "0"], "--cg-iters"),
    "no follower steps": (["--unroll", "0"], "--unroll"),
    "batch larger than the buffer": (["--batch-size", "200", "--buffer-size", "100"], "--batch-size"),
    "resume of nothing": (["--resume", "no/such/run"], "no/such/run"),
    "evaluate of nothing": (["--evaluate", "no/such/model.pt"], "no/such/model.pt"),
    "lam-decay of zero": (["--lam-decay", "0"], "--lam-decay"),
    "observations of no fixed size": (["--env-id", "point_env:PointNoFixedSize-v0"], "of a fixed size"),
    "evaluate for no episodes": (["--evaluate", "model.pt", "--eval-episodes", "0"], "--eval-episodes"),
    "actions in a matrix": (["--env-id", "point_env:PointMatrix-v0"], "1-d"),
    "negative seed": (["--seed", "-1"], "--seed"),
    "learning rate not a number": (["--policy-lr", "nan"], "--policy-lr"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(here, script, case, capsys, monkeypatch):
    """One line on stderr that names the trouble, exit code 2, and no run folder."""
    line, expected = BAD[case]
    monkeypatch.setattr(sys, "argv", [script.__file__, *line])
    with pytest.raises(SystemExit) as error:
        script.main()
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1
    assert not (here / "runs").exists()


def test_bad_input_from_the_shell(here):
    code, out, err = finish(command("--lam", "nan", cwd=here))
    assert code == 2 and out == "" and err.count("\n") == 1 and "--lam" in err


@pytest.mark.parametrize(
    "line, last_words",
    [
        (["--env-id", "Hoper-v4"], "Did you mean: `Hopper`?"),
        (["--env-id", "Pusher-v4"], "only supported on `mujoco<3`"),
        (["--env-id", SMALL["env_id"], "--buffer-size", str(10**15)], "can't allocate memory"),
    ],
)
def test_what_libraries_say_themselves(here, script, line, last_words, monkeypatch):
    """An exception whose message says it all, before there is a run folder."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *line])
    with pytest.raises(Exception, match=re.escape(last_words)):
        script.main()
    assert not (here / "runs").exists()


@pytest.mark.parametrize("env_id, step, last", [("NaN", 150, 120), ("Huge", 150, 120), ("BadReset", 21, None)])
def test_environment_that_is_not_finite(here, script, capsys, env_id, step, last):
    """NaN, a reward that float32 cannot hold, and a NaN of `reset`: named with its step, and never in a checkpoint."""
    with pytest.raises(SystemExit) as error:
        script.train(args(script, env_id=f"point_env:Point{env_id}-v0", checkpoint_every=50))
    assert error.value.code == 1
    message = capsys.readouterr().err
    assert f"step {step}: " in message and "not finite" in message and message.count("\n") == 1
    checkpoints = [torch.load(path, weights_only=True) for path in here.glob("runs/*/checkpoint.pt")]
    assert [state["global_step"] for state in checkpoints] == ([last] if last else [])
    assert all(column.isfinite().all() for state in checkpoints for column in state["buffer"]["data"])


def test_loss_that_becomes_infinite(here, script, capsys, monkeypatch):
    """The run stops at that step; the checkpoint is from before it and has finite weights."""
    steps, actor_loss = [], script.actor_loss

    def diverging(*arguments):
        steps.append(1)
        return actor_loss(*arguments) * (math.inf if len(steps) == 200 else 1)

    monkeypatch.setattr(script, "actor_loss", diverging)
    with pytest.raises(SystemExit) as error:
        script.train(args(script, leader="none", checkpoint_every=50))
    assert error.value.code == 1
    assert "step 299: a loss is not finite" in capsys.readouterr().err  # the 200th update, counted from step 100
    state = torch.load(next(here.glob("runs/*/checkpoint.pt")), weights_only=True)
    assert state["global_step"] == 240 and all(value.isfinite().all() for value in state["actor"].values())


def test_parameters_that_are_not_finite_are_not_saved(here, script, capsys, monkeypatch):
    """A finite loss can have a gradient that is not: the checkpoint before it stays."""
    calls, step = [], script.optimizer_step

    def spoiling(optimizer, grads):
        calls.append(1)
        step(optimizer, [g * (math.nan if len(calls) == 362 else 1) for g in grads])

    monkeypatch.setattr(
        script, "optimizer_step", spoiling
    )  # two steps an update: the last before step 280's checkpoint
    with pytest.raises(SystemExit):
        script.train(args(script, leader="none", checkpoint_every=40))
    assert "step 280" in capsys.readouterr().err
    state = torch.load(next(here.glob("runs/*/checkpoint.pt")), weights_only=True)
    assert state["global_step"] == 240


@pytest.mark.filterwarnings("ignore:.*share an object")
def test_transitions_are_the_environments(here, script):
    """What is stored: (s, a, r, s') of the task, consecutive within an episode, also from an array changed in place."""
    run = args(script, env_id="point_env:PointInPlace-v0", leader="none", policy_lr=0.0, checkpoint_every=400)
    run_dir = script.train(run)
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    obs, actions, rewards, next_obs, _ = state["buffer"]["data"]
    assert len(obs) == 400
    torch.testing.assert_close(next_obs, (obs + 0.2 * actions).clamp(-2, 2))
    torch.testing.assert_close(rewards, -(next_obs**2).sum(-1))
    inner = torch.arange(400) % 20 != 19  # all but the last of each episode
    assert torch.equal(next_obs[inner], obs[1:][inner[:-1]])
    # uniform at first, then the policy with its noise
    assert actions[:200].abs().max() > 0.95 and actions[:200].std() == pytest.approx(3**-0.5, rel=0.1)
    if script is stddpg:
        noise = actions[200:] - load_actor(script, run_dir)[0](obs[200:]).detach()
        assert noise.std() == pytest.approx(run.exploration_noise, rel=0.2)


def test_lam_decay_and_fresh_batches_reach_the_update(here, script, monkeypatch):
    seen, update = [], script.stackelberg_update

    def recording(nets, optimizers, batches, *rest):
        seen.append((batches, rest[-3]))
        return update(nets, optimizers, batches, *rest)

    monkeypatch.setattr(script, "stackelberg_update", recording)
    script.train(args(script, unroll=3, lam=200.0, lam_decay=50.0, total_timesteps=150))
    assert len(seen) == 51  # steps 100 to 150
    for step, (batches, lam) in enumerate(seen, start=100):
        assert lam == pytest.approx(200 * math.exp(-step / 50))
        assert len(batches) == 3 and not torch.equal(batches[0].obs, batches[1].obs)


def test_odd_spaces(here, script):
    """Dictionary observations are flattened, and bounds of a narrow integer type do not overflow."""
    run_dir = script.train(args(script, env_id="point_env:PointSmall-v0", total_timesteps=220))
    actor = torch.load(run_dir / "model.pt", weights_only=True)["actor"]
    assert (actor["action_scale"] == 100).all() and (actor["action_bias"] == 0).all()


class TestTimeLimits:
    """`truncated` bootstraps, `terminated` does not."""

    def play(self, script, env_id, here):
        """The rewards and ends in the buffer after 2,000 steps of training, and the critic's mean value there."""
        entropy = {"alpha": 0.0} if script is stsac else {}
        run = args(script, env_id=env_id, leader="none", total_timesteps=2001, checkpoint_every=1000, **entropy)
        script.train(run)
        state = torch.load(next(here.glob("runs/*/checkpoint.pt")), weights_only=True)
        assert state["global_step"] == 2000
        env = script.make_env(env_id)
        critic = script.Critic(env.observation_space, env.action_space, SMALL["hidden"])
        critic.load_state_dict(state["critic"])
        obs, actions, rewards, next_obs, terminated = state["buffer"]["data"]
        assert len(terminated) == 2000 and (rewards == 1).all()
        return state["episode"], terminated, torch.stack([*critic(obs, actions)]).mean().item()

    def test_timeout(self, here, script):
        """Two episodes of 1,000 steps of reward 1 that time out: no transition is terminal, and Q → 1 / (1 - γ)."""
        episodes, terminated, q = self.play(script, "point_env:PointTimeout-v0", here)
        assert episodes == 2 and (terminated == 0).all()
        assert q > 5  # on its way to 10

    def test_terminal(self, here, script):
        """Episodes that really end after a reward of 1: Q = 1."""
        episodes, terminated, q = self.play(script, "point_env:PointTerminal-v0", here)
        assert episodes == 2000 and (terminated == 1).all()
        assert q == pytest.approx(1, abs=0.1)


def test_tensorboard_and_log(here, script):
    autotune = {"autotune": True} if script is stsac else {}
    run_dir = script.train(args(script, leader="actor", lam_decay=300.0, **autotune))
    found = scalars(run_dir)
    names = "qf1_values qf1_loss actor_loss"
    names += " qf2_values qf2_loss qf_loss alpha alpha_loss" if script is stsac else ""
    expected = {f"losses/{name}" for name in names.split()}
    expected |= {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    expected |= {"eval/episodic_return", "eval/episodic_return_std"}
    names = "cg_residual cg_iterations negative_curvature direct_norm implicit_norm cosine lam"
    expected |= {f"stackelberg/{name}" for name in names.split()}
    assert found.keys() == expected
    assert [step for step, _ in found["charts/episodic_return"]] == list(range(20, 401, 20))
    assert all(value == 20 for _, value in found["charts/episodic_length"])
    assert [step for step, _ in found["eval/episodic_return"]] == [200, 400]
    assert all(math.isfinite(value) for values in found.values() for _, value in values)
    assert dict(found["stackelberg/lam"])[300] == pytest.approx(500 / math.e)
    assert all(0 < value <= 3 for _, value in found["stackelberg/cg_iterations"])
    events = EventAccumulator(str(run_dir))
    events.Reload()
    text = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "|leader|actor|" in text and "|lam|500.0|" in text
    log = (run_dir / "log.txt").read_text().splitlines()
    assert len(log) == 2
    mean, std = dict(found["eval/episodic_return"])[400], dict(found["eval/episodic_return_std"])[400]
    assert log[1].startswith(f"step 400: eval return {mean:.2f} ± {std:.2f} (3 episodes)")


@pytest.mark.parametrize("learning_starts", [0, 150])
def test_diagnostics_are_means_over_the_updates(here, script, learning_starts):
    """Also over the first ones, which are fewer than 100: every update takes its one iteration."""
    run = args(script, learning_starts=learning_starts, cg_iters=1, cg_tol=0.0, batch_size=8)
    found = scalars(script.train(run))
    assert [step for step, _ in found["stackelberg/cg_iterations"]] == list(
        range(100 if learning_starts == 0 else 200, 401, 100)
    )
    assert all(value == 1 for _, value in found["stackelberg/cg_iterations"])


def test_autotune_lowers_alpha_while_the_entropy_is_above_the_target(here):
    """-dim = -2, which the first policies are above: log π + 2 for log π - 2, or the other sign, would raise α."""
    found = dict(scalars(stsac.train(args(autotune=True, leader="none")))["losses/alpha"])
    assert found[400] < found[200] < found[100] == 1


def test_leaders_differ_in_nothing_but_the_gradient(here, script):
    """The same seed: the same networks and the same random actions, whoever leads and whatever is checked before."""
    runs = [{"leader": "none"}, {"leader": "actor"}, {"leader": "actor", "precondition": False}]
    runs += [{"leader": "critic"}, {"leader": "actor", "curvature": "gauss-newton"}]
    buffers = []
    for changes in runs:
        run_dir = script.train(args(script, checkpoint_every=100, total_timesteps=119, learning_starts=101, **changes))
        buffers.append(torch.load(run_dir / "checkpoint.pt", weights_only=True)["buffer"]["data"])
    assert all(torch.equal(a, b) for other in buffers[1:] for a, b in zip(buffers[0], other))


def test_the_plain_algorithm_has_no_game(here, script):
    assert not any(tag.startswith("stackelberg/") for tag in scalars(script.train(args(script, leader="none"))))


def test_evaluate_plays_a_saved_model(here, script, capsys, monkeypatch):
    run_dir = script.train(args(script))
    line = ["--evaluate", str(run_dir / "model.pt"), "--eval-episodes", "4", "--env-id", SMALL["env_id"]]
    monkeypatch.setattr(sys, "argv", [script.__file__, *line])
    capsys.readouterr()
    script.main()
    out = capsys.readouterr().out.splitlines()
    # one line an episode and one of the mean: the saved model's returns, not another policy's
    returns = script.evaluate(*load_actor(script, run_dir), 4, 1, 2)
    np.testing.assert_allclose([float(text.split()[-1]) for text in out[:4]], returns, atol=0.01)
    assert len(out) == 5 and f"mean return {returns.mean():.2f} ± {returns.std():.2f}" in out[4]


def test_a_model_of_another_script_is_refused(here, capsys, monkeypatch):
    run_dir = stsac.train(args())
    monkeypatch.setattr(sys, "argv", ["stddpg.py", "--evaluate", str(run_dir / "model.pt")])
    with pytest.raises(SystemExit) as error:
        stddpg.main()
    assert error.value.code == 2 and "no stddpg file" in capsys.readouterr().err


def test_the_copied_file_runs_alone(here, script):
    """In an empty folder, with no other file of the project in reach; nothing but its lines is printed."""
    copy = shutil.copy(script.__file__, here)
    line = "--env-id Pendulum-v1 --total-timesteps 450 --start-steps 100 --learning-starts 100 --eval-every 200".split()
    line += "--eval-episodes 1 --checkpoint-every 200 --hidden 16 16 --no-cuda".split()
    code, out, err = finish(command(*line, cwd=here, script=copy, env={**os.environ, "PYTHONPATH": ""}))
    assert code == 0 and err == ""
    (run_dir,) = here.glob("runs/*")
    assert run_dir.name.startswith(f"Pendulum-v1__{script.__name__}-al__1__") and (run_dir / "checkpoint.pt").exists()
    lines = out.splitlines()
    assert lines[0] == f"runs/{run_dir.name}" and [text.split(":")[0] for text in lines[1:]] == ["step 200", "step 400"]


def test_mujoco_v4_is_silent_but_for_its_lines(here):
    """The deprecation of the paper's v4 ids is not shown to the user."""
    line = "--env-id Hopper-v4 --total-timesteps 120 --start-steps 50 --learning-starts 50 --eval-every 100".split()
    code, out, err = finish(command(*line, "--eval-episodes", 1, "--hidden", 16, 16, "--no-cuda", cwd=here))
    assert code == 0 and err == "" and len(out.splitlines()) == 2


def test_weights_and_biases_offline(here):
    pytest.importorskip("wandb")
    code, out, err = finish(command(*flags(args()), "--track", cwd=here))
    assert code == 0, err
    (log,) = here.glob("wandb/offline-run-*/*.wandb")
    assert b"eval/episodic_return" in log.read_bytes()


def test_video(here, capsys, monkeypatch):
    """The first episode of each evaluation, and of `--evaluate`."""
    pytest.importorskip("moviepy")
    run_dir = stsac.train(args(env_id="point_env:PointRendering-v0", capture_video=True))
    videos = sorted(path.name for path in run_dir.glob("videos/from-0/*"))
    assert videos == ["rl-video-episode-0.mp4", "rl-video-episode-3.mp4"]
    line = ["--evaluate", str(run_dir / "model.pt"), "--env-id", "point_env:PointRendering-v0", "--capture-video"]
    monkeypatch.setattr(sys, "argv", ["stsac.py", *line])
    stsac.main()
    assert (run_dir / "evaluate" / "rl-video-episode-0.mp4").stat().st_size > 0


def test_video_without_moviepy(here, monkeypatch):
    """gymnasium's own exception, before any training."""
    monkeypatch.setitem(sys.modules, "moviepy", None)
    with pytest.raises(Exception, match="MoviePy is not installed"):
        stsac.train(args(env_id="point_env:PointRendering-v0", capture_video=True))


def test_interrupt_ends_at_once(here):
    process = command(*flags(args(total_timesteps=100_000)), cwd=here)
    try:
        deadline = time.time() + 120
        while not list(here.glob("runs/*/checkpoint.pt")):
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        code, out, err = finish(process)
        assert code in (130, -signal.SIGINT) and err.rstrip().endswith("KeyboardInterrupt")
    finally:
        process.kill()
