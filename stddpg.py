# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11,<2.14", "gymnasium[mujoco]>=1.2", "numpy", "tensorboard", "tqdm", "tyro>=0.9"]
# ///
"""Stackelberg deep deterministic policy gradient (STDDPG-AL, STDDPG-CL) and plain DDPG in one file.

Zheng, Fiez, Alumbaugh, Chasnov, Ratliff: Stackelberg Actor-Critic: Game-Theoretic Reinforcement Learning Algorithms,
2021. Numbers in parentheses are its equations. The actor (θ) minimises -J(θ, w), the critic (w) L(θ, w), and the leader
follows the total derivative of its cost through the other's best response. Everything else is DDPG.

    python stddpg.py --env-id Hopper-v4 --leader actor --lam 500     # STDDPG-AL; critic: STDDPG-CL, none: DDPG
    python stddpg.py --resume runs/Hopper-v4__stddpg-al__1__1700000000
    python stddpg.py --evaluate runs/Hopper-v4__stddpg-al__1__1700000000/model.pt
"""

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
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = ""
    """the name of this experiment (default: the algorithm's, which is ddpg, stddpg-al or stddpg-cl)"""
    seed: int = 1
    """seed of the experiment"""
    torch_deterministic: bool = True
    """the value of `torch.backends.cudnn.deterministic`"""
    cuda: bool = True
    """if toggled, cuda will be enabled where there is one"""
    compile: bool = False
    """torch.compile the gradients (up to a minute, a C++ compiler; no solve stops early, so give it --cg-iters 3)"""
    track: bool = False
    """if toggled, this experiment will be tracked with Weights and Biases"""
    wandb_project_name: str = "stackelberg-actor-critic"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
    capture_video: bool = False
    """whether to record the first episode of each evaluation (see `videos` in the run's folder)"""
    save_model: bool = False
    """whether to save the model (`model.pt` in the run's folder) at the end"""
    eval_every: int = 10_000
    """environment steps between two evaluations"""
    eval_episodes: int = 10
    """episodes of an evaluation, played without exploration noise in a separate environment"""
    checkpoint_every: int = 10_000
    """environment steps between two checkpoints; each waits for the end of the episode"""
    resume: str | None = None
    """the folder of a run to carry on; its flags need not be repeated"""
    evaluate: str | None = None
    """a model to play for `--eval-episodes` episodes instead of training"""

    # Algorithm specific arguments
    env_id: str = "Hopper-v4"
    """the environment id of the task"""
    total_timesteps: int = 1_000_000
    """total timesteps of the experiment"""
    buffer_size: int = 1_000_000
    """the replay memory buffer size"""
    gamma: float = 0.99
    """the discount factor gamma"""
    tau: float = 0.005
    """target smoothing coefficient (the paper's Polyak average is 1 - tau)"""
    batch_size: int = 100
    """the batch size of sample from the replay memory"""
    start_steps: int = 10_000
    """timesteps of uniformly random actions at the start (CleanRL: `--learning-starts`)"""
    learning_starts: int = 1_000
    """timestep of the first update (in CleanRL also the end of the random actions, here `--start-steps`)"""
    policy_lr: float = 1e-3
    """the learning rate of the actor's Adam"""
    q_lr: float = 1e-3
    """the learning rate of the critic's Adam"""
    exploration_noise: float = 0.1
    """standard deviation of the exploration noise, in half widths of the action space"""
    target_policy: bool = False
    """take next actions from the usual target actor, not from the current policy (footnote 4); leader none only"""
    hidden: tuple[int, ...] = (256, 256)
    """hidden layers of the actor and of the Q network"""

    # The Stackelberg game
    leader: Literal["actor", "critic", "none"] = "actor"
    """the player that follows its total derivative; none: plain DDPG, the limit λ → ∞ of both"""
    lam: float = 500.0
    """λ of the regularized follower Hessian ∇₂²f2 + λI (Section 4.5)"""
    lam_decay: float | None = None
    """time constant in environment steps: λ exp(-t / lam_decay); the paper's released code has 1e5 (default: off)"""
    unroll: int = 1
    """m of Algorithm 2: follower steps for one of the leader's (leader none: critic steps)"""
    curvature: Literal["hessian", "gauss-newton"] = "hessian"
    """the follower's curvature with the actor as leader: the paper's ∇_w²L, or its Gauss-Newton part in closed form"""
    precondition: bool = True
    """precondition conjugate gradient by the Gauss-Newton solve (actor as leader, full Hessian; the paper does not)"""
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
    positive = "hidden unroll cg_iters batch_size lam_decay total_timesteps eval_every eval_episodes checkpoint_every"
    for name, value in vars(args).items():
        least, most = int(name in positive.split()), 1 if name in ("gamma", "tau", "cg_tol") else math.inf
        if isinstance(value, (int, float, tuple)) and not all(least <= x <= most for x in np.atleast_1d(value)):
            stop(f"--{name.replace('_', '-')} {value} is not in [{least}, {most}]")
    if args.batch_size > args.buffer_size:
        stop("--batch-size must not be larger than --buffer-size")
    if args.target_policy and args.leader != "none":
        stop("--target-policy takes θ out of L: it needs --leader none")
    if args.curvature == "gauss-newton" and (args.leader == "critic" or args.lam == 0):
        stop("--curvature gauss-newton needs a positive --lam, and a critic that follows: -J is no sum of squares")


