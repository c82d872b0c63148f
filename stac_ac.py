# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11,<2.14", "gymnasium[mujoco]>=1.2", "numpy", "tensorboard", "tqdm", "tyro>=0.9"]
# ///
"""Stackelberg actor-critic (STAC) and plain on-policy actor-critic in one file.

Zheng, Fiez, Alumbaugh, Chasnov, Ratliff: Stackelberg Actor-Critic: Game-Theoretic Reinforcement Learning Algorithms,
2021. Numbers in parentheses are the paper's equations. Every player minimises a cost: the actor (parameters θ), which
leads, -J(θ, w), the critic (parameters w), which follows, L(θ, w). The actor follows the total derivative of its cost
through the critic's best response; everything else is vanilla actor-critic, with Spinning Up's conventions.

    python stac_ac.py --env-id CartPole-v1 --leader actor --lam 0 --unroll 80     # STAC; λ as in the paper: here 0,
    python stac_ac.py --env-id Hopper-v4 --leader actor --unroll 80               # elsewhere 500
    python stac_ac.py --env-id Hopper-v4 --leader none --unroll 80                # vanilla actor-critic
    python stac_ac.py --resume runs/Hopper-v4__stac-al__1__1700000000
    python stac_ac.py --evaluate runs/Hopper-v4__stac-al__1__1700000000/model.pt
"""

import difflib
import math
import os
import random
import re
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = ""
    """the name of this experiment (default: the algorithm's, which is ac or stac-al)"""
    seed: int = 1
    """seed of the experiment"""
    torch_deterministic: bool = True
    """the value of `torch.backends.cudnn.deterministic`"""
    cuda: bool = True
    """if toggled, cuda will be enabled where there is one (for the updates; the policy acts on the CPU)"""
    num_threads: int = 1
    """CPU threads of this run; more only pay where cores are idle"""
    track: bool = False
    """if toggled, this experiment will be tracked with Weights and Biases"""
    wandb_project_name: str = "stackelberg-actor-critic"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
    capture_video: bool = False
    """whether to record the first episode of `--evaluate` (in `videos` beside the model)"""
    save_model: bool = False
    """whether to save the model (`model.pt` in the run's folder) at the end"""
    eval_episodes: int = 10
    """episodes of `--evaluate`, played by the most likely action; the measure of training is the batch's mean return"""
    checkpoint_every: int = 10_000
    """environment steps between two checkpoints; each waits for the end of the batch"""
    resume: str | None = None
    """the folder of a run to carry on; its flags need not be repeated"""
    evaluate: str | None = None
    """a model to play for `--eval-episodes` episodes instead of training"""

    # Algorithm specific arguments
    env_id: str = "CartPole-v1"
    """the environment id of the task, with discrete or continuous actions"""
    total_timesteps: int = 800_000
    """total timesteps of the experiment; the last batch is the last that fits"""
    num_steps: int = 4_000
    """the number of steps in a batch"""
    gamma: float = 0.99
    """the discount factor gamma"""
    gae_lambda: float = 0.97
    """the lambda for the general advantage estimation"""
    norm_adv: bool = True
    """advantages normalization, Spinning Up's: subtract the batch's mean, divide the composed gradient by its std"""
    policy_lr: float = 0.1
    """the learning rate of the actor's gradient descent"""
    critic_lr: float = 0.01
    """the learning rate of the critic's gradient descent"""
    grad_noise: float = 0.0
    """standard deviation of Gaussian noise on each gradient of both players (the paper's released code has 0.05)"""
    hidden: tuple[int, ...] = (64, 32)
    """hidden layers of the actor and of the critic"""
    critic: Literal["v", "q"] = "v"
    """the critic: V_w(s) (Proposition 1) or Q_w(s, a) (equations (2) to (4), Theorem 1)"""

    # The Stackelberg game
    leader: Literal["actor", "none"] = "actor"
    """the player that follows its total derivative; none: vanilla actor-critic, the limit λ → ∞"""
    lam: float = 500.0
    """λ of the regularized follower Hessian ∇_w²L + λI (Section 4.5); the paper has 0 in CartPole, 500 elsewhere"""
    lam_decay: float | None = None
    """time constant in environment steps: λ exp(-t / lam_decay); the paper's released code has 1e5 (default: off)"""
    unroll: int = 1
    """m of Algorithm 2: critic steps on a batch, for one of the actor's"""
    start_states: Literal["every", "initial"] = "every"
    """s_0 of Proposition 1 and Theorem 1: every visited state, as in the critic's loss, or each trajectory's first"""
    cg_iters: int = 10
    """most conjugate gradient iterations, each one Hessian-vector product"""
    cg_tol: float = 1e-3
    """relative residual at which conjugate gradient stops"""


