# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11,<2.14", "gymnasium[mujoco]>=1.2", "numpy", "tensorboard", "tqdm", "tyro>=0.9"]
# ///
"""Stackelberg deep deterministic policy gradient (STDDPG-AL, STDDPG-CL) and plain DDPG in one file.

Zheng, Fiez, Alumbaugh, Chasnov, Ratliff: Stackelberg Actor-Critic: Game-Theoretic Reinforcement Learning Algorithms,
2021. Numbers in parentheses are the paper's equations. Every player minimises a cost: the actor (parameters θ)
-J(θ, w), the critic (parameters w) L(θ, w). The leader follows the total derivative of its cost through the
follower's best response; everything else is DDPG.

    python stddpg.py --env-id Hopper-v4 --leader actor --lam 500     # STDDPG-AL
    python stddpg.py --env-id Hopper-v4 --leader critic              # STDDPG-CL
    python stddpg.py --env-id Hopper-v4 --leader none                # DDPG
    python stddpg.py --resume runs/Hopper-v4__stddpg-al__1__1700000000
    python stddpg.py --evaluate runs/Hopper-v4__stddpg-al__1__1700000000/model.pt
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
    num_threads: int = 1
    """CPU threads of this run; more only pay where cores are idle"""
    compile: bool = False
    """compile the gradients with torch.compile: needs a C++ compiler and ten seconds to a minute at the start; every
    solve then takes all of its --cg-iters, so give it three"""
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
    counts = "unroll cg_iters batch_size total_timesteps eval_every eval_episodes checkpoint_every num_threads"
    for name in counts.split():
        if getattr(args, name) < 1:
            stop(f"--{name.replace('_', '-')} must be at least 1")
    for ok, message in [
        (0 <= args.seed < 2**32, "--seed must be in [0, 2^32)"),
        (0 <= args.lam < math.inf, "--lam must be finite and at least 0 (λ → ∞ is --leader none)"),
        (args.lam_decay is None or args.lam_decay > 0, "--lam-decay must be positive"),
        (0 <= args.cg_tol < 1, "--cg-tol must be in [0, 1)"),
        (
            args.curvature == "hessian" or args.leader != "critic",
            "--curvature gauss-newton needs the actor as leader: with the critic as leader the follower's cost is -J, "
            "which is no sum of squares",
        ),
        (args.curvature == "hessian" or args.lam > 0, "--curvature gauss-newton needs a positive --lam"),
        (args.batch_size <= args.buffer_size, "--batch-size must not be larger than --buffer-size"),
        (0 <= args.gamma <= 1, "--gamma must be in [0, 1]"),
        (0 < args.tau <= 1, "--tau must be in (0, 1]"),
        (args.policy_lr >= 0 and args.q_lr >= 0, "--policy-lr and --q-lr must be at least 0"),
        (args.exploration_noise >= 0, "--exploration-noise must be at least 0"),
        (not args.target_policy or args.leader == "none", "--target-policy takes θ out of L: it needs --leader none"),
        (all(width >= 1 for width in args.hidden), "--hidden must be positive layer widths"),
        (args.start_steps >= 0 and args.learning_starts >= 0, "--start-steps, --learning-starts must be at least 0"),
    ]:
        if not ok:
            stop(message)


# Environment
def make_env(env_id, capture_video=False):
    """One environment with flat observations and the statistics of its episodes; stops if it does not suit."""
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
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        stop(f"{env_id} has the action space {space}; a one-dimensional Box is needed")
    width = space.high.astype(np.float64) - space.low
    if not ((0 < width) & (width < np.finfo(np.float32).max)).all():
        stop(f"{env_id} has the unbounded (or empty) action space {space}; a bounded one is needed")
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
    return np.array(obs)  # a copy: some environments change their array in place


# Networks
def mlp(*sizes):
    """Linear layers of the given sizes with ReLU between them."""
    layers = []
    for n_in, n_out in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Deterministic policy μ_θ(s), scaled to the bounds of the action space."""

    def __init__(self, observation_space, action_space, hidden=(256, 256)):
        super().__init__()
        obs_dim, act_dim = math.prod(observation_space.shape), math.prod(action_space.shape)
        self.net = mlp(obs_dim, *hidden, act_dim)
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
        n_in = math.prod(observation_space.shape) + math.prod(action_space.shape)
        self.q1 = mlp(n_in, *hidden, 1)

    def forward(self, obs, actions):
        """obs [B, obs_dim], actions [B, act_dim] -> Q_w, [B]."""
        x = torch.cat([obs, actions], dim=-1)
        return self.q1(x).squeeze(-1)  # critical: [B, 1] against [B] would broadcast


