# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11,<2.14", "gymnasium[mujoco]>=1.2", "numpy", "tensorboard", "tqdm", "tyro>=0.9"]
# ///
"""Stackelberg soft actor-critic (STSAC-AL, STSAC-CL) and plain SAC in one file.

Zheng, Fiez, Alumbaugh, Chasnov, Ratliff: Stackelberg Actor-Critic: Game-Theoretic Reinforcement Learning Algorithms,
2021. Numbers in parentheses are its equations. Actor and critic are two players. The actor (θ) minimises -J(θ, w), the
critic (w) minimises L(θ, w), and the leader follows the total derivative of its cost through the other's best response.
With player 1 the leader, of cost f1, and player 2 the follower, of cost f2, it is, regularized as in Section 4.5,

    ∇₁f1 - (∇₂₁f2)ᵀ (∇₂²f2 + λI)⁻¹ ∇₂f1.

Everything else is Spinning Up's SAC, but for three things, which hold for --leader none as well:
- both gradients are taken at the same (θ, w), as in Algorithm 1; usual code steps the critic first;
- there is one update a step, not 50 every 50 steps;
- the critic sees actions scaled to [-1, 1].

    python stsac.py --env-id Walker2d-v4 --leader actor --lam 500    # STSAC-AL; critic: STSAC-CL, none: SAC
    python stsac.py --env-id Walker2d-v4 --run-dir runs/walker       # begins there; the same command carries it on
    python stsac.py --evaluate runs/walker/model.pt                  # plays a model that --save-model has saved
"""

import atexit
import copy
import fcntl
import functools
import math
import os
import pickle
import random
import re
import sys
import time
import warnings
import zipfile
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.overrides import TorchFunctionMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# the v4 tasks are the nearest to the paper's: silence the warning that they are old, and no other
warnings.filterwarnings("ignore", r".*The environment \S+ is out of date", DeprecationWarning)


@dataclass
class Args:
    exp_name: str = ""  # name of the experiment (default: the algorithm's, which is sac, stsac-al or stsac-cl)
    seed: int = 1  # seed of the experiment
    cuda: bool = True  # run on a GPU if there is one
    compile: bool = False  # torch.compile the gradients (a minute); solves cannot stop early then: say --cg-iters 2
    track: bool = False  # send the curves to Weights & Biases (needs wandb; WANDB_PROJECT, WANDB_ENTITY: where to)
    capture_video: bool = False  # record the first episode of each evaluation (needs moviepy; `videos` in the folder)
    save_model: bool = False  # save the model (`model.pt` in the run's folder) at the end
    run_dir: str | None = None  # folder of the run: begins it or carries it on (default: a new folder in runs)
    evaluate: str | None = None  # a model.pt to play on its own task, for --eval-episodes episodes, instead of training
    eval_every: int = 10_000  # environment steps between two evaluations
    eval_episodes: int = 10  # episodes of an evaluation, played by the mean policy in an environment of its own
    checkpoint_every: int = 10_000  # environment steps between two checkpoints; each waits for the end of an episode

    # Algorithm specific arguments
    env_id: str = "Walker2d-v4"  # the environment id of the task
    max_episode_steps: int | None = None  # time limit of an episode (default: the task's own)
    total_timesteps: int = 1_000_000  # total timesteps of the experiment
    buffer_size: int = 1_000_000  # the replay memory buffer size
    gamma: float = 0.99  # the discount factor gamma
    tau: float = 0.005  # target smoothing coefficient (1 - Spinning Up's polyak)
    batch_size: int = 100  # the batch size of sample from the replay memory
    start_steps: int = 10_000  # steps of uniformly random actions at the start
    update_after: int = 1_000  # step of the first update; then one a step (CleanRL's --learning-starts sets both)
    policy_lr: float = 1e-3  # the learning rate of the actor's Adam
    q_lr: float = 1e-3  # the learning rate of the critic's Adam
    alpha: float = 0.2  # entropy regularization coefficient (the paper's η)
    autotune: bool = False  # learn the coefficient, from 1 on, with --q-lr, without --alpha (the paper: fixed)
    hidden: tuple[int, ...] = (256, 256)  # hidden layers of the actor and of each Q network

    # The Stackelberg game
    leader: Literal["actor", "critic", "none"] = "actor"  # who follows the total derivative; none: plain SAC
    lam: float = 500.0  # λ of the follower's regularized Hessian ∇₂²f2 + λI (Section 4.5); λ → ∞ is --leader none
    lam_decay: float | None = None  # λ exp(-t / lam_decay) at step t; the released code has 1e5 (default: λ stays)
    unroll: int = 1  # m of Algorithm 2: follower steps for one of the leader's (leader none: critic steps)
    curvature: Literal["hessian", "gauss-newton"] = "hessian"  # actor leads: all of ∇_w²L, or its fast approximation
    precondition: bool = True  # actor leads, hessian: precondition the solve by Gauss-Newton (the paper does not)
    cg_iters: int = 10  # most iterations of a solve, a Hessian-vector product each (preconditioned: one more, to start)
    cg_tol: float = 0.01  # relative residual at which a solve stops


def stop(message):
    """Ends the program with one line."""
    raise SystemExit(f"{Path(__file__).name}: error: {message}")


def check_args(args):
    """Refuses values that no run can have, in one line that names the flag."""
    conditions = [
        ("--seed must be at least 0 and below 2147483648", 0 <= args.seed < 2**31),
        ("--eval-every must be positive", args.eval_every > 0),
        ("--eval-episodes must be positive", args.eval_episodes > 0),
        ("--checkpoint-every must be positive", args.checkpoint_every > 0),
        ("--max-episode-steps must be positive", args.max_episode_steps is None or args.max_episode_steps > 0),
        ("--total-timesteps must be positive", args.total_timesteps > 0),
        ("--run-dir must not be empty", args.run_dir != ""),
        ("--evaluate must not be empty", args.evaluate != ""),
        ("--buffer-size must be positive", args.buffer_size > 0),
        ("--gamma must be between 0 and 1", 0 <= args.gamma <= 1),
        ("--gamma 0 leaves nothing of the actor in L: it needs --leader none", args.gamma > 0 or args.leader == "none"),
        ("--tau must be between 0 and 1", 0 <= args.tau <= 1),
        ("--batch-size must be positive", args.batch_size > 0),
        ("--start-steps must not be negative", args.start_steps >= 0),
        ("--update-after must not be negative", args.update_after >= 0),
        ("--policy-lr must be between 0 and 1e6", 0 <= args.policy_lr <= 1e6),
        ("--q-lr must be between 0 and 1e6", 0 <= args.q_lr <= 1e6),
        ("--alpha must be between 0 and 1e6", 0 <= args.alpha <= 1e6),
        ("--hidden must be positive numbers", all(width > 0 for width in args.hidden)),
        ("--lam must be between 0 and 1e12", 0 <= args.lam <= 1e12),
        ("--lam-decay must be between 1e-6 and 1e12", args.lam_decay is None or 1e-6 <= args.lam_decay <= 1e12),
        ("--unroll must be positive", args.unroll > 0),
        ("--cg-iters must be positive", args.cg_iters > 0),
        ("--cg-tol must be at least 0 and below 1", 0 <= args.cg_tol < 1),  # at 1 a solve ends where it starts
        (
            "--curvature gauss-newton needs a critic that follows (-J is no sum of squares)",
            args.curvature == "hessian" or args.leader != "critic",
        ),
        ("--curvature gauss-newton needs a positive --lam", args.curvature == "hessian" or args.lam > 0),
    ]
    for message, holds in conditions:
        if not holds:
            stop(message)


# Environment
TRAIN, EVAL, PLAY = 0, 1, 2  # streams of episodes, each with seeds of its own


