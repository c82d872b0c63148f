# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11,<2.14", "gymnasium[mujoco]>=1.2", "numpy", "tensorboard", "tqdm", "tyro>=0.9"]
# ///
"""Stackelberg actor-critic (STAC) and plain on-policy actor-critic (AC) in one file.

Zheng, Fiez, Alumbaugh, Chasnov, Ratliff: Stackelberg Actor-Critic: Game-Theoretic Reinforcement Learning Algorithms,
2021. Numbers in parentheses are its equations. Actor and critic are two players. The actor (θ) minimises -J(θ, w), the
critic (w) minimises L(θ, w), and the actor leads: it follows the total derivative of its cost through the critic's best
response. With player 1 the leader, of cost f1, and player 2 the follower, of cost f2, it is, regularized as in
Section 4.5,

    ∇₁f1 - (∇₂₁f2)ᵀ (∇₂²f2 + λI)⁻¹ ∇₂f1.

Everything else is Spinning Up's vanilla policy gradient, but for plain gradient descent and networks of (64, 32) units
(Appendix E), actions that are clipped to their Box, and --unroll critic steps a batch.

    python stac_ac.py --env-id CartPole-v1 --leader actor --lam 0 --unroll 80    # STAC; none: AC
    python stac_ac.py --env-id Hopper-v4 --run-dir runs/hopper       # begins there; the same command carries it on
    python stac_ac.py --evaluate runs/hopper/model.pt                # plays a model that --save-model has saved

The term through the best response, the implicit one, needs ∇_w∇_θL, and ∇_θL is an expectation over trajectories from a
start state s_0 (Proposition 1, Theorem 1). Which states of the batch count as s_0, --start-states says:

    released    the batch's first state alone, as in the released code: AC's gradient times a number, about 2 at λ = 0
    every       every visited state, as the start of its trajectory's rest: those that the critic's loss averages over
    initial     the first state of each trajectory: the propositions as they are written (∇_w²L stays that of all)

With a small λ and the full Hessian a solve often stops early (in TensorBoard stackelberg/negative_curvature is 1 then):
say --curvature gauss-newton.
"""

import atexit
import copy
import fcntl
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
from contextlib import contextmanager
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
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# the v4 tasks are the nearest to the paper's: silence the warning that they are old, and no other
warnings.filterwarnings("ignore", r".*The environment \S+ is out of date", DeprecationWarning)


@dataclass
class Args:
    exp_name: str = ""  # name of the experiment (default: the algorithm's, which is ac or stac-al)
    seed: int = 1  # seed of the experiment
    cuda: bool = True  # update on a GPU if there is one (the policy acts on the CPU)
    track: bool = False  # send the curves to Weights & Biases (needs wandb; WANDB_PROJECT, WANDB_ENTITY: where to)
    capture_video: bool = False  # record the first episode of --evaluate (needs moviepy; `videos` beside the model)
    save_model: bool = False  # save the model (`model.pt` in the run's folder) at the end
    run_dir: str | None = None  # folder of the run: begins it or carries it on (default: a new folder in runs)
    evaluate: str | None = None  # a model.pt to play on its own task, for --eval-episodes episodes, instead of training
    eval_episodes: int = 10  # episodes of --evaluate, played by the most likely action
    checkpoint_every: int = 10_000  # environment steps between two checkpoints; each waits for the end of a batch

    # Algorithm specific arguments
    env_id: str = "CartPole-v1"  # the environment id of the task, with discrete or continuous actions
    max_episode_steps: int | None = None  # time limit of an episode (default: the task's own)
    total_timesteps: int = 800_000  # total timesteps of the experiment; the last batch is the last that fits
    num_steps: int = 4_000  # the number of steps in a batch; it begins a new episode and cuts its last one
    gamma: float = 0.99  # the discount factor gamma
    gae_lambda: float = 0.97  # the lambda of the generalized advantage estimation, of a V critic
    norm_adv: bool = True  # centre the advantages, and divide the actor's gradient by their standard deviation
    policy_lr: float = 0.1  # the learning rate of the actor's gradient descent
    critic_lr: float = 0.01  # the learning rate of the critic's gradient descent
    grad_noise: float = 0.0  # standard deviation of Gaussian noise on each gradient (the released code has 0.05)
    hidden: tuple[int, ...] = (64, 32)  # hidden layers of the actor and of the critic
    critic: Literal["v", "q"] = "v"  # V_w(s), of Proposition 1, or Q_w(s, a), of (2) to (4) and Theorem 1

    # The Stackelberg game
    leader: Literal["actor", "none"] = "actor"  # follows its total derivative; none: plain AC, its limit λ → ∞
    lam: float = 500.0  # λ of ∇_w²L + λI (Section 4.5), for MuJoCo. CartPole: the paper has 0; 500 leaves little but AC
    lam_decay: float | None = None  # λ exp(-t / lam_decay) at step t; the released code has 1e5 (default: λ stays)
    unroll: int = 1  # m of Algorithm 2: critic steps on a batch, for one of the actor's
    start_states: Literal["released", "every", "initial"] = "released"  # which states are an s_0, see above
    curvature: Literal["hessian", "gauss-newton"] = "hessian"  # ∇_w²L, or its part without negative eigenvalues
    cg_iters: int = 10  # most iterations of a solve, a Hessian-vector product each
    cg_tol: float = 0.01  # relative residual at which a solve stops


