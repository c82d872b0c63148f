# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11,<2.14", "gymnasium[mujoco]>=1.2", "numpy", "tensorboard", "tqdm", "tyro>=0.9"]
# ///
"""Stackelberg actor-critic (STAC) and plain on-policy actor-critic in one file.

Zheng, Fiez, Alumbaugh, Chasnov, Ratliff: Stackelberg Actor-Critic: Game-Theoretic Reinforcement Learning Algorithms,
2021. Numbers in parentheses are its equations. The actor (θ) minimises -J(θ, w), the critic (w) L(θ, w), and the actor
follows the total derivative of its cost through the critic's best response. Everything else is vanilla actor-critic,
with Spinning Up's conventions.

    python stac_ac.py --env-id CartPole-v1 --leader actor --lam 0 --unroll 80     # STAC; none: vanilla actor-critic
    python stac_ac.py --env-id Hopper-v4 --leader actor --lam 500 --unroll 80
    python stac_ac.py --resume runs/Hopper-v4__stac-al__1__1700000000
    python stac_ac.py --evaluate runs/Hopper-v4__stac-al__1__1700000000/model.pt
"""

import copy
import math
import os
import re
import sys
import time
import warnings
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    track: bool = False
    """if toggled, this experiment will be tracked with Weights and Biases"""
    wandb_project_name: str = "stackelberg-actor-critic"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
    capture_video: bool = False
    """whether to record the first episode of `--evaluate` (in `evaluate` beside the model)"""
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
    start_states: Literal["every", "initial", "batch"] = "every"
    """s_0 of Proposition 1 and Theorem 1: every visited state, as in the critic's loss, or each trajectory's first;
    batch: the released code's, the batch's first with the batch's policy gradient, a multiple of the plain gradient"""
    curvature: Literal["hessian", "gauss-newton"] = "hessian"
    """∇_w²L, or its Gauss-Newton part (2/N) 𝒥ᵀ𝒥, 𝒥 = ∂V_w/∂w, without negative eigenvalues (λ = 0: with zero ones)"""
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
    positive = "hidden unroll cg_iters num_steps lam_decay total_timesteps eval_episodes checkpoint_every"
    for name, value in vars(args).items():
        least, most = int(name in positive.split()), 1 if name in ("gamma", "gae_lambda", "cg_tol") else math.inf
        if isinstance(value, (int, float, tuple)) and not all(least <= x <= most for x in np.atleast_1d(value)):
            stop(f"--{name.replace('_', '-')} {value} is not in [{least}, {most}]")
    if args.num_steps > args.total_timesteps:
        stop("--num-steps must not be larger than --total-timesteps")
    if args.start_states == "batch" and args.critic == "q":
        stop("--start-states batch is Proposition 1's and needs --critic v")
    if args.capture_video and not args.evaluate:
        stop("--capture-video needs --evaluate")


# Environment
def make_env(env_id, video_folder=None, video_every=1):
    """One environment with flat observations, actions 0, 1, ... or in a Box, and the statistics of its episodes."""
    # v4 ids are the paper's tasks; their deprecation is known and is the one warning that is silenced
    warnings.filterwarnings("ignore", r".*The environment \S+ is out of date", DeprecationWarning)
    render = {"render_mode": "rgb_array"} if video_folder else {}  # not all environments know a render_mode
    env = gym.wrappers.FlattenObservation(gym.make(env_id, **render))
    spaces = env.observation_space, env.action_space
    if isinstance(spaces[1], gym.spaces.Discrete):
        env = gym.wrappers.TransformAction(env, lambda a: a + spaces[1].start, gym.spaces.Discrete(spaces[1].n))
    elif isinstance(spaces[1], gym.spaces.Box):
        env = gym.wrappers.ClipAction(env)  # a Gaussian has no bounds, a Box has
    if not isinstance(spaces[0], gym.spaces.Box) or env.action_space is spaces[1]:
        stop(f"{env_id} needs observations of a fixed size and Discrete or Box actions, not {spaces}")
    if video_folder:
        env = gym.wrappers.RecordVideo(env, str(video_folder), lambda episode: episode % video_every == 0)
    return gym.wrappers.RecordEpisodeStatistics(env)