def make_env(env_id, max_episode_steps=None, video_folder=None, video_every=1):
    """One environment with flat observations, actions in a bounded Box, and a time limit.

    Traps: a wrapper with a state, such as NormalizeObservation, has another state in evaluations, and none is kept in a
    checkpoint; one that changes rewards changes the returns that are reported.
    """
    limit = {} if max_episode_steps is None else {"max_episode_steps": max_episode_steps}
    render = {"render_mode": "rgb_array"} if video_folder else {}  # not all environments know a render_mode
    env = gym.wrappers.FlattenObservation(gym.make(env_id, **limit, **render))
    obs_space = env.observation_space
    act_space = env.action_space
    bounded = isinstance(act_space, gym.spaces.Box) and len(act_space.shape) == 1 and act_space.is_bounded()
    if not isinstance(obs_space, gym.spaces.Box) or not bounded:
        stop(f"{env_id} needs flat observations and actions in a bounded 1-d Box, not {obs_space} and {act_space}")
    if env.spec is None:
        stop(f"{env_id} has no spec, which has its time limit: register it, and use gym.make")
    if env.spec.max_episode_steps is None:
        stop(f"{env_id} has no time limit, so an evaluation may never end: --max-episode-steps 1000 sets one")
    if video_folder:
        try:
            env.reset()
            env.render()
            env = gym.wrappers.RecordVideo(env, str(video_folder), lambda episode: episode % video_every == 0)
        except Exception as e:  # each renderer has its own
            stop(f"--capture-video: {env_id} cannot be recorded here ({type(e).__name__}: {e})")
    return env


def reset(env, *key):
    """Starts an episode whose randomness depends on `key` alone, so that a checkpoint between two episodes is complete.

    Trap: where an environment draws from the global generators, evaluations seed these anew amid a training episode.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1)[0] % 2**31)  # some environments want an int32
    random.seed(seed)
    np.random.seed(seed)
    obs, _ = env.reset(seed=seed)
    obs = to_float32(obs)
    if not np.isfinite(obs).all():
        stop("the first observation of an episode is not finite in float32")
    return obs


def to_float32(x):
    """A copy (some environments change their arrays in place) in float32; what is too large becomes inf."""
    with np.errstate(over="ignore"):
        return np.array(x, dtype=np.float32)


def to_box(action, space):
    """A copy of an action, within the bounds to the last bit, and of the space's dtype."""
    if not np.isfinite(action).all():
        stop("the policy's action is not finite")
    action = action.clip(space.low, space.high)
    if np.issubdtype(space.dtype, np.integer):
        action = action.round()  # astype alone would cut off the decimals
    return action.astype(space.dtype)


# Networks
def mlp(*sizes):
    """Linear layers of the given sizes with ReLU between them."""
    layers = []
    for n_in, n_out in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])  # no ReLU at the end


class Actor(nn.Module):
    """Tanh-squashed Gaussian policy π_θ(a|s), scaled to the bounds of the action space.

    Another policy needs this `forward`, for a batch and for one observation, and both buffers.
    """

    def __init__(self, observation_space, action_space, hidden=(256, 256)):
        super().__init__()
        self.net = mlp(math.prod(observation_space.shape), *hidden, 2 * math.prod(action_space.shape))
        low = torch.tensor(action_space.low).float()
        high = torch.tensor(action_space.high).float()
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)

    def forward(self, obs, deterministic=False):
        """obs [..., obs_dim] -> actions a_θ(s) [..., act_dim] in the environment's units, and log π_θ(a_θ(s)|s) [...].

        log π is of the action in [-1, 1], before the scaling, as in Spinning Up: it does not depend on units.
        """
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        log_std = log_std.clamp(-20, 2)  # Spinning Up's bounds
        noise = torch.zeros_like(mean) if deterministic else torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log of dtanh(u)/du = 1 - tanh²u, also where that is 0
        actions = torch.tanh(u) * self.action_scale + self.action_bias
        return actions, (log_normal - log_slope).sum(-1)


class Critic(nn.Module):
    """Both Q networks, w = {w_1, w_2}. For another number return a tuple of as many (one: of one)."""

    def __init__(self, observation_space, action_space, hidden=(256, 256)):
        super().__init__()
        n_in = math.prod(observation_space.shape) + math.prod(action_space.shape)
        self.q1 = mlp(n_in, *hidden, 1)
        self.q2 = mlp(n_in, *hidden, 1)
        # for actions in [-1, 1], so that learning does not depend on the environment's units
        low = torch.tensor(action_space.low).float()
        high = torch.tensor(action_space.high).float()
        self.register_buffer("action_scale", ((high - low) / 2).clamp(min=1e-12))
        self.register_buffer("action_bias", (high + low) / 2)

    def forward(self, obs, actions):
        """obs [B, obs_dim], actions [B, act_dim] in the environment's units -> (Q_w1, Q_w2), [B] each."""
        x = torch.cat([obs, (actions - self.action_bias) / self.action_scale], dim=-1)
        return self.q1(x).squeeze(-1), self.q2(x).squeeze(-1)  # trap: [B, 1] less [B] is [B, B]


# Replay buffer
Batch = namedtuple("Batch", "obs actions rewards next_obs terminated")  # ξ = (s, a, r, s', end): tensors, first axis B


class ReplayBuffer:
    """The last `size` transitions, on `device`, in float32."""

    def __init__(self, size, observation_space, action_space, device):
        obs_shape = observation_space.shape
        act_shape = action_space.shape
        shapes = Batch(obs_shape, act_shape, (), obs_shape, ())
        numbers = sum(math.prod(shape) for shape in shapes)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if torch.device(device).type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
        if 4 * numbers * size > memory:
            stop(f"--buffer-size {size} takes {4 * numbers * size / 1e9:.1f} GB, and there are {memory / 1e9:.1f}")
        # empty, not zeros: on a CPU memory is taken only when it is written to
        self.data = Batch(*(torch.empty(size, *shape, device=device) for shape in shapes))
        self.size = size
        self.count = 0

    def add(self, obs, action, reward, next_obs, terminated):
        """A time limit is not `terminated`: the critic bootstraps through it."""
        transition = Batch(obs, action, reward, next_obs, terminated)
        for column, value in zip(self.data, transition):
            column[self.count % self.size] = torch.as_tensor(value)
        self.count += 1

    def sample(self, batch_size):
        """A batch drawn uniformly with replacement."""
        index = torch.randint(min(self.count, self.size), (batch_size,), device=self.data.obs.device)
        return Batch(*(column.index_select(0, index) for column in self.data))

    def state_dict(self):
        """What is filled. By way of numpy: a slice of a torch tensor would be saved with the whole buffer."""
        filled = [torch.from_numpy(column[: self.count].cpu().numpy()) for column in self.data]
        return {"count": self.count, "data": filled}

    def load_state_dict(self, state):
        self.count = state["count"]
        for column, saved in zip(self.data, state["data"]):
            column[: self.count] = saved


# Losses. Each is written once, of what the networks return, and autograd takes every gradient from it.
def actor_loss(actor, critic, batch, alpha):
    """The actor's cost -J(θ, w), (9): a scalar."""
    actions, log_prob = actor(batch.obs)
    smallest_q = functools.reduce(torch.minimum, critic(batch.obs, actions))  # of all Q networks
    return (alpha * log_prob - smallest_q).mean()


def td_target(actor, target_critic, batch, gamma, alpha):
    """y(r, s'), below (10), [B], but nothing follows a terminal state.

    The next action is the current policy's (footnote 4): through it L depends on θ.
    """
    # no torch.no_grad() here, though usual SAC has it: θ has to reach L through y
    actions, log_prob = actor(batch.next_obs)
    smallest_q = functools.reduce(torch.minimum, target_critic(batch.next_obs, actions))
    return batch.rewards + gamma * (1 - batch.terminated) * (smallest_q - alpha * log_prob)