# Replay buffer
class Batch(NamedTuple):
    """ξ = (s, a, r, s') and whether s' is terminal: tensors, first axis B."""

    obs: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    next_obs: torch.Tensor
    terminated: torch.Tensor


class ReplayBuffer:
    """The last `size` transitions, on `device`, in float32."""

    def __init__(self, size, observation_space, action_space, device):
        obs, act = observation_space.shape, action_space.shape
        # empty, not zeros: memory is only taken once it is written to
        self.data = Batch(*(torch.empty(size, *shape, device=device) for shape in (obs, act, (), obs, ())))
        self.size, self.count, self.device = size, 0, device

    def __len__(self):
        return min(self.count, self.size)

    def add(self, *transition):
        """(s, a, r, s', terminated). A time limit is not terminal: the critic bootstraps through it."""
        for column, value in zip(self.data, transition):
            column[self.count % self.size] = torch.as_tensor(value)
        self.count += 1

    def sample(self, batch_size):
        """A batch drawn uniformly with replacement."""
        index = torch.randint(len(self), (batch_size,), device=self.device)
        return Batch(*(column.index_select(0, index) for column in self.data))

    def state_dict(self):
        # a copy: saving a slice would write the whole buffer
        return {"data": [column[: len(self)].to("cpu", copy=True) for column in self.data], "count": self.count}

    def load_state_dict(self, state):
        self.count = int(state["count"])
        for column, saved in zip(self.data, state["data"], strict=True):
            column[: len(self)] = saved


# Losses
def actor_loss(actor, critic, batch):
    """The actor's cost -J(θ, w), (7): a scalar."""
    return -critic(batch.obs, actor(batch.obs)).mean()


def td_target(actor, target_critic, batch, gamma):
    """y = r + γ Q_0(s', μ_θ(s')), in (8), [B].

    The next action is the current policy's (footnote 4), so y depends on θ through the action, and only so does L.
    Critical: no `no_grad` here, or the leader's implicit term is zero and STDDPG is DDPG.
    """
    return batch.rewards + gamma * (1 - batch.terminated) * target_critic(batch.next_obs, actor(batch.next_obs))


def critic_loss(actor, critic, target_critic, batch, gamma):
    """The critic's cost L(θ, w), (8): a scalar, differentiable in w and, through y, in θ."""
    y = td_target(actor, target_critic, batch, gamma)
    return ((critic(batch.obs, batch.actions) - y) ** 2).mean()


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


# The actor as leader: the critic's tangent kernel
def jacobian_factors(q, x):
    """A Q network at its inputs x, [B, n_in] -> Q, [B], and the Jacobian 𝒥 = ∂Q/∂w in factors.

    The factors are a pair (A, Δ) for each linear layer, its inputs and ∂Q/∂(its outputs), [B, width] each: row i of 𝒥
    is the outer product Δ_i A_iᵀ for the layer's weights, and Δ_i for its biases.
    """
    layers, inputs = list(q)[::2], [x]  # with ReLU between them
    for layer in layers[:-1]:
        inputs.append(F.relu(layer(inputs[-1])))
    out = layers[-1](inputs[-1])
    deltas = [torch.ones_like(out)]
    for layer, A in zip(layers[:0:-1], inputs[:0:-1]):
        deltas.insert(0, deltas[0] @ layer.weight * A.sign())  # A ≥ 0, so this is ReLU's derivative
    return out.squeeze(-1), list(zip(inputs, deltas))


