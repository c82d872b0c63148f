"""Small games in float64 whose every derivative is written out row by row: what the gradients are compared with."""

import copy
import types

import gymnasium as gym
import torch

import stsac

GAMMA = 0.9
SPACES = gym.spaces.Box(-1.0, 1.0, (3,)), gym.spaces.Box(-2.0, 1.0, (2,))
NOISE = 3  # seed of the one sample that all costs are taken on


def as_tuple(qs):
    return qs if isinstance(qs, tuple) else (qs,)


def vector(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def set_vector(parameters, values):
    sizes = [p.numel() for p in parameters]
    for p, value in zip(parameters, values.split(sizes)):
        p.data.copy_(value.view_as(p))


def first(cost, x, create_graph=False):
    """The derivative of a scalar by a list of tensors, one vector."""
    derivatives = torch.autograd.grad(cost, x, create_graph=create_graph, retain_graph=True, materialize_grads=True)
    return torch.cat([d.reshape(-1) for d in derivatives])


def second(gradient, x):
    """The derivative of a vector by a list of tensors, [len(gradient), len(x)]: a row is the derivative of an entry."""
    rows = torch.eye(len(gradient), dtype=gradient.dtype)
    derivatives = torch.autograd.grad(gradient, x, rows, retain_graph=True, allow_unused=True, is_grads_batched=True)
    blocks = [rows.new_zeros(len(rows), p.numel()) if d is None else d.flatten(1) for p, d in zip(x, derivatives)]
    return torch.cat(blocks, dim=1)


def solve(matrix, lam, b):
    return torch.linalg.solve(matrix + lam * torch.eye(len(b), dtype=b.dtype), b)


def relative_error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def positive_definite_lam(hessian):
    """A λ of the size of the curvature that makes H + λI positive definite."""
    eigenvalues = torch.linalg.eigvalsh(hessian)
    return float(max(0.0, -2 * eigenvalues[0]) + 0.05 * eigenvalues[-1])


class Game:
    """Networks of a script, one batch and one stream of noise: both costs are functions of (θ, w) alone.

    critic: the script's, or what a user has put in its place.
    """

    def __init__(self, script, hidden=(5, 4), batch_size=12, seed=0, critic=None, alpha=0.3, noise=0.3):
        torch.manual_seed(seed)
        self.script = script
        self.entropy = (torch.tensor(alpha, dtype=torch.float64),) if script is stsac else ()
        self.actor = script.Actor(*SPACES, hidden).double()
        self.critic = (critic or script.Critic(*SPACES, hidden)).double()
        self.target_critic = copy.deepcopy(self.critic)
        for net in (self.actor, self.critic, self.target_critic):
            for p in net.parameters():
                p.data += noise * torch.randn_like(p)  # larger than PyTorch's start, so that all curvatures matter
        self.target_critic.requires_grad_(False)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.theta = [p for p in self.actor.parameters() if p.requires_grad]
        self.w = [p for p in self.critic.parameters() if p.requires_grad]
        obs, next_obs = torch.randn(2, batch_size, 3).double()
        actions = torch.rand(batch_size, 2).double()
        terminated = (torch.rand(batch_size) < 0.3).double()
        terminated[0] = 0  # also in a batch of one the target depends on θ
        self.batch = script.Batch(obs, actions, torch.randn(batch_size).double(), next_obs, terminated)

    @property
    def nets(self):
        if self.script is stsac:
            return [self.actor, self.critic, self.target_critic]
        return [self.actor, self.critic, self.target_actor, self.target_critic]

    def costs(self, noise=NOISE):
        """-J, L, Q and y; the noise is drawn in the order in which `player_gradients` draws it."""
        torch.manual_seed(noise)
        f_actor = self.script.actor_loss(self.actor, self.critic, self.batch, *self.entropy)
        nets = self.actor, self.critic, self.target_critic
        f_critic, qs, y = self.script.critic_cost(*nets, self.batch, *self.entropy, self.args())
        return types.SimpleNamespace(actor=f_actor, critic=f_critic, qs=qs, y=y)

    def args(self, **flags):
        return self.script.Args(**{"gamma": GAMMA, "leader": "actor", "cg_iters": 1000, "cg_tol": 0.0, **flags})

    def gradients(self, lam, **flags):
        """`player_gradients`, with the actor as leader where nothing else is said."""
        torch.manual_seed(NOISE)
        lam = torch.tensor(lam, dtype=torch.float64)
        return self.script.player_gradients(*self.nets, self.batch, *self.entropy, lam, self.args(**flags))

    def check(self, lam, **flags):
        """What `train` asks before the first update."""
        lam = torch.tensor(lam, dtype=torch.float64)
        self.script.check_first_batch(self.nets, self.batch, *self.entropy, lam, self.args(**flags))

    def dense(self, leader="actor", curvature="hessian"):
        """∇₁f1, ∇₂f1, ∇₂₁f2 and ∇₂²f2 (or its Gauss-Newton part), each in full."""
        costs = self.costs()
        if leader == "critic":
            f1, f2, x1, x2 = costs.critic, costs.actor, self.w, self.theta
        else:
            f1, f2, x1, x2 = costs.actor, costs.critic, self.theta, self.w
        grad2_f2 = first(f2, x2, create_graph=True)
        if curvature == "hessian":
            matrix = second(grad2_f2, x2)
        else:
            J = second(torch.cat([q.reshape(-1) for q in costs.qs]), x2)
            matrix = J.T @ second(first(f2, costs.qs, create_graph=True), costs.qs) @ J
        return first(f1, x1), first(f1, x2), second(grad2_f2, x1), matrix


def assert_is_the_total_derivative(game, lam=None, leader="actor", curvature="hessian", **flags):
    """Both players' gradients against (15) with the matrix built and inverted, the follower's against autograd's."""
    direct, grad2_f1, mixed, matrix = game.dense(leader, curvature)
    lam = positive_definite_lam(matrix) if lam is None else lam
    implicit = -mixed.T @ solve(matrix, lam, grad2_f1)
    assert implicit.norm() > 1e-3 * direct.norm()  # so that the rest is about something
    f_actor, f_critic, grad_theta, grad_w, info = game.gradients(lam, leader=leader, curvature=curvature, **flags)
    costs = game.costs()
    torch.testing.assert_close([f_actor, f_critic], [costs.actor.detach(), costs.critic.detach()])
    if leader == "actor":
        total, own, expected = vector(grad_theta), vector(grad_w), first(costs.critic, game.w)
    else:
        total, own, expected = vector(grad_w), vector(grad_theta), first(costs.actor, game.theta)
    # the least eigenvalue is 5 % of the largest at the λ above, so 1e-8 is far from rounding
    assert (total - direct - implicit).norm() < 1e-8 * implicit.norm()
    assert relative_error(own, expected) < 1e-12
    torch.testing.assert_close(info["direct_norm"], direct.norm())
    torch.testing.assert_close(info["implicit_norm"], implicit.norm())
    torch.testing.assert_close(info["cosine"], torch.cosine_similarity(direct, implicit, dim=0))
    return info