def critic_loss(qs, y):
    """The critic's cost L(θ, w), (10): a scalar. qs: what the critic returns, [B] each; y: the targets, [B]."""
    for q in qs:
        check_shape(q, y)
    return sum(((q - y) ** 2).mean() for q in qs)


def check_shape(q, y):
    """[B, 1] less [B] would be [B, B], without an error."""
    if q.shape != y.shape:
        stop(f"values of Q are {tuple(q.shape)} and their targets {tuple(y.shape)}: both have to be [B]")


# Solver
def conjugate_gradient(matvec, b, max_iters, tol, preconditioner=None):
    """x ≈ A⁻¹b, [n], for a symmetric matrix A, by conjugate gradient, until ‖b - Ax‖ ≤ tol ‖b‖.

    matvec: v -> Av. preconditioner: r -> Mr with M ≈ A⁻¹. The solve starts from Mb, without M from 0, and comes nearer
    to A⁻¹b with each step while A is positive definite. Where the curvature pᵀAp is not positive (beyond rounding) or a
    number is not finite, it stops and keeps its x: on an indefinite A that can be the start, and the residual can be
    above 1.
    Returns x and info, tensors: residual ‖b - Ax‖ / ‖b‖ by the recursion for r, inf after a number that was not finite;
    iterations; negative_curvature, whether it met pᵀAp ≤ 0 (beyond rounding).
    """
    eps = torch.finfo(b.dtype).eps
    tol = max(tol, eps)  # the recursion for r goes on shrinking below rounding, where it means nothing
    b_norm = b.norm()
    x = torch.zeros_like(b)
    r = b
    if preconditioner is not None:
        Mb = preconditioner(b)
        r_of_Mb = b - matvec(Mb)
        usable = (Mb.norm() + r_of_Mb.norm()).isfinite()
        x = torch.where(usable, Mb, x)
        r = torch.where(usable, r_of_Mb, r)
    residual = torch.where(b_norm == 0, 0.0, r.norm() / b_norm)
    iterations = torch.zeros_like(b_norm)
    negative_curvature = torch.zeros_like(b_norm, dtype=torch.bool)
    broken = ~residual.isfinite()
    max_curvature = torch.zeros_like(b_norm)
    active = residual > tol
    p = torch.zeros_like(b)  # with p = 0 and rz = 1 the first direction is z
    rz = torch.ones_like(b_norm)

    for _ in range(max_iters):
        # compiled code cannot stop early: there the masks below keep x as it is
        if not torch.compiler.is_compiling() and not active:
            break
        z = r if preconditioner is None else preconditioner(r)
        rz_old = rz
        rz = r @ z
        p = z + rz / rz_old * p
        Ap = matvec(p)
        pAp = p @ Ap
        step = rz / pAp
        x_new = x + step * p
        r_new = r - step * Ap
        residual_new = r_new.norm() / b_norm

        curvature = pAp / (p @ p)
        max_curvature = torch.maximum(max_curvature, curvature)
        not_convex = active & pAp.isfinite() & (curvature <= eps * max_curvature)
        finite = (pAp + residual_new).isfinite()
        good = active & ~not_convex & finite
        x = torch.where(good, x_new, x)
        r = torch.where(good, r_new, r)
        residual = torch.where(good, residual_new, residual)
        iterations = iterations + good
        negative_curvature = negative_curvature | not_convex
        broken = broken | (active & ~not_convex & ~finite)
        active = good & (residual > tol)

    residual = torch.where(broken, math.inf, residual)
    return x, {"residual": residual, "iterations": iterations, "negative_curvature": negative_curvature}


# Stackelberg gradient
def trainable(net):
    """The parameters of a player, less those that are frozen."""
    return [p for p in net.parameters() if p.requires_grad]


def flatten(tensors):
    """One vector of all entries."""
    return torch.cat([t.reshape(-1) for t in tensors])


def grad(outputs, inputs, grad_outputs=None, **kwargs):
    """`torch.autograd.grad` on a graph that is kept; an input that does not matter gets zeros."""
    return torch.autograd.grad(outputs, inputs, grad_outputs, retain_graph=True, materialize_grads=True, **kwargs)


def require_influence(grads, inputs, missing):
    """Zeros for None. Ends the run if all are None: the leader would silently be a plain player."""
    if all(g is None for g in grads):
        stop(
            f"the leader cannot influence the follower to any effect: {missing} (no_grad or frozen networks in a loss?)"
        )
    return [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, grads)]


def cost_gradients(f1, x1, x2):
    """∇₁f1 and ∇₂f1, lists like x1 and x2."""
    grads = torch.autograd.grad(f1, [*x1, *x2], retain_graph=True, allow_unused=True)
    grad1_f1 = [torch.zeros_like(p) if g is None else g for p, g in zip(x1, grads)]  # the direct term may be zero
    grad2_f1 = require_influence(grads[len(x1) :], x2, "its cost does not depend on the follower's parameters")
    return grad1_f1, grad2_f1


def mixed_derivative(follower_grad, x1, v):
    """∇₁⟨follower_grad, v⟩ with v held constant, a list like x1. For follower_grad = ∇₂f2 that is (∇₂₁f2)ᵀv."""
    grads = torch.autograd.grad(follower_grad, x1, v, retain_graph=True, allow_unused=True)
    return require_influence(grads, x1, "the follower's gradient does not depend on the leader's parameters")


def total_derivative(direct, implicit):
    """direct - implicit, a list of tensors, and info: the norms of direct and -implicit, and their cosine."""
    total = [d - i for d, i in zip(direct, implicit)]
    direct = flatten(direct)
    implicit = flatten(implicit)
    direct_norm = direct.norm()
    implicit_norm = implicit.norm()
    cosine = -(direct @ implicit) / (direct_norm * implicit_norm).clamp(min=torch.finfo(direct.dtype).tiny)
    return total, {"direct_norm": direct_norm, "implicit_norm": implicit_norm, "cosine": cosine}


def stackelberg_gradient(f1, f2, x1, x2, lam, cg_iters, cg_tol, *, grad2_f2=None, preconditioner=None):
    """The leader's total derivative ∇₁f1 - (∇₂₁f2)ᵀ (∇₂²f2 + λI)⁻¹ ∇₂f1: (15), (16), regularized as in Section 4.5.

    f1, f2: the leader's and the follower's cost, scalars with their graphs; x1, x2: their lists of parameters.
    grad2_f2: ∇₂f2 with its graph, which callers often have: it is the follower's own gradient.
    Returns a list like x1, and info.
    Actor leads: f1 = -J, f2 = L, and this is minus (15), which is of J. Critic leads: f1 = L, f2 = -J: this is (16), as
    both signs of J cancel. Not so beside λI: Algorithm 2 prints ∇_θ²J + λI, and it has to be ∇_θ²(-J) + λI.
    """
    grad1_f1, grad2_f1 = cost_gradients(f1, x1, x2)
    if grad2_f2 is None:
        grad2_f2 = grad(f2, x2, create_graph=True)
    follower_grad = flatten(grad2_f2)

    def damped_hessian(v):
        return flatten(grad(follower_grad, x2, v)) + lam * v  # ∇₂²f2 v = ∇₂⟨∇₂f2, v⟩: no Hessian is ever made

    v, solver_info = conjugate_gradient(damped_hessian, flatten(grad2_f1), cg_iters, cg_tol, preconditioner)
    total, info = total_derivative(grad1_f1, mixed_derivative(follower_grad, x1, v))
    return total, solver_info | info