def stop(message):
    """Ends the program with one line."""
    raise SystemExit(f"{Path(__file__).name}: error: {message}")


def check_args(args):
    """Refuses values that no run can have, in one line that names the flag."""
    conditions = [
        ("--seed must be at least 0 and below 2147483648", 0 <= args.seed < 2**31),
        ("--capture-video needs --evaluate", args.evaluate or not args.capture_video),
        ("--eval-episodes must be positive", args.eval_episodes > 0),
        ("--checkpoint-every must be positive", args.checkpoint_every > 0),
        ("--max-episode-steps must be positive", args.max_episode_steps is None or args.max_episode_steps > 0),
        ("--total-timesteps must be positive", args.total_timesteps > 0),
        ("--run-dir must not be empty", args.run_dir != ""),
        ("--evaluate must not be empty", args.evaluate != ""),
        ("--num-steps must be positive", args.num_steps > 0),
        ("--num-steps must not be larger than --total-timesteps", args.num_steps <= args.total_timesteps),
        ("--gamma must be between 0 and 1", 0 <= args.gamma <= 1),
        ("--gae-lambda must be between 0 and 1", 0 <= args.gae_lambda <= 1),
        ("--policy-lr must be between 0 and 1e6", 0 <= args.policy_lr <= 1e6),
        ("--critic-lr must be between 0 and 1e6", 0 <= args.critic_lr <= 1e6),
        ("--grad-noise must be between 0 and 1e6", 0 <= args.grad_noise <= 1e6),
        ("--hidden must be positive numbers", all(width > 0 for width in args.hidden)),
        ("--lam must be between 0 and 1e12", 0 <= args.lam <= 1e12),
        ("--lam-decay must be between 1e-6 and 1e12", args.lam_decay is None or 1e-6 <= args.lam_decay <= 1e12),
        ("--unroll must be positive", args.unroll > 0),
        (
            "--start-states released needs --critic v (Theorem 1 was not released): say every or initial",
            args.critic == "v" or args.start_states != "released" or args.leader == "none",
        ),
        (
            "--gamma 0 leaves nothing of V in J: say --leader none, --start-states released or --critic q",
            args.gamma > 0 or args.leader == "none" or args.start_states == "released" or args.critic == "q",
        ),
        ("--cg-iters must be positive", args.cg_iters > 0),
        ("--cg-tol must be at least 0 and below 1", 0 <= args.cg_tol < 1),  # at 1 a solve ends where it starts
    ]
    for message, holds in conditions:
        if not holds:
            stop(message)


# Environment
TRAIN, PLAY = 0, 1  # streams of episodes, each with seeds of its own


def make_env(env_id, max_episode_steps=None, video_folder=None, video_every=1):
    """One environment with flat observations, Discrete actions or a 1-d Box of them, and a time limit.

    Traps: a wrapper with a state, such as NormalizeObservation, has another state in --evaluate, and none is kept in a
    checkpoint; one that changes rewards changes the returns that are reported.
    """
    limit = {} if max_episode_steps is None else {"max_episode_steps": max_episode_steps}
    render = {"render_mode": "rgb_array"} if video_folder else {}  # not all environments know a render_mode
    env = gym.wrappers.FlattenObservation(gym.make(env_id, **limit, **render))
    obs_space = env.observation_space
    act_space = env.action_space
    discrete = isinstance(act_space, gym.spaces.Discrete)
    vector = isinstance(act_space, gym.spaces.Box) and len(act_space.shape) == 1
    if not isinstance(obs_space, gym.spaces.Box) or not (discrete or vector):
        stop(f"{env_id} needs flat observations and actions in a Discrete or 1-d Box, not {obs_space} and {act_space}")
    if env.spec is None:
        stop(f"{env_id} has no spec, which has its time limit: register it, and use gym.make")
    if env.spec.max_episode_steps is None:
        stop(f"{env_id} has no time limit, so an episode may never end: --max-episode-steps 1000 sets one")
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

    Trap: where an environment draws from the global generators, an evaluation amid a batch would seed these anew.
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


def to_env(action, space):
    """A copy of an action for the environment: a number of the Discrete space, or within the Box to the last bit."""
    if isinstance(space, gym.spaces.Discrete):
        return space.dtype.type(space.start + action)
    if not np.isfinite(action).all():
        stop("the policy's action is not finite")
    action = action.clip(space.low, space.high)
    if np.issubdtype(space.dtype, np.integer):
        action = action.round()  # astype alone would cut off the decimals
    return action.astype(space.dtype)