def stop(message, code=2):
    """Ends the program with one line on stderr: code 2 for bad input, 1 for a run that went wrong."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def check_args(args):
    """Refuses values that no run can have."""
    for name in "unroll cg_iters num_steps total_timesteps eval_episodes checkpoint_every num_threads".split():
        if getattr(args, name) < 1:
            stop(f"--{name.replace('_', '-')} must be at least 1")
    for ok, message in [
        (0 <= args.seed < 2**32, "--seed must be in [0, 2^32)"),
        (0 <= args.lam < math.inf, "--lam must be finite and at least 0 (λ → ∞ is --leader none)"),
        (args.lam_decay is None or args.lam_decay > 0, "--lam-decay must be positive"),
        (0 <= args.cg_tol < 1, "--cg-tol must be in [0, 1)"),
        (args.num_steps <= args.total_timesteps, "--num-steps must not be larger than --total-timesteps"),
        (0 <= args.gamma <= 1, "--gamma must be in [0, 1]"),
        (0 <= args.gae_lambda <= 1, "--gae-lambda must be in [0, 1]"),
        (args.policy_lr >= 0 and args.critic_lr >= 0, "--policy-lr and --critic-lr must be at least 0"),
        (args.grad_noise >= 0, "--grad-noise must be at least 0"),
        (all(width >= 1 for width in args.hidden), "--hidden must be positive layer widths"),
        (not args.capture_video or args.evaluate, "--capture-video needs --evaluate"),
    ]:
        if not ok:
            stop(message)


# Environment
def make_env(env_id, capture_video=False):
    """One environment with flat observations, and actions 0, 1, ... or in a Box; stops if it does not suit."""
    # v4 ids are the paper's tasks; their deprecation is known and is the one warning that is silenced
    warnings.filterwarnings("ignore", r".*The environment \S+ is out of date", DeprecationWarning)
    try:
        env = gym.make(env_id, **({"render_mode": "rgb_array"} if capture_video else {}))
    except gym.error.UnregisteredEnv:
        near = difflib.get_close_matches(env_id, gym.registry, n=5)
        stop(f"unknown environment {env_id!r}" + (f"; near matches: {', '.join(near)}" if near else ""))
    except Exception as e:  # whatever a third party's constructor raises
        stop(f"cannot make environment {env_id!r}: {' '.join(str(e).split())}")
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    if not isinstance(env.observation_space, gym.spaces.Box):
        stop(f"{env_id} has observations of no fixed size")
    space = env.action_space
    if isinstance(space, gym.spaces.Discrete):
        first, actions = int(space.start), gym.spaces.Discrete(space.n)
        env = gym.wrappers.TransformAction(env, lambda a: a + first, actions) if first else env
    elif not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        stop(f"{env_id} has the action space {space}; a Discrete or a one-dimensional Box is needed")
    if capture_video:
        try:
            import moviepy  # noqa: F401, what RecordVideo needs

            env.reset()
            env.render()
        except Exception as e:  # every rendering backend has its own errors
            stop(
                "cannot record videos: install moviepy (pip install moviepy) and OpenGL (on Debian: apt install "
                f"libegl1, then MUJOCO_GL=egl, or libosmesa6, then MUJOCO_GL=osmesa): {' '.join(str(e).split())}"
            )
    return gym.wrappers.RecordEpisodeStatistics(env)


def reset(env, *key):
    """Starts an episode with randomness that depends on `key` (integers) alone; returns the observation.

    All that is random outside torch is seeded anew for each episode. So a checkpoint between two episodes has nothing
    of the simulator to save.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    obs, _ = env.reset(seed=seed)
    return np.array(obs)


def clip(action, space):
    """What the environment gets for a policy's action: a Gaussian has no bounds, a Box has."""
    return np.minimum(np.maximum(action, space.low), space.high) if isinstance(space, gym.spaces.Box) else action