def needs_jacobian(args):
    """Whether Gauss-Newton (further below) has a part in the gradients: as the curvature, or as the preconditioner."""
    return args.leader == "actor" and (args.curvature == "gauss-newton" or args.precondition)


def critic_cost(actor, critic, target_critic, batch, alpha, args, layers=None):
    """L(θ, w), (10), and what it is made of: Q and y. layers: see `RecordLayers`.

    A further term belongs here. Trap: its curvature is not in Gauss-Newton's.
    """
    y = td_target(actor, target_critic, batch, args.gamma, alpha)
    with nullcontext() if layers is None else RecordLayers(layers):
        qs = tuple(critic(batch.obs, batch.actions))
    return critic_loss(qs, y), qs, y


def player_gradients(actor, critic, target_critic, batch, alpha, lam, args):
    """Both players' costs and gradients at the same (θ, w), all of one batch.

    Returns f_actor, f_critic, the gradients as lists like θ and w, and info: tensors, among them Q and y of the batch.
    """
    theta = trainable(actor)
    w = trainable(critic)
    layers = [] if needs_jacobian(args) else None
    f_actor = actor_loss(actor, critic, batch, alpha)
    f_critic, qs, y = critic_cost(actor, critic, target_critic, batch, alpha, args, layers)
    info = {}

    if args.leader == "none":
        grad_theta = grad(f_actor, theta)
        grad_w = grad(f_critic, w)
    elif args.leader == "critic":
        grad_theta = grad(f_actor, theta, create_graph=True)
        grad_w, info = stackelberg_gradient(
            f_critic, f_actor, w, theta, lam, args.cg_iters, args.cg_tol, grad2_f2=grad_theta
        )
    elif args.curvature == "gauss-newton":  # the actor leads
        grad_w = grad(f_critic, w)
        jacs = jacobians(critic, qs, layers)
        grad_theta, info = gauss_newton_gradient(f_actor, f_critic, theta, w, lam, qs, jacs)
    else:  # the actor leads, with the full Hessian
        grad_w = grad(f_critic, w, create_graph=True)
        M = None
        if args.precondition:
            M = gauss_newton_preconditioner(f_critic, w, lam, qs, jacobians(critic, qs, layers))
        grad_theta, info = stackelberg_gradient(
            f_actor, f_critic, theta, w, lam, args.cg_iters, args.cg_tol, grad2_f2=grad_w, preconditioner=M
        )

    info |= {"qs": [q.detach() for q in qs], "y": y.detach()}
    grad_theta = [g.detach() for g in grad_theta]
    grad_w = [g.detach() for g in grad_w]
    return f_actor.detach(), f_critic.detach(), grad_theta, grad_w, info


# Update
def optimizer_step(optimizer, parameters, grads):
    """One step of an optimizer along given gradients (here is the place to clip them).

    Traps: freeze by `requires_grad_(False)`, not by a rate of 0, or the game still counts on these parameters; and put
    weight decay into the loss, or the other player does not know of it.
    """
    optimizer.zero_grad()  # or what you freeze during a run would go on along its last gradient
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g.detach()
    optimizer.step()


@torch.no_grad()
def update_target(target, net, tau):
    """Polyak average of the parameters; buffers, such as running statistics of observations, are copied."""
    for target_p, p in zip(target.parameters(), net.parameters(), strict=True):
        target_p.lerp_(p, tau)
    for target_b, b in zip(target.buffers(), net.buffers(), strict=True):
        target_b.copy_(b)


def stackelberg_update(nets, optimizers, batches, alpha, lam, args, gradients=player_gradients):
    """One iteration of Algorithm 2 (one batch, λ = 0: of Algorithm 1, (11)-(14)), and the target network's step.

    nets: actor, critic, target critic. optimizers: the actor's, the critic's. batches: m; the follower takes a step on
    each (fresh ones, because it responds to the whole replay buffer), the leader one on the first.
    Returns both costs and info of the first batch.
    """
    actor, critic, target_critic = nets
    actor_optimizer, critic_optimizer = optimizers
    theta = trainable(actor)
    w = trainable(critic)
    f_actor, f_critic, grad_theta, grad_w, info = gradients(*nets, batches[0], alpha, lam, args)  # at (θ_k, w_k)

    # the follower's steps come first: they are at the leader's old parameters
    if args.leader == "critic":
        optimizer_step(actor_optimizer, theta, grad_theta)
        for batch in batches[1:]:
            cost = actor_loss(actor, critic, batch, alpha)
            optimizer_step(actor_optimizer, theta, grad(cost, theta))
        optimizer_step(critic_optimizer, w, grad_w)
    else:
        optimizer_step(critic_optimizer, w, grad_w)
        for batch in batches[1:]:
            cost, _, _ = critic_cost(actor, critic, target_critic, batch, alpha, args)
            optimizer_step(critic_optimizer, w, grad(cost, w))
        optimizer_step(actor_optimizer, theta, grad_theta)

    update_target(target_critic, critic, args.tau)
    return f_actor, f_critic, info


# Gauss-Newton, for the actor as leader: not in the paper, and not needed to understand it (skip it on a first reading)
#
# L of (10) depends on w only through the values Q = (Q(s_1, a_1), ..., Q(s_B, a_B)) of a Q network. With the Jacobian
# 𝒥 = ∂Q/∂w, [B, |w|] (J is the actor's objective),
#     ∇_w²L = 𝒥ᵀD𝒥 + Σ_i ∂L/∂Q_i ∇_w²Q_i,        D = ∂²L/∂Q², diagonal: 2/B for the mean square of (10).
# Gauss-Newton keeps the first term, positive semi-definite if L is convex in Q; the second is small where Q_i ≈ y_i.
# Then no |w| × |w| system has to be solved, but one with the tangent kernel K = 𝒥𝒥ᵀ, which is B × B, by Cholesky:
#     𝒥(𝒥ᵀD𝒥 + λI)⁻¹ = D⁻¹(K + λD⁻¹)⁻¹𝒥                   (`gauss_newton_gradient`: in place of the Hessian)
#      (𝒥ᵀD𝒥 + λI)⁻¹ = (I - 𝒥ᵀS(SKS + λI)⁻¹S𝒥) / λ, S = √D    (`gauss_newton_preconditioner`: for the full Hessian)
# 𝒥 itself is never made. For a layer z = Wx + b its row i is the outer product of ∂Q_i/∂z_i and x_i for W, and just
# ∂Q_i/∂z_i for b. So the layers' x and z are recorded when the critic runs, and a backward pass from Q gives all ∂Q/∂z.
# LayerNorm, and Q networks that share layers, are there for critics that you may put in.
Layer = namedtuple("Layer", "weight bias inputs scale outputs")  # outputs = (inputs weightᵀ + bias) * scale + others


class RecordLayers(TorchFunctionMode):
    """Appends each Linear and LayerNorm that runs while this is active to `layers`, in terms of its parameters.

    PyTorch shows every call of a torch function to an active TorchFunctionMode. (Hooks set in compiled code fail.)
    """

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = function(*args, **kwargs)
        if function is F.linear:
            self.record_linear(outputs, *args, **kwargs)
        elif function is F.layer_norm:
            self.record_layer_norm(outputs, *args, **kwargs)
        else:
            return outputs
        return outputs.clone()  # an in-place activation changes the copy, not what is recorded

    def record_linear(self, outputs, input, weight, bias=None):
        self.layers.append(Layer(weight, bias, input.detach(), None, outputs))

    def record_layer_norm(self, outputs, input, normalized_shape, weight=None, bias=None, eps=1e-5):
        # weight * x̂ + bias: the weight is like a bias, but for the scale x̂
        normalized = F.layer_norm(input.detach(), normalized_shape, eps=eps)
        self.layers.append(Layer(None, weight, None, normalized, outputs))
        self.layers.append(Layer(None, bias, None, None, outputs))


