"""The Stackelberg gradient against dense oracles, finite differences and the limits of Proposition 2, in float64."""

import math

import pytest
import torch
from gymnasium.spaces import Box
from torch.func import functional_call

import stddpg
import stsac

GAMMA, ALPHA = 0.9, 0.3
SPACES = Box(-1.0, 1.0, (3,)), Box(-2.0, 1.0, (2,))


@pytest.fixture(params=[stsac, stddpg], ids=lambda script: script.__name__)
def script(request):
    return request.param


class Game(torch.nn.Module):
    """Small networks and one fixed batch and noise, so that both costs are functions of (θ, w) alone."""

    def __init__(self, script, hidden=(5, 4), batch_size=12, alpha=ALPHA, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.script, self.entropy = script, (alpha,) if script is stsac else ()
        self.actor, self.critic = script.Actor(*SPACES, hidden), script.Critic(*SPACES, hidden)
        self.target_critic = script.Critic(*SPACES, (5, 4)).requires_grad_(False)
        self.double()
        for p in self.parameters():
            p.data += 0.3 * torch.randn_like(p)  # larger than PyTorch's start, so that all curvatures matter
        b = batch_size
        self.batch = script.Batch(
            torch.randn(b, 3).double(),
            torch.rand(b, 2).double(),
            torch.randn(b).double(),
            torch.randn(b, 3).double(),
            (torch.rand(b) < 0.3).double(),
        )
        self.theta, self.w = list(self.actor.parameters()), list(self.critic.parameters())

    def forward(self, player):
        torch.manual_seed(1 if player == "actor" else 2)  # the fixed sample
        if player == "actor":
            return self.script.actor_loss(self.actor, self.critic, self.batch, *self.entropy)
        return self.script.critic_loss(self.actor, self.critic, self.target_critic, self.batch, GAMMA, *self.entropy)

    def players(self, leader):
        """(name of the leader, its parameters, name of the follower, its parameters)"""
        if leader == "actor":
            return "actor", self.theta, "critic", self.w
        return "critic", self.w, "actor", self.theta

    def as_function(self, player):
        """The player's cost as a function of the vectors (θ, w), independent of the parameters stored here."""
        names = {"actor": [n for n, _ in self.actor.named_parameters(prefix="actor")]}
        names["critic"] = [n for n, _ in self.critic.named_parameters(prefix="critic")]

        def cost(theta, w):
            tensors = {}
            for name, vector, like in (("actor", theta, self.theta), ("critic", w, self.w)):
                parts = vector.split([p.numel() for p in like])
                tensors |= {n: v.view_as(p) for n, v, p in zip(names[name], parts, like)}
            return functional_call(self, tensors, (player,))

        return cost

    def stackelberg_gradient(self, leader, lam, cg_iters=2000, cg_tol=1e-14):
        name1, x1, name2, x2 = self.players(leader)
        return self.script.stackelberg_gradient(self(name1), self(name2), x1, x2, lam, cg_iters, cg_tol)


def vector(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def dense(game, leader):
    """∇₁f1, ∇₂f1, ∇₂₁f2 and ∇₂²f2 at the game's parameters, from the explicit Hessian of f2 in (x1, x2)."""
    name1, _, name2, _ = game.players(leader)
    point = vector(game.theta).requires_grad_(), vector(game.w).requires_grad_()
    lead, follow = (0, 1) if leader == "actor" else (1, 0)
    first = torch.autograd.grad(game.as_function(name1)(*point), point)
    second = torch.autograd.functional.hessian(game.as_function(name2), point)
    return first[lead], first[follow], second[follow][lead], second[follow][follow]


def set_vector(params, values):
    for p, v in zip(params, values.split([p.numel() for p in params])):
        p.data.copy_(v.view_as(p))


def positive_definite_lam(hessian):
    """A λ of the size of the curvature that makes H + λI positive definite."""
    eigenvalues = torch.linalg.eigvalsh(hessian)
    return float(max(0.0, -2 * eigenvalues[0]) + 0.05 * eigenvalues[-1])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("leader", ["actor", "critic"])
def test_equals_the_dense_formula(script, leader, seed):
    game = Game(script, seed=seed)
    direct, grad2_f1, mixed, hessian = dense(game, leader)
    lam = positive_definite_lam(hessian)
    regularized = hessian + lam * torch.eye(len(hessian), dtype=torch.float64)
    implicit = -mixed.T @ torch.linalg.solve(regularized, grad2_f1)
    total, info = game.stackelberg_gradient(leader, lam)
    assert implicit.norm() > 1e-3 * direct.norm()
    assert (vector(total) - (direct + implicit)).norm() < 1e-8 * implicit.norm()
    assert info["residual"] < 1e-13 and not info["negative_curvature"]
    torch.testing.assert_close(info["direct_norm"], direct.norm())
    torch.testing.assert_close(info["implicit_norm"], implicit.norm())
    torch.testing.assert_close(info["cosine"], torch.cosine_similarity(direct, implicit, dim=0))


@pytest.mark.parametrize("leader", ["actor", "critic"])
def test_follows_the_best_response(script, leader):
    """Directional derivatives of f1(x1, x2*(x1)), where x2* minimises f2 + (λ/2)‖x2 - x2⁰‖² (Newton)."""
    game = Game(script, seed=4)  # of a few seeds, one where no kink of ReLU lies at x2*
    name1, x1, name2, x2 = game.players(leader)
    f1, f2 = game.as_function(name1), game.as_function(name2)
    lam = 4 * positive_definite_lam(dense(game, leader)[3])  # so that x2* is near x2⁰, within one linear piece of ReLU
    anchor = vector(x2)

    def order(v1, v2):
        return (v1, v2) if leader == "actor" else (v2, v1)

    def best_response(v1, v2):
        for _ in range(50):
            v2 = v2.detach().requires_grad_()
            g = torch.autograd.grad(f2(*order(v1, v2)), v2)[0] + lam * (v2 - anchor)
            H = torch.autograd.functional.hessian(lambda y: f2(*order(v1, y)), v2.detach())
            newton = torch.linalg.solve(H + lam * torch.eye(len(H), dtype=torch.float64), g)
            v2 = (v2 - newton).detach()
            if newton.norm() < 1e-13 * (1 + v2.norm()):
                return v2
        raise AssertionError("Newton's method did not converge")

    v1 = vector(x1)
    v2 = best_response(v1, anchor)
    set_vector(x2, v2)
    total, info = game.stackelberg_gradient(leader, lam)
    assert info["implicit_norm"] > 1e-2 * info["direct_norm"]
    implicit = vector(total) - dense(game, leader)[0]
    eps = 1e-5  # error of the central difference: O(eps²) and Newton's 1e-13 / eps
    for direction in (implicit / implicit.norm(), torch.nn.functional.normalize(torch.randn_like(v1), dim=0)):
        plus, minus = v1 + eps * direction, v1 - eps * direction
        y_plus, y_minus = best_response(plus, v2), best_response(minus, v2)
        whole = (f1(*order(plus, y_plus)) - f1(*order(minus, y_minus))) / (2 * eps)
        partial = (f1(*order(plus, v2)) - f1(*order(minus, v2))) / (2 * eps)
        assert abs(whole - vector(total) @ direction) < 1e-6 * vector(total).norm()
        assert abs(whole - partial - implicit @ direction) < 1e-6 * implicit.norm() + 1e-8


@pytest.mark.parametrize("leader", ["actor", "critic"])
def test_large_lam_gives_the_plain_gradient(script, leader):
    """Proposition 2, λ → ∞: the implicit term falls as 1/λ."""
    game = Game(script)
    direct = dense(game, leader)[0]
    norms = []
    for lam in (1e6, 1e9):
        total, info = game.stackelberg_gradient(leader, lam)
        norms.append(info["implicit_norm"])
        assert (vector(total) - direct).norm() <= 1.01 * info["implicit_norm"]
    assert norms[0] / norms[1] == pytest.approx(1e3, rel=1e-3)
    assert norms[1] < 1e-6 * direct.norm()


def test_small_lam_gives_the_unregularized_gradient(script):
    """Proposition 2, λ → 0, where the follower's Hessian is positive definite: critics that are linear in w."""
    game = Game(script, hidden=(), batch_size=64)
    direct, grad2_f1, mixed, hessian = dense(game, "actor")
    assert torch.linalg.eigvalsh(hessian)[0] > 1e-2
    unregularized = direct - mixed.T @ torch.linalg.solve(hessian, grad2_f1)
    assert (vector(game.stackelberg_gradient("actor", 0.0)[0]) - unregularized).norm() < 1e-8 * unregularized.norm()
    errors = [(vector(game.stackelberg_gradient("actor", lam)[0]) - unregularized).norm() for lam in (1e-3, 1e-6)]
    assert errors[0] / errors[1] == pytest.approx(1e3, rel=0.1)


@pytest.mark.parametrize("leader", ["actor", "critic"])
def test_stops_at_negative_curvature(script, leader):
    """Without enough λ the follower's Hessian is indefinite: the gradient stays finite and the diagnostics say so."""
    found = []
    for seed in range(5):
        game = Game(script, seed=seed)
        hessian = dense(game, leader)[3]
        total, info = game.stackelberg_gradient(leader, 0.0, cg_iters=50)
        assert vector(total).isfinite().all() and not any(value.isnan() for value in info.values())
        assert not info["negative_curvature"] or torch.linalg.eigvalsh(hessian)[0] < 1e-9
        found.append(bool(info["negative_curvature"]))
    assert any(found)


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
def test_target_depends_on_theta(script, alpha):
    """∇_θL, which is all through y: the action (alpha 0) and the entropy. Zero if the target were under no_grad."""
    game = Game(script, alpha=alpha)
    gradient = vector(torch.autograd.grad(game("critic"), game.theta))
    assert gradient.norm() > 1e-2
    theta, w, L = vector(game.theta), vector(game.w), game.as_function("critic")
    eps = 1e-6
    for _ in range(3):
        d = torch.nn.functional.normalize(torch.randn_like(theta), dim=0)
        difference = (L(theta + eps * d, w) - L(theta - eps * d, w)) / (2 * eps)
        assert abs(difference - gradient @ d) < 1e-7 * gradient.norm()


def test_target_is_the_papers():
    """y(r, s') below (10): the smaller target critic, the entropy, and no bootstrapping from terminal states alone."""
    game = Game(stsac)
    b = game.batch
    torch.manual_seed(3)
    y = stsac.td_target(game.actor, game.target_critic, b, GAMMA, ALPHA)
    torch.manual_seed(3)
    actions, log_prob = game.actor(b.next_obs)
    q = torch.stack(game.target_critic(b.next_obs, actions)).amin(0)
    assert y.shape == (12,) and b.terminated.any() and not b.terminated.all()
    for i in range(12):
        bootstrap = 0.0 if b.terminated[i] else GAMMA * (q[i] - ALPHA * log_prob[i])
        torch.testing.assert_close(y[i], b.rewards[i] + bootstrap)


def test_actor_reaches_only_the_smaller_critic():
    """∇_wJ of (9): each sample's gradient goes to its arg-min critic."""
    game = Game(stsac)
    torch.manual_seed(1)
    with torch.no_grad():
        actions, log_prob = game.actor(game.batch.obs)
    q1, q2 = game.critic(game.batch.obs, actions)
    first = q1 < q2
    assert first.any() and not first.all()
    expected = torch.autograd.grad((-torch.where(first, q1, q2)).mean(), game.w)
    torch.testing.assert_close(vector(torch.autograd.grad(game("actor"), game.w)), vector(expected))


def test_log_prob_is_a_density():
    """∫ π(a|s) da = 1 over the scaled box, and the samples' log π is the change of variables' one."""
    torch.manual_seed(0)
    low, high = -2.0, 1.0
    actor = stsac.Actor(Box(-1.0, 1.0, (3,)), Box(low, high, (1,)), (8,)).double()
    obs = torch.randn(3).double().expand(4000, 3)
    with torch.no_grad():
        mean, log_std = actor.net(obs[0]).chunk(2)
        action, log_prob = actor(obs)
        assert ((low <= action) & (action <= high)).all()
        mode, _ = actor(obs, deterministic=True)
        torch.testing.assert_close(mode[0], torch.tanh(mean) * actor.action_scale + actor.action_bias)

        def density(a):
            u = torch.atanh((a - actor.action_bias) / actor.action_scale)
            jacobian = actor.action_scale * (1 - torch.tanh(u) ** 2)
            return torch.distributions.Normal(mean, log_std.exp()).log_prob(u).exp() / jacobian

        torch.testing.assert_close(density(action).squeeze(-1).log(), log_prob, rtol=1e-6, atol=1e-6)
        grid = torch.linspace(low, high, 20001, dtype=torch.float64)[1:-1, None]
        assert torch.trapezoid(density(grid).squeeze(), grid.squeeze()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("output, log_std", [(10.0, 2.0), (1.0, 1.0), (-50.0, -20.0)])
def test_log_std_is_bounded(output, log_std):
    """At the mode u = 0 of a policy on [-1, 1]: log π = -log σ - log(2π)/2, and log σ is in [-20, 2]."""
    actor = stsac.Actor(Box(-1.0, 1.0, (3,)), Box(-1.0, 1.0, (1,)), (8,)).double()
    with torch.no_grad():
        actor.net[-1].weight.zero_()
        actor.net[-1].bias.copy_(torch.tensor([0.0, output]))
        _, log_prob = actor(torch.ones(3).double(), deterministic=True)
    assert float(log_prob) == pytest.approx(-log_std - math.log(2 * math.pi) / 2, rel=1e-12)


def make(script, args, seed=0):
    """Networks, optimizers and batches for one update of a script."""
    torch.manual_seed(seed)
    kinds = (script.Actor, script.Critic, script.Critic)
    if script is stddpg:
        kinds = (script.Actor, script.Critic, script.Actor, script.Critic)
    nets = [kind(*SPACES, (8, 8)).double() for kind in kinds]
    for net in nets[2:]:
        net.requires_grad_(False)
    optimizers = [torch.optim.SGD(list(net.parameters()), lr) for net, lr in zip(nets, (0.1, 0.01))]
    batches = [Game(script, batch_size=16, seed=k).batch for k in range(args.unroll)]
    return nets, optimizers, batches


@pytest.mark.parametrize("unroll", [1, 3])
@pytest.mark.parametrize("leader", ["none", "actor", "critic", "none with target policy"])
def test_update_is_algorithm_2(script, leader, unroll):
    """One update, by gradient descent, against Algorithm 2 step by step: both first gradients at (θ_k, w_k), the
    follower's m steps at the leader's old parameters, then the leader's; then the target networks'."""
    leader, *target_policy = leader.split(" with ")
    if target_policy and script is stsac:
        pytest.skip("SAC has no target policy")
    args = script.Args(leader=leader, unroll=unroll, cg_iters=50, cg_tol=0.0, tau=0.3)
    args.target_policy = bool(target_policy)
    nets, optimizers, batches = make(script, args)
    extra = (ALPHA,) if script is stsac else ()
    torch.manual_seed(9)
    script.stackelberg_update(nets, optimizers, batches, *extra, 40.0, args)

    expected, _, _ = make(script, args)
    actor, critic, *targets = expected
    target_critic = targets[-1]
    torch.manual_seed(9)  # the noise is drawn in the same order

    def actor_cost(batch):
        return script.actor_loss(actor, critic, batch, *extra)

    def critic_cost(batch):
        policy = targets[0] if target_policy else actor
        return script.critic_loss(policy, critic, target_critic, batch, args.gamma, *extra)

    players = [(actor_cost(batches[0]), list(actor.parameters()), 0.1, actor_cost)]
    players += [(critic_cost(batches[0]), list(critic.parameters()), 0.01, critic_cost)]
    (f1, x1, lr1, _), (f2, x2, lr2, cost2) = players[::-1] if leader == "critic" else players
    if leader == "none":
        gradient = torch.autograd.grad(f1, x1, retain_graph=True)
    else:
        gradient, _ = script.stackelberg_gradient(f1, f2, x1, x2, 40.0, 50, 0.0)
    for k in range(unroll):
        for p, g in zip(x2, torch.autograd.grad(f2 if k == 0 else cost2(batches[k]), x2)):
            p.data -= lr2 * g
    for p, g in zip(x1, gradient):
        p.data -= lr1 * g
    for target, net in zip(targets, [critic] if script is stsac else [actor, critic]):
        for p, q in zip(target.parameters(), net.parameters()):
            p.data += 0.3 * (q.data - p.data)
    for ours, theirs in zip(nets, expected):
        torch.testing.assert_close(vector(ours.parameters()), vector(theirs.parameters()), rtol=1e-9, atol=1e-12)
    assert not any(p.requires_grad for net in nets[2:] for p in net.parameters())  # the target step records no graph


class TestToyGame:
    """The example of Section 3.2: J = wθ, L = (wθ + θ²/5)², with its derivatives written out."""

    def test_equals_the_closed_form(self):
        for theta0, w0 in [(-1.0, 1.0), (0.3, 0.7), (0.5, -0.2)]:
            for lam in (0.0, 0.04):
                theta = torch.tensor([theta0], dtype=torch.float64, requires_grad=True)
                w = torch.tensor([w0], dtype=torch.float64, requires_grad=True)
                q = w * theta  # shared by both costs: the graphs must survive both
                f1, f2 = -q.sum(), ((q + theta**2 / 5) ** 2).sum()
                total, _ = stsac.stackelberg_gradient(f1, f2, [theta], [w], lam, 10, 0.0)
                # ∇_wJ = θ, ∇_w²L = 2θ², ∇_θ∇_wL = 2(2wθ + 3θ²/5)
                mixed = 2 * (2 * w0 * theta0 + 3 * theta0**2 / 5)
                expected = -w0 + mixed * theta0 / (2 * theta0**2 + lam)
                assert float(total[0]) == pytest.approx(expected, rel=1e-12)

    def test_a_follower_without_curvature_or_a_leader_that_does_not_care(self):
        theta, w = (torch.tensor([2.0], requires_grad=True) for _ in range(2))
        total, info = stsac.stackelberg_gradient((w**2).sum(), (w * theta).sum(), [w], [theta], 1.0, 10, 0.0)
        assert float(total[0]) == 4 and info["implicit_norm"] == 0 and info["cosine"] == 0