# Environment
def make_env(env_id, video_folder=None, video_every=1):
    """One environment with flat observations, actions in a bounded Box, and the statistics of its episodes."""
    # v4 ids are the paper's tasks; their deprecation is known and is the one warning that is silenced
    warnings.filterwarnings("ignore", r".*The environment \S+ is out of date", DeprecationWarning)
    render = {"render_mode": "rgb_array"} if video_folder else {}  # not all environments know a render_mode
    env = gym.wrappers.FlattenObservation(gym.make(env_id, **render))
    obs, act = env.observation_space, env.action_space
    bounded = isinstance(act, gym.spaces.Box) and len(act.shape) == 1 and act.is_bounded()
    if not isinstance(obs, gym.spaces.Box) or not bounded:
        stop(f"{env_id} needs observations of a fixed size and actions in a bounded 1-d Box, not {obs} and {act}")
    if video_folder:
        env = gym.wrappers.RecordVideo(env, str(video_folder), lambda episode: episode % video_every == 0)
    return gym.wrappers.RecordEpisodeStatistics(env)


def reset(env, *key):
    """Starts an episode whose randomness depends on `key` alone: a checkpoint between two needs no simulator state."""
    obs, _ = env.reset(seed=int(np.random.SeedSequence(key).generate_state(1)[0]))
    return np.array(obs)  # a copy: some environments change their array in place