# One layer's part of 𝒥. weight, bias: the places of its parameters in w, None if it has none or they are frozen;
# inputs [rows, n_in], slopes [rows, n_out]: row i of 𝒥 is slopes_i inputs_iᵀ for the weight and slopes_i for the bias.
Factors = namedtuple("Factors", "weight bias inputs slopes")


def refuse(what, reason):
    """Ends the run because Gauss-Newton, as the curvature or as the preconditioner, would be wrong."""
    stop(f"Gauss-Newton does not know this {what}: {reason}. --curvature hessian --no-precondition takes it")


def check_layers(critic, qs, layers):
    """Refuses what `jacobians` cannot know: parameters elsewhere or used twice, several outputs a sample."""
    used = [layer.weight for layer in layers] + [layer.bias for layer in layers]
    for name, p in critic.named_parameters():
        times = sum(p is other for other in used)
        if p.requires_grad and times == 0:
            refuse("critic", f"{name} is no weight or bias of a Linear or LayerNorm that has run")
        if p.requires_grad and times > 1:
            refuse("critic", f"{name} is used more than once")
    for q in qs:
        if q.dim() != 1:
            refuse("critic", f"a Q network has values of shape {tuple(q.shape)}, not [B]")
    for layer in layers:
        if layer.outputs.shape[:-1] != qs[0].shape:
            refuse("critic", f"a layer has outputs of shape {tuple(layer.outputs.shape)}, not [B, n_out]")


def jacobians(critic, qs, layers):
    """𝒥 of each Q network, a list of Factors; one 𝒥 of all of them, rows one below the other, if they share layers."""
    place = {p: k for k, p in enumerate(trainable(critic))}  # of a parameter in w
    layers = [layer for layer in layers if layer.weight in place or layer.bias in place]
    check_layers(critic, qs, layers)
    outputs = [layer.outputs for layer in layers]
    slopes = []  # ∂Q_i/∂outputs_i of each Q network and layer, None where Q does not depend on the layer
    for q in qs:
        # of the sum over i, because Q_i depends on outputs_i alone (`check_gauss_newton` sees if it does not)
        slopes.append(torch.autograd.grad(q.sum(), outputs, retain_graph=True, allow_unused=True))
    users = []  # how many Q networks depend on each layer; more than one: they share it
    for of_layer in zip(*slopes):
        users.append(sum(slope is not None for slope in of_layer))
    if min(users) == 0:
        refuse("critic", "a layer that has run does not reach Q")
    if max(users) > 1:
        layers, slopes = stack_rows(layers, slopes)

    jacs = []
    for of_network in slopes:
        jac = []
        for layer, slope in zip(layers, of_network):
            if slope is not None:
                slope = slope if layer.scale is None else slope * layer.scale
                jac.append(Factors(place.get(layer.weight), place.get(layer.bias), layer.inputs, slope))
        jacs.append(jac)
    return jacs


def stack_rows(layers, slopes):
    """Layers and slopes as if of one Q network: a layer that two share couples them, 𝒥ᵀD𝒥 is not block diagonal."""
    stacked_layers = []
    stacked_slopes = []
    for layer, of_layer in zip(layers, zip(*slopes)):
        inputs = None if layer.inputs is None else layer.inputs.repeat(len(slopes), 1)
        scale = None if layer.scale is None else layer.scale.repeat(len(slopes), 1)
        stacked_layers.append(layer._replace(inputs=inputs, scale=scale))
        nothing = torch.zeros_like(layer.outputs)
        stacked_slopes.append(torch.cat([nothing if slope is None else slope for slope in of_layer]))
    return stacked_layers, [stacked_slopes]


def rows(values, jacs):
    """Values of the Q networks, [B] each, as one vector for each 𝒥: the same, or all in one if there is one 𝒥."""
    return torch.cat(values).chunk(len(jacs))


def jvp(jac, u):
    """𝒥u, [rows], for a list u like w, of tensors of any shape."""
    products = []
    for weight, bias, inputs, slopes in jac:
        change = 0.0 if bias is None else u[bias].reshape(-1)  # of the layer's outputs
        if weight is not None:
            change = inputs @ u[weight].reshape(slopes.shape[1], inputs.shape[1]).T + change
        products.append((change * slopes).sum(1))
    return sum(products)


def vjp(jac, c):
    """𝒥ᵀc for c [rows]: a dict from places in w to entries, for the parameters that 𝒥 has."""
    entries = {}
    for weight, bias, inputs, slopes in jac:
        if weight is not None:
            entries[weight] = (c[:, None] * slopes).T @ inputs
        if bias is not None:
            entries[bias] = c @ slopes
    return entries


def tangent_kernel(jac):
    """K = 𝒥𝒥ᵀ, [rows, rows]: how fitting Q at one sample moves it at another."""
    kernels = []
    for weight, bias, inputs, slopes in jac:
        inputs_kernel = 0.0 if bias is None else 1.0  # a bias is the weight of an input that is 1
        if weight is not None:
            inputs_kernel = inputs @ inputs.T + inputs_kernel
        kernels.append(inputs_kernel * (slopes @ slopes.T))
    return sum(kernels)


def ridge_solver(K, damping):
    """c -> (K + diag(damping))⁻¹ c, [rows], with damping > 0 [rows]: the matrix is positive definite."""
    rounding = torch.finfo(K.dtype).eps * K.trace()  # K has errors of this size: with less it could be indefinite
    K = K.double() + torch.diag(damping.double() + rounding)
    chol, failed = torch.linalg.cholesky_ex(K)  # it raises nothing, so that a GPU need not wait
    chol = torch.where(failed == 0, chol, math.nan)
    return lambda c: torch.cholesky_solve(c.double()[:, None], chol)[:, 0].to(c.dtype)


def q_derivatives(f_critic, qs):
    """∂L/∂Q, with its graph, and the diagonal of D = ∂²L/∂Q²: lists like qs."""
    dL_dQ = grad(f_critic, qs, create_graph=True)
    # the sums of D's rows, which are its diagonal if nothing is beside it (`check_gauss_newton` sees if that is not so)
    D = grad(dL_dQ, qs, [torch.ones_like(q) for q in qs])
    return dL_dQ, D


def gauss_newton_gradient(f1, f2, x1, x2, lam, qs, jacs):
    """`stackelberg_gradient` with 𝒥ᵀD𝒥 in place of ∇₂²f2: v = (𝒥ᵀD𝒥 + λI)⁻¹ ∇₂f1. Here f2 = L, x1 = θ, x2 = w.

    ∇₂f2 = 𝒥ᵀ ∂f2/∂Q, and 𝒥 does not depend on θ, so only 𝒥v is needed:

        (∇₂₁f2)ᵀv = ∇₁⟨∂f2/∂Q, 𝒥v⟩,        𝒥v = D⁻¹(K + λD⁻¹)⁻¹ 𝒥∇₂f1.

    In words: θ moves the targets, the critic is fitted to them anew (a kernel ridge regression), and that moves f1.
    """
    grad1_f1, grad2_f1 = cost_gradients(f1, x1, x2)
    dL_dQ, D = q_derivatives(f2, qs)
    Jv = []
    for jac, D_diag in zip(jacs, rows(D, jacs)):
        D_diag = torch.where(D_diag > 0, D_diag, math.nan)  # L is not convex in Q: then `training_loop` ends the run
        solve = ridge_solver(tangent_kernel(jac), lam / D_diag)
        Jv.append(solve(jvp(jac, grad2_f1)) / D_diag)
    Jv = torch.cat(Jv).chunk(len(qs))
    return total_derivative(grad1_f1, mixed_derivative(dL_dQ, x1, Jv))