# Networks
def mlp(*sizes):
    """Linear layers of the given sizes with tanh between them."""
    layers = []
    for n_in, n_out in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(n_in, n_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])  # no tanh at the end


def numpy_mlp(net):
    """An `mlp` as a function of numpy arrays: ten times as fast for a single observation."""
    layers = []
    for layer in net:
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach().cpu().numpy()
            bias = layer.bias.detach().cpu().numpy()
            layers.append((weight.T.copy(order="C"), bias.copy()))  # copies: an optimizer's step must not change them
        elif not isinstance(layer, nn.Tanh):
            stop(f"the actor acts in numpy, and numpy_mlp does not know {type(layer).__name__}: change it with mlp")
    last_weight, last_bias = layers.pop()

    def forward(x):
        for weight, bias in layers:
            x = np.tanh(x.dot(weight) + bias)
        return x.dot(last_weight) + last_bias

    return forward


class Actor(nn.Module):
    """Policy π_θ(a|s): Categorical, or Gaussian with a standard deviation that does not depend on the state."""

    def __init__(self, observation_space, action_space, hidden=(64, 32)):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.n_out = int(action_space.n) if self.discrete else math.prod(action_space.shape)
        self.net = mlp(math.prod(observation_space.shape), *hidden, self.n_out)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((self.n_out,), -0.5))  # Spinning Up's start

    def forward(self, obs):
        """obs [..., obs_dim] -> the distribution π_θ(·|s)."""
        outputs = self.net(obs)
        if self.discrete:
            return Categorical(logits=outputs, validate_args=False)
        std = self.log_std.exp().expand_as(outputs)
        return Independent(Normal(outputs, std, validate_args=False), 1)

    def sampler(self, num_steps):
        """The policy in numpy, for the steps t < num_steps of a batch: a function (obs [obs_dim], t) -> a ~ π_θ(·|s).

        It has the θ of now, and its noise is drawn here for all steps: a Gaussian's, or Gumbel's, whose argmax with the
        logits is a sample of the Categorical. Trap: for another policy change `forward`, `acting_distribution` and this
        function. `check_first_batch` compares the first two; it cannot see whether the noise here fits them.
        """
        outputs = numpy_mlp(self.net)
        noise = torch.empty(num_steps, self.n_out)
        if self.discrete:
            noise = -noise.exponential_().log()
        else:
            noise = noise.normal_() * self.log_std.detach().cpu().exp()
        noise = noise.numpy()

        def sample(obs, t):
            x = outputs(obs) + noise[t]
            return x.argmax() if self.discrete else x

        return sample

    def acting_distribution(self, obs):
        """The distribution that `sampler` draws from, on the CPU, by numpy_mlp."""
        outputs = torch.from_numpy(numpy_mlp(self.net)(obs.numpy()))
        if self.discrete:
            return Categorical(logits=outputs, validate_args=False)
        return Independent(Normal(outputs, self.log_std.exp(), validate_args=False), 1)


class Critic(nn.Module):
    """State values V_w(s), of Proposition 1."""

    def __init__(self, observation_space, hidden=(64, 32)):
        super().__init__()
        self.v = mlp(math.prod(observation_space.shape), *hidden, 1)

    def forward(self, obs, actions=None):
        """obs [..., obs_dim] -> V_w(s) [...]. The actions are for the Q critic."""
        return self.v(obs).squeeze(-1)  # trap: [N, 1] less [N] is [N, N]

    def state_values(self, obs, actor):
        """V_w(s), [N]."""
        return self(obs)

    def action_values(self, batch, gamma):
        """What stands for Q_w(s, a) in (2), [N]: r + γ (1 - terminated) V_w(s')."""
        return batch.rewards + gamma * (1 - batch.terminated) * self(batch.next_obs)


class QCritic(nn.Module):
    """Action values Q_w(s, a), of `--critic q`; a discrete action is an input for each action."""

    def __init__(self, observation_space, action_space, hidden=(64, 32)):
        super().__init__()
        self.n_actions = int(action_space.n) if isinstance(action_space, gym.spaces.Discrete) else None
        act_dim = self.n_actions or math.prod(action_space.shape)
        self.q = mlp(math.prod(observation_space.shape) + act_dim, *hidden, 1)

    def forward(self, obs, actions):
        """obs [..., obs_dim], actions [...] (discrete) or [..., act_dim] -> Q_w(s, a) [...]."""
        if self.n_actions is not None:
            actions = F.one_hot(actions, self.n_actions).to(obs.dtype)
        return self.q(torch.cat([obs, actions], dim=-1)).squeeze(-1)

    def state_values(self, obs, actor):
        """E_{a~π}[Q_w(s, a)], [N]: exact over discrete actions, else the mean of ten samples."""
        policy = actor(obs)
        if self.n_actions is None:
            samples = [self(obs, policy.sample()) for _ in range(10)]
            return torch.stack(samples).mean(0)
        obs = obs[:, None].expand(-1, self.n_actions, -1)
        actions = torch.arange(self.n_actions, device=obs.device).expand(len(obs), -1)
        return (policy.probs * self(obs, actions)).sum(-1)

    def action_values(self, batch, gamma):
        """Q_w(s, a), [N]."""
        return self(batch.obs, batch.actions)