# Networks
def mlp(*sizes):
    """Linear layers of the given sizes with tanh between them."""
    layers = []
    for n_in, n_out in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(n_in, n_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Policy π_θ(a|s): Categorical, or Gaussian with a standard deviation that does not depend on the state."""

    def __init__(self, observation_space, action_space, hidden=(64, 32)):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        n_out = int(action_space.n) if self.discrete else math.prod(action_space.shape)
        self.net = mlp(math.prod(observation_space.shape), *hidden, n_out)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((n_out,), -0.5))  # Spinning Up's start

    def forward(self, obs):
        """obs [..., obs_dim] -> the distribution π_θ(·|s)."""
        if self.discrete:
            return Categorical(logits=self.net(obs), validate_args=False)
        mean = self.net(obs)
        return Independent(Normal(mean, self.log_std.exp().expand_as(mean), validate_args=False), 1)

    def mode(self, obs):
        """The deterministic policy of the evaluation."""
        return self.net(obs).argmax(-1) if self.discrete else self.net(obs)

    def sampler(self, num_steps):
        """The policy as a numpy function (obs [obs_dim], t) -> a ~ π_θ(·|s), for t < num_steps; θ is that of now.

        On one observation torch takes ten times as long as numpy. What is random is drawn here, all at once: a
        Gaussian's noise, and for a Categorical Gumbel's, whose argmax with the logits is a sample.
        """
        weights = [np.ascontiguousarray(layer.weight.detach().cpu().numpy().T) for layer in self.net[::2]]
        biases = [layer.bias.detach().cpu().numpy() for layer in self.net[::2]]
        hidden, weight_out, bias_out = list(zip(weights[:-1], biases)), weights[-1], biases[-1]
        shape = num_steps, len(bias_out)
        noise = -torch.empty(shape).exponential_().log() if self.discrete else torch.randn(shape) * self.std()
        noise = noise.numpy() + bias_out

        def sample(x, t):
            for weight, bias in hidden:
                x = np.tanh(x.dot(weight) + bias)
            x = x.dot(weight_out) + noise[t]
            return x.argmax() if self.discrete else x

        return sample

    def std(self):
        return self.log_std.detach().exp().cpu()


class Critic(nn.Module):
    """State values V_w(s)."""

    def __init__(self, observation_space, hidden=(64, 32)):
        super().__init__()
        self.v = mlp(math.prod(observation_space.shape), *hidden, 1)

    def forward(self, obs):
        """obs [..., obs_dim] -> V_w(s) [...]."""
        return self.v(obs).squeeze(-1)  # critical: [N, 1] against [N] would broadcast


class QCritic(nn.Module):
    """Action values Q_w(s, a), of `--critic q`; a discrete action is an input for each action."""

    def __init__(self, observation_space, action_space, hidden=(64, 32)):
        super().__init__()
        self.n_actions = int(action_space.n) if isinstance(action_space, gym.spaces.Discrete) else None
        act_dim = self.n_actions or math.prod(action_space.shape)
        self.q = mlp(math.prod(observation_space.shape) + act_dim, *hidden, 1)

    def forward(self, obs, actions):
        """obs [..., obs_dim], actions [...] (discrete) or [..., act_dim] -> Q_w(s, a) [...]."""
        if self.n_actions:
            actions = F.one_hot(actions, self.n_actions).to(obs.dtype)
        return self.q(torch.cat([obs, actions], dim=-1)).squeeze(-1)


# Batch collection
class Rollout(NamedTuple):
    """A batch of trajectories, one after the other: tensors, first axis N.

    trajectory: the number of the trajectory that a step belongs to. A trajectory whose last step is not terminated
    was cut: by a time limit, or by the end of the batch.
    """

    obs: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    next_obs: torch.Tensor
    terminated: torch.Tensor
    trajectory: torch.Tensor


def collect(env, actor, num_steps, seed, start):
    """A batch of `num_steps` steps of π_θ, and (step, return, length) of each episode that ended in it.

    It begins with a new episode and cuts its last one, as Spinning Up does. So a checkpoint between two batches has
    nothing of the simulator to save. start: environment steps before the batch.
    """
    policy = actor.sampler(num_steps)
    shape = num_steps, math.prod(env.observation_space.shape)
    obs, next_obs = np.empty(shape, np.float32), np.empty(shape, np.float32)
    rewards, terminated = np.empty(num_steps, np.float32), np.empty(num_steps, np.float32)
    actions, trajectory, episodes, number, done = [], np.empty(num_steps, np.int64), [], 0, True
    for t in range(num_steps):
        obs[t] = reset(env, seed, 0, start + t) if done else next_obs[t - 1]
        action = policy(obs[t], t)
        next_obs[t], reward, terminated[t], truncated, info = env.step(clip(action, env.action_space))
        if not math.isfinite(next_obs[t].dot(next_obs[t]) + reward):  # several times as fast as np.isfinite
            message = "the environment returned an observation or a reward that is not finite"
            raise FloatingPointError(f"step {start + t + 1}: {message}")
        actions.append(action)
        rewards[t], trajectory[t] = reward, number
        done = terminated[t] or truncated
        if done:
            episodes.append((start + t + 1, info["episode"]["r"], info["episode"]["l"]))
            number += 1
    columns = obs, np.array(actions), rewards, next_obs, terminated, trajectory
    device = next(actor.parameters()).device
    return Rollout(*(torch.from_numpy(column).to(device) for column in columns)), episodes


# Estimates
def discounted_sum(x, discount, trajectory):
    """Σ_{l≥0} discountˡ x_{t+l} within each trajectory, [N] -> [N], differentiable: log N vectorised doublings."""
    reach = 1  # x_t is the sum over the first `reach` steps
    while reach < len(x):
        same = trajectory[reach:] == trajectory[:-reach]
        x = x + F.pad(torch.where(same, discount**reach * x[reach:], 0), (0, reach))
        reach *= 2
    return x


def state_values(actor, critic, obs):
    """V_w(s), [N]: for a Q critic E_{a~π}[Q_w(s, a)], exact over discrete actions, else by ten samples."""
    if isinstance(critic, Critic):
        return critic(obs)
    if actor.discrete:
        actions = torch.arange(critic.n_actions, device=obs.device).expand(len(obs), -1)
        q = critic(obs[:, None].expand(-1, critic.n_actions, -1), actions)
        return (actor(obs).probs * q).sum(-1)
    return torch.stack([critic(obs, actor(obs).sample()) for _ in range(10)]).mean(0)


class Estimates(NamedTuple):
    """What is estimated from a batch at (θ_k, w_k), constants for both players: [N] each."""

    returns: torch.Tensor  # Monte Carlo: of V^π(s) and of Q^π(s, a); the critic's targets
    mc_advantages: torch.Tensor  # of Q^π(s, a) less the baseline V_w(s): for L
    advantages: torch.Tensor  # less the same baseline: for J


@torch.no_grad()
def estimate(actor, critic, batch, gamma, gae_lambda):
    """Monte Carlo returns and advantages of a batch. Where a trajectory was cut, V_w stands for the rest of it."""
    values = state_values(actor, critic, batch.obs)
    next_values = (1 - batch.terminated) * state_values(actor, critic, batch.next_obs)
    last = F.pad(batch.trajectory[1:] != batch.trajectory[:-1], (0, 1), value=True)
    returns = discounted_sum(batch.rewards + gamma * next_values * last, gamma, batch.trajectory)
    if isinstance(critic, Critic):  # GAE
        deltas = batch.rewards + gamma * next_values - values
        advantages = discounted_sum(deltas, gamma * gae_lambda, batch.trajectory)
    else:  # (3) as it stands
        advantages = critic(batch.obs, batch.actions) - values
    return Estimates(returns, returns - values, advantages)


# Surrogates
#
# J and L depend on θ through the distribution of the trajectories, which autograd does not see. The surrogates f1 and
# f2 have the values of the costs -J and L on the batch, and through `score`, which is 0 but has the gradient of log π,
# the four derivatives that the Stackelberg gradient takes: ∇_θf1, ∇_wf1, ∇_w²f2 and ∇_θ∇_wf2. Nothing else of them
# means anything: ∇_θ²f1 is not that of -J, and ∇_θf2 multiplies estimates that share their samples.
def score_function(actor, batch):
    """log π_θ(a|s) less its own value: zeros [N] whose gradient is ∇_θ log π_θ(a|s)."""
    log_prob = actor(batch.obs).log_prob(batch.actions)
    return log_prob - log_prob.detach()


def critic_values(critic, batch):
    """V_w(s) or Q_w(s, a) along the batch, [N]."""
    return critic(batch.obs) if isinstance(critic, Critic) else critic(batch.obs, batch.actions)


def actor_surrogate(critic, batch, score, advantages, gamma):
    """f1, for -J(θ, w): a scalar.

    ∇_θJ is the policy gradient (3). ∇_wJ is that of (2) and, for a state value critic (Section 4.2), of
    J = E[r + γ (1 - terminated) V_w(s')]: the paper's text leaves out what multiplies V_w.
    """
    if isinstance(critic, Critic):
        q = batch.rewards + gamma * (1 - batch.terminated) * critic(batch.next_obs)
    else:
        q = critic(batch.obs, batch.actions)
    return -(q + score * advantages).mean()


def critic_loss(critic, batch, returns):
    """The critic's cost L(θ, w) as a function of w, (4): a scalar. All that a critic needs that does not lead."""
    return ((critic_values(critic, batch) - returns) ** 2).mean()


def critic_surrogate(critic, batch, score, returns, mc_advantages, gamma, start_states):
    """f2, for L(θ, w), (4): a scalar. ∇_θ∇_wf2 is ∇_w of

        2 Σ_{t≥0} γᵗ ∇_θ log π(a_t|s_t) (V^π(s_0) - V_w(s_0)) Q^π(s_t, a_t)                      (Proposition 1)
        ∇_θ log π(a_0|s_0) (Q_w(s_0, a_0) - Q^π(s_0, a_0))²
            + 2 Σ_{t≥1} γᵗ ∇_θ log π(a_t|s_t) (Q^π(s_0, a_0) - Q_w(s_0, a_0)) Q^π(s_t, a_t)      (Theorem 1)

    for every visited state, or for each trajectory's first, as s_0. Theorem 1 as printed lacks the 2. The Q^π(s_t, a_t)
    of the sums is a Monte Carlo advantage: the baseline changes no expectation, and GAE's bias would.
    """
    error = critic_values(critic, batch) - returns
    influence = discounted_sum(score * mc_advantages, gamma, batch.trajectory)  # ∇_θV^π(s_0), (21)
    if isinstance(critic, Critic):
        theorem = -2 * error * influence
    else:
        influence = influence - score * mc_advantages  # ∇_θQ^π(s_0, a_0), (19)
        theorem = score * error**2 - 2 * error * influence
    if start_states == "initial":
        first = F.pad(batch.trajectory[1:] != batch.trajectory[:-1], (1, 0), value=True)
        return (error**2).mean() + theorem[first].mean()
    return (error**2).mean() + theorem.mean()


# Solver
def conjugate_gradient(matvec, b, max_iters, tol, preconditioner=None):
    """Solves Ax = b for a symmetric A by conjugate gradient, from x = 0.

    matvec: v -> Av; b: [n]; preconditioner: r -> an approximation of A⁻¹r, symmetric positive definite.
    Stops at ‖b - Ax‖ ≤ tol ‖b‖. At pᵀAp ≤ 0 (to rounding: A is not positive definite) or at the first number that is
    not finite it keeps the last good x, 0 if there is none: x is finite whatever A and b are. With a preconditioner M
    the x returned is never worse than Mb: that is what it falls back to.
    Returns x and info, tensors on b's device: residual (relative; inf after a number that was not finite), iterations
    (those that changed x) and negative_curvature.
    """
    eps = torch.finfo(b.dtype).eps
    tol = max(tol, eps)  # the recursion for r goes on shrinking below rounding, where it means nothing
    x, r, b_norm = torch.zeros_like(b), b, b.norm()
    p, rz = r, r @ r
    residual = torch.where(b_norm.isfinite(), (b_norm != 0).to(b.dtype), math.inf)
    max_curvature, iterations = torch.zeros_like(b_norm), torch.zeros_like(b_norm)
    active = b_norm.isfinite() & (residual > tol)
    negative_curvature = torch.zeros_like(active)
    Mb, Mb_residual = x, torch.full_like(residual, math.inf)
    for k in range(max_iters):
        # On a CPU an early stop is free; on a GPU reading `active` would stall it, so the masks do the work instead.
        if b.device.type == "cpu" and not torch.compiler.is_compiling() and not active:
            break
        z = r if preconditioner is None else preconditioner(r)
        rz, rz_old = r @ z, rz
        p = z if k == 0 else z + rz / rz_old * p
        Ap = matvec(p)
        if k == 0:
            Mb, Mb_residual = p, (b - Ap).norm() / b_norm
        pAp = p @ Ap
        curvature = pAp / (p @ p)
        max_curvature = torch.maximum(max_curvature, curvature)
        flat = active & curvature.isfinite() & (curvature <= eps * max_curvature)
        alpha = rz / pAp
        x_new, r_new = x + alpha * p, r - alpha * Ap
        finite = (x_new.sum() + r_new.sum()).isfinite()  # ten times as fast as to look at each number
        good = active & ~flat & finite
        negative_curvature = negative_curvature | flat
        x, r = torch.where(good, x_new, x), torch.where(good, r_new, r)
        residual = torch.where(good, r.norm() / b_norm, torch.where(active & ~flat, math.inf, residual))
        iterations = iterations + good
        active = good & (residual > tol)
    if preconditioner is not None:
        fallback = (residual + Mb_residual).isfinite() & ((residual > Mb_residual) | (iterations == 0))
        x, residual = torch.where(fallback, Mb, x), torch.where(fallback, Mb_residual, residual)
    return x, {"residual": residual, "iterations": iterations, "negative_curvature": negative_curvature}


# Stackelberg gradient
def grad(outputs, inputs, grad_outputs=None, create_graph=False):
    """`torch.autograd.grad` on a graph that is kept; an input that does not matter gets zeros."""
    return torch.autograd.grad(
        outputs, inputs, grad_outputs, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )


def flatten(tensors):
    """One vector of all entries."""
    return torch.cat([t.reshape(-1) for t in tensors])


def term_sizes(direct, implicit):
    """Norms of the leader's direct and implicit term, and the cosine between the two."""
    d, i = flatten(direct), flatten(implicit)
    d_norm, i_norm = d.norm(), i.norm()
    cosine = d @ i / (d_norm * i_norm).clamp(min=torch.finfo(d.dtype).tiny)
    return {"direct_norm": d_norm, "implicit_norm": i_norm, "cosine": cosine}


def stackelberg_gradient(f1, f2, x1, x2, lam, cg_iters, cg_tol, grad2_f2=None):
    """The leader's total derivative, (15) and (16) with the regularization of Section 4.5:

        ∇₁f1 - (∇₂₁f2)ᵀ (∇₂²f2 + λI)⁻¹ ∇₂f1

    f1, f2: the leader's and the follower's cost, scalars with their graphs; x1, x2: their lists of parameters;
    grad2_f2: ∇₂f2 with its graph (create_graph=True), if the caller has it already.
    Returns a list of tensors like x1, and info: the solver's, and the norms of the direct term ∇₁f1 and of the
    implicit term (all the rest, with its sign), and the cosine between the two.
    """
    grads = grad(f1, [*x1, *x2])
    direct, grad2_f1 = grads[: len(x1)], flatten(grads[len(x1) :])
    grad2_f2 = flatten(grad(f2, x2, create_graph=True) if grad2_f2 is None else grad2_f2)

    def damped_hessian(v):
        return flatten(grad(grad2_f2, x2, v)) + lam * v

    v, info = conjugate_gradient(damped_hessian, grad2_f1, cg_iters, cg_tol)
    implicit = grad(grad2_f2, x1, -v)
    return [a + b for a, b in zip(direct, implicit)], info | term_sizes(direct, implicit)


# Update
def optimizer_step(optimizer, params, grads):
    """One optimizer step along given gradients."""
    for p, g in zip(params, grads):
        p.grad = g.detach()
    optimizer.step()


def with_noise(grads, std):
    """Gradients with Gaussian noise, the released code's."""
    return [g + std * torch.randn_like(g) for g in grads] if std else grads


def stackelberg_update(actor, critic, actor_optimizer, critic_optimizer, batch, lam, args):
    """One iteration of Algorithm 2 (with m = 1 of Algorithm 1, (11) and (12)).

    The critic takes m steps on the batch, the actor one; both first gradients are taken at the same (θ_k, w_k).
    Returns the costs -J and L on the batch, and the solver's info.
    """
    theta, w = list(actor.parameters()), list(critic.parameters())
    returns, mc_advantages, advantages = estimate(actor, critic, batch, args.gamma, args.gae_lambda)
    std = advantages.std(correction=0) + 1e-8 if args.norm_adv else 1.0
    advantages = advantages - advantages.mean() if args.norm_adv else advantages
    score, info = score_function(actor, batch), {}
    f1 = actor_surrogate(critic, batch, score, advantages, args.gamma)
    if args.leader == "none":
        f2 = critic_loss(critic, batch, returns)
        grad1, grad2 = grad(f1, theta), grad(f2, w)
    else:
        f2 = critic_surrogate(critic, batch, score, returns, mc_advantages, args.gamma, args.start_states)
        grad2 = grad(f2, w, create_graph=True)
        grad1, info = stackelberg_gradient(f1, f2, theta, w, lam, args.cg_iters, args.cg_tol, grad2)
    # critical: advantages keep their unit until here, or the direct term would be scaled and the implicit one not
    grad1 = [g / std for g in grad1]
    optimizer_step(critic_optimizer, w, with_noise(grad2, args.grad_noise))
    for _ in range(args.unroll - 1):
        optimizer_step(critic_optimizer, w, with_noise(grad(critic_loss(critic, batch, returns), w), args.grad_noise))
    optimizer_step(actor_optimizer, theta, with_noise(grad1, args.grad_noise))
    return f1.detach(), f2.detach(), info


# Evaluation
def evaluate(actor, env, episodes, *key):
    """Undiscounted returns of `episodes` episodes of the most likely action; start states depend on `key` alone."""
    device, returns = next(actor.parameters()).device, []
    for episode in range(episodes):
        obs, done = reset(env, *key, episode), False
        while not done:
            with torch.no_grad():
                action = actor.mode(torch.as_tensor(obs, dtype=torch.float32, device=device))
            obs, _, terminated, truncated, info = env.step(clip(action.cpu().numpy(), env.action_space))
            done = terminated or truncated
        returns.append(float(info["episode"]["r"]))
    return np.array(returns)


def evaluate_model(args):
    """`--evaluate PATH`: plays a saved model and prints each episode's return."""
    check_args(args)
    torch.set_num_threads(args.num_threads)
    state = load(args.evaluate, args, "actor")
    env_id, hidden = state["args"]["env_id"], state["args"]["hidden"]
    env = make_env(env_id, args.capture_video)
    try:
        actor = Actor(env.observation_space, env.action_space, hidden)
        actor.load_state_dict(state["actor"])
    except Exception as e:  # a file can hold anything
        stop(f"{args.evaluate} holds no actor for {env_id} ({type(e).__name__})")
    if args.capture_video:
        env = gym.wrappers.RecordVideo(env, str(Path(args.evaluate).parent / "evaluate"), lambda e: e == 0)
    returns = evaluate(actor, env, args.eval_episodes, args.seed, 2)
    env.close()
    for episode, episodic_return in enumerate(returns):
        print(f"episode {episode + 1}: return {episodic_return:.2f}")
    print(f"{env_id}: mean return {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")


# Checkpoint
ALGORITHM = "stac"  # marks the files that this script writes
CHANGEABLE = set(  # when a run is carried on; all other flags decide which run it is
    "total_timesteps resume evaluate eval_episodes checkpoint_every save_model cuda num_threads "
    "torch_deterministic track wandb_project_name wandb_entity capture_video".split()
)


def save(path, **state):
    """Writes `state` to `path` atomically: a kill at any time leaves the old file or the new one."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        torch.save({"algorithm": ALGORITHM, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path, args, *keys):
    """Reads what `save` wrote: {"algorithm", "args", *keys, ...}. Stops in one line at any other file.

    Never runs code: neither from the file (weights_only) nor by importing a module that only the file names.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["algorithm"] != ALGORITHM or not {"args", *keys} <= state.keys():
            raise ValueError
        env_id, _ = str(state["args"]["env_id"]), state["args"]["hidden"]
    except OSError as e:
        stop(f"cannot read {path}: {e.strerror}")
    except Exception as e:  # a damaged or foreign file can fail in any way
        stop(f"{path} is damaged or not a {ALGORITHM} file that can be used for this ({type(e).__name__})")
    if ":" in env_id and env_id != args.env_id:
        stop(f"{path} wants a module imported for its environment; to allow that, say --env-id {env_id}")
    return state


def load_checkpoint(args):
    """The checkpoint of the run in the folder `args.resume`."""
    state = load(Path(args.resume) / "checkpoint.pt", args, "global_step", "rng")
    if state["args"].keys() != asdict(args).keys():
        stop(f"cannot resume {args.resume}: it was made by another version of {Path(__file__).name}")
    return state


# Training
def new_run_dir(args):
    """Makes the run's own folder runs/{env_id}__{exp_name}__{seed}__{unix time}."""
    names = {"none": ALGORITHM.removeprefix("st"), "actor": f"{ALGORITHM}-al", "critic": f"{ALGORITHM}-cl"}
    exp_name = args.exp_name or names[args.leader]
    now = int(time.time())
    while True:
        try:
            name = f"{args.env_id}__{exp_name}__{args.seed}__{now}"
            run_dir = Path("runs") / re.sub(r"[^\w.-]", "-", name)
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError:  # of a run that started in the same second
            now += 1


def train(args):
    """What the command line calls: trains (or carries on) one run and returns its folder."""
    check_args(args)
    if args.resume:
        state = load_checkpoint(args)
        for name, value in asdict(args).items():
            if name not in CHANGEABLE and state["args"][name] != value:
                stop(f"cannot resume {args.resume}: its {name} is {state['args'][name]!r}, not {value!r}")
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    if args.track:
        try:
            import wandb
        except ImportError:
            stop("--track needs Weights and Biases: pip install wandb")

    env = make_env(args.env_id)
    spaces = env.observation_space, env.action_space
    actor = Actor(*spaces, args.hidden).to(device)
    critic = (Critic(spaces[0], args.hidden) if args.critic == "v" else QCritic(*spaces, args.hidden)).to(device)
    actor_optimizer = torch.optim.SGD(actor.parameters(), lr=args.policy_lr)
    critic_optimizer = torch.optim.SGD(critic.parameters(), lr=args.critic_lr)
    parts = {"actor": actor, "critic": critic}  # plain gradient descent has no state
    start, log_size = 0, 0
    if args.resume:
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            start, log_size = int(state["global_step"]), int(state["log_size"])
            if start < 0 or log_size < 0:
                raise ValueError("its counters are impossible")
            torch.set_rng_state(state["rng"])
            if device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"])
        except Exception as e:  # a file can hold anything
            stop(f"cannot resume {args.resume}: its checkpoint is not of this run ({' '.join(str(e).split())})")
        if args.total_timesteps < start:
            stop(f"cannot resume {args.resume}: it is at step {start}, --total-timesteps is {args.total_timesteps}")

    run_dir = Path(args.resume) if args.resume else new_run_dir(args)
    if args.track:
        run = {"name": run_dir.name, "id": run_dir.name, "resume": "allow", "config": asdict(args), "save_code": True}
        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, sync_tensorboard=True, **run)
    # a killed run wrote things after its checkpoint, which will be written again
    writer = SummaryWriter(str(run_dir), purge_step=start + 1 if args.resume else None)
    log = open(run_dir / "log.txt", "a")
    log.truncate(min(log_size, log.tell()))
    if not args.resume:
        table = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        print(run_dir, flush=True)

    def abort(message):
        writer.close()
        stop(f"{message}; the last good checkpoint, if there is one, is in {run_dir}", 1)

    num_batches, checkpoint_step, shown = args.total_timesteps // args.num_steps, start, {}
    timer_start = time.perf_counter()
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # SPS, not the bar's own rate
    total = num_batches * args.num_steps
    bar = tqdm(total=total, initial=start, disable=None, dynamic_ncols=True, bar_format=form)
    for number in range(start // args.num_steps + 1, num_batches + 1):
        global_step = number * args.num_steps
        try:
            batch, episodes = collect(env, actor, args.num_steps, args.seed, global_step - args.num_steps)
        except FloatingPointError as e:
            abort(str(e))
        with torch.no_grad():
            entropy = actor(batch.obs).entropy().mean()
        lam = args.lam * math.exp(-global_step / args.lam_decay) if args.lam_decay else args.lam
        f1, f2, solve = stackelberg_update(actor, critic, actor_optimizer, critic_optimizer, batch, lam, args)
        if not (f1 + f2).isfinite():
            abort(f"step {global_step}: a loss is not finite")
        if not all(p.isfinite().all() for p in [*actor.parameters(), *critic.parameters()]):
            abort(f"step {global_step}: a parameter is not finite")

        shown["SPS"] = int((global_step - start) / (time.perf_counter() - timer_start))
        paused = time.perf_counter()
        for when, episodic_return, length in episodes:
            writer.add_scalar("charts/episodic_return", episodic_return, when)
            writer.add_scalar("charts/episodic_length", length, when)
        scalars = {"charts/SPS": shown["SPS"], "losses/policy_loss": f1, "losses/value_loss": f2}
        scalars["losses/entropy"] = entropy  # policy_loss is -J(θ, w) itself, value_loss is L(θ, w)
        if args.leader != "none":
            for name, value in solve.items():
                name = f"cg_{name}" if name in ("residual", "iterations") else name
                scalars[f"stackelberg/{name}"] = value
            scalars["stackelberg/lam"] = lam
        line = f"step {global_step}: batch return "
        if episodes:  # the paper's measure of performance: the mean over the batch's episodes that came to an end
            returns = np.array([episode[1] for episode in episodes])
            scalars["charts/batch_return"] = returns.mean()
            line += f"{returns.mean():.2f} ± {returns.std():.2f} ({len(episodes)} episodes)"
            shown["return"] = f"{returns.mean():.1f}"
        else:
            line += "unknown (no episode ended)"
        for name, value in scalars.items():
            writer.add_scalar(name, float(value), global_step)
        line += f", {shown['SPS']} steps/s"
        print(line, file=log, flush=True)
        if number % 10 == 0 or number == num_batches:
            tqdm.write(line)
        bar.set_postfix(shown, refresh=False)
        bar.update(args.num_steps)

        if global_step - checkpoint_step >= args.checkpoint_every:
            writer.flush()
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"args": asdict(args), "global_step": global_step, "log_size": log.tell()}
            state |= {"rng": torch.get_rng_state()}
            state["cuda_rng"] = torch.cuda.get_rng_state() if device.type == "cuda" else None
            save(run_dir / "checkpoint.pt", **state)
            checkpoint_step = global_step
        timer_start += time.perf_counter() - paused  # SPS is the speed of training alone

    if args.save_model:
        save(run_dir / "model.pt", args=asdict(args), actor=actor.state_dict(), critic=critic.state_dict())
    bar.close()
    writer.close()
    log.close()
    env.close()
    if args.track:
        wandb.finish()
    return run_dir


def main():
    """The command line."""
    args = tyro.cli(Args, description=__doc__)
    if args.evaluate:
        evaluate_model(args)
        return
    if args.resume:  # the defaults are now the run's own flags
        args = tyro.cli(Args, description=__doc__, default=Args(**load_checkpoint(args)["args"]))
    try:
        train(args)
    except KeyboardInterrupt:
        stop("interrupted; carry on with --resume and the run's folder", 130)


if __name__ == "__main__":
    main()