# Networks
def mlp(*sizes):
    """Linear layers of the given sizes with ReLU between them."""
    layers = [layer for n in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(*n), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Deterministic policy μ_θ(s), scaled to the bounds of the action space."""

    def __init__(self, observation_space, action_space, hidden=(256, 256)):
        super().__init__()
        self.net = mlp(math.prod(observation_space.shape), *hidden, math.prod(action_space.shape))
        low, high = torch.tensor(action_space.low).float(), torch.tensor(action_space.high).float()
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)

    def forward(self, obs):
        """obs [..., obs_dim] -> actions [..., act_dim]."""
        return torch.tanh(self.net(obs)) * self.action_scale + self.action_bias


class Critic(nn.Module):
    """Q network Q_w(s, a)."""

    def __init__(self, observation_space, action_space, hidden=(256, 256)):
        super().__init__()
        self.q1 = mlp(math.prod(observation_space.shape) + math.prod(action_space.shape), *hidden, 1)

    def forward(self, obs, actions):
        """obs [B, obs_dim], actions [B, act_dim] -> Q_w, [B]."""
        return self.q1(torch.cat([obs, actions], dim=-1)).squeeze(-1)  # critical: [B, 1] against [B] would broadcast


# Replay buffer
Batch = namedtuple("Batch", "obs actions rewards next_obs terminated")  # ξ = (s, a, r, s', end): tensors, first axis B


class ReplayBuffer:
    """The last `size` transitions, on `device`, in float32."""

    def __init__(self, size, observation_space, action_space, device):
        obs, act = observation_space.shape, action_space.shape
        # empty, not zeros: memory is only taken once it is written to
        self.data = Batch(*(torch.empty(size, *shape, device=device) for shape in (obs, act, (), obs, ())))
        self.size, self.count = size, 0

    def add(self, *transition):  # a time limit is not terminal: the critic bootstraps through it
        for column, value in zip(self.data, transition):
            column[self.count % self.size] = torch.as_tensor(value)
        self.count += 1

    def sample(self, batch_size):
        """A batch drawn uniformly with replacement."""
        index = torch.randint(min(self.count, self.size), (batch_size,), device=self.data.obs.device)
        return Batch(*(column.index_select(0, index) for column in self.data))

    def state_dict(self):  # of copies: a slice would be saved with the whole buffer
        return {"count": self.count, "data": [column[: self.count].cpu().clone() for column in self.data]}

    def load_state_dict(self, state):
        self.count = state["count"]
        for column, saved in zip(self.data, state["data"]):
            column[: self.count] = saved


# Losses: each is written here alone, all gradients are taken of it
def actor_loss(actor, critic, batch):
    """The actor's cost -J(θ, w), (7): a scalar."""
    return -critic(batch.obs, actor(batch.obs)).mean()


def td_target(actor, target_critic, batch, gamma):
    """y = r + γ Q_0(s', μ_θ(s')) of (8), [B]. Next actions are the current policy's (footnote 4): so L depends on θ."""
    # critical: no `no_grad` here, or the leader's implicit term is zero and STDDPG is DDPG
    return batch.rewards + gamma * (1 - batch.terminated) * target_critic(batch.next_obs, actor(batch.next_obs))


def critic_loss(actor, critic, target_critic, batch, gamma):
    """The critic's cost L(θ, w), (8): a scalar, differentiable in w and, through y, in θ."""
    y = td_target(actor, target_critic, batch, gamma)
    return ((critic(batch.obs, batch.actions) - y) ** 2).mean()


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


# The actor as leader: the Gauss-Newton part 𝒥ᵀD𝒥 of ∇_w²L, 𝒥 = ∂Q/∂w, D = ∂²L/∂Q² = 2/B, by the tangent kernel K = 𝒥𝒥ᵀ
def jacobian_factors(q, x):
    """A Q network at its inputs x, [B, n] -> Q, [B], to first order in x and constant in w, and 𝒥 in factors.
    The factors are a pair (A, G) for each Linear, its inputs and ∂Q/∂(its outputs), [B, width] each: row i of 𝒥 is
    G_i A_iᵀ for the layer's weights, and G_i for its biases. Critical: this is right for modules that run in their
    order, of which only Linears have parameters, if no two samples meet. `check_jacobian` refuses anything else."""
    out = start = x.detach().requires_grad_()
    inputs, outputs = [], []
    for module in (m for m in q.modules() if not list(m.children())):
        before, out = out, module(out)
        if isinstance(module, nn.Linear):
            inputs.append(before.detach())
            outputs.append(out)
    slope, *gradients = grad(out.sum(), [start, *outputs])
    value = out.detach().squeeze(-1).requires_grad_() + (slope * (x - x.detach())).sum(-1)
    return value, list(zip(inputs, gradients))


def vjp(J, c):
    """𝒥ᵀc, a list of tensors like w, for c of shape [B]."""
    return [t for A, G in J for t in ((G * c[:, None]).T @ A, G.T @ c)]


def check_jacobian(critic, observation_space, action_space):
    """Refuses a critic that `jacobian_factors` gets wrong, by the value and the gradient of c·Q at a few points."""
    generator, w = torch.Generator().manual_seed(0), list(critic.parameters())  # not the run's generator
    shapes = observation_space.shape, action_space.shape, ()
    obs, actions, c = (torch.rand(8, *shape, generator=generator).to(w[0]) for shape in shapes)
    Q = c @ critic(obs, actions)
    expected = [Q, *grad(Q, w)]
    try:
        qs, Js = zip(*(jacobian_factors(q, torch.cat([obs, actions], dim=-1)) for q in critic.children()))
        found = [sum(c @ q for q in qs), *(t for J in Js for t in vjp(J, c))]
        error = (flatten(found) - flatten(expected)).norm() / flatten(expected).norm()
    except RuntimeError:  # modules or shapes that do not fit
        error = math.inf
    if not error < 1e-3:
        stop("`jacobian_factors` is wrong for this critic: it needs --curvature hessian --no-precondition")


def tangent_kernel(J1, J2):
    """𝒥₁𝒥₂ᵀ, [B₁, B₂]: how fitting Q at one sample moves it at another."""
    return sum((A1 @ A2.T + 1) * (G1 @ G2.T) for (A1, G1), (A2, G2) in zip(J1, J2))


def ridge_solver(K, damping):
    """c -> (K + diag(damping))⁻¹ c, [B], damping > 0 a number or [B]: positive definite, it cannot break down."""
    rounding = torch.finfo(K.dtype).eps * K.trace()  # K has errors of this size: with less it could be indefinite
    K = K.to(torch.float64, copy=True)
    K.diagonal().add_(damping + rounding)
    chol, _ = torch.linalg.cholesky_ex(K)  # checks nothing, so that a GPU need not wait
    return lambda c: torch.cholesky_solve(c.double()[:, None], chol)[:, 0].to(c.dtype)


def gauss_newton_preconditioner(critic, batch, lam):
    """r -> ((2/B)𝒥ᵀ𝒥 + λI)⁻¹ r = (r - 𝒥ᵀ(K + (λB/2) I)⁻¹𝒥r)/λ for each Q network. (2/B is of the squares in (10); for
    another loss this is only a worse preconditioner.)"""
    x, sizes = torch.cat([batch.obs, batch.actions], dim=-1), [len(flatten(q.parameters())) for q in critic.children()]
    Js = [jacobian_factors(q, x)[1] for q in critic.children()]
    Ks = [tangent_kernel(J, J) for J in Js]
    # (r - fit)/λ is a difference of close numbers: far below the matrix's trace λ would leave rounding alone
    floor = torch.finfo(x.dtype).eps ** (2 / 3) * 2 / len(x) * sum(K.trace() for K in Ks)
    lam = floor.clamp(min=lam)
    solvers = [ridge_solver(K, lam * len(x) / 2) for K in Ks]

    def jvp(J, v):  # 𝒥v, [B], for a flat v like w
        parts = v.split([n for A, G in J for n in (G.shape[1] * A.shape[1], G.shape[1])])
        layers = zip(J, parts[::2], parts[1::2])
        return sum((torch.addmm(bias, A, weight.view(-1, A.shape[1]).T) * G).sum(1) for (A, G), weight, bias in layers)

    def preconditioner(r):
        fits = [flatten(vjp(J, solve(jvp(J, u)))) for J, solve, u in zip(Js, solvers, r.split(sizes))]
        return (r - torch.cat(fits)) / lam

    return preconditioner


def gauss_newton_gradients(actor, critic, target_critic, batch, lam, args):
    """`player_gradients` for the actor as leader, with 𝒥ᵀD𝒥 in place of ∇_w²L: v = (𝒥ᵀD𝒥 + λI)⁻¹ ∇_wf1.
    (∇₂₁f2)ᵀv = ∇_θ⟨∂L/∂Q, 𝒥v⟩ needs only 𝒥v = D⁻¹(K + λD⁻¹)⁻¹ 𝒥∇_wf1, a kernel ridge regression: when the critic
    re-fits, moving a target moves f1, and the actor descends its influence on the targets, too."""
    theta, B, seen = list(actor.parameters()), len(batch.obs), []

    def critic_pi(obs, actions):  # (s, a) and (s, μ_θ(s)) go through the layers together
        x = torch.cat([torch.cat([batch.obs, batch.actions], dim=-1), torch.cat([obs, actions], dim=-1)])
        seen.extend(jacobian_factors(q, x) for q in critic.children())
        return seen[0][0][B:]

    def critic_sa(obs, actions):
        assert actions is batch.actions, "Gauss-Newton needs a critic_loss of Q at the batch's (s, a) alone"
        return qs_sa[0]

    f_actor = actor_loss(actor, critic_pi, batch)
    qs, Js = zip(*seen)
    qs_sa, Js_sa = [q[:B].detach().requires_grad_() for q in qs], [[(A[:B], G[:B]) for A, G in J] for J in Js]
    f_critic = critic_loss(actor, critic_sa, target_critic, batch, args.gamma)
    grads = grad(f_actor, [*theta, *qs])
    direct, f1_q = grads[: len(theta)], grads[len(theta) :]  # f1_q: [2B], zero in the first B rows
    f2_q = grad(f_critic, qs_sa, create_graph=True)
    # critical: this is ∂²L/∂Q² only of an L that is a sum over samples and Q networks, strictly convex in each Q
    f2_qq = grad(f2_q, qs_sa, [torch.ones_like(q) for q in qs_sa])
    grad_w = [t for J, c in zip(Js_sa, f2_q) for t in vjp(J, c.detach())]
    Ks = [tangent_kernel(J_sa, J) for J_sa, J in zip(Js_sa, Js)]  # [B, 2B]
    Jv = [ridge_solver(K[:, :B], lam / D)(K @ c) / D for K, c, D in zip(Ks, f1_q, f2_qq)]
    grad_theta, info = total_derivative(direct, grad(f2_q, theta, [-u for u in Jv]))
    return f_actor.detach(), f_critic.detach(), grad_theta, grad_w, info


def player_gradients(actor, critic, target_actor, target_critic, batch, lam, args):
    """Both players' costs and gradients at the same (θ, w): f_actor, f_critic, two lists like θ and w, and info."""
    if args.leader == "actor" and args.curvature == "gauss-newton":
        return gauss_newton_gradients(actor, critic, target_critic, batch, lam, args)
    theta, w, info = list(actor.parameters()), list(critic.parameters()), {}
    f_actor = actor_loss(actor, critic, batch)
    f_critic = critic_loss(target_actor if args.target_policy else actor, critic, target_critic, batch, args.gamma)
    if args.leader == "none":
        grad_theta, grad_w = grad(f_actor, theta), grad(f_critic, w)
    elif args.leader == "actor":
        grad_w = grad(f_critic, w, create_graph=True)
        M = gauss_newton_preconditioner(critic, batch, lam) if args.precondition else None
        grad_theta, info = stackelberg_gradient(f_actor, f_critic, theta, w, lam, args.cg_iters, args.cg_tol, grad_w, M)
    else:
        grad_theta = grad(f_actor, theta, create_graph=True)
        grad_w, info = stackelberg_gradient(f_critic, f_actor, w, theta, lam, args.cg_iters, args.cg_tol, grad_theta)
    return f_actor.detach(), f_critic.detach(), [g.detach() for g in grad_theta], [g.detach() for g in grad_w], info


# Update
def optimizer_step(optimizer, grads):
    """One optimizer step along given gradients."""
    for p, g in zip(optimizer.param_groups[0]["params"], grads):
        p.grad = g.detach()
    optimizer.step()


def stackelberg_update(nets, optimizers, batches, lam, args, gradients=player_gradients):
    """One iteration of Algorithm 2 (with one batch: of Algorithm 1, (11)-(14)), and the target networks' step.
    nets: actor, critic, their targets; optimizers: the actor's, the critic's. The follower takes a step on each batch
    (fresh ones: it responds to the whole replay buffer), the leader one on the first. Returns both costs and info."""
    actor, critic, target_actor, target_critic = nets
    policy = target_actor if args.target_policy else actor
    f_actor, f_critic, *grads, info = gradients(*nets, batches[0], lam, args)  # at the same (θ_k, w_k)
    leader, follower = (1, 0) if args.leader == "critic" else (0, 1)
    optimizer_step(optimizers[follower], grads[follower])
    for batch in batches[1:]:
        critic_follows = policy, critic, target_critic, batch, args.gamma
        f2 = critic_loss(*critic_follows) if follower else actor_loss(actor, critic, batch)
        optimizer_step(optimizers[follower], grad(f2, list(nets[follower].parameters())))
    optimizer_step(optimizers[leader], grads[leader])  # last: the follower's steps are at the leader's old parameters
    with torch.no_grad():
        for target, net in ((target_actor, actor), (target_critic, critic)):
            torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), args.tau)
    return f_actor, f_critic, info