# Batch collection
# N steps, trajectory after trajectory: obs, next_obs [N, obs_dim]; actions [N] (discrete) or [N, act_dim], before they
# are clipped; rewards, terminated (0 or 1) and trajectory, the number of a step's trajectory, [N]. If its last step is
# not `terminated`, it was cut: by a time limit, or by the end of the batch. Trap: the surrogates need a whole batch, of
# the present θ: no minibatches, and one step of the actor.
Rollout = namedtuple("Rollout", "obs actions rewards next_obs terminated trajectory")


def collect(env, actor, num_steps, seed, start):
    """A batch of `num_steps` steps of π_θ, and (step, return, length) of each episode that ended in it.

    It begins with a new episode and cuts its last one, as Spinning Up does. So a checkpoint between two batches has
    nothing of the simulator to save. start: environment steps before the batch.
    """
    policy = actor.sampler(num_steps)
    space = env.action_space
    transitions = []
    episodes = []
    done = True
    for t in range(num_steps):
        if done:
            obs = reset(env, seed, TRAIN, start + t)
            episode_return, episode_length = 0.0, 0
        action = policy(obs, t)  # log π is of this action, before it is clipped to a Box
        next_obs, reward, terminated, truncated, _ = env.step(to_env(action, space))
        next_obs = to_float32(next_obs)
        reward = to_float32(reward).item()
        if not (np.isfinite(next_obs).all() and math.isfinite(reward)):
            stop(f"step {start + t + 1}: an observation or the reward is not finite in float32")
        transitions.append((obs, action, np.float32(reward), next_obs, np.float32(terminated), len(episodes)))
        obs = next_obs
        episode_return += reward
        episode_length += 1
        done = terminated or truncated
        if done:
            episodes.append((start + t + 1, episode_return, episode_length))

    device = next(actor.parameters()).device
    columns = [torch.from_numpy(np.array(column)).to(device) for column in zip(*transitions)]
    return Rollout(*columns), episodes


# Estimates
def discounted_sum(x, discount, trajectory):
    """Σ_{l≥0} discountˡ x_{t+l} within each trajectory, [N] -> [N], differentiable."""
    # After k rounds x_t holds the first 2ᵏ terms of its sum. A round adds the next 2ᵏ: what x_{t+2ᵏ} holds, times
    # discount^(2ᵏ), if t+2ᵏ is in the same trajectory. So log₂N rounds, each vectorised, do it.
    reach = 1  # 2ᵏ
    while reach < len(x):
        same = trajectory[reach:] == trajectory[:-reach]
        ahead = torch.where(same, discount**reach * x[reach:], 0)
        x = x + F.pad(ahead, (0, reach))
        reach *= 2
    return x


# What the batch says at (θ_k, w_k), constants [N] for both players. returns: Monte Carlo, of V^π(s) and Q^π(s, a), the
# critic's targets. mc_advantages: the returns less the baseline V_w(s), for L. advantages, for J: GAE, or
# with a Q critic Q_w(s, a) - V_w(s). Trap: other targets need their own `influence` in `critic_surrogate` (`every`,
# `initial`): advantages + values the sum of score * advantages, discounted by γλ.
Estimates = namedtuple("Estimates", "returns mc_advantages advantages")


@torch.no_grad()
def estimate(actor, critic, batch, args):
    """The Estimates of a batch. Where a trajectory was cut, V_w(s') stands for the rest of it."""
    values = critic.state_values(batch.obs, actor)
    next_values = (1 - batch.terminated) * critic.state_values(batch.next_obs, actor)
    last = F.pad(batch.trajectory[1:] != batch.trajectory[:-1], (0, 1), value=True)
    rewards_and_rest = batch.rewards + args.gamma * next_values * last
    returns = discounted_sum(rewards_and_rest, args.gamma, batch.trajectory)

    # for a Q critic (3) as it stands, with Q_w(s, a) - V_w(s): that is GAE with its λ = 0
    gae_lambda = args.gae_lambda if args.critic == "v" else 0.0
    td_errors = critic.action_values(batch, args.gamma) - values
    advantages = discounted_sum(td_errors, args.gamma * gae_lambda, batch.trajectory)
    return Estimates(returns, returns - values, advantages)