def rows(J, index):
    """The Jacobian at a part of the batch."""
    return [(A[index], D[index]) for A, D in J]


def vjp(J, c):
    """𝒥ᵀc, a list of tensors like w, for c of shape [B]."""
    return [t for A, D in J for t in ((D * c[:, None]).T @ A, D.T @ c)]


def layerwise(J, v):
    """A flat v like w as the layers' pairs of weight and bias."""
    shapes = [(D.shape[1], A.shape[1]) for A, D in J]
    parts = v.split([n for n_out, n_in in shapes for n in (n_out * n_in, n_out)])
    return [(weight.view(shape), bias) for weight, bias, shape in zip(parts[::2], parts[1::2], shapes)]


def jvp(J, v):
    """𝒥v, [B], for a flat v like w."""
    return sum((torch.addmm(bias, A, weight.T) * D).sum(1) for (A, D), (weight, bias) in zip(J, layerwise(J, v)))


def hessian_vector_product(q, J, f2_q, v):
    """∇_w²L v, flat like w, for L = Σ (Q_i - y_i)²/B: Pearlmutter's (1994) derivative of the backward pass along v.

    f2_q: ∂L/∂Q, [B]. Equal to double backward through L, with J instead of a graph.
    """
    layers, V, product = list(q)[::2], layerwise(J, v), []
    dA, dinputs = torch.zeros_like(J[0][0]), []  # derivatives along v
    for i, (layer, (A, _), (weight, bias)) in enumerate(zip(layers, J, V)):
        dinputs.append(dA)
        dout = torch.addmm(torch.addmm(bias, A, weight.T), dA, layer.weight.T)
        if i + 1 < len(layers):
            dA = dout * J[i + 1][0].sign()
    ddelta = 2 / len(f2_q) * dout
    for layer, (A, D), (weight, _), dA in list(zip(layers, J, V, dinputs))[::-1]:
        delta = D * f2_q[:, None]
        product = [torch.addmm(ddelta.T @ A, delta.T, dA), ddelta.sum(0), *product]
        if dA is not dinputs[0]:
            ddelta = torch.addmm(ddelta @ layer.weight, delta, weight) * A.sign()
    return flatten(product)


def tangent_kernel(J1, J2):
    """𝒥₁𝒥₂ᵀ, [B₁, B₂]: how fitting Q at one sample moves it at another."""
    return sum((A1 @ A2.T + 1) * (D1 @ D2.T) for (A1, D1), (A2, D2) in zip(J1, J2))


def ridge_solver(K, lam):
    """c -> (K + (λB/2) I)⁻¹ c, [B]: positive definite for every λ > 0, so it cannot break down."""
    rounding = torch.finfo(K.dtype).eps * K.trace()  # K's own; a smaller λ would leave K indefinite
    K = K.to(torch.float64, copy=True)
    K.diagonal().add_(len(K) / 2 * lam + rounding)
    L, _ = torch.linalg.cholesky_ex(K)  # checks nothing, so that a GPU need not wait
    return lambda c: torch.cholesky_solve(c.double()[:, None], L)[:, 0].to(c.dtype)