# Evaluation
def evaluate(actor, env, episodes, *key):
    """Undiscounted returns of `episodes` episodes without exploration noise; start states depend on `key` alone."""
    returns = []
    for episode in range(episodes):
        obs, info = reset(env, *key, episode), {}
        while "episode" not in info:
            with torch.no_grad():
                action = actor(torch.as_tensor(obs).to(actor.action_scale))
            obs, _, _, _, info = env.step(action.cpu().numpy())
        returns.append(float(info["episode"]["r"]))
    return np.array(returns)


# Checkpoint
ALGORITHM = "stddpg"  # marks the files that this script writes


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
    nets = [net(*spaces, args.hidden).to(device) for net in (Actor, Critic, Actor, Critic)]
    actor, critic, target_actor, target_critic = nets
    target_actor.requires_grad_(False).load_state_dict(actor.state_dict())
    target_critic.requires_grad_(False).load_state_dict(critic.state_dict())
    players = (actor, args.policy_lr), (critic, args.q_lr)
    optimizers = [torch.optim.Adam(list(x.parameters()), lr=lr, fused=True) for x, lr in players]
    buffer = ReplayBuffer(args.buffer_size, *spaces, device)
    if args.leader == "actor" and (args.precondition or args.curvature == "gauss-newton"):
        check_jacobian(critic, *spaces)
    gradients = player_gradients
    if args.compile:  # "fallback_random": noise from torch's generator, as without --compile
        torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad inside a compiled function
        gradients = torch.compile(player_gradients, fullgraph=True, options={"fallback_random": True})
    exp_name = args.exp_name or {"none": "ddpg", "actor": "stddpg-al", "critic": "stddpg-cl"}[args.leader]
    run_name = re.sub(r"[^\w.-]", "-", f"{args.env_id}__{exp_name}__{args.seed}__{time.time_ns() // 1000}")
    run_dir = Path(args.resume or f"runs/{run_name}")
    parts = {"actor": actor, "critic": critic, "target_actor": target_actor, "target_critic": target_critic}
    parts |= {"actor_optimizer": optimizers[0], "q_optimizer": optimizers[1], "buffer": buffer}
    start, episode, log_size, totals = 0, 0, 0, {}
    if args.resume:
        state, names = load(run_dir / "checkpoint.pt", args, "rng"), list(vars(args))
        for name in ["seed", "env_id", *names[names.index("buffer_size") :]]:  # what makes it that run
            if state["args"][name] != getattr(args, name):
                stop(f"cannot resume {run_dir}: its {name} is {state['args'][name]}, not {getattr(args, name)}")
        start, episode, log_size, totals = (state[x] for x in ("global_step", "episode", "log_size", "totals"))
        if start > args.total_timesteps:
            stop(f"cannot resume {run_dir}: it is at step {start}, beyond --total-timesteps")
        for name, part in parts.items():
            part.load_state_dict(state.pop(name))
        torch.set_rng_state(state["rng"])
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    eval_env = make_env(args.env_id, args.capture_video and run_dir / f"videos/from-{start}", args.eval_episodes)
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
    obs, checkpoint_step, timer = reset(env, args.seed, 0, episode), start, time.perf_counter()
    steps = range(start + 1, args.total_timesteps + 1)
    for global_step in tqdm(steps, initial=start, total=args.total_timesteps, disable=None, dynamic_ncols=True):
        with torch.no_grad():
            if global_step <= args.start_steps:  # not action_space.sample(): environments may share that generator
                action = actor.action_bias + actor.action_scale * (2 * torch.rand_like(actor.action_scale) - 1)
            else:
                action = actor(torch.as_tensor(obs, dtype=torch.float32, device=device))
                action += args.exploration_noise * actor.action_scale * torch.randn_like(action)
        action = action.cpu().numpy().clip(env.action_space.low, env.action_space.high)
        next_obs, reward, terminated, _, info = env.step(action)
        if not np.abs(np.concatenate([obs, action, next_obs, [reward]])).max() <= np.finfo(np.float32).max:
            stop(f"step {global_step}: an action, an observation or the reward is not finite (in float32)", 1)
        buffer.add(obs, action, reward, next_obs, terminated)
        obs = np.array(next_obs)
        if global_step >= args.learning_starts:
            batches = [buffer.sample(args.batch_size) for _ in range(args.unroll)]
            lam = torch.full((), args.lam * math.exp(-global_step / (args.lam_decay or math.inf)), device=device)
            f_actor, f_critic, solve = stackelberg_update(nets, optimizers, batches, lam, args, gradients)
            if not (f_actor + f_critic).isfinite():
                stop(f"step {global_step}: a loss is not finite", 1)
            for name, value in solve.items():
                name = f"cg_{name}" if name in ("residual", "iterations") else name
                totals[name] = totals.get(name, 0) + value
            if global_step % 100 == 0:
                q1 = critic(batches[0].obs, batches[0].actions)
                y = td_target(target_actor if args.target_policy else actor, target_critic, batches[0], args.gamma)
                losses = {"actor_loss": f_actor, "qf1_values": q1, "qf1_loss": (q1 - y) ** 2}
                scalars = {f"losses/{name}": value.mean() for name, value in losses.items()}
                updates = min(100, global_step - args.learning_starts + 1)
                scalars |= {f"stackelberg/{name}": total / updates for name, total in totals.items()}
                scalars |= {"stackelberg/lam": lam} if solve else {}
                scalars["charts/SPS"] = (global_step - start) / (time.perf_counter() - timer)
                for name, value in scalars.items():
                    writer.add_scalar(name, value, global_step)
                totals = {}

        if global_step % args.eval_every == 0:
            scores = evaluate(actor, eval_env, args.eval_episodes, args.seed, 1, global_step)
            writer.add_scalar("eval/episodic_return", scores.mean(), global_step)
            writer.add_scalar("eval/episodic_return_std", scores.std(), global_step)
            line = f"step {global_step}: eval return {scores.mean():.2f} ± {scores.std():.2f} ({len(scores)} episodes)"
            tqdm.write(line)
            print(line, file=log, flush=True)
        if "episode" in info:
            writer.add_scalar("charts/episodic_return", info["episode"]["r"], global_step)
            writer.add_scalar("charts/episodic_length", info["episode"]["l"], global_step)
            episode += 1
            if global_step - checkpoint_step >= args.checkpoint_every:
                if not flatten([*actor.parameters(), *critic.parameters()]).isfinite().all():
                    stop(f"step {global_step}: a parameter is not finite", 1)
                writer.flush()
                state = {"args": vars(args), "rng": torch.get_rng_state()}
                state["cuda_rng"] = torch.cuda.get_rng_state_all() if device.type == "cuda" else []
                state |= {"global_step": global_step, "episode": episode, "log_size": log.tell(), "totals": totals}
                save(run_dir / "checkpoint.pt", **state, **{name: part.state_dict() for name, part in parts.items()})
                checkpoint_step = global_step
            obs = reset(env, args.seed, 0, episode)
    if args.save_model:
        save(run_dir / "model.pt", args=vars(args), actor=actor.state_dict(), critic=critic.state_dict())
    writer.close()
    eval_env.close()
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