# Surrogates
#
# J and L depend on θ through the distribution of the trajectories, which autograd does not see. The surrogates f1 and
# f2 have the values of the costs -J and L on the batch. `score` is 0 but has the gradient of log π; through it they
# have the derivatives that are used: ∇_θf1, ∇_wf1, ∇_wf2, ∇_w²f2 and ∇_θ∇_wf2. Others mean nothing: ∇_θ²f1 is not that
# of -J, and ∇_θf2 multiplies estimates that share their samples.
def score_function(policy, actions):
    """log π_θ(a|s) less its own value: zeros [N] whose gradient is ∇_θ log π_θ(a|s).

    Trap: less the log π of an older policy, as in PPO, it is not zero, and moves the critic's targets.
    """
    log_prob = policy.log_prob(actions)
    return log_prob - log_prob.detach()


def actor_surrogate(critic, batch, score, advantages, args):
    """f1, for -J(θ, w): a scalar.

    ∇_θJ is the policy gradient (3); with a V critic GAE stands for Q_w (Appendix E). ∇_wJ depends on the critic:
    - Q_w(s, a): that of (2).
    - V_w(s): of J = E[r + γ (1 - terminated) V_w(s')]; Section 4.2 prints it without the factors.
    - `released`: of E[V_w(s)], as in the released code.
    """
    if args.start_states == "released":
        value = critic(batch.obs, batch.actions)
    else:
        value = critic.action_values(batch, args.gamma)
    return -(value + score * advantages).mean()


def linear_values(critic, obs, actions):
    """The critic's values, to first order in w, [N].

    So ∇_w²L is (2/N) 𝒥ᵀ𝒥 for the squared loss, 𝒥 = ∂values/∂w, [N, |w|]: no negative eigenvalues.
    """
    w = dict(critic.named_parameters())
    w_k = {name: p.detach() for name, p in w.items()}

    def values_at(w):
        return torch.func.functional_call(critic, w, (obs, actions))

    values, slope = torch.func.jvp(values_at, (w_k,), (w,))  # slope: 𝒥w
    return values + (slope - slope.detach())  # as in `score_function`: zero, but with a gradient


def critic_loss(values, targets, ratio=1):
    """The critic's cost L(θ, w), (4): a scalar.

    `critic_surrogate` puts θ into the targets and into the ratio, which is 1 but has the gradient of log π, times the
    weight of s_0. For the critic's own steps both are constants.
    Traps: a further term of L belongs here, for all three callers. A loss without the ratio loses the first term of
    Theorem 1 (Q critic).
    """
    return (ratio * (values - targets) ** 2).mean()


def critic_surrogate(critic, batch, score, estimates, args):
    """f2, for L(θ, w), (4): a scalar, with targets that respond to θ.

    ∇_θ∇_wf2 is ∇_w of the mean, over every visited state or over each trajectory's first as s_0, of

        2 Σ_{t≥0} γᵗ ∇_θ log π(a_t|s_t) (V^π(s_0) - V_w(s_0)) Q^π(s_t, a_t)            (V critic: Proposition 1)
        ∇_θ log π(a_0|s_0) (Q_w(s_0, a_0) - Q^π(s_0, a_0))²
            + 2 Σ_{t≥1} γᵗ ∇_θ log π(a_t|s_t) (Q^π(s_0, a_0) - Q_w(s_0, a_0)) Q^π(s_t, a_t)  (Q critic: Theorem 1)

    Theorem 1 as printed lacks the 2. For the Q^π(s_t, a_t) of the sums stands a Monte Carlo advantage: a baseline does
    not change the expectation, GAE's bias would. Where a trajectory was cut, the sum ends: what comes after counts as
    independent of θ, though the targets have V_w(s') for it.
    With `released` it is ∇_w of 2 ∇_θJ (V^π(s_0) - V_w(s_0)), s_0 the batch's first state, ∇_θJ as in f1.
    """
    # influence: zeros [N], of which the gradient is how θ moves a state's target: ∇_θV^π(s_0), (21)
    influence = discounted_sum(score * estimates.mc_advantages, args.gamma, batch.trajectory)
    is_start = torch.ones_like(score)
    if args.start_states == "initial":
        is_start = F.pad(batch.trajectory[1:] != batch.trajectory[:-1], (1, 0), value=True).to(score)
    elif args.start_states == "released":
        is_start[1:] = 0.0
        influence = (score * estimates.advantages).mean()  # with the gradient ∇_θJ, the same for all
    start_weight = is_start / is_start.mean()  # with this weight the mean over the batch is the mean over its s_0
    ratio = 1
    if args.critic == "q":
        # a_0 is given, so its own term goes to the ratio
        influence = influence - score * estimates.mc_advantages  # with the gradient ∇_θQ^π(s_0, a_0), (19)
        ratio = 1 + start_weight * score
    if args.curvature == "gauss-newton":
        values = linear_values(critic, batch.obs, batch.actions)
    else:
        values = critic(batch.obs, batch.actions)
    return critic_loss(values, estimates.returns + start_weight * influence, ratio)