def target_weights(qs, Js, f1_q, f2_q, lam, args):
    """df1/dy, [B]: what moving each target changes in the leader's cost once the follower has re-fit.

        df1/dy_i = (2/B) ∇_wQ_w(s_i, a_i)·v,    v = (∇_w²L + λI)⁻¹ ∇_w f1          (summed over the Q networks)

    The Gauss-Newton part of ∇_w²L is (2/B)𝒥ᵀ𝒥. With it alone this is kernel ridge regression, (K + (λB/2) I)⁻¹ 𝒥∇_w f1;
    with all of ∇_w²L it is the preconditioner.
    qs: the Q networks; for each of them, Js: the Jacobian at (s, a) and then (s, μ_θ(s)), 2B rows; f2_q: ∂L/∂Q at the
    former, f1_q: ∂f1/∂Q at the latter, [B]. Returns df1/dy and the solver's info.
    """
    B = len(f2_q[0])
    Js, Js_all, Js_pi = [rows(J, slice(B)) for J in Js], Js, [rows(J, slice(B, None)) for J in Js]
    if args.curvature == "gauss-newton":
        kernels = [tangent_kernel(J, J_all) for J, J_all in zip(Js, Js_all)]
        return sum(ridge_solver(K[:, :B], lam)(K[:, B:] @ c) for K, c in zip(kernels, f1_q)), {}
    grad2_f1 = flatten([t for J_pi, c in zip(Js_pi, f1_q) for t in vjp(J_pi, c)])

    def damped_hessian(v):
        parts = zip(qs, Js, f2_q, v.chunk(len(qs)))  # block diagonal
        return torch.cat([hessian_vector_product(q, J, c, u) for q, J, c, u in parts]) + lam * v

    preconditioner = None
    if args.precondition:
        kernels = [tangent_kernel(J, J) for J in Js]
        # (r - fit)/λ is a difference of close numbers: with a λ below this bound it would be rounding alone
        bound = torch.finfo(grad2_f1.dtype).eps ** (2 / 3) * 2 / B * sum(K.trace() for K in kernels)
        damping = bound.clamp(min=lam)
        solvers = [ridge_solver(K, damping) for K in kernels]

        def preconditioner(r):
            """((2/B)𝒥ᵀ𝒥 + λI)⁻¹ r = (r - 𝒥ᵀ(K + (λB/2) I)⁻¹𝒥r)/λ for each Q network."""
            fits = [flatten(vjp(J, solve(jvp(J, u)))) for J, solve, u in zip(Js, solvers, r.chunk(len(Js)))]
            return (r - torch.cat(fits)) / damping

    v, info = conjugate_gradient(damped_hessian, grad2_f1, args.cg_iters, args.cg_tol, preconditioner)
    return 2 / B * sum(jvp(J, u) for J, u in zip(Js, v.chunk(len(Js)))), info


def actor_leads(actor, critic, target_critic, batch, lam, args):
    """The players' costs and gradients, the leader being the actor: `stackelberg_gradient` with f1 = -J and f2 = L.

    L depends on θ only through the targets y_i, so ∇₁f1 - (∇₂₁f2)ᵀv = ∇_θf1 + Σ_i df1/dy_i ∇_θy_i: when the critic
    re-fits, moving a target moves the actor's cost, so the actor descends its own influence on the targets, too.
    Returns f_actor, f_critic, their gradients (lists like θ and w) and info.
    """
    theta, B = list(actor.parameters()), len(batch.obs)
    actions = actor(batch.obs)
    y = td_target(actor, target_critic, batch, args.gamma)
    with torch.no_grad():
        x, x_pi = torch.cat([batch.obs, batch.actions], dim=-1), torch.cat([batch.obs, actions], dim=-1)
        q_all, J = jacobian_factors(critic.q1, torch.cat([x, x_pi]))
        q, q_pi = q_all.chunk(2)
        f1_q, f2_q = torch.full_like(q, -1 / B), 2 / B * (q - y)
        f1_actions = f1_q[:, None] * (J[0][1][B:] @ critic.q1[0].weight[:, -actions.shape[1] :])
        weights, info = target_weights([critic.q1], [J], [f1_q], [f2_q], lam, args)
        f_actor, f_critic, grad_w = -q_pi.mean(), F.mse_loss(q, y), vjp(rows(J, slice(B)), f2_q)
    direct, implicit = grad(actions, theta, f1_actions), grad(y, theta, weights)
    grad_theta = [a + b for a, b in zip(direct, implicit)]
    return f_actor, f_critic, grad_theta, grad_w, info | term_sizes(direct, implicit)