def reset(env, *key):
    """Starts an episode whose randomness depends on `key` alone: a checkpoint between two needs no simulator state."""
    obs, _ = env.reset(seed=int(np.random.SeedSequence(key).generate_state(1)[0]))
    return np.array(obs)  # a copy: some environments change their array in place


# Networks
def mlp(*sizes):
    """Linear layers of the given sizes with tanh between them."""
    layers = [layer for n in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(*n), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def numpy_layer(layer):
    """A layer as a function of a numpy vector, ten times as fast as torch; one that is not known here runs in torch."""
    layer = copy.deepcopy(layer).cpu().requires_grad_(False)
    if isinstance(layer, nn.Linear):
        weight, bias = np.ascontiguousarray(layer.weight.numpy().T), layer.bias.numpy()
        return lambda x: x.dot(weight) + bias
    return np.tanh if isinstance(layer, nn.Tanh) else lambda x: layer(torch.from_numpy(x)).numpy()


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

    def sampler(self, num_steps):
        """The policy as a numpy function (obs [obs_dim], t) -> a ~ π_θ(·|s), for t < num_steps; θ is that of now.

        What is random is drawn here, all at once: a Gaussian's noise, and for a Categorical Gumbel's, whose argmax with
        the logits is a sample.
        """
        layers = [numpy_layer(layer) for layer in self.net[:-1]]
        weight, bias = (p.detach().cpu().numpy() for p in self.net[-1].parameters())
        weight, shape = np.ascontiguousarray(weight.T), (num_steps, len(bias))
        if self.discrete:
            noise = -torch.empty(shape).exponential_().log()
        else:
            noise = torch.randn(shape) * self.log_std.detach().exp().cpu()
        noise = noise.numpy() + bias

        def sample(x, t):
            for layer in layers:
                x = layer(x)
            x = x.dot(weight) + noise[t]
            return x.argmax() if self.discrete else x

        return sample


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
# Trajectories, one after the other: tensors, first axis N. trajectory: the number of the one that a step belongs to.
# One whose last step is not terminated was cut: by a time limit, or by the end of the batch.
Rollout = namedtuple("Rollout", "obs actions rewards next_obs terminated trajectory")


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
        actions.append(policy(obs[t], t))
        next_obs[t], rewards[t], terminated[t], truncated, info = env.step(actions[-1])
        if not math.isfinite(next_obs[t].dot(next_obs[t]) + rewards[t]):  # several times as fast as np.isfinite
            stop(f"step {start + t + 1}: an observation or the reward is not finite (in float32)", 1)
        trajectory[t] = number
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


# Constants for both players at (θ_k, w_k), [N] each: Monte Carlo returns of V^π(s) and Q^π(s, a), the critic's targets;
# Monte Carlo advantages (less the baseline V_w(s)) for L; advantages for J
Estimates = namedtuple("Estimates", "returns mc_advantages advantages")


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


def critic_values(critic, batch, linear=False):
    """V_w(s) or Q_w(s, a) along the batch, [N]; linear: to first order in w, so that ∇_w²L is (2/N) 𝒥ᵀ𝒥 alone."""
    inputs = (batch.obs,) if isinstance(critic, Critic) else (batch.obs, batch.actions)
    if not linear:
        return critic(*inputs)
    w = dict(critic.named_parameters())
    w_k = {name: p.detach() for name, p in w.items()}
    values, slope = torch.func.jvp(lambda w: torch.func.functional_call(critic, w, inputs), (w_k,), (w,))
    return values + (slope - slope.detach())  # the slope is 𝒥w


def actor_surrogate(critic, batch, score, advantages, args):
    """f1, for -J(θ, w): a scalar.

    ∇_θJ is the policy gradient (3). ∇_wJ is that of (2) and, for a state value critic (Section 4.2), of
    J = E[r + γ (1 - terminated) V_w(s')]: the paper's text leaves out what multiplies V_w. With `batch` it is that of
    E[V_w(s)], as in the released code.
    """
    if isinstance(critic, Critic) and args.start_states != "batch":
        q = batch.rewards + args.gamma * (1 - batch.terminated) * critic(batch.next_obs)
    else:
        q = critic_values(critic, batch)
    return -(q + score * advantages).mean()


def critic_loss(values, targets, ratio=1):
    """The critic's cost L(θ, w), (4): a scalar. θ is in the targets and in π_θ(a|s) / π_{θ_k}(a|s), the ratio of how
    likely the actions are; for a follower, and for a critic that nobody leads, both are constants."""
    return (ratio * (values - targets) ** 2).mean()


def critic_surrogate(critic, batch, score, estimates, args):
    """f2, for L(θ, w), (4): a scalar, with targets that respond to θ. ∇_θ∇_wf2 is ∇_w of

        2 Σ_{t≥0} γᵗ ∇_θ log π(a_t|s_t) (V^π(s_0) - V_w(s_0)) Q^π(s_t, a_t)                      (Proposition 1)
        ∇_θ log π(a_0|s_0) (Q_w(s_0, a_0) - Q^π(s_0, a_0))²
            + 2 Σ_{t≥1} γᵗ ∇_θ log π(a_t|s_t) (Q^π(s_0, a_0) - Q_w(s_0, a_0)) Q^π(s_t, a_t)      (Theorem 1)

    for every visited state, or for each trajectory's first, as s_0. Theorem 1 as printed lacks the 2. The Q^π(s_t, a_t)
    of the sums is a Monte Carlo advantage: the baseline changes no expectation, and GAE's bias would.

    With `batch` it is ∇_w of 2 ∇_θJ (V^π(s_0) - V_w(s_0)), s_0 the batch's first state, ∇_θJ as in f1. The total
    derivative is then c ∇_θf1, c = 1 + 2 ⟨∇_wV_w(s_0), v⟩, v = (∇_w²L + λI)⁻¹ ∇_w mean V_w. If V_w = φ(s)ᵀw and
    φ(s)ᵀe = 1 (a constant feature), then ∇_w²L e = 2 mean φφᵀe = 2 ∇_w mean V_w, so that v = e/2 and c = 2 at λ = 0;
    as λ → ∞, v → 0 and c → 1. (With Gauss-Newton this is true of any network whose last layer has a bias.)
    """
    influence = discounted_sum(score * estimates.mc_advantages, args.gamma, batch.trajectory)  # ∇_θV^π(s_0), (21)
    ratio, start = 1, torch.ones_like(score)  # start: the weight of each state as an s_0
    if args.start_states == "initial":
        start = F.pad(batch.trajectory[1:] != batch.trajectory[:-1], (1, 0), value=True).to(score)
    elif args.start_states == "batch":
        start, influence = F.pad(start[:1], (0, len(start) - 1)), (score * estimates.advantages).mean()
    start = start / start.mean()
    if not isinstance(critic, Critic):
        influence = influence - score * estimates.mc_advantages  # ∇_θQ^π(s_0, a_0), (19)
        ratio = 1 + start * score
    values = critic_values(critic, batch, linear=args.curvature == "gauss-newton")
    return critic_loss(values, estimates.returns + start * influence, ratio)


# Solver
def conjugate_gradient(matvec, b, max_iters, tol, preconditioner=None):
    """x ≈ A⁻¹b, [n], for a symmetric A (matvec: v -> Av) by conjugate gradient from 0, until ‖b - Ax‖ ≤ tol ‖b‖.
    At pᵀAp ≤ 0 (A is not positive definite) or a number that is not finite it keeps the last good x, 0 at first; with a
    preconditioner (r -> Mr, M ≈ A⁻¹) Mb, if there is none or Mb's residual is smaller. Info: tensors; the residual is
    relative, inf after a number that was not finite."""
    eps = torch.finfo(b.dtype).eps
    tol = max(tol, eps)  # the recursion for r goes on shrinking below rounding, where it means nothing
    x, r, p, b_norm = torch.zeros_like(b), b, b, b.norm()
    rz = max_curvature = iterations = torch.zeros_like(b_norm)
    residual = torch.where(b_norm.isfinite(), (b_norm != 0).to(b.dtype), math.inf)
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
        if k == 0 and preconditioner is not None:
            Mb, Mb_residual = p, (b - Ap).norm() / b_norm
        pAp = p @ Ap
        curvature, step = pAp / (p @ p), rz / pAp
        max_curvature = torch.maximum(max_curvature, curvature)
        flat = active & curvature.isfinite() & (curvature <= eps * max_curvature)
        x_new, r_new = x + step * p, r - step * Ap
        good = active & ~flat & (x_new.sum() + r_new.sum()).isfinite()  # sums: faster than to look at each number
        negative_curvature, iterations = negative_curvature | flat, iterations + good
        x, r = torch.where(good, x_new, x), torch.where(good, r_new, r)
        residual = torch.where(good, r.norm() / b_norm, torch.where(active & ~flat, math.inf, residual))
        active = good & (residual > tol)
    worse = (residual + Mb_residual).isfinite() & ((residual > Mb_residual) | (iterations == 0))
    x, residual = torch.where(worse, Mb, x), torch.where(worse, Mb_residual, residual)
    return x, {"residual": residual, "iterations": iterations, "negative_curvature": negative_curvature}


# Stackelberg gradient
def grad(outputs, inputs, grad_outputs=None, **kwargs):
    """`torch.autograd.grad` on a graph that is kept; an input that does not matter gets zeros."""
    return torch.autograd.grad(outputs, inputs, grad_outputs, retain_graph=True, materialize_grads=True, **kwargs)


def flatten(tensors):
    """One vector of all entries."""
    return torch.cat([t.reshape(-1) for t in tensors])


def total_derivative(direct, implicit):
    """The sum of both terms, a list of tensors, and info: their norms and the cosine between them."""
    d, i = flatten(direct), flatten(implicit)
    d_norm, i_norm = d.norm(), i.norm()
    cosine = d @ i / (d_norm * i_norm).clamp(min=torch.finfo(d.dtype).tiny)
    return [a + b for a, b in zip(direct, implicit)], dict(direct_norm=d_norm, implicit_norm=i_norm, cosine=cosine)


def stackelberg_gradient(f1, f2, x1, x2, lam, cg_iters, cg_tol, grad2_f2=None, preconditioner=None):
    """The leader's total derivative ∇₁f1 - (∇₂₁f2)ᵀ (∇₂²f2 + λI)⁻¹ ∇₂f1: (15), (16), regularized as in Section 4.5.
    f1, f2: the leader's and the follower's cost, scalars with their graphs; x1, x2: their lists of parameters;
    grad2_f2: ∇₂f2 with its graph, if the caller has it. Returns a list of tensors like x1, and info. (For the critic as
    leader Algorithm 2 prints ∇_θ²J + λI; the follower's cost is -J, so it is ∇_θ²(-J) + λI here.)"""
    grads = grad(f1, [*x1, *x2])
    direct, grad2_f1 = grads[: len(x1)], flatten(grads[len(x1) :])
    grad2_f2 = flatten(grad(f2, x2, create_graph=True) if grad2_f2 is None else grad2_f2)

    def damped_hessian(v):
        return flatten(grad(grad2_f2, x2, v)) + lam * v

    v, solver_info = conjugate_gradient(damped_hessian, grad2_f1, cg_iters, cg_tol, preconditioner)
    total, info = total_derivative(direct, grad(grad2_f2, x1, -v))
    return total, solver_info | info


# Update
def optimizer_step(optimizer, grads):
    """One optimizer step along given gradients."""
    for p, g in zip(optimizer.param_groups[0]["params"], grads):
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
    returns, _, advantages = estimates = estimate(actor, critic, batch, args.gamma, args.gae_lambda)
    std = advantages.std(correction=0) + 1e-8 if args.norm_adv else 1.0
    if args.norm_adv:
        estimates = estimates._replace(advantages=advantages - advantages.mean())
    score, info = score_function(actor, batch), {}
    f1 = actor_surrogate(critic, batch, score, estimates.advantages, args)
    if args.leader == "none":
        f2 = critic_loss(critic_values(critic, batch), returns)
        grad1, grad2 = grad(f1, theta), grad(f2, w)
    else:
        f2 = critic_surrogate(critic, batch, score, estimates, args)
        grad2 = grad(f2, w, create_graph=True)
        grad1, info = stackelberg_gradient(f1, f2, theta, w, lam, args.cg_iters, args.cg_tol, grad2)
    # critical: advantages keep their unit until here, or the direct term would be scaled and the implicit one not
    grad1 = [g / std for g in grad1]
    optimizer_step(critic_optimizer, with_noise(grad2, args.grad_noise))
    for _ in range(args.unroll - 1):
        loss = critic_loss(critic_values(critic, batch), returns)
        optimizer_step(critic_optimizer, with_noise(grad(loss, w), args.grad_noise))
    optimizer_step(actor_optimizer, with_noise(grad1, args.grad_noise))
    return f1.detach(), f2.detach(), info


# Evaluation
def evaluate(actor, env, episodes, *key):
    """Undiscounted returns of `episodes` episodes of the most likely action; start states depend on `key` alone."""
    returns = []
    for episode in range(episodes):
        obs, info = reset(env, *key, episode), {}
        while "episode" not in info:
            with torch.no_grad():
                action = actor(torch.as_tensor(obs, dtype=torch.float32)).mode
            obs, _, _, _, info = env.step(action.numpy())
        returns.append(float(info["episode"]["r"]))
    return np.array(returns)


# Checkpoint
ALGORITHM = "stac"  # marks the files that this script writes


def save(path, **state):
    """Writes `state` to `path` atomically: a kill at any time leaves the old file or the new one."""
    with open(f"{path}.tmp", "wb") as file:
        torch.save({"algorithm": ALGORITHM, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def load(path, args, *keys):
    """What `save` wrote. Runs no code: neither the file's (weights_only) nor a module's that only the file names."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        env_id = str(state["args"]["env_id"])
        if state["algorithm"] != ALGORITHM or state["args"].keys() != vars(args).keys() or not {*keys} <= state.keys():
            raise ValueError
    except Exception as e:  # a file can hold anything
        stop(f"{path} is missing, damaged or no {ALGORITHM} file that fits ({type(e).__name__})")
    if ":" in env_id and env_id != args.env_id:
        stop(f"{path} wants a module imported for its environment; to allow that, say --env-id {env_id}")
    return state


# Training
def train(args):
    """What the command line calls: trains (or carries on) one run and returns its folder."""
    torch.set_num_threads(1)  # networks of this size hardly gain by more, and runs side by side lose
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    env = make_env(args.env_id)
    spaces = env.observation_space, env.action_space
    actor = Actor(*spaces, args.hidden).to(device)
    critic = (Critic(spaces[0], args.hidden) if args.critic == "v" else QCritic(*spaces, args.hidden)).to(device)
    players = (actor, args.policy_lr), (critic, args.critic_lr)
    optimizers = [torch.optim.SGD(x.parameters(), lr=lr) for x, lr in players]  # they have no state to be saved
    exp_name = args.exp_name or {"none": "ac", "actor": "stac-al"}[args.leader]
    run_name = re.sub(r"[^\w.-]", "-", f"{args.env_id}__{exp_name}__{args.seed}__{time.time_ns() // 1000}")
    run_dir = Path(args.resume or f"runs/{run_name}")
    start, log_size = 0, 0
    if args.resume:
        state, names = load(run_dir / "checkpoint.pt", args, "rng"), list(vars(args))
        for name in ["seed", "env_id", *names[names.index("num_steps") :]]:  # what makes it that run
            if state["args"][name] != getattr(args, name):
                stop(f"cannot resume {run_dir}: its {name} is {state['args'][name]}, not {getattr(args, name)}")
        start, log_size = state["global_step"], state["log_size"]
        if start > args.total_timesteps:
            stop(f"cannot resume {run_dir}: it is at step {start}, beyond --total-timesteps")
        actor.load_state_dict(state["actor"])
        critic.load_state_dict(state["critic"])
        torch.set_rng_state(state["rng"])
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    if args.track:
        import wandb

        run = {"name": run_dir.name, "id": run_dir.name, "resume": "allow", "config": vars(args), "save_code": True}
        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, sync_tensorboard=True, **run)
    writer = SummaryWriter(str(run_dir), purge_step=start + 1, flush_secs=10)  # a kill's leftovers are written again
    table = ["|param|value|", "|-|-|", *(f"|{name}|{value}|" for name, value in vars(args).items())]
    writer.add_text("hyperparameters", "\n".join(table), start)
    log = open(run_dir / "log.txt", "a")
    log.seek(log.truncate(log_size))  # drops what was logged after the checkpoint
    print(run_dir, flush=True)

    checkpoint_step, timer, end = start, time.perf_counter(), args.total_timesteps // args.num_steps * args.num_steps
    for step in tqdm(range(start, end, args.num_steps), disable=None, dynamic_ncols=True):
        global_step = step + args.num_steps
        batch, episodes = collect(env, actor, args.num_steps, args.seed, step)
        with torch.no_grad():
            entropy = actor(batch.obs).entropy().mean()
        lam = args.lam * math.exp(-global_step / (args.lam_decay or math.inf))
        f1, f2, info = stackelberg_update(actor, critic, *optimizers, batch, lam, args)
        if not (f1 + f2).isfinite():
            stop(f"step {global_step}: a loss is not finite", 1)
        if not flatten([*actor.parameters(), *critic.parameters()]).isfinite().all():
            stop(f"step {global_step}: a parameter is not finite", 1)

        for when, episodic_return, length in episodes:
            writer.add_scalar("charts/episodic_return", episodic_return, when)
            writer.add_scalar("charts/episodic_length", length, when)
        scalars = {"losses/policy_loss": f1, "losses/value_loss": f2, "losses/entropy": entropy}  # f1 = -J, f2 = L
        scalars["charts/SPS"] = (global_step - start) / (time.perf_counter() - timer)
        for name, value in info.items():
            scalars[f"stackelberg/cg_{name}" if name in ("residual", "iterations") else f"stackelberg/{name}"] = value
        scalars |= {"stackelberg/lam": lam} if info else {}
        line = f"step {global_step}: batch return unknown (no episode ended)"
        if episodes:  # the paper's measure of performance: the mean over the batch's episodes that came to an end
            scores = np.array([episodic_return for _, episodic_return, _ in episodes])
            scalars["charts/batch_return"] = scores.mean()
            line = f"step {global_step}: batch return {scores.mean():.2f} ± {scores.std():.2f} ({len(scores)} episodes)"
        for name, value in scalars.items():
            writer.add_scalar(name, value, global_step)
        print(line, file=log, flush=True)
        if global_step % (10 * args.num_steps) == 0 or global_step == end:
            tqdm.write(line)

        if global_step - checkpoint_step >= args.checkpoint_every:
            writer.flush()
            state = {"args": vars(args), "rng": torch.get_rng_state()}
            state["cuda_rng"] = torch.cuda.get_rng_state_all() if device.type == "cuda" else []
            state |= {"global_step": global_step, "log_size": log.tell()}
            save(run_dir / "checkpoint.pt", **state, actor=actor.state_dict(), critic=critic.state_dict())
            checkpoint_step = global_step

    if args.save_model:
        save(run_dir / "model.pt", args=vars(args), actor=actor.state_dict(), critic=critic.state_dict())
    writer.close()
    return run_dir


def main():
    """The command line."""
    args = tyro.cli(Args, description=__doc__)
    if args.resume:  # the defaults are now the run's own flags
        state = load(Path(args.resume) / "checkpoint.pt", args, "rng")
        args = tyro.cli(Args, description=__doc__, default=Args(**state["args"]))
    check_args(args)
    if not args.evaluate:
        return train(args)
    state = load(args.evaluate, args, "actor")
    env = make_env(state["args"]["env_id"], args.capture_video and Path(args.evaluate).parent / "evaluate", 10**9)
    actor = Actor(env.observation_space, env.action_space, state["args"]["hidden"])
    actor.load_state_dict(state["actor"])
    returns = evaluate(actor, env, args.eval_episodes, args.seed, 2)
    env.close()
    print(*(f"episode {k}: return {episodic_return:.2f}" for k, episodic_return in enumerate(returns, 1)), sep="\n")
    print(f"mean return {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")


if __name__ == "__main__":
    main()
