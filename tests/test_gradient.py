"""The Stackelberg gradient against dense oracles, finite differences and the limits of Proposition 2, in float64."""

import copy
import math

import gymnasium as gym
import pytest
import torch
from game import (
    GAMMA,
    SPACES,
    Game,
    as_tuple,
    assert_is_the_total_derivative,
    first,
    positive_definite_lam,
    relative_error,
    second,
    set_vector,
    solve,
    vector,
)

import stddpg
import stsac

PLAYERS = {
    "critic": {"leader": "critic"},
    "plain": {"leader": "actor", "precondition": False},
    "preconditioned": {"leader": "actor"},
    "gauss-newton": {"leader": "actor", "curvature": "gauss-newton"},
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("player", PLAYERS)
def test_is_the_dense_formula(script, player, seed):
    game = Game(script, seed=seed)
    info = assert_is_the_total_derivative(game, **PLAYERS[player])
    if player == "gauss-newton":
        assert "residual" not in info  # there is no solver to report on
    else:
        assert info["residual"] < 1e-12
        assert not info["negative_curvature"]
    torch.testing.assert_close(info["qs"], [q.detach() for q in game.costs().qs])
    # nothing is left that a later backward could reach
    returned = game.gradients(1.0, **PLAYERS[player])
    tensors = [*returned[:2], *returned[2], *returned[3], *info["qs"]]
    assert not any(t.requires_grad for t in tensors)
    assert all(p.grad is None for net in game.nets for p in net.parameters())


@pytest.mark.parametrize("leader", ["actor", "critic"])
def test_follows_the_best_response(script, leader):
    """Directional derivatives of f1(x1, x2*(x1)), where x2* minimises f2 + (λ/2)‖x2 - x2⁰‖² (Newton)."""
    game = Game(script)
    for net in game.nets:
        for module in list(net.modules()):
            if isinstance(module, torch.nn.Sequential):  # no kinks
                module[1] = module[3] = torch.nn.Tanh()
    follower = "critic" if leader == "actor" else "actor"
    x1, x2 = (game.theta, game.w) if leader == "actor" else (game.w, game.theta)
    lam = 2 * positive_definite_lam(game.dense(leader)[3])  # so that x2* is near x2⁰
    anchor = vector(x2)

    def best_response(v1):
        set_vector(x1, v1)
        for _ in range(50):
            gradient = first(getattr(game.costs(), follower), x2, create_graph=True)
            newton = solve(second(gradient, x2), lam, gradient.detach() + lam * (vector(x2) - anchor))
            set_vector(x2, vector(x2) - newton)
            if newton.norm() < 1e-13 * (1 + vector(x2).norm()):
                return vector(x2)
        raise AssertionError("Newton's method did not converge")

    def f1(v1, v2):
        set_vector(x1, v1)
        set_vector(x2, v2)
        return getattr(game.costs(), leader).item()

    v1 = vector(x1)
    v2 = best_response(v1)
    _, _, grad_theta, grad_w, info = game.gradients(lam, leader=leader)
    total = vector(grad_theta if leader == "actor" else grad_w)
    assert info["implicit_norm"] > 1e-2 * info["direct_norm"]
    implicit = total - first(getattr(game.costs(), leader), x1)
    eps = 1e-5  # error of the central difference: O(eps²) and Newton's 1e-13 / eps
    for direction in (implicit, torch.randn_like(v1)):
        direction = direction / direction.norm()
        plus = v1 + eps * direction
        minus = v1 - eps * direction
        whole = (f1(plus, best_response(plus)) - f1(minus, best_response(minus))) / (2 * eps)
        partial = (f1(plus, v2) - f1(minus, v2)) / (2 * eps)
        assert abs(whole - total @ direction) < 1e-6 * total.norm()
        assert abs(whole - partial - implicit @ direction) < 1e-6 * implicit.norm() + 1e-8


@pytest.mark.parametrize("player", PLAYERS)
def test_large_lam_is_the_plain_algorithm(script, player):
    """Proposition 2, λ → ∞: the implicit term falls as 1/λ."""
    game = Game(script, seed=1)
    plain = game.gradients(1.0, leader="none")
    assert plain[4].keys() <= {"qs", "y"}
    near, far = (game.gradients(lam, **PLAYERS[player])[4]["implicit_norm"] for lam in (1e6, 1e9))
    assert near / far == pytest.approx(1e3, rel=1e-3)
    limit = game.gradients(1e30, **PLAYERS[player])
    for k in (2, 3):
        assert relative_error(vector(limit[k]), vector(plain[k])) < 1e-14


@pytest.mark.parametrize("lam", [0.0, 1e-6])
def test_small_lam_is_the_unregularized_gradient(script, lam):
    """λ = 0 is allowed where the follower's Hessian is positive definite: critics that are linear in w."""
    assert_is_the_total_derivative(Game(script, hidden=(), batch_size=64), lam, precondition=False)


@pytest.mark.parametrize("leader", ["actor", "critic"])
def test_stops_at_negative_curvature(script, leader):
    """Without enough λ the follower's Hessian is indefinite: the gradient stays finite and the diagnostics say so."""
    found = []
    for seed in range(5):
        game = Game(script, seed=seed)
        _, _, grad_theta, grad_w, info = game.gradients(0.0, leader=leader, precondition=False, cg_iters=50)
        assert vector([*grad_theta, *grad_w]).isfinite().all()
        assert not info["residual"].isnan()
        found.append(bool(info["negative_curvature"]))
    assert any(found)


# Losses
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_target_depends_on_theta(script, alpha):
    """∇_θL, which is all through y: the action (alpha 0) and the entropy."""
    game = Game(script, seed=4, alpha=alpha)
    gradient = first(game.costs().critic, game.theta)
    assert gradient.norm() > 1e-2
    theta = vector(game.theta)
    for _ in range(3):
        direction = torch.nn.functional.normalize(torch.randn_like(theta), dim=0)
        costs = []
        for eps in (1e-6, -1e-6):
            set_vector(game.theta, theta + eps * direction)
            costs.append(game.costs().critic.item())
        assert abs((costs[0] - costs[1]) / 2e-6 - gradient @ direction) < 1e-7 * gradient.norm()


def test_losses_are_the_papers(script):
    """(7) to (10), sample by sample: the smaller Q network, the entropy, a bootstrap but where an episode has ended."""
    game = Game(script, seed=2)
    costs = game.costs()
    torch.manual_seed(3)
    values = []
    for critic, obs in ((game.critic, game.batch.obs), (game.target_critic, game.batch.next_obs)):
        actions = game.actor(obs)
        entropy = 0.0
        if script is stsac:
            actions, log_prob = actions
            entropy = -0.3 * log_prob
        qs = torch.stack(as_tuple(critic(obs, actions)))
        assert len(qs) == 1 or 0 < (qs[0] < qs[1]).sum() < 12  # each is the smaller one somewhere
        values.append(qs.amin(0) + entropy)
    assert costs.y.shape == (12,)
    assert 0 < game.batch.terminated.sum() < 12
    for i in range(12):
        bootstrap = 0.0 if game.batch.terminated[i] else GAMMA * values[1][i]
        torch.testing.assert_close(costs.y[i], game.batch.rewards[i] + bootstrap)
    torch.testing.assert_close(costs.actor, -values[0].mean())
    errors = [(q[i] - costs.y[i]) ** 2 for q in costs.qs for i in range(12)]
    torch.testing.assert_close(costs.critic, sum(errors) / 12)
    assert len(costs.qs) == (2 if script is stsac else 1)


# Policies
def test_log_prob_is_a_density_on_the_unit_box():
    """∫ π(a|s) da = 1 over [-1, 1], and the samples' log π is the change of variables' one, whatever the bounds.

    The samples are Gaussian, independent from axis to axis, before they are squashed.
    """
    torch.manual_seed(0)
    actor = stsac.Actor(SPACES[0], gym.spaces.Box(-2.0, 1.0, (2,)), (8,)).double()
    obs = torch.randn(3).double().expand(4000, 3)
    with torch.no_grad():
        mean, log_std = actor.net(obs[0]).chunk(2)
        action, log_prob = actor(obs)
        assert action.min() >= -2
        assert action.max() <= 1
        mode, _ = actor(obs, deterministic=True)
        torch.testing.assert_close(mode[0], 1.5 * torch.tanh(mean) - 0.5)

        def density(a):
            normal = torch.distributions.Normal(mean, log_std.exp())
            return normal.log_prob(torch.atanh(a)).exp() / (1 - a**2)

        unit = (action + 0.5) / 1.5
        torch.testing.assert_close(density(unit).log().sum(1), log_prob, rtol=1e-6, atol=1e-6)
        grid = torch.linspace(-1, 1, 20001, dtype=torch.float64)[1:-1, None]
        for axis in density(grid).T:
            assert torch.trapezoid(axis, grid[:, 0]) == pytest.approx(1, abs=1e-3)
        noise = (torch.atanh(unit) - mean) / log_std.exp()  # standard errors of 1/√4000 = 0.016
        assert noise.mean(0).abs().max() < 0.08
        torch.testing.assert_close(torch.cov(noise.T), torch.eye(2).double(), rtol=0, atol=0.1)


@pytest.mark.parametrize("output, log_std", [(10.0, 2.0), (1.0, 1.0), (-50.0, -20.0)])
def test_log_std_is_bounded(output, log_std):
    """At the mode u = 0: log π = -log σ - log(2π)/2, and log σ is in [-20, 2]; also where the box has no width."""
    actor = stsac.Actor(SPACES[0], gym.spaces.Box(0.0, 0.0, (1,)), (8,)).double()
    with torch.no_grad():
        actor.net[-1].weight.zero_()
        actor.net[-1].bias.copy_(torch.tensor([0.0, output]))
        _, log_prob = actor(torch.ones(3).double(), deterministic=True)
    assert float(log_prob) == pytest.approx(-log_std - math.log(2 * math.pi) / 2, rel=1e-12)


def test_the_critic_sees_the_unit_box(script):
    """Also of a box that is not symmetric."""
    critic = script.Critic(SPACES[0], gym.spaces.Box(-2.0, 1.0, (2,)))
    inputs = []
    critic.q1.register_forward_pre_hook(lambda module, x: inputs.append(x[0]))
    critic(torch.zeros(2, 3), torch.tensor([[-2.0, -2.0], [1.0, 1.0]]))
    assert inputs[0][:, 3:].tolist() == [[-1, -1], [1, 1]]


@pytest.mark.parametrize("player", ["none", *PLAYERS])
def test_units_of_the_actions_do_not_matter(script, player):
    """The same task in other units: the same costs and gradients."""
    results = []
    for size in (1.0, 0.25):  # a power of two, so to the last bit
        space = gym.spaces.Box(-size, 3 * size, (2,))
        game = Game(script)
        for net in (script.Actor(SPACES[0], space), script.Critic(SPACES[0], space)):
            for ours in game.nets:
                if type(ours) is type(net):
                    ours.action_scale = net.action_scale
                    ours.action_bias = net.action_bias
        game.batch = game.batch._replace(actions=size * game.batch.actions)
        results.append(game.gradients(5.0, **PLAYERS.get(player, {"leader": "none"}))[:4])
    assert torch.equal(torch.stack(results[0][:2]), torch.stack(results[1][:2]))
    for k in (2, 3):
        assert torch.equal(vector(results[0][k]), vector(results[1][k]))


# Algorithm 2
ALGORITHMS = [(script, leader, False) for script in (stsac, stddpg) for leader in ("none", "actor", "critic")]


@pytest.mark.parametrize("unroll", [1, 3])
@pytest.mark.parametrize("script, leader, target_policy", [*ALGORITHMS, (stddpg, "none", True)])
def test_update_is_algorithm_2(script, leader, target_policy, unroll):
    """Both first gradients at (θ_k, w_k), the follower's m steps at the leader's old parameters, then the leader's,
    then the target networks'. By gradient descent, where each parameter has a group and a rate of its own.
    """
    game = Game(script)
    set_vector(list(game.target_actor.parameters()), 0.3 * torch.randn(len(vector(game.theta))).double())
    expected = copy.deepcopy(game, {id(script): script})
    batches = [Game(script, seed=seed).batch for seed in range(unroll)]
    optimizers = []
    for x in (game.theta, game.w):
        groups = [{"params": [p], "lr": 0.01 * k} for k, p in enumerate(x, 1)]
        optimizers.append(torch.optim.SGD(groups, lr=1.0))
    args = game.args(leader=leader, precondition=False, cg_iters=50, tau=0.3)
    args.target_policy = target_policy
    torch.manual_seed(9)
    script.stackelberg_update(game.nets, optimizers, batches, *game.entropy, 40.0, args)

    torch.manual_seed(9)  # the noise is drawn in the same order
    policy = expected.target_actor if target_policy else expected.actor

    def actor_cost(batch):
        return script.actor_loss(expected.actor, expected.critic, batch, *game.entropy)

    def critic_cost(batch):
        y = script.td_target(policy, expected.target_critic, batch, GAMMA, *game.entropy)
        return script.critic_loss(expected.critic(batch.obs, batch.actions), y)

    first_actor_cost = actor_cost(batches[0])
    first_critic_cost = critic_cost(batches[0])
    if leader == "critic":
        x1, x2, f1, f2 = expected.w, expected.theta, first_critic_cost, first_actor_cost
        follower_cost = actor_cost
    else:
        x1, x2, f1, f2 = expected.theta, expected.w, first_actor_cost, first_critic_cost
        follower_cost = critic_cost
    gradient = torch.autograd.grad(f1, x1, retain_graph=True)
    if leader != "none":
        gradient, _ = script.stackelberg_gradient(f1, f2, x1, x2, 40.0, 50, 0.0)
    # the follower: m steps
    for k, batch in enumerate(batches):
        cost = f2 if k == 0 else follower_cost(batch)
        for rate, (p, g) in enumerate(zip(x2, torch.autograd.grad(cost, x2)), 1):
            p.data -= 0.01 * rate * g
    # the leader: one, along the gradient from above
    for rate, (p, g) in enumerate(zip(x1, gradient), 1):
        p.data -= 0.01 * rate * g
    # the target networks
    followed = [(expected.target_critic, expected.critic)]
    if script is stddpg:
        followed.append((expected.target_actor, expected.actor))
    for target, net in followed:
        for p, q in zip(target.parameters(), net.parameters()):
            p.data += 0.3 * (q.data - p.data)
    for ours, theirs in zip(game.nets, expected.nets):
        torch.testing.assert_close(vector(ours.parameters()), vector(theirs.parameters()), rtol=1e-9, atol=1e-12)
    targets = [p for net in game.nets[2:] for p in net.parameters()]
    assert not any(p.requires_grad for p in targets)


def test_targets_follow_in_their_buffers(script):
    """Such as running statistics of the observations."""
    nets = [torch.nn.BatchNorm1d(3) for _ in range(2)]
    nets[1](torch.randn(10, 3) + 5)
    nets[1].weight.data.fill_(3.0)
    script.update_target(*nets, 0.25)
    assert torch.equal(nets[0].running_mean, nets[1].running_mean)
    assert nets[0].num_batches_tracked == 1
    assert (nets[0].weight == 1.5).all()


# A leader without influence
@pytest.mark.parametrize("player", PLAYERS)
def test_a_leader_that_cannot_influence_the_follower_is_an_error(script, player, monkeypatch):
    """Targets under no_grad: the implicit term would be zero, and the algorithm silently the plain one."""
    game = Game(script)
    monkeypatch.setattr(script, "td_target", torch.no_grad()(script.td_target))
    who = "its cost" if player == "critic" else "the follower's gradient"
    with pytest.raises(SystemExit, match=f"{who} does not depend on") as error:
        game.check(5.0, **PLAYERS[player])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("player", PLAYERS)
def test_targets_whose_q_is_cut_off_are_an_error(player, monkeypatch):
    """SAC's entropy still moves with θ: without a word the implicit term would lose Q's part."""
    td_target = stsac.td_target

    def without_gradient(actor, target_critic, *rest):
        return td_target(actor, torch.no_grad()(target_critic), *rest)

    monkeypatch.setattr(stsac, "td_target", without_gradient)
    for seed in range(3):
        with pytest.raises(SystemExit, match="Q in the targets does not depend on θ"):
            Game(stsac, seed=seed).check(5.0, **PLAYERS[player])
    Game(stsac).check(5.0, leader="none")


def test_targets_that_are_cut_off_beside_a_further_term_are_an_error(script, monkeypatch):
    """The term depends on θ, and so does the follower's gradient."""
    cost = script.critic_cost

    def with_a_term(actor, critic, target_critic, batch, *rest):
        f_critic, qs, y = cost(actor, critic, target_critic, batch, *rest)
        policy = actor(batch.obs)
        actions = policy[0] if isinstance(policy, tuple) else policy
        return f_critic + torch.stack(as_tuple(critic(batch.obs, actions))).square().mean(), qs, y

    game = Game(script)
    monkeypatch.setattr(script, "critic_cost", with_a_term)
    game.check(5.0, precondition=False)
    monkeypatch.setattr(script, "td_target", torch.no_grad()(script.td_target))
    with pytest.raises(SystemExit, match="Q in the targets does not depend on θ"):
        game.check(5.0, precondition=False)


@pytest.mark.parametrize("player", ["none", *PLAYERS])
def test_a_critic_that_begins_at_zero_is_no_error(script, player):
    """Its last layer, whose targets move with θ a step later."""
    game = Game(script)
    for q in [*game.critic.children(), *game.target_critic.children()]:
        q[-1].weight.data.zero_()
    game.check(5.0, **PLAYERS.get(player, {"leader": "none"}))


@pytest.mark.parametrize("player", ["none", *PLAYERS])
def test_a_policy_at_its_bounds_is_no_error(script, player):
    """There Q does not move with θ in float32."""
    game = Game(script)
    game.actor.net[-1].bias.data[:2] = 100
    for net in game.nets:
        net.float()
    game.batch = script.Batch(*(column.float() for column in game.batch))
    game.check(5.0, **PLAYERS.get(player, {"leader": "none"}))


@pytest.mark.parametrize("player", ["none", *PLAYERS])
def test_targets_of_the_critic_itself_are_an_error(script, player, monkeypatch):
    """Without a target network the follower's gradient would have a part of its own targets."""
    cost = script.critic_cost
    monkeypatch.setattr(script, "critic_cost", lambda actor, critic, target, *rest: cost(actor, critic, critic, *rest))
    words = "depend on the critic's own parameters|θ and w meet"
    with pytest.raises(SystemExit, match=words):
        Game(script).check(5.0, **PLAYERS.get(player, {"leader": "none"}))


def test_a_parameter_that_does_not_matter_is_no_error(script):
    """Its gradient is zero, whoever leads."""
    for player in ({"leader": "none"}, *PLAYERS.values()):
        game = Game(script)
        game.actor.spare = torch.nn.Parameter(torch.ones(2).double())
        *_, grad_theta, _, _ = game.gradients(5.0, **player)
        assert vector(grad_theta).norm() > 0 and any((g == 0).all() for g in grad_theta if g.shape == (2,))


def test_a_player_that_is_frozen_is_an_error(script):
    game = Game(script)
    game.critic.requires_grad_(False)
    with pytest.raises(SystemExit, match="all parameters of the actor or of the critic are frozen"):
        game.check(5.0, leader="none")


def test_an_encoder_shared_with_the_target_network_is_an_error(script):
    """It is frozen there, and would never be trained."""
    game = Game(script)
    game.target_critic.q1 = game.critic.q1
    with pytest.raises(SystemExit, match="shares parameters with its target network"):
        game.check(5.0, leader="none")
    if script is stddpg:
        game = Game(script)
        game.target_actor.net[0] = game.actor.net[0]
        with pytest.raises(SystemExit, match="shares parameters with its target network"):
            game.check(5.0, leader="none")


def test_what_is_frozen_during_a_run_stays(script):
    """Its last gradient is not applied again."""
    game = Game(script)
    optimizers = [torch.optim.Adam(x) for x in (game.theta, game.w)]
    moved = []
    for _ in range(2):
        before = [vector(net.parameters()).clone() for net in (game.actor.net[0], game.critic.q1[0], *game.nets[:2])]
        lam = torch.tensor(5.0).double()
        script.stackelberg_update(game.nets, optimizers, [game.batch], *game.entropy, lam, game.args())
        after = [vector(net.parameters()) for net in (game.actor.net[0], game.critic.q1[0], *game.nets[:2])]
        moved.append([not torch.equal(a, b) for a, b in zip(after, before)])
        game.actor.net[0].requires_grad_(False)
        game.critic.q1[0].requires_grad_(False)
    assert moved == [[True] * 4, [False, False, True, True]]


@pytest.mark.parametrize("player", PLAYERS)
def test_a_critic_that_is_frozen_in_the_actors_loss_is_an_error(script, player, monkeypatch):
    """As usual code has it, to save time: J no longer depends on w, whoever leads."""
    game = Game(script)
    actor_loss = script.actor_loss

    def frozen_critic(actor, critic, *rest):
        w = {name: p.detach() for name, p in critic.named_parameters()}
        return actor_loss(actor, lambda *inputs: torch.func.functional_call(critic, w, inputs), *rest)

    monkeypatch.setattr(script, "actor_loss", frozen_critic)
    with pytest.raises(SystemExit, match="does not depend on"):
        game.check(5.0, **PLAYERS[player])


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_target_actor_in_stackelberg_gradient_is_an_error(script, requires_grad):
    """As in TD3: the next actions are another network's."""
    game = Game(script)
    f_actor = game.costs().actor
    game.target_actor.requires_grad_(requires_grad)
    y = script.td_target(game.target_actor, game.target_critic, game.batch, GAMMA, *game.entropy)
    f_critic = script.critic_loss(game.critic(game.batch.obs, game.batch.actions), y)
    with pytest.raises(SystemExit, match="does not depend on"):
        script.stackelberg_gradient(f_actor, f_critic, game.theta, game.w, 5.0, 10, 0.0)


@pytest.mark.parametrize("player", ["none", *PLAYERS])
def test_players_that_share_parameters_are_an_error(script, player):
    game = Game(script)
    game.critic.encoder = game.actor.net[0]
    with pytest.raises(SystemExit, match="actor and critic share parameters"):
        game.check(5.0, **PLAYERS.get(player, {"leader": "none"}))


def test_a_critic_of_another_shape_is_an_error(script):
    """[B, 1] less [B] would be [B, B], without a word."""
    y = torch.ones(4)
    with pytest.raises(SystemExit, match=r"\(4, 1\) and their targets \(4,\)"):
        script.critic_loss(torch.ones(4, 1) if script is stddpg else [y, torch.ones(4, 1)], y)


def test_a_first_solve_that_breaks_down_is_an_error(script, monkeypatch):
    """Its v is zero, so the leader would be a plain player."""
    grad = script.grad
    monkeypatch.setattr(script, "grad", lambda *arguments, **flags: [math.nan * g for g in grad(*arguments, **flags)])
    with pytest.raises(SystemExit, match="the first solve met a number that is not finite"):
        Game(script).check(5.0, precondition=False)


# The example of Section 3.2: J = wθ, L = (wθ + θ²/5)², with its derivatives written out
@pytest.mark.parametrize("lam", [0.0, 0.04])
@pytest.mark.parametrize("start", [(-1.0, 1.0), (0.3, 0.7), (0.5, -0.2)])
def test_toy_game(start, lam):
    theta, w = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in start)
    q = w * theta  # shared by both costs: the graphs must survive both
    f1 = -q.sum()
    f2 = ((q + theta**2 / 5) ** 2).sum()
    total, _ = stsac.stackelberg_gradient(f1, f2, [theta], [w], lam, 10, 0.0)
    # ∇_wJ = θ, ∇_w²L = 2θ², ∇_θ∇_wL = 2(2wθ + 3θ²/5)
    mixed = 2 * (2 * w * theta + 3 * theta**2 / 5)
    expected = -w + mixed * theta / (2 * theta**2 + lam)
    torch.testing.assert_close(total[0], expected.detach(), rtol=1e-12, atol=0)


def test_a_follower_without_curvature_or_a_leader_that_does_not_care():
    theta, w = (torch.tensor([2.0], requires_grad=True) for _ in range(2))
    total, info = stsac.stackelberg_gradient((w**2 + 0 * theta).sum(), (w * theta).sum(), [w], [theta], 1.0, 10, 0.0)
    assert total[0] == 4
    assert info["implicit_norm"] == 0
    assert info["cosine"] == 0
