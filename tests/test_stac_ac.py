"""stac_ac.py as its users run it, and the pieces between the simulator and the surrogates."""

import functools
import importlib
import itertools
import math
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from gymnasium.spaces import Box, Discrete
from test_training import assert_same_weights, command, finish, flags, here, scalars  # noqa: F401, a fixture

import stac_ac

# a run of a few seconds: twenty batches of ten episodes
SMALL = {
    **{"env_id": "point_env:Point-v0", "hidden": (16, 16), "num_steps": 200, "total_timesteps": 4000, "gamma": 0.9},
    **{"checkpoint_every": 400, "save_model": True, "cuda": False, "unroll": 5, "critic_lr": 0.02, "lam": 1.0},
}
KINDS = {
    "continuous": {},
    "discrete": {"env_id": "point_env:Compass-v0"},
    "continuous-q": {"critic": "q"},
    "discrete-q": {"env_id": "point_env:Compass-v0", "critic": "q"},
}


def args(**changes):
    return stac_ac.Args(**{**SMALL, **changes})


@pytest.fixture(autouse=True)
def working_folder(here):  # noqa: F811
    return here


def batch_returns(run_dir):
    return [value for _, value in scalars(run_dir)["charts/batch_return"]]


def parameters(actor):
    return torch.cat([p.detach().reshape(-1) for p in actor.parameters()])