# Solver
def conjugate_gradient(matvec, b, max_iters, tol):
    """x ≈ A⁻¹b, [n], for a symmetric matrix A, by conjugate gradient, until ‖b - Ax‖ ≤ tol ‖b‖.

    matvec: v -> Av. The solve starts from 0, and comes nearer to A⁻¹b with each step while A is positive definite.
    Where the curvature pᵀAp is not positive (beyond rounding) or a number is not finite, it stops and keeps its x: on
    an indefinite A that can be the start, and the residual can be above 1.
    Returns x and info, tensors: residual ‖b - Ax‖ / ‖b‖ by the recursion for r, inf after a number that was not finite;
    iterations; negative_curvature, whether it met pᵀAp ≤ 0 (beyond rounding).
    """
    eps = torch.finfo(b.dtype).eps
    tol = max(tol, eps)  # the recursion for r goes on shrinking below rounding, where it means nothing
    b_norm = b.norm()
    x = torch.zeros_like(b)
    r = b
    residual = torch.where(b_norm == 0, 0.0, r.norm() / b_norm)
    iterations = torch.zeros_like(b_norm)
    negative_curvature = torch.zeros_like(b_norm, dtype=torch.bool)
    broken = ~residual.isfinite()
    max_curvature = torch.zeros_like(b_norm)
    active = residual > tol
    p = torch.zeros_like(b)  # with p = 0 and rz = 1 the first direction is r, which is b
    rz = torch.ones_like(b_norm)

    for _ in range(max_iters):
        if not active:
            break
        z = r  # no preconditioner here; otherwise the function of stsac.py
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
        not_convex = pAp.isfinite() & (curvature <= eps * max_curvature)
        finite = (pAp + residual_new).isfinite()
        good = ~not_convex & finite
        x = torch.where(good, x_new, x)
        r = torch.where(good, r_new, r)
        residual = torch.where(good, residual_new, residual)
        iterations = iterations + good
        negative_curvature = negative_curvature | not_convex
        broken = broken | (~not_convex & ~finite)
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


def stackelberg_gradient(f1, f2, x1, x2, lam, cg_iters, cg_tol, *, grad2_f2=None):
    """The leader's total derivative ∇₁f1 - (∇₂₁f2)ᵀ (∇₂²f2 + λI)⁻¹ ∇₂f1: (15), regularized as in Section 4.5.

    f1, f2: the leader's and the follower's cost, scalars with their graphs; x1, x2: their lists of parameters.
    grad2_f2: ∇₂f2 with its graph, which callers often have: it is the follower's own gradient.
    Here f1 = -J and f2 = L, so the result is minus (15), which is of J.
    Returns a list like x1, and info.
    """
    grad1_f1, grad2_f1 = cost_gradients(f1, x1, x2)
    if grad2_f2 is None:
        grad2_f2 = grad(f2, x2, create_graph=True)
    follower_grad = flatten(grad2_f2)

    def damped_hessian(v):
        return flatten(grad(follower_grad, x2, v)) + lam * v  # ∇₂²f2 v = ∇₂⟨∇₂f2, v⟩: no Hessian is ever made

    v, solver_info = conjugate_gradient(damped_hessian, flatten(grad2_f1), cg_iters, cg_tol)
    total, info = total_derivative(grad1_f1, mixed_derivative(follower_grad, x1, v))
    return total, solver_info | info


def player_gradients(actor, critic, batch, estimates, lam, args):
    """Both players' costs and gradients at the same (θ, w).

    Returns f_actor, f_critic (-J and L on the batch), the gradients as lists like θ and w, and info: tensors.
    """
    theta = trainable(actor)
    w = trainable(critic)
    scale = 1.0
    if args.norm_adv:
        # trap: the scale divides the composed gradient, below. With `every` and `initial` the implicit term has other
        # advantages: dividing these here would rescale the direct term alone
        scale = estimates.advantages.std(correction=0) + 1e-8
        estimates = estimates._replace(advantages=estimates.advantages - estimates.advantages.mean())
    policy = actor(batch.obs)
    score = score_function(policy, batch.actions)
    f_actor = actor_surrogate(critic, batch, score, estimates.advantages, args)
    # the norms in info are before the division by the scale; f_actor, which is losses/policy_loss, is -J by the critic,
    # not Spinning Up's surrogate
    info = {}

    if args.leader == "none":
        f_critic = critic_loss(critic(batch.obs, batch.actions), estimates.returns)
        grad_theta = grad(f_actor, theta)
        grad_w = grad(f_critic, w)
    else:
        f_critic = critic_surrogate(critic, batch, score, estimates, args)
        grad_w = grad(f_critic, w, create_graph=True)
        grad_theta, info = stackelberg_gradient(
            f_actor, f_critic, theta, w, lam, args.cg_iters, args.cg_tol, grad2_f2=grad_w
        )

    info["entropy"] = policy.entropy().mean().detach()
    # trap: this divides all of f1. A term that you add to it, such as an entropy bonus, has to be multiplied by scale
    grad_theta = [g.detach() / scale for g in grad_theta]
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