def gauss_newton_preconditioner(f2, x2, lam, qs, jacs):
    """r -> (𝒥ᵀD𝒥 + λI)⁻¹ r = (r - 𝒥ᵀS(SKS + λI)⁻¹S𝒥r) / λ, S = √D, [n], for a λ that is not too small for rounding."""
    _, D = q_derivatives(f2, qs)
    roots = [D_diag.clamp(min=0).sqrt() for D_diag in rows(D, jacs)]  # a preconditioner has to be positive definite
    kernels = [root[:, None] * tangent_kernel(jac) * root for root, jac in zip(roots, jacs)]
    trace = sum(K.trace() for K in kernels)
    floor = torch.finfo(trace.dtype).eps ** (2 / 3) * trace  # with a smaller λ r - 𝒥ᵀ(...)𝒥r would be rounding
    lam = floor.clamp(min=lam)
    solvers = [ridge_solver(K, lam.expand(len(K))) for K in kernels]
    sizes = [p.numel() for p in x2]

    def preconditioner(r):
        u = r.split(sizes)
        fits = {}
        for jac, root, solve in zip(jacs, roots, solvers):
            fits |= vjp(jac, root * solve(root * jvp(jac, u)))  # the 𝒥s have no parameter in common
        return (r - flatten(fits[k] for k in range(len(x2)))) / lam

    return preconditioner


def differ(found, expected):
    """Whether two lists of tensors are unequal beyond float32's rounding."""
    expected = flatten(expected)
    return not (flatten(found) - expected).norm() <= 1e-3 * expected.norm()


def check_gauss_newton(actor, critic, target_critic, batch, alpha, args):
    """Ends the run in one line if on a real batch 𝒥, or with Gauss-Newton D or ∇_θ∇_wL, is not what autograd says."""
    layers = []
    f_critic, qs, _ = critic_cost(actor, critic, target_critic, batch, alpha, args, layers)
    jacs = jacobians(critic, qs, layers)
    theta = trainable(actor)
    w = trainable(critic)
    c = [torch.randn_like(q) for q in qs]
    entries = {}
    for jac, c_rows in zip(jacs, rows(c, jacs)):
        entries |= vjp(jac, c_rows)
    if differ([entries[k] for k in range(len(w))], grad(qs, w, c)):
        refuse(
            "critic", "∂Q/∂w is not what its layers say (samples meet, as in batch norm, or w is used elsewhere, too)"
        )

    if args.curvature == "gauss-newton":
        dL_dQ, D = q_derivatives(f_critic, qs)
        if not (torch.cat(D) > 0).all():
            refuse("critic_loss", "it is not strictly convex in each Q")
        if differ([D_i * c_i for D_i, c_i in zip(D, c)], grad(dL_dQ, qs, c)):
            refuse("critic_loss", "it is no sum over samples and Q networks")
        u = [torch.randn_like(p) for p in w]
        Ju = torch.cat([jvp(jac, u) for jac in jacs]).chunk(len(qs))
        mixed = mixed_derivative(grad(f_critic, w, create_graph=True), theta, u)
        if differ(mixed_derivative(dL_dQ, theta, Ju), mixed):
            refuse("critic_cost", "θ and w meet in it elsewhere than in Q at the batch's actions")


# Evaluation
def evaluate(actor, env, episodes, *key):
    """Undiscounted returns of `episodes` episodes of the mean policy, [episodes]; they start as `key` says."""
    device = actor.action_scale.device
    returns = np.zeros(episodes)
    modes = {module: module.training for module in actor.modules()}  # a part that you froze may not be training
    actor.eval()
    for episode in range(episodes):
        obs = reset(env, *key, episode)
        done = False
        while not done:
            with torch.no_grad():
                action, _ = actor(torch.as_tensor(obs, device=device), deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(to_box(action.cpu().numpy(), env.action_space))
            obs = to_float32(obs)
            returns[episode] += to_float32(reward).item()
            done = terminated or truncated
    for module, training in modes.items():
        module.training = training
    return returns


def play(args):
    """What the command line calls for --evaluate: plays a model."""
    torch.set_num_threads(1)
    state = load(args.evaluate, args, "actor")
    videos = None
    if args.capture_video:
        videos = Path(args.evaluate).parent / f"videos/evaluate-{time.time_ns() // 1000}"
    flags = state["args"]
    env = make_env(flags["env_id"], args.max_episode_steps or flags["max_episode_steps"], videos, args.eval_episodes)
    actor = Actor(env.observation_space, env.action_space, flags["hidden"])
    actor.load_state_dict(state["actor"])
    print(f"{args.evaluate} on {flags['env_id']}, seed {args.seed}")
    returns = evaluate(actor, env, args.eval_episodes, args.seed, PLAY)
    env.close()
    for k, episodic_return in enumerate(returns, 1):
        print(f"episode {k}: return {episodic_return:.2f}")
    print(f"mean return {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")


# The run's folder, checkpoints
ALGORITHM = "stsac"  # marks the files that this script writes; trap: give a copy with other networks another mark
# flags that may differ when a run is carried on: it stays the same experiment (trap: with a schedule over
# total_timesteps it does not)
MAY_CHANGE = {"exp_name", "cuda", "compile", "track", "capture_video", "save_model", "run_dir", "evaluate"}
MAY_CHANGE |= {"eval_every", "eval_episodes", "checkpoint_every", "total_timesteps"}


@contextmanager
def run_folder(run_dir):
    """Makes the folder and locks it as long as the run lasts; says how to carry on after Ctrl-C."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / "lock", "w")
    except OSError as e:
        stop(f"--run-dir {run_dir}: {e.strerror}")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{Path(__file__).name}: another process is at work in {run_dir}", file=sys.stderr)
            raise SystemExit(os.EX_TEMPFAIL) from None  # launchers leave the run to the other
        except OSError as e:
            stop(f"{run_dir} cannot be locked: {e.strerror}")
        try:
            yield
        except KeyboardInterrupt:
            if (run_dir / "checkpoint.pt").exists():
                how = f"the same command with --run-dir {run_dir} carries on from the last checkpoint"
            else:
                how = "before the first checkpoint, so there is nothing to carry on from"
            print(f"\ninterrupted: {how}", file=sys.stderr)
            raise SystemExit(130) from None


def save(path, **state):
    """Writes `state` to `path` atomically: a kill at any time leaves the old file or the new one."""
    with open(f"{path}.tmp", "wb") as file:
        torch.save({"algorithm": ALGORITHM, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    try:  # better now than when the run is to be carried on
        torch.load(f"{path}.tmp", map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        os.remove(f"{path}.tmp")
        stop(f"{path} could not be read back: only tensors, numbers, strings, tuples, lists and dicts can (no numpy)")
    os.replace(f"{path}.tmp", path)


def load(path, args, key):
    """What `save` wrote, with `key` in it, mapped into memory. No code runs: not the file's, nor modules it names."""
    if not Path(path).is_file():
        stop(f"{path} is {'a folder' if Path(path).is_dir() else 'missing'}, not a file that this script has saved")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("wrong checksum")
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        algorithm = state["algorithm"]
        flags = state["args"]
        env_id = str(flags["env_id"])
    except OSError as e:
        stop(f"{path}: {e.strerror}")
    except Exception as e:  # a file can hold anything
        stop(f"{path} is damaged, or no checkpoint ({type(e).__name__})")
    if algorithm != ALGORITHM:
        stop(f"{path} is of another script: {algorithm}")
    if flags.keys() != vars(args).keys():
        stop(f"{path} is of another version of this script: its flags are not the same")
    if key not in state:
        stop(f"{path} has no {key}: a model cannot be carried on, only a checkpoint")
    if ":" in env_id and env_id != args.env_id:  # the environment "module:name" imports a module
        stop(f"{path} wants a module imported for its environment; to allow that, say --env-id {env_id}")
    return state


def restore(state, parts, device):
    """Networks, optimizers, replay buffer and random numbers as they were."""
    for name, part in parts.items():
        # a copy, because an optimizer goes on with the very tensors; the buffer copies by itself
        part.load_state_dict(state[name] if name == "buffer" else copy.deepcopy(state[name]))
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], device)