def player_gradients(actor, critic, target_critic, policy, batch, lam, args):
    """Both players' costs and gradients at the same (θ, w): f_actor, f_critic, two lists like θ and w, and info.

    policy: the one of the targets.
    """
    if args.leader == "actor":
        return actor_leads(actor, critic, target_critic, batch, lam, args)
    f_actor, f_critic = actor_loss(actor, critic, batch), critic_loss(policy, critic, target_critic, batch, args.gamma)
    theta, w, info = list(actor.parameters()), list(critic.parameters()), {}
    grad_theta = grad(f_actor, theta, create_graph=args.leader == "critic")
    if args.leader == "critic":
        grad_w, info = stackelberg_gradient(f_critic, f_actor, w, theta, lam, args.cg_iters, args.cg_tol, grad_theta)
    else:
        grad_w = grad(f_critic, w)
    return f_actor.detach(), f_critic.detach(), [g.detach() for g in grad_theta], grad_w, info


# Update
def optimizer_step(optimizer, params, grads):
    """One optimizer step along given gradients."""
    for p, g in zip(params, grads):
        p.grad = g.detach()
    optimizer.step()


def stackelberg_update(nets, optimizers, batches, lam, args, gradients=player_gradients):
    """One iteration of Algorithm 2 (with one batch: of Algorithm 1, (11)-(14)), and the target networks' step.

    nets: actor, critic, target actor, target critic; optimizers: the actor's, the critic's; gradients: what to call,
    `player_gradients` or its compiled form.
    The follower takes a step on each of the batches, the leader one on the first; both first gradients are taken at
    the same (θ_k, w_k). Every batch is a fresh sample: the follower's best response is to the whole replay buffer,
    and m steps on one minibatch would fit that minibatch.
    Returns the actor's and the critic's cost on the first batch, and the solver's info.
    """
    actor, critic, target_actor, target_critic = nets
    policy = target_actor if args.target_policy else actor
    f_actor, f_critic, grad_theta, grad_w, info = gradients(actor, critic, target_critic, policy, batches[0], lam, args)
    theta_step = optimizers[0], list(actor.parameters()), grad_theta
    w_step = optimizers[1], list(critic.parameters()), grad_w
    follower, leader = (theta_step, w_step) if args.leader == "critic" else (w_step, theta_step)
    optimizer_step(*follower)
    for batch in batches[1:]:
        optimizer, x2, _ = follower
        if args.leader == "critic":
            f2 = actor_loss(actor, critic, batch)
        else:
            f2 = critic_loss(policy, critic, target_critic, batch, args.gamma)
        optimizer_step(optimizer, x2, grad(f2, x2))
    optimizer_step(*leader)  # last: the follower's steps are all taken at the leader's old parameters
    with torch.no_grad():
        torch._foreach_lerp_(list(target_critic.parameters()), list(critic.parameters()), args.tau)
        torch._foreach_lerp_(list(target_actor.parameters()), list(actor.parameters()), args.tau)
    return f_actor, f_critic, info