@pytest.mark.parametrize("leader", ["actor", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_learns(kind, leader):
    """The mean return of a batch, -20 (continuous) or -40 (discrete) at the start. The total derivative is several
    times as long as the plain gradient, and a Q critic, which the actor climbs directly, has to be near its best
    response: hence the rates."""
    changes = {"policy_lr": 0.2 if leader == "none" else 0.05, "lam": 50.0, **KINDS[kind]}
    if "critic" in changes:
        changes |= {"policy_lr": 0.1 if leader == "none" else 0.01, "unroll": 20}
    returns = batch_returns(stac_ac.train(args(leader=leader, total_timesteps=16_000, **changes)))
    assert np.mean(returns[-5:]) > np.mean(returns[:3]) / 2


def test_without_gradients_nothing_is_learned():
    """The control of the test above."""
    for kind in KINDS.values():
        returns = batch_returns(stac_ac.train(args(policy_lr=0.0, total_timesteps=6000, **kind)))
        assert np.mean(returns[-5:]) < 0.7 * np.mean(returns[:3])


@pytest.mark.parametrize("kind", ["continuous-q", "discrete"])
@pytest.mark.parametrize("leader", ["actor", "none"])
def test_same_seed_same_run(kind, leader):
    runs = [
        args(leader=leader, seed=seed, total_timesteps=600, lam=50.0, policy_lr=0.02, grad_noise=0.1, **KINDS[kind])
        for seed in (1, 1, 2)
    ]
    first, second, other = (stac_ac.train(run) for run in runs)
    assert_same_weights(first, second)
    with pytest.raises(AssertionError):
        assert_same_weights(first, other)
    assert first.name.split("__")[1] == {"actor": "stac-al", "none": "ac"}[leader]


def test_logging_does_not_change_the_run():
    assert_same_weights(stac_ac.train(args()), stac_ac.train(args(checkpoint_every=10_000)))


@pytest.mark.parametrize(
    "changes",
    [
        {"env_id": "point_env:Compass-v0", "num_steps": 190, "grad_noise": 0.05, "lam_decay": 1e4},
        {"leader": "none", "critic": "q"},
    ],
    ids=["actor-cut-episodes", "none-q"],
)
def test_killed_and_resumed_ends_with_the_same_weights(here, changes):  # noqa: F811
    """SIGKILL after a checkpoint, in the middle of a batch or of writing one down; then `--resume` alone."""
    run = args(total_timesteps=10_000, **changes)
    whole = here / stac_ac.train(run)
    process = command(*flags(run), cwd=here, script=stac_ac.__file__)
    deadline = time.time() + 120
    while not (killed := [p for p in here.glob("runs/*/checkpoint.pt") if p.parent != whole]):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = killed[0].parent
    assert not (killed / "model.pt").exists()
    code, out, err = finish(command("--resume", killed, "--env-id", run.env_id, cwd=here, script=stac_ac.__file__))
    assert code == 0, err
    assert_same_weights(whole, killed)
    a, b = scalars(whole), scalars(killed)
    a.pop("charts/SPS"), b.pop("charts/SPS")
    assert a == b  # nothing missing, nothing twice
    lines = [[line.split(",")[0] for line in (d / "log.txt").read_text().splitlines()] for d in (whole, killed)]
    assert lines[0] == lines[1] and len(lines[0]) == 10_000 // run.num_steps


def test_a_longer_run_can_be_made_of_a_shorter_one():
    short = stac_ac.train(args(total_timesteps=2000))
    resumed = stac_ac.train(args(resume=str(short)))
    assert resumed == short
    assert_same_weights(resumed, stac_ac.train(args()))


def refused(capsys, run_dir, **changes):
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as error:
        stac_ac.train(args(resume=str(run_dir), **changes))
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before
    return message


def test_checkpoints_that_are_refused(capsys):
    run_dir = stac_ac.train(args(total_timesteps=400))
    for changes in ({"seed": 2}, {"num_steps": 100}, {"critic": "q"}, {"start_states": "initial"}, {"lam": 2.0}):
        assert next(iter(changes)) in refused(capsys, run_dir, **changes)
    checkpoint = run_dir / "checkpoint.pt"
    data, state = checkpoint.read_bytes(), torch.load(checkpoint, weights_only=True)
    for size in (0, 100, len(data) // 2, len(data) - 10):
        checkpoint.write_bytes(data[:size])
        assert "checkpoint.pt" in refused(capsys, run_dir)
    for content in ({**state, "algorithm": "stsac"}, [1], {**state, "args": {}}):
        torch.save(content, checkpoint)
        refused(capsys, run_dir)
    shutil.copy(run_dir / "model.pt", checkpoint)
    refused(capsys, run_dir)
    torch.save({**state, "critic": {"v.0.weight": torch.ones(2, 2)}}, checkpoint)
    with pytest.raises(RuntimeError, match="size mismatch"):  # torch's own exception
        stac_ac.train(args(resume=str(run_dir)))


BAD = {
    "other actions": (["--env-id", "point_env:TwoBoxes-v0"], "MultiDiscrete"),
    "negative lam": (["--lam", "-1"], "--lam"),
    "lam not a number": (["--lam", "nan"], "--lam"),
    "no CG iterations": (["--cg-iters", "0"], "--cg-iters"),
    "no follower steps": (["--unroll", "0"], "--unroll"),
    "empty batch": (["--num-steps", "0"], "--num-steps"),
    "a batch longer than the run": (["--num-steps", "200", "--total-timesteps", "100"], "--num-steps"),
    "gae-lambda above one": (["--gae-lambda", "1.1"], "--gae-lambda"),
    "negative noise": (["--grad-noise", "-0.1"], "--grad-noise"),
    "resume of nothing": (["--resume", "no/such/run"], "no/such/run"),
    "evaluate of nothing": (["--evaluate", "no/such/model.pt"], "no/such/model.pt"),
    "one start state for a Q critic": (["--start-states", "batch", "--critic", "q"], "--critic v"),
    "video of the training": (["--capture-video"], "--evaluate"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(here, case, capsys, monkeypatch):  # noqa: F811
    line, expected = BAD[case]
    monkeypatch.setattr(sys, "argv", [stac_ac.__file__, *line])
    with pytest.raises(SystemExit) as error:
        stac_ac.main()
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1
    assert not (here / "runs").exists()


def test_environment_that_returns_nan(here, capsys):  # noqa: F811
    with pytest.raises(SystemExit) as error:
        stac_ac.train(args(env_id="point_env:PointNaN-v0", num_steps=60, checkpoint_every=60))
    assert error.value.code == 1
    message = capsys.readouterr().err
    assert "step 150: " in message and "not finite" in message and message.count("\n") == 1
    (checkpoint,) = here.glob("runs/*/checkpoint.pt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 120


@pytest.mark.parametrize("spoiled, word", [("critic_loss", "loss"), ("optimizer_step", "parameter")])
def test_numbers_that_become_infinite(here, capsys, monkeypatch, spoiled, word):  # noqa: F811
    """The run stops at that step; the checkpoint is from before it and has finite weights."""
    calls, original = [], getattr(stac_ac, spoiled)

    def spoiling(*arguments):
        calls.append(1)
        if spoiled == "critic_loss":
            return original(*arguments) * (math.inf if len(calls) == 5 else 1)
        optimizer, grads = arguments
        original(optimizer, [g * (math.nan if len(calls) == 10 else 1) for g in grads])

    monkeypatch.setattr(stac_ac, spoiled, spoiling)
    with pytest.raises(SystemExit) as error:
        stac_ac.train(args(leader="none", unroll=1, checkpoint_every=200))
    assert error.value.code == 1
    assert f"step 1000: a {word} is not finite" in capsys.readouterr().err
    state = torch.load(next(here.glob("runs/*/checkpoint.pt")), weights_only=True)
    assert state["global_step"] == 800 and all(value.isfinite().all() for value in state["actor"].values())


@pytest.mark.parametrize("leader", ["actor", "none"])
def test_tensorboard_and_log(leader, capsys):
    run_dir = stac_ac.train(args(leader=leader, num_steps=210, total_timesteps=2200, lam_decay=1000.0))
    out = capsys.readouterr().out.splitlines()
    found = scalars(run_dir)
    names = "cg_residual cg_iterations negative_curvature direct_norm implicit_norm cosine lam"
    game = {f"stackelberg/{name}" for name in names.split()} if leader == "actor" else set()
    losses = {f"losses/{name}" for name in ("policy_loss", "value_loss", "entropy")}
    charts = {f"charts/{name}" for name in ("episodic_return", "episodic_length", "batch_return", "SPS")}
    assert found.keys() == game | losses | charts
    assert all(math.isfinite(value) for values in found.values() for _, value in values)
    # ten whole episodes a batch, of 20 steps, and one of 10 that is cut and does not count
    steps = [start + 20 * k for start in range(0, 2100, 210) for k in range(1, 11)]
    assert [step for step, _ in found["charts/episodic_return"]] == steps
    assert all(value == 20 for _, value in found["charts/episodic_length"])
    assert [step for step, _ in found["charts/batch_return"]] == list(range(210, 2101, 210))
    log = (run_dir / "log.txt").read_text().splitlines()
    episodic = [value for _, value in found["charts/episodic_return"]]
    for k, line in enumerate(log):
        mean, std = np.mean(episodic[10 * k : 10 * k + 10]), np.std(episodic[10 * k : 10 * k + 10])
        assert line.startswith(f"step {210 * (k + 1)}: batch return {mean:.2f} ± {std:.2f} (10 episodes)")
        assert found["charts/batch_return"][k][1] == pytest.approx(mean, rel=1e-5)
    assert len(log) == 10 and out == [str(run_dir), log[9]]
    if leader == "actor":
        assert dict(found["stackelberg/lam"])[1050] == pytest.approx(math.exp(-1.05))


def test_a_batch_without_the_end_of_an_episode():
    run_dir = stac_ac.train(args(env_id="point_env:PointTimeout-v0", total_timesteps=600))
    assert "charts/batch_return" not in scalars(run_dir)
    assert "unknown (no episode ended)" in (run_dir / "log.txt").read_text()


@pytest.mark.parametrize("kind", ["continuous", "discrete-q"])
def test_evaluate_plays_a_saved_model(kind, capsys, monkeypatch):
    run = args(total_timesteps=400, **KINDS[kind])
    run_dir = stac_ac.train(run)
    line = ["--evaluate", str(run_dir / "model.pt"), "--eval-episodes", "3", "--env-id", run.env_id]
    monkeypatch.setattr(sys, "argv", [stac_ac.__file__, *line])
    capsys.readouterr()
    stac_ac.main()
    out = capsys.readouterr().out.splitlines()
    env = stac_ac.make_env(run.env_id)
    actor = stac_ac.Actor(env.observation_space, env.action_space, run.hidden)
    actor.load_state_dict(torch.load(run_dir / "model.pt", weights_only=True)["actor"])
    returns = stac_ac.evaluate(actor, env, 3, 1, 2)
    np.testing.assert_allclose([float(text.split()[-1]) for text in out[:3]], returns, atol=0.01)
    assert len(out) == 4 and f"mean return {returns.mean():.2f}" in out[3]


def test_the_copied_file_runs_alone(here):  # noqa: F811
    """In an empty folder, with no other file of the project in reach; nothing but its lines is printed."""
    copy = shutil.copy(stac_ac.__file__, here)
    line = "--env-id Hopper-v4 --total-timesteps 600 --num-steps 200 --checkpoint-every 200 --no-cuda".split()
    code, out, err = finish(command(*line, cwd=here, script=copy, env={"PATH": "", "OMP_NUM_THREADS": "1"}))
    assert code == 0 and err == ""
    (run_dir,) = here.glob("runs/*")
    assert run_dir.name.startswith("Hopper-v4__stac-al__1__") and (run_dir / "checkpoint.pt").exists()
    lines = out.splitlines()
    assert len(lines) == 2 and lines[0] == f"runs/{run_dir.name}" and lines[1].startswith("step 600: batch return ")


class TestCollect:
    def collect(self, env_id, num_steps, start=0, **changes):
        env = stac_ac.make_env(env_id)
        torch.manual_seed(0)
        actor = stac_ac.Actor(env.observation_space, env.action_space, (8,))
        return actor, *stac_ac.collect(env, actor, num_steps, 1, start)

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
        assert not torch.equal(first.obs, self.collect("point_env:Point-v0", 30, start=90)[1].obs)

    def test_the_batch_has_the_gaussians_actions_and_the_environment_clipped_ones(self):
        _, batch, _ = self.collect("point_env:Point-v0", 200)
        assert batch.actions.shape == (200, 2) and (batch.actions.abs() > 1).any()
        inside = (batch.next_obs.abs() < 2).all(1)
        moved = batch.obs + 0.2 * batch.actions.clamp(-1, 1)
        torch.testing.assert_close(batch.next_obs[inside], moved[inside])

    @pytest.mark.parametrize("space", [Discrete(3), Box(-1.0, 1.0, (2,))], ids=["discrete", "continuous"])
    def test_the_numpy_sampler_is_the_policy(self, space):
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
        "between", [nn.ReLU, nn.SiLU, nn.Tanh, lambda: nn.LayerNorm(8)], ids="ReLU SiLU tanh norm".split()
    )
    def test_the_numpy_sampler_is_any_policy(self, between, monkeypatch):
        """Somebody swaps the activation in `mlp`, and nothing else: a Gaussian without noise is its mean."""

        def mlp(n_in, n_hidden, n_out):
            return nn.Sequential(nn.Linear(n_in, n_hidden), between(), nn.Linear(n_hidden, n_out))

        monkeypatch.setattr(stac_ac, "mlp", mlp)
        actor = stac_ac.Actor(Box(-1.0, 1.0, (3,)), Box(-1.0, 1.0, (2,)), (8,))
        actor.log_std.data.fill_(-math.inf)
        obs = torch.randn(3)
        torch.testing.assert_close(torch.from_numpy(actor.sampler(1)(obs.numpy(), 0)), actor.net(obs).detach())


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
            found = stac_ac.estimate(actor, critic, batch, gamma, lam)
            torch.testing.assert_close(found.returns, torch.tensor(returns))
            torch.testing.assert_close(found.mc_advantages, torch.tensor(returns) - V(batch.obs))
            torch.testing.assert_close(found.advantages, torch.as_tensor(advantages))

    def test_a_time_limit_is_not_an_end(self):
        """Rewards of 1 for ever, but episodes time out after 1,000 steps: V → 1 / (1 - γ). If they end, V = 1."""
        values = {}
        for env_id in ("PointTimeout", "PointTerminal"):
            changes = {"total_timesteps": 20_000, "num_steps": 1000, "unroll": 100, "critic_lr": 0.03}
            run_dir = stac_ac.train(args(env_id=f"point_env:{env_id}-v0", leader="none", **changes))
            critic = stac_ac.Critic(Box(-2.0, 2.0, (2,)), (16, 16))
            critic.load_state_dict(torch.load(run_dir / "model.pt", weights_only=True)["critic"])
            values[env_id] = critic(torch.zeros(2)).item()
        assert values["PointTimeout"] > 9 and values["PointTerminal"] == pytest.approx(1, abs=0.1)


class TestUpdate:
    def make(self, critic="v", n=60):
        env = stac_ac.make_env("point_env:Compass-v0")
        torch.manual_seed(1)
        spaces = env.observation_space, env.action_space
        actor = stac_ac.Actor(*spaces, (8,))
        critic = stac_ac.Critic(spaces[0], (8,)) if critic == "v" else stac_ac.QCritic(*spaces, (8,))
        batch, _ = stac_ac.collect(env, actor, n, 1, 0)
        return actor, critic, batch

    def update(self, critic="v", policy_lr=0.1, critic_lr=0.01, **changes):
        """One update; the steps that actor and critic took, and the run of it."""
        run = args(critic=critic, policy_lr=policy_lr, critic_lr=critic_lr, cg_iters=50, **changes)
        actor, critic, batch = self.make(critic)
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
        actor, critic, batch = self.make(critic_kind)
        before = parameters(actor), parameters(critic)
        theta, w = list(actor.parameters()), list(critic.parameters())
        est = stac_ac.estimate(actor, critic, batch, 0.9, 0.97)
        score = stac_ac.score_function(actor, batch)
        f1 = stac_ac.actor_surrogate(critic, batch, score, est.advantages, args())
        f2 = stac_ac.critic_surrogate(critic, batch, score, est, args())
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
        advantages = stac_ac.estimate(actor, critic, batch, 0.9, 0.97).advantages
        theta, w = list(actor.parameters()), list(critic.parameters())
        est = stac_ac.estimate(actor, critic, batch, 0.9, 0.97)
        score = stac_ac.score_function(actor, batch)
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
        """`--start-states batch`, written down as the released code has it, with a dense solve."""
        lam = 100.0
        step = self.update(start_states="batch", lam=lam, norm_adv=norm_adv, cg_tol=1e-6)[0]
        actor, critic, batch = self.make()
        theta, w = list(actor.parameters()), list(critic.parameters())
        returns, _, A = stac_ac.estimate(actor, critic, batch, 0.9, 0.97)
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
            run = stac_ac.Args(curvature=curvature, lam=0.0, cg_iters=50)
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
        assert not torch.allclose(self.update(start_states="initial")[0], self.update()[0], rtol=0.1)