def check_same_run(run_dir, state, args):
    """Refuses to carry a run on as another one."""
    for name, value in state["args"].items():
        if name not in MAY_CHANGE and value != getattr(args, name):
            stop(f"{run_dir} has a run with --{name.replace('_', '-')} {value}, not {getattr(args, name)}")
    if state["global_step"] > args.total_timesteps:
        stop(f"{run_dir} is at step {state['global_step']}, beyond --total-timesteps {args.total_timesteps}")


# Logging
def new_writer(run_dir, start, args):
    """TensorBoard's writer. What was written after step `start` by a process that was killed is written again."""
    for path in run_dir.glob("events.out.tfevents.*"):
        began = re.search(r"tfevents\.(\d+)\.", path.name)
        if began and int(began[1]) > time.time():
            print(f"the clock is behind {path}: TensorBoard, which goes by time, may hide the older part of a curve")
    writer = SummaryWriter(str(run_dir), purge_step=start + 1, flush_secs=10)
    atexit.register(writer.close)  # also after `stop`: what was written so far is kept
    table = ["|param|value|", "|-|-|"]
    for name, value in vars(args).items():
        table.append(f"|{name}|{value}|")
    writer.add_text("hyperparameters", "\n".join(table), start)
    return writer


def update_scalars(f_actor, f_critic, info, lam):
    """What TensorBoard gets of an update, out of what the update returned: no network runs again."""
    scalars = {"losses/actor_loss": f_actor, "losses/qf_loss": f_critic / len(info["qs"])}
    for i, q in enumerate(info["qs"], 1):
        scalars[f"losses/qf{i}_values"] = q.mean()
        scalars[f"losses/qf{i}_loss"] = ((q - info["y"]) ** 2).mean()  # CleanRL's, whatever critic_loss is
    for name in ("residual", "iterations"):
        if name in info:
            scalars[f"stackelberg/cg_{name}"] = info[name]
    for name in ("negative_curvature", "direct_norm", "implicit_norm", "cosine"):
        if name in info:
            scalars[f"stackelberg/{name}"] = info[name]
    if "cosine" in info:
        scalars["stackelberg/lam"] = lam
    return scalars


# Training
def check_targets(actor, critic, target_critic, batch, alpha, args):
    """Refuses targets y that depend on w and, unless --leader is none, targets whose Q does not depend on θ.

    It changes the networks that it gets: `check_first_batch` has copies.
    """
    with torch.no_grad():
        for p in trainable(actor):
            p.mul_(0.01)  # away from its bounds, where a policy does not move Q in float32
        for p in target_critic.parameters():
            p.add_(1e-3 * torch.randn_like(p))  # away from 0, where a last layer may begin
    batch = batch._replace(terminated=torch.zeros_like(batch.terminated))  # after a terminal state y has no Q
    alpha = 0 * alpha  # the entropy depends on θ in any case
    _, _, y = critic_cost(actor, critic, target_critic, batch, alpha, args)
    theta = trainable(actor)
    w = trainable(critic)
    grads = [None] * len(theta + w)
    if y.requires_grad:
        direction = torch.randn_like(y)  # not y's sum, which can be a constant
        grads = torch.autograd.grad(y, theta + w, direction, allow_unused=True)
    grad_theta = grads[: len(theta)]
    grad_w = grads[len(theta) :]
    if any(g is not None for g in grad_w):
        stop("the targets depend on the critic's own parameters: take their Q from the target network")
    if args.leader != "none" and not any(g is not None and g.any() for g in grad_theta):
        stop("the leader has no influence: Q in the targets does not depend on θ (no_grad, detach, or all clipped?)")


def check_first_batch(nets, batch, alpha, lam, args):
    """Ends the run in one line if this leader and curvature cannot work with these networks and losses."""
    nets = copy.deepcopy(nets)  # a pass may change buffers and draws noise: neither is to touch the run
    actor, critic, target_critic = nets
    if set(actor.parameters()) & set(critic.parameters()):
        stop("actor and critic share parameters, so they are no two players")
    if set(critic.parameters()) & set(target_critic.parameters()):
        stop("the critic shares parameters with its target network, which freezes them: give the target a copy")
    if not (trainable(actor) and trainable(critic)):
        stop("all parameters of the actor or of the critic are frozen")
    with torch.random.fork_rng([batch.obs.device] if batch.obs.is_cuda else []):
        *_, info = player_gradients(*nets, batch, alpha, lam, args)
        if "residual" in info and info["residual"].isinf():
            stop("the first solve met a number that is not finite, and the leader would be a plain player")
        if needs_jacobian(args):
            check_gauss_newton(actor, critic, target_critic, batch, alpha, args)
        check_targets(actor, critic, target_critic, batch, alpha, args)


def train(args):
    """What the command line calls: begins a run or carries it on, and returns its folder."""
    algorithm = {"none": "sac", "actor": "stsac-al", "critic": "stsac-cl"}[args.leader]
    run_name = f"{args.env_id}__{args.exp_name or algorithm}__{args.seed}__{time.time_ns() // 1000}"
    run_dir = Path(args.run_dir or "runs/" + re.sub(r"[^\w.-]", "-", run_name))
    with run_folder(run_dir):
        training_loop(run_dir, algorithm, args)
    return run_dir