# Evaluation
def evaluate(actor, env, episodes, *key):
    """Undiscounted returns of `episodes` episodes without exploration noise; start states depend on `key` alone."""
    device, returns = actor.action_scale.device, []
    for episode in range(episodes):
        obs, done = reset(env, *key, episode), False
        while not done:
            with torch.no_grad():
                action = actor(torch.as_tensor(obs, dtype=torch.float32, device=device))
            obs, _, terminated, truncated, info = env.step(action.cpu().numpy())
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
ALGORITHM = "stddpg"  # marks the files that this script writes
CHANGEABLE = set(  # when a run is carried on; all other flags decide which run it is
    "total_timesteps resume evaluate eval_every eval_episodes checkpoint_every save_model cuda num_threads compile "
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
    gradients = player_gradients
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad inside a compiled function
        # "fallback_random": noise from torch's generator, as without --compile
        compiled = torch.compile(player_gradients, fullgraph=True, options={"fallback_random": True})

        def gradients(*inputs):  # a number would be compiled in, a tensor may change
            return compiled(*(torch.tensor(x) if isinstance(x, float) else x for x in inputs))

        try:
            torch.compile(torch.sin, fullgraph=True)(torch.ones(2, device=device))
        except Exception as e:  # no compiler, or one that does not work
            stop(f"--compile needs a working C++ compiler: {str(e).strip().splitlines()[0]}")
    if args.track:
        try:
            import wandb
        except ImportError:
            stop("--track needs Weights and Biases: pip install wandb")

    env, eval_env = make_env(args.env_id), make_env(args.env_id, args.capture_video)
    spaces = env.observation_space, env.action_space
    nets = [net(*spaces, args.hidden).to(device) for net in (Actor, Critic, Actor, Critic)]
    actor, critic, target_actor, target_critic = nets
    target_actor.load_state_dict(actor.state_dict())
    target_actor.requires_grad_(False)
    target_critic.load_state_dict(critic.state_dict())
    target_critic.requires_grad_(False)
    actor_optimizer = torch.optim.Adam(list(actor.parameters()), lr=args.policy_lr, fused=True)
    q_optimizer = torch.optim.Adam(list(critic.parameters()), lr=args.q_lr, fused=True)
    optimizers = actor_optimizer, q_optimizer
    try:
        buffer = ReplayBuffer(args.buffer_size, *spaces, device)
    except (MemoryError, RuntimeError):
        stop(f"--buffer-size {args.buffer_size} does not fit into memory")
    parts = {"actor": actor, "critic": critic, "target_actor": target_actor, "target_critic": target_critic}
    parts |= {"actor_optimizer": actor_optimizer, "q_optimizer": q_optimizer, "buffer": buffer}
    start, episode, log_size = 0, 0, 0
    if args.resume:
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            start, episode, log_size = (int(state[name]) for name in ("global_step", "episode", "log_size"))
            if not (start >= len(buffer) > 0 and episode >= 0 and log_size >= 0):
                raise ValueError("its counters are impossible")
            torch.set_rng_state(state["rng"])
            if device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"])
        except Exception as e:  # a file can hold anything
            stop(f"cannot resume {args.resume}: its checkpoint is not of this run ({' '.join(str(e).split())})")
        del state  # the buffer is in memory twice until here
        if args.total_timesteps < start:
            stop(f"cannot resume {args.resume}: it is at step {start}, --total-timesteps is {args.total_timesteps}")

    run_dir = Path(args.resume) if args.resume else new_run_dir(args)
    if args.capture_video:
        first = lambda e: e % args.eval_episodes == 0  # noqa: E731
        eval_env = gym.wrappers.RecordVideo(eval_env, str(run_dir / "videos"), first, name_prefix=f"eval-{start}")
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
        stop(f"step {global_step}: {message}; the last good checkpoint, if there is one, is in {run_dir}", 1)

    def speed():  # steps per second since the first updates, evaluations not counted
        return int((global_step - timer_step) / (time.perf_counter() - timer_start))

    obs = reset(env, args.seed, 0, episode)
    checkpoint_step, updates, counted, totals, shown = start, 0, 0, {}, {}
    timer_start, timer_step = time.perf_counter(), start
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # SPS, not the bar's own rate
    bar = tqdm(total=args.total_timesteps, initial=start, disable=None, dynamic_ncols=True, bar_format=form)
    for global_step in range(start + 1, args.total_timesteps + 1):
        with torch.no_grad():
            if global_step <= args.start_steps:  # not action_space.sample(): environments may share that generator
                action = actor.action_bias + actor.action_scale * (2 * torch.rand_like(actor.action_scale) - 1)
            else:
                action = actor(torch.as_tensor(obs, dtype=torch.float32, device=device))
                action += args.exploration_noise * actor.action_scale * torch.randn_like(action)
        action = action.cpu().numpy().clip(env.action_space.low, env.action_space.high)
        if not np.isfinite(action).all():
            abort("the policy's action is not finite")
        next_obs, reward, terminated, truncated, info = env.step(action)
        if not np.abs(np.concatenate([obs, next_obs, [reward]])).max() <= np.finfo(np.float32).max:
            abort("the environment returned an observation or a reward that is not finite (in float32)")
        buffer.add(obs, action, reward, next_obs, terminated)
        obs = np.array(next_obs)

        if global_step >= args.learning_starts:
            batches = [buffer.sample(args.batch_size) for _ in range(args.unroll)]
            lam = args.lam * math.exp(-global_step / args.lam_decay) if args.lam_decay else args.lam
            f_actor, f_critic, solve = stackelberg_update(nets, optimizers, batches, lam, args, gradients)
            if not (f_actor + f_critic).isfinite():
                abort("a loss is not finite")
            totals = {name: totals.get(name, 0) + value for name, value in solve.items()}
            updates, counted = updates + 1, counted + 1
            if updates == 10:  # steps without updates do not count, and the first updates are slow
                timer_start, timer_step = time.perf_counter(), global_step

        if global_step % 100 == 0 and updates:
            with torch.no_grad():
                q1 = critic(batches[0].obs, batches[0].actions)
                policy = target_actor if args.target_policy else actor
                y = td_target(policy, target_critic, batches[0], args.gamma)
            scalars = {
                "losses/qf1_values": q1.mean(),
                "losses/qf1_loss": F.mse_loss(q1, y),
                "losses/actor_loss": f_actor,
            }
            if updates > 10:
                scalars["charts/SPS"] = shown["SPS"] = speed()
            if args.leader != "none":  # means over the updates since the last time
                for name, total in totals.items():
                    name = f"cg_{name}" if name in ("residual", "iterations") else name
                    scalars[f"stackelberg/{name}"] = total / counted
                scalars["stackelberg/lam"] = lam
            for name, value in scalars.items():
                writer.add_scalar(name, float(value), global_step)
            totals, counted = {}, 0
            bar.set_postfix(shown, refresh=False)
        bar.update()

        if global_step % args.eval_every == 0:
            sps, paused = speed(), time.perf_counter()
            returns = evaluate(actor, eval_env, args.eval_episodes, args.seed, 1, global_step)
            timer_start += time.perf_counter() - paused
            writer.add_scalar("eval/episodic_return", returns.mean(), global_step)
            writer.add_scalar("eval/episodic_return_std", returns.std(), global_step)
            line = f"step {global_step}: eval return {returns.mean():.2f} ± {returns.std():.2f}"
            line += f" ({args.eval_episodes} episodes), {sps} steps/s"
            tqdm.write(line)
            print(line, file=log, flush=True)
            shown["eval"] = f"{returns.mean():.1f}"

        if terminated or truncated:
            writer.add_scalar("charts/episodic_return", info["episode"]["r"], global_step)
            writer.add_scalar("charts/episodic_length", info["episode"]["l"], global_step)
            shown["return"] = f"{info['episode']['r']:.1f}"
            episode += 1
            if global_step - checkpoint_step >= args.checkpoint_every:
                if not all(p.isfinite().all() for p in [*actor.parameters(), *critic.parameters()]):
                    abort("a parameter is not finite")
                writer.flush()
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= {"args": asdict(args), "global_step": global_step, "episode": episode, "log_size": log.tell()}
                state |= {"rng": torch.get_rng_state()}
                state["cuda_rng"] = torch.cuda.get_rng_state() if device.type == "cuda" else None
                save(run_dir / "checkpoint.pt", **state)
                del state
                checkpoint_step = global_step
            obs = reset(env, args.seed, 0, episode)

    if args.save_model:
        save(run_dir / "model.pt", args=asdict(args), actor=actor.state_dict(), critic=critic.state_dict())
    bar.close()
    writer.close()
    log.close()
    env.close()
    eval_env.close()
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