def with_noise(grads, std):
    """Gradients with Gaussian noise, the released code's."""
    if std == 0:
        return grads
    return [g + std * torch.randn_like(g) for g in grads]


def stackelberg_update(actor, critic, actor_optimizer, critic_optimizer, batch, lam, args):
    """One iteration of Algorithm 2; with m = 1 and λ = 0 it is Algorithm 1, (11) and (12). Returns costs and info.

    The critic takes m steps on the batch, the actor one. Its gradient and the critic's first are both at (θ_k, w_k).
    """
    theta = trainable(actor)
    w = trainable(critic)
    estimates = estimate(actor, critic, batch, args)
    f_actor, f_critic, grad_theta, grad_w, info = player_gradients(actor, critic, batch, estimates, lam, args)

    optimizer_step(critic_optimizer, w, with_noise(grad_w, args.grad_noise))
    for _ in range(args.unroll - 1):
        cost = critic_loss(critic(batch.obs, batch.actions), estimates.returns)
        optimizer_step(critic_optimizer, w, with_noise(grad(cost, w), args.grad_noise))
    optimizer_step(actor_optimizer, theta, with_noise(grad_theta, args.grad_noise))
    return f_actor, f_critic, info


# Evaluation
def evaluate(actor, env, episodes, *key):
    """Undiscounted returns of `episodes` episodes of the most likely action, [episodes]; they start as `key` says."""
    device = next(actor.parameters()).device
    returns = np.zeros(episodes)
    modes = {module: module.training for module in actor.modules()}  # a part that you froze may not be training
    actor.eval()
    for episode in range(episodes):
        obs = reset(env, *key, episode)
        done = False
        while not done:
            with torch.no_grad():
                action = actor(torch.as_tensor(obs, device=device)).mode
            obs, reward, terminated, truncated, _ = env.step(to_env(action.cpu().numpy(), env.action_space))
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
ALGORITHM = "stac"  # marks the files that this script writes; trap: give a copy with other networks another mark
# flags that may differ when a run is carried on: it stays the same experiment (trap: with a schedule over
# total_timesteps it does not)
MAY_CHANGE = {"exp_name", "cuda", "track", "capture_video", "save_model", "run_dir", "evaluate"}
MAY_CHANGE |= {"eval_episodes", "checkpoint_every", "total_timesteps"}


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
    """Networks, optimizers and random numbers as they were."""
    for name, part in parts.items():
        # a copy, because an optimizer goes on with the very tensors
        part.load_state_dict(copy.deepcopy(state[name]))
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
    scalars = {"losses/policy_loss": f_actor, "losses/value_loss": f_critic, "losses/entropy": info["entropy"]}
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
def check_first_batch(actor, critic, batch):
    """Ends the run in one line if it would be silently wrong with these networks."""
    # a pass may change buffers and draws noise: neither is to touch the run
    actor, critic = copy.deepcopy((actor, critic))
    if set(actor.parameters()) & set(critic.parameters()):
        stop("actor and critic share parameters, so they are no two players")
    if not (trainable(actor) and trainable(critic)):
        stop("all parameters of the actor or of the critic are frozen")
    if len(batch.trajectory.unique_consecutive()) != len(batch.trajectory.unique()):
        stop("the batch is not trajectory after trajectory, as the estimates take it to be")
    with torch.random.fork_rng([batch.obs.device] if batch.obs.is_cuda else []):
        values = critic(batch.obs, batch.actions)
    if values.shape != batch.rewards.shape:
        stop(f"the critic's values are {tuple(values.shape)}, not {tuple(batch.rewards.shape)} like the rewards")
    # the policy that acts and the policy that learns, in float64: rounding is no difference
    policy = actor.cpu().double()
    obs = batch.obs.cpu().double()
    actions = batch.actions.cpu()
    for shift in (0.0, 0.01):  # moved as well, to see what does nothing at first, such as running statistics
        with torch.no_grad():
            for x in [*policy.parameters(), *policy.buffers()]:
                if x.is_floating_point():
                    x.add_(shift)
        acted = policy.acting_distribution(obs).log_prob(actions)
        learned = policy(obs).log_prob(actions)
        if not torch.allclose(acted, learned, rtol=1e-6, atol=1e-6, equal_nan=True):
            stop("the actor's forward is not its acting_distribution: they are two policies (see Actor.sampler)")