def training_loop(run_dir, algorithm, args):
    """From the last checkpoint in the folder, if there is one, to the last step."""
    state = None
    start = 0
    episode = 0
    if (run_dir / "checkpoint.pt").exists():
        state = load(run_dir / "checkpoint.pt", args, "rng")
        check_same_run(run_dir, state, args)
        start = state["global_step"]
        episode = state["episode"]
    if start == args.total_timesteps:
        print(f"{run_dir} is finished, with {start} steps; a larger --total-timesteps makes it longer")
        if args.save_model:
            save(run_dir / "model.pt", args=vars(args), actor=state["actor"], critic=state["critic"])
        return

    torch.set_num_threads(1)  # networks of this size hardly gain by more, and runs side by side lose
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    env = make_env(args.env_id, args.max_episode_steps)
    spaces = env.observation_space, env.action_space

    # The players, and all else that a checkpoint holds. Trap: what you add and has a state must be in `parts`
    actor = Actor(*spaces, args.hidden).to(device)
    critic = Critic(*spaces, args.hidden).to(device)
    target_critic = Critic(*spaces, args.hidden).to(device)
    target_critic.load_state_dict(critic.state_dict())
    target_critic.requires_grad_(False)
    log_alpha = nn.ParameterList([torch.zeros((), device=device)])  # a list has a state_dict, like the other parts
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.policy_lr, fused=True)
    q_optimizer = torch.optim.Adam(critic.parameters(), lr=args.q_lr, fused=True)
    alpha_optimizer = torch.optim.Adam(log_alpha.parameters(), lr=args.q_lr, fused=True)
    buffer = ReplayBuffer(min(args.buffer_size, args.total_timesteps), *spaces, device)
    parts = {
        "actor": actor,
        "critic": critic,
        "target_critic": target_critic,
        "log_alpha": log_alpha,
        "actor_optimizer": actor_optimizer,
        "q_optimizer": q_optimizer,
        "alpha_optimizer": alpha_optimizer,
        "buffer": buffer,
    }
    if state is not None:
        restore(state, parts, device)
        del state  # and with it the file's memory

    # What a run needs besides
    videos = run_dir / f"videos/{time.time_ns() // 1000}" if args.capture_video else None
    eval_env = make_env(args.env_id, args.max_episode_steps, videos, args.eval_episodes)
    gradients = player_gradients
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad inside a compiled function
        # "fallback_random": noise from torch's generator, as without --compile (on a GPU perhaps in another order).
        # On a GPU, both gradients become a CUDA graph: one launch for all kernels. Trap: the next call overwrites what
        # this one returned. Clone what you keep
        options = {"fallback_random": True, "triton.cudagraphs": device.type == "cuda"}
        gradients = torch.compile(player_gradients, fullgraph=True, options=options)
    if args.track:
        import wandb

        folder = run_dir.resolve()
        id_file = folder / "wandb_id"  # carried on, a run goes on there (a copy of the folder as well: delete it in it)
        if start == 0 or not id_file.exists():
            id_file.write_text(os.urandom(4).hex())
        run_id = id_file.read_text()
        wandb.init(
            name=folder.name, id=run_id, resume="allow", config=vars(args), sync_tensorboard=True, save_code=True
        )
    writer = new_writer(run_dir, start, args)
    curvature = f", {args.curvature}" if args.leader != "none" else ""
    print(f"{algorithm}{curvature} on {args.env_id}, {device}, from step {start}: {run_dir}", flush=True)

    nets = actor, critic, target_critic
    optimizers = actor_optimizer, q_optimizer
    checked = False
    checkpoint_step = start
    start_time = time.perf_counter()
    told_step, told_time = start, start_time
    obs = reset(env, args.seed, TRAIN, episode)
    episode_return, episode_length = 0.0, 0
    steps = range(start + 1, args.total_timesteps + 1)
    bar = tqdm(steps, initial=start, total=args.total_timesteps, disable=None, dynamic_ncols=True)  # on a terminal
    for global_step in bar:
        # Act
        with torch.no_grad():
            if global_step <= args.start_steps:  # not action_space.sample(): its generator is in no checkpoint
                noise = 2 * torch.rand_like(actor.action_scale) - 1
                action = actor.action_bias + actor.action_scale * noise
            else:
                action, _ = actor(torch.as_tensor(obs, device=device))
        action = to_box(action.cpu().numpy(), env.action_space)
        next_obs, reward, terminated, truncated, _ = env.step(action.copy())  # a copy: it may be changed in place
        next_obs = to_float32(next_obs)
        reward = to_float32(reward).item()

        # Store
        if not np.isfinite(next_obs).all():
            stop(f"step {global_step}: an observation is not finite in float32")
        if not math.isfinite(reward):
            stop(f"step {global_step}: the reward is not finite in float32")
        buffer.add(obs, action, reward, next_obs, terminated)
        obs = next_obs
        episode_return += reward
        episode_length += 1
        done = terminated or truncated

        # Learn
        if global_step >= args.update_after:
            batches = [buffer.sample(args.batch_size) for _ in range(args.unroll)]
            # alpha and lam are tensors: torch.compile would make new code for each number
            alpha = log_alpha[0].detach().exp() if args.autotune else torch.full((), args.alpha, device=device)
            decay = math.exp(-global_step / args.lam_decay) if args.lam_decay else 1.0
            lam = torch.full((), args.lam * decay, device=device)
            if not checked:
                check_first_batch(nets, batches[0], alpha, lam, args)
                checked = True
            f_actor, f_critic, info = stackelberg_update(nets, optimizers, batches, alpha, lam, args, gradients)
            implicit_norm = info.get("implicit_norm", 0.0)
            if not (f_actor + f_critic + implicit_norm).isfinite():
                costs = f"-J = {f_actor:.3g}, L = {f_critic:.3g}, norm of the implicit term {implicit_norm:.3g}"
                stop(f"step {global_step}: not finite (or, with Gauss-Newton, L is not convex in Q): {costs}")
            if args.autotune:
                with torch.no_grad():
                    _, log_prob = actor(batches[0].obs)
                target_entropy = -math.prod(env.action_space.shape)
                alpha_loss = (-log_alpha[0].exp() * (log_prob + target_entropy)).mean()
                optimizer_step(alpha_optimizer, log_alpha, grad(alpha_loss, list(log_alpha)))

            # Log the update
            if global_step % 100 == 0:
                scalars = update_scalars(f_actor, f_critic, info, lam)
                scalars["losses/alpha"] = alpha
                if args.autotune:
                    scalars["losses/alpha_loss"] = alpha_loss
                scalars["charts/SPS"] = (global_step - start) / (time.perf_counter() - start_time)
                for name, value in scalars.items():
                    writer.add_scalar(name, value, global_step)

        # Evaluate
        if global_step % args.eval_every == 0:
            returns = evaluate(actor, eval_env, args.eval_episodes, args.seed, EVAL, global_step)
            writer.add_scalar("eval/episodic_return", returns.mean(), global_step)
            writer.add_scalar("eval/episodic_return_std", returns.std(), global_step)
            mean_and_std = f"{returns.mean():.2f} ± {returns.std():.2f}"
            tqdm.write(f"step {global_step}: eval return {mean_and_std} ({len(returns)} episodes)")
            sys.stdout.flush()

        # End the episode
        if done:
            writer.add_scalar("charts/episodic_return", episode_return, global_step)
            writer.add_scalar("charts/episodic_length", episode_length, global_step)
        last = global_step == args.total_timesteps
        if done or last:
            episode += 1
            obs = reset(env, args.seed, TRAIN, episode)
            episode_return, episode_length = 0.0, 0

        # Save, between two episodes (a run that is made longer begins with a new one)
        if last or (done and global_step - checkpoint_step >= args.checkpoint_every):
            if not flatten([*actor.parameters(), *critic.parameters()]).isfinite().all():
                stop(f"step {global_step}: a parameter is not finite")
            writer.flush()
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"args": vars(args), "global_step": global_step, "episode": episode}
            state["rng"] = torch.get_rng_state()
            state["cuda_rng"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            save(run_dir / "checkpoint.pt", **state)
            checkpoint_step = global_step

        # Say how far it is: a line a minute where there is no terminal for a progress bar
        if bar.disable and time.perf_counter() - told_time > 60:
            speed = (global_step - told_step) / (time.perf_counter() - told_time)
            left = timedelta(seconds=round((args.total_timesteps - global_step) / speed))
            print(f"step {global_step} of {args.total_timesteps}, {speed:.0f} steps/s, {left} left", flush=True)
            told_step, told_time = global_step, time.perf_counter()

    if args.save_model:
        save(run_dir / "model.pt", args=vars(args), actor=actor.state_dict(), critic=critic.state_dict())
    writer.close()
    env.close()
    eval_env.close()
    print(f"finished: {run_dir}", flush=True)


def main():
    """The command line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that knows ASCII alone shows "?" for λ and ±
    args = tyro.cli(Args, description=__doc__)
    if args.evaluate:
        check_args(args)
        return play(args)
    checkpoint = Path(args.run_dir or "") / "checkpoint.pt"
    if args.run_dir and checkpoint.exists():  # the run's own flags are the defaults now
        flags = load(checkpoint, args, "rng")["args"]
        args = tyro.cli(Args, description=__doc__, default=Args(**flags))
    check_args(args)
    train(args)


if __name__ == "__main__":
    main()