def train(args):
    """What the command line calls: begins a run or carries it on, and returns its folder."""
    algorithm = {"none": "ac", "actor": "stac-al"}[args.leader]
    run_name = f"{args.env_id}__{args.exp_name or algorithm}__{args.seed}__{time.time_ns() // 1000}"
    run_dir = Path(args.run_dir or "runs/" + re.sub(r"[^\w.-]", "-", run_name))
    with run_folder(run_dir):
        training_loop(run_dir, algorithm, args)
    return run_dir


def training_loop(run_dir, algorithm, args):
    """From the last checkpoint in the folder, if there is one, to the last batch that fits."""
    state = None
    start = 0
    end = args.total_timesteps // args.num_steps * args.num_steps
    if (run_dir / "checkpoint.pt").exists():
        state = load(run_dir / "checkpoint.pt", args, "rng")
        check_same_run(run_dir, state, args)
        start = state["global_step"]
    if start == end:
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
    critic = Critic(spaces[0], args.hidden) if args.critic == "v" else QCritic(*spaces, args.hidden)
    critic = critic.to(device)
    actor_optimizer = torch.optim.SGD(actor.parameters(), lr=args.policy_lr)
    critic_optimizer = torch.optim.SGD(critic.parameters(), lr=args.critic_lr)
    parts = {
        "actor": actor,
        "critic": critic,
        "actor_optimizer": actor_optimizer,
        "critic_optimizer": critic_optimizer,
    }
    if state is not None:
        restore(state, parts, device)
        del state  # and with it the file's memory

    # What a run needs besides
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
    if args.num_steps < env.spec.max_episode_steps:
        print("a batch is shorter than the time limit: it cuts long episodes, and returns are those of the others")

    checkpoint_step = start
    start_time = time.perf_counter()
    told_step, told_time = start, start_time
    steps = range(start, end, args.num_steps)
    done = start // args.num_steps
    total = end // args.num_steps
    bar = tqdm(steps, initial=done, total=total, unit="batch", disable=None, dynamic_ncols=True)  # on a terminal
    for step in bar:
        global_step = step + args.num_steps

        # Act
        batch, episodes = collect(env, actor, args.num_steps, args.seed, step)
        if step == start:
            check_first_batch(actor, critic, batch)

        # Learn
        decay = math.exp(-global_step / args.lam_decay) if args.lam_decay else 1.0
        lam = args.lam * decay
        f_actor, f_critic, info = stackelberg_update(actor, critic, actor_optimizer, critic_optimizer, batch, lam, args)
        implicit_norm = info.get("implicit_norm", 0.0)
        if not (f_actor + f_critic + implicit_norm).isfinite():
            costs = f"-J = {f_actor:.3g}, L = {f_critic:.3g}, norm of the implicit term {implicit_norm:.3g}"
            stop(f"step {global_step}: a number is not finite: {costs}")
        if step == start and "residual" in info and info["residual"].isinf():
            stop("the first solve met a number that is not finite, and the leader would be a plain player")
        if not flatten([*actor.parameters(), *critic.parameters()]).isfinite().all():
            stop(f"step {global_step}: a parameter is not finite")

        # Log the episodes and the update
        for when, episodic_return, episodic_length in episodes:
            writer.add_scalar("charts/episodic_return", episodic_return, when)
            writer.add_scalar("charts/episodic_length", episodic_length, when)
        scalars = update_scalars(f_actor, f_critic, info, lam)
        scalars["charts/SPS"] = (global_step - start) / (time.perf_counter() - start_time)
        batch_return = "unknown (no episode ended)"
        if episodes:  # the paper's measure of performance: the mean over the batch's episodes that came to an end
            returns = np.array([episodic_return for _, episodic_return, _ in episodes])
            scalars["charts/batch_return"] = returns.mean()
            batch_return = f"{returns.mean():.2f} ± {returns.std():.2f} ({len(returns)} episodes)"
        for name, value in scalars.items():
            writer.add_scalar(name, value, global_step)
        last = global_step == end
        if last or global_step % (10 * args.num_steps) == 0:
            tqdm.write(f"step {global_step}: batch return {batch_return}")
            sys.stdout.flush()

        # Save
        if last or global_step - checkpoint_step >= args.checkpoint_every:
            writer.flush()
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"args": vars(args), "global_step": global_step}
            state["rng"] = torch.get_rng_state()
            state["cuda_rng"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            save(run_dir / "checkpoint.pt", **state)
            checkpoint_step = global_step

        # Say how far it is: a line a minute where there is no terminal for a progress bar
        if bar.disable and time.perf_counter() - told_time > 60:
            speed = (global_step - told_step) / (time.perf_counter() - told_time)
            left = timedelta(seconds=round((end - global_step) / speed))
            print(f"step {global_step} of {end}, {speed:.0f} steps/s, {left} left", flush=True)
            told_step, told_time = global_step, time.perf_counter()

    if args.save_model:
        save(run_dir / "model.pt", args=vars(args), actor=actor.state_dict(), critic=critic.state_dict())
    writer.close()
    env.close()
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
