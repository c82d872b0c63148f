"""Gauss-Newton, the preconditioner, and what users put in the place of critics and losses, in float64."""

import copy

import pytest
import torch
import torch._dynamo  # before a test replaces torch.compiler.is_compiling, which dynamo looks up when it is imported
import torch.nn as nn
import torch.nn.functional as F
from game import Game, as_tuple, assert_is_the_total_derivative, first, relative_error, second, solve, vector
from runs import args, checkpoint, scalars
from test_gradient import PLAYERS
from torch.nn import ELU, BatchNorm1d, Dropout, LayerNorm, Linear, ReLU, Sequential, SiLU, Tanh
from torch.nn.utils.parametrizations import weight_norm

import stddpg
import stsac

CURVATURES = ["gauss-newton", "hessian"]


# parameters of one critic: 59, 59, 59, 29, 6, of which the last two are fewer than the samples
@pytest.mark.parametrize("lam", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("shape", [((5, 4), 12), ((5, 4), 1), ((5, 4), 40), ((4,), 64), ((), 20)], ids=str)
def test_gauss_newton_is_the_dense_formula(script, shape, lam):
    assert_is_the_total_derivative(Game(script, *shape, seed=1), lam, curvature="gauss-newton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lam", [0.02, 1e-30])
def test_singular_kernel(lam, dtype):
    """A batch with repetitions has a singular K: without a floor under λ rounding would make it indefinite."""
    game = Game(stsac, (8, 8), 12)
    for net in game.nets:
        net.to(dtype)
    index = torch.arange(12) // 4
    columns = {name: column[index].to(dtype) for name, column in game.batch._asdict().items()}
    for name in ("obs", "actions", "next_obs"):
        columns[name] = 1e3 * columns[name]
    game.batch = stsac.Batch(**columns)
    *_, grad_theta, _, info = game.gradients(lam, curvature="gauss-newton")
    assert vector(grad_theta).isfinite().all() and info["implicit_norm"] > 0


@pytest.mark.parametrize("lam", [0.3, 30.0])
def test_preconditioner_is_the_gauss_newton_solve(script, lam, monkeypatch):
    """M r = (H_GN + λI)⁻¹ r, and only where it is asked for."""
    used = []
    solver = script.conjugate_gradient

    def recording(*arguments):
        used.append(arguments[4])
        return solver(*arguments)

    monkeypatch.setattr(script, "conjugate_gradient", recording)
    game = Game(script)
    game.gradients(lam, cg_iters=1)
    game.gradients(lam, cg_iters=1, precondition=False)
    matrix = game.dense(curvature="gauss-newton")[3]
    r = torch.randn(len(matrix)).double()
    assert relative_error(used[0](r), solve(matrix, lam, r)) < 1e-11
    assert used[1] is None


@pytest.fixture(scope="module")
def single_and_double():
    """A game of Hopper's scale (two layers of 256, batch 100, values in the thousands), in float32 and in float64."""
    single = Game(stddpg, (256, 256), 100, noise=0.0)
    for critic in (single.critic, single.target_critic):
        for p in critic.parameters():
            p.data *= 9
        critic.q1[-1].bias.data += 3000
    single.batch = single.batch._replace(obs=4 * single.batch.obs, next_obs=4 * single.batch.next_obs)
    for net in single.nets:
        net.float()
    double = copy.deepcopy(single, {id(stddpg): stddpg})
    for net in double.nets:
        net.double()
    single.batch = stddpg.Batch(*(column.float() for column in single.batch))
    double.batch = stddpg.Batch(*(column.double() for column in single.batch))
    (q,) = double.costs().qs
    J = second(q, double.w)
    largest = float(2 / 100 * torch.linalg.eigvalsh(J @ J.T)[-1])
    assert q.abs().mean() > 1e3
    assert 3e5 < largest < 3e6  # of the Gauss-Newton part; Hopper's Hessian has 4e5 to 1.3e6
    return single, double, largest


def gradient(game, lam, **flags):
    *_, grad_theta, _, info = game.gradients(lam, **{"cg_iters": 10, "cg_tol": 1e-3, **flags})
    return vector(grad_theta), info["implicit_norm"]


@pytest.mark.parametrize("curvature, factor", [("gauss-newton", 4), ("hessian", 40)])
def test_in_single_precision(single_and_double, curvature, factor):
    """K has rounding errors of eps · λ_max, so (K + λB/2)⁻¹ has relative ones of at most κ · eps times a few.

    κ = λ_max/λ ≈ 1e3 and eps = 1.2e-7: κ · eps = 1.2e-4, and the forward pass through sums of 256 adds a factor
    of at most √256. As a preconditioner it is applied in each of up to ten iterations.
    """
    single, double, largest = single_and_double
    (found, _), (expected, implicit) = (gradient(game, 500.0, curvature=curvature) for game in (single, double))
    assert implicit > 0.1 * expected.norm()  # or the error would be that of the direct term
    tolerance = factor * largest / 500 * torch.finfo(torch.float32).eps
    assert tolerance < 2e-2
    assert relative_error(found, expected) < tolerance


@pytest.mark.parametrize("lam", [0.02, 1e-12, 1e-30, 0.0])
def test_in_single_precision_with_a_decayed_lam(single_and_double, lam):
    """500 exp(-10) after 1e6 steps with --lam-decay 1e5: κ · eps > 1, so nothing is promised by conditioning.

    In the preconditioner (r - 𝒥ᵀ(K + λB/2)⁻¹𝒥r)/λ cancels and then divides by λ: without a bound on λ it is rounding
    alone, 10 to 1e5 times too large, and what conjugate gradient starts from.
    """
    single, _, _ = single_and_double
    found, implicit_norm = gradient(single, lam)
    _, gauss_newton_norm = gradient(single, 500.0, curvature="gauss-newton")
    assert found.isfinite().all()
    assert gauss_newton_norm / 10 < implicit_norm < 2 * gauss_newton_norm
    found, _ = gradient(single, lam, curvature="gauss-newton")
    assert found.isfinite().all()


# Critics that users write
class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Residual(Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Embeddings(nn.Module):
    """Of s and of a, apart."""

    def __init__(self):
        super().__init__()
        self.of_obs = Linear(3, 6)
        self.of_action = Linear(2, 6, bias=False)

    def forward(self, x):
        return torch.tanh(self.of_obs(x[:, :3])) * self.of_action(x[:, 3:])


class Normalized(nn.Module):
    """By running statistics, which are buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.randn(5))
        self.register_buffer("std", torch.rand(5) + 0.5)

    def forward(self, x):
        return (x - self.mean) / self.std


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * x


class Ensemble(nn.Module):
    """Q networks in a ModuleList: what each makes of (s, a), [B]; of several a tuple, as in stsac.py."""

    def __init__(self, networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, obs, actions):
        x = torch.cat([obs, actions], dim=-1)
        qs = tuple(network(x).squeeze(-1) for network in self.networks)
        return qs if len(qs) > 1 else qs[0]


class Trunk(nn.Module):
    """Q networks that share their first layers."""

    def __init__(self, heads):
        super().__init__()
        self.trunk = Sequential(Linear(5, 6), LayerNorm(6), Tanh())
        deep = Sequential(Linear(6, 4), Tanh(), Linear(4, 1))
        self.heads = nn.ModuleList([deep, Linear(6, 1), Linear(6, 1)][:heads])

    def forward(self, obs, actions):
        features = self.trunk(torch.cat([obs, actions], dim=-1))
        qs = tuple(head(features).squeeze(-1) for head in self.heads)
        return qs if len(qs) > 1 else qs[0]


def frozen(layer):
    return layer.requires_grad_(False)


def tied():
    """Two layers with one weight."""
    layers = [Linear(5, 5), Tanh(), Linear(5, 5), Linear(5, 1)]
    layers[2].weight = layers[0].weight
    return layers


def twice():
    hidden = Linear(5, 5)
    return [hidden, Tanh(), hidden, Tanh(), Linear(5, 1)]


def partly_frozen():
    layers = [frozen(Linear(5, 6)), Tanh(), Linear(6, 6), Tanh(), Linear(6, 1)]
    frozen(layers[2].weight)
    frozen(layers[4].bias)
    return layers


def tokens():
    """A token for each input."""
    return [nn.Unflatten(1, (5, 1)), Linear(1, 3), nn.Flatten(), Tanh(), Linear(15, 1)]


def convolution():
    return [nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 2), nn.Flatten(), Tanh(), Linear(12, 1)]


KNOWN = {
    "LayerNorm": lambda: [Linear(5, 6), LayerNorm(6), ReLU(), Linear(6, 4), LayerNorm(4), Linear(4, 1)],
    "of the inputs": lambda: [LayerNorm(5, bias=False), Linear(5, 6), SiLU(), Linear(6, 1)],
    "without parameters": lambda: [Linear(5, 6), LayerNorm(6, elementwise_affine=False), ELU(), Linear(6, 1)],
    "no bias": lambda: [Linear(5, 6, bias=False), LayerNorm(6), ELU(), Linear(6, 1, bias=False)],
    "nested": lambda: [Sequential(Linear(5, 6), Tanh()), Sequential(Linear(6, 1))],
    "residual": lambda: [Linear(5, 6), Residual(LayerNorm(6), Linear(6, 6), SiLU(), Linear(6, 6)), Linear(6, 1)],
    "normalized": lambda: [Normalized(), Linear(5, 6), Tanh(), Linear(6, 1)],
    "embeddings": lambda: [Embeddings(), Linear(6, 1)],
    "dropout": lambda: [Linear(5, 8), Dropout(0.3), LayerNorm(8), ReLU(), Linear(8, 1)],
    "functional": lambda: [Linear(5, 6), Apply(torch.sin), Linear(6, 6), Apply(F.leaky_relu), Linear(6, 1)],
    "in place": lambda: [Linear(5, 6), ReLU(inplace=True), LayerNorm(6), ELU(inplace=True), Linear(6, 1)],
    "clamped": lambda: [Apply(lambda x: x.clamp(-0.5, 0.5)), Linear(5, 6), Tanh(), Linear(6, 1)],
    "partly frozen": partly_frozen,
}
UNKNOWN = {  # and what the refusal names
    "batch norm": (lambda: [Linear(5, 6), BatchNorm1d(6), ReLU(), Linear(6, 1)], "networks.0.1.weight"),
    "its bare form": (lambda: [Linear(5, 6), BatchNorm1d(6, affine=False), Tanh(), Linear(6, 1)], "samples meet"),
    "PReLU": (lambda: [Linear(5, 6), nn.PReLU(), Linear(6, 1)], "networks.0.1.weight is no weight or bias"),
    "parameter of its own": (lambda: [Linear(5, 6), Scaled(), Linear(6, 1)], "networks.0.1.scale"),
    "beside frozen ones": (lambda: [frozen(Linear(5, 6)), nn.PReLU(), Linear(6, 1)], "networks.0.1.weight"),
    # its second derivative by its own parameters is wrong in torch 2.13
    "weight_norm": (lambda: [weight_norm(Linear(5, 6)), Tanh(), Linear(6, 1)], "parametrizations.weight.original0"),
    "twice": (twice, "networks.0.0.weight is used more than once"),
    "tied": (tied, "networks.0.0.weight is used more than once"),
    "convolution": (convolution, "networks.0.1.weight"),
    "tokens": (tokens, "a layer has outputs of shape (12, 5, 3)"),
}


def ensemble(script, layers, seed=0, networks=None):
    """A game with as many Q networks as the script has."""
    torch.manual_seed(seed)
    networks = networks or (2 if script is stsac else 1)
    return Game(script, critic=Ensemble([Sequential(*layers()) for _ in range(networks)]), seed=1)


def assert_is_right(game, curvature):
    """Accepted on the first batch, and every gradient is the dense one."""
    game.check(5.0, curvature=curvature)
    assert_is_the_total_derivative(game, curvature=curvature)


def assert_is_refused(game, reason, curvatures=CURVATURES):
    for curvature in curvatures:
        with pytest.raises(SystemExit) as error:
            game.check(5.0, curvature=curvature)
        message = str(error.value)
        assert reason in message
        assert "--curvature hessian --no-precondition takes it" in message
        assert "\n" not in message


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("kind", KNOWN)
def test_critics_that_it_knows(script, kind, curvature):
    assert_is_right(ensemble(script, KNOWN[kind]), curvature)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_critics_that_it_does_not_know(script, kind):
    """Refused where a wrong number would come out; the plain solve and the critic as leader take anything."""
    layers, reason = UNKNOWN[kind]
    game = ensemble(script, layers)
    assert_is_refused(game, reason)
    for player in ("plain", "critic") if kind != "weight_norm" else ("critic",):
        game.check(5.0, **PLAYERS[player])
        assert_is_the_total_derivative(game, **PLAYERS[player])


@pytest.mark.parametrize("curvature", CURVATURES)
def test_ten_networks_of_unequal_sizes(curvature):
    torch.manual_seed(0)
    networks = [Sequential(Linear(5, n), Tanh(), Linear(n, 1)) for n in range(1, 11)]
    assert_is_right(Game(stsac, critic=Ensemble(networks)), curvature)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_networks_that_share_a_trunk(script, curvature):
    for networks in (2, 3) if script is stsac else (1,):
        assert_is_right(Game(script, critic=Trunk(networks), seed=2), curvature)


def twin(monkeypatch):
    """stddpg.py with two Q networks: its losses for as many as there are."""
    td_target, actor_loss = stddpg.td_target, stddpg.actor_loss

    def smallest(critic):
        return lambda *inputs: torch.stack(critic(*inputs)).amin(0)

    monkeypatch.setattr(stddpg, "td_target", lambda actor, critic, *rest: td_target(actor, smallest(critic), *rest))
    monkeypatch.setattr(stddpg, "actor_loss", lambda actor, critic, *rest: actor_loss(actor, smallest(critic), *rest))
    monkeypatch.setattr(stddpg, "critic_loss", lambda qs, y: sum(((q - y) ** 2).mean() for q in qs))


@pytest.mark.parametrize("player", PLAYERS)
def test_a_twin_in_stddpg(player, monkeypatch):
    twin(monkeypatch)
    game = ensemble(stddpg, KNOWN["LayerNorm"], networks=2)
    game.check(5.0, **PLAYERS[player])
    assert_is_the_total_derivative(game, **PLAYERS[player])


@pytest.mark.parametrize("script, networks", [(stsac, 10), (stddpg, 2)])
def test_trains_as_many_networks_as_a_critic_returns(here, script, networks, monkeypatch):
    """A change of `Critic`, in stddpg.py of its losses as well, through to the curves of each network."""
    if script is stddpg:
        twin(monkeypatch)

    def critic(*spaces_and_hidden):
        return Ensemble([Sequential(Linear(4, 5), LayerNorm(5), Tanh(), Linear(5, 1)) for _ in range(networks)])

    monkeypatch.setattr(script, "Critic", critic)
    found = scalars(script.train(args(script, total_timesteps=100, update_after=80)))
    values = [found[f"losses/qf{k}_values"][100] for k in range(1, networks + 1)]
    losses = [found[f"losses/qf{k}_loss"][100] for k in range(1, networks + 1)]
    assert len(set(values)) == networks
    assert sum(losses) / networks == pytest.approx(found["losses/qf_loss"][100], rel=1e-5)


def test_several_outputs_a_sample(script, monkeypatch):
    """Atoms or quantiles, with losses that fit: refused, and taken by the plain solve."""
    td_target, actor_loss = script.td_target, script.actor_loss

    def mean(critic):
        def means(*inputs):
            qs = critic(*inputs)
            return tuple(q.mean(-1) for q in qs) if isinstance(qs, tuple) else qs.mean(-1)

        return means

    monkeypatch.setattr(script, "actor_loss", lambda actor, critic, *rest: actor_loss(actor, mean(critic), *rest))
    monkeypatch.setattr(
        script, "td_target", lambda actor, critic, *rest: td_target(actor, mean(critic), *rest)[:, None]
    )
    monkeypatch.setattr(script, "critic_loss", lambda qs, y: sum(((q - y) ** 2).mean() for q in as_tuple(qs)))
    game = ensemble(script, lambda: [Linear(5, 6), Tanh(), Linear(6, 4)])
    assert_is_refused(game, "a Q network has values of shape (12, 4), not [B]")
    for player in ("plain", "critic"):
        game.check(5.0, **PLAYERS[player])
        assert_is_the_total_derivative(game, **PLAYERS[player])


@pytest.mark.parametrize("player", ["none", *PLAYERS])
def test_frozen_parameters(script, player):
    """Of both players: left alone, for every leader."""
    game = Game(script)
    actor_optimizer = torch.optim.SGD(game.actor.parameters(), lr=0.1)
    critic_optimizer = torch.optim.SGD(game.critic.parameters(), lr=0.1)
    frozen(game.actor.net[0])
    frozen(game.critic.q1[2].weight)
    game.theta = [p for p in game.actor.parameters() if p.requires_grad]
    game.w = [p for p in game.critic.parameters() if p.requires_grad]
    if player != "none":
        game.check(5.0, **PLAYERS[player])
        assert_is_the_total_derivative(game, **PLAYERS[player])
    before = copy.deepcopy(list(game.actor.named_parameters()) + list(game.critic.named_parameters()))
    run = game.args(**PLAYERS.get(player, {"leader": "none"}), unroll=2)
    optimizers = actor_optimizer, critic_optimizer
    script.stackelberg_update(game.nets, optimizers, [game.batch] * 2, *game.entropy, torch.tensor(5.0), run)
    after = [*game.actor.parameters(), *game.critic.parameters()]
    moved = {name for (name, old), new in zip(before, after) if not torch.equal(old, new)}
    assert moved == {name for name, _ in before} - {"net.0.weight", "net.0.bias", "q1.2.weight"}


def test_train_refuses_before_the_first_update(here, script, monkeypatch):
    """On a batch of the run itself; what does not need Gauss-Newton trains, with its running statistics."""

    def critic(*spaces_and_hidden):
        layers = [[Linear(4, 5), BatchNorm1d(5, affine=False), Tanh(), Linear(5, 1)] for _ in range(2)]
        networks = [Sequential(*of_network) for of_network in layers]
        return Ensemble(networks if script is stsac else networks[:1])

    monkeypatch.setattr(script, "Critic", critic)
    for flags in ({}, {"curvature": "gauss-newton"}):
        with pytest.raises(SystemExit, match="Gauss-Newton does not know this critic: .*samples meet"):
            script.train(args(script, **flags))
    for player in ("plain", "critic"):
        state = checkpoint(script.train(args(script, total_timesteps=60, **PLAYERS[player])))
        for net in ("critic", "target_critic"):  # 11 updates, each with one pass or two of each network
            assert state[net]["networks.0.1.num_batches_tracked"] == 22


# Losses that users write
def change_loss(script, monkeypatch, change, seed=2):
    """A game whose critic's loss is change(script's loss, qs, y), with qs always a tuple."""
    critic_loss = script.critic_loss
    game = Game(script, seed=seed)

    def changed(qs, y):
        return change(game, critic_loss(qs, y), as_tuple(qs), y)

    monkeypatch.setattr(script, "critic_loss", changed)
    return game


@pytest.mark.parametrize("player", PLAYERS)
def test_a_term_that_is_no_function_of_q(script, player, monkeypatch):
    """L2 on the weights is in the critic's own gradient."""
    game = change_loss(script, monkeypatch, lambda game, L, qs, y: L + 0.1 * sum((p**2).sum() for p in game.w))
    game.check(5.0, **PLAYERS[player])
    assert_is_the_total_derivative(game, **PLAYERS[player])
    plain = game.gradients(1.0, leader="none")[3]
    assert relative_error(vector(plain), first(game.costs().critic, game.w)) < 1e-12


@pytest.mark.parametrize("player", PLAYERS)
def test_weighted_squares(script, player, monkeypatch):
    """∂²L/∂Q² is the loss's own, so a factor or a weight for each sample is no mistake."""
    weights = torch.rand(12, generator=torch.Generator().manual_seed(0)).double() + 0.1
    game = change_loss(script, monkeypatch, lambda game, L, qs, y: sum((weights * (q - y) ** 2).mean() / 3 for q in qs))
    game.check(5.0, **PLAYERS[player])
    assert_is_the_total_derivative(game, **PLAYERS[player])


def scaled(game, L, qs, y):
    """By the batch's own scale: each sample's term has all others."""
    return L / sum((q - y).std() for q in qs)


def tie(game, L, qs, y):
    """Q networks to one another, or the samples, where there is one alone."""
    other = qs[1] if len(qs) > 1 else qs[0].roll(1)
    return L + ((qs[0] - other) ** 2).mean()


def cauchy(game, L, qs, y):
    """Of negative curvature where the residual is large."""
    return sum((1 + (q - y) ** 2).log().mean() for q in qs)


def huber(game, L, qs, y):
    """Every other residual is an outlier."""
    delta = torch.cat([q - y for q in qs]).abs().median().item() * 1.0001
    return sum(F.huber_loss(q, y, delta=delta) for q in qs)


@pytest.mark.parametrize(
    "loss, reason",
    [
        (scaled, "Gauss-Newton does not know this critic_loss"),
        (tie, "no sum over samples"),
        (huber, "not strictly convex"),
        (cauchy, "not strictly convex"),
    ],
)
def test_losses_that_gauss_newton_does_not_know(script, loss, reason, monkeypatch):
    """Refused; the Hessian's ways are right, with a preconditioner that is not quite the Gauss-Newton matrix, too."""
    game = change_loss(script, monkeypatch, loss)
    assert_is_refused(game, reason, ["gauss-newton"])
    for player in ("preconditioned", "plain", "critic"):
        game.check(5.0, **PLAYERS[player])
        assert_is_the_total_derivative(game, **PLAYERS[player])


def test_a_term_of_other_actions(script, monkeypatch):
    """Such as CQL's, of Q at the policy's actions: there θ and w meet, too."""
    critic_cost = script.critic_cost

    def changed(actor, critic, target_critic, batch, *rest):
        f_critic, qs, y = critic_cost(actor, critic, target_critic, batch, *rest)
        actions = as_tuple(actor(batch.obs))[0]
        return f_critic + sum(q.mean() for q in as_tuple(critic(batch.obs, actions))), qs, y

    monkeypatch.setattr(script, "critic_cost", changed)
    game = Game(script, seed=2)
    assert_is_refused(game, "θ and w meet in it elsewhere", ["gauss-newton"])
    for player in ("preconditioned", "plain", "critic"):
        game.check(5.0, **PLAYERS[player])
        assert_is_the_total_derivative(game, **PLAYERS[player])


def test_gauss_newton_without_curvature_is_not_silent(script, monkeypatch):
    """A later batch, which nothing looks at beforehand: no number comes out that could be taken for a gradient."""
    game = change_loss(script, monkeypatch, huber)
    *_, grad_theta, _, _ = game.gradients(1.0, curvature="gauss-newton")
    assert vector(grad_theta).isnan().any()


# On another device, and compiled
@pytest.mark.parametrize("player", ["none", *PLAYERS])
def test_update_mixes_no_devices_and_never_waits(script, player, monkeypatch):
    """On the meta device, with the masks of a compiled solve: a tensor of another device or a value that is read back
    raises there, as if a GPU had to wait for it."""
    game = Game(script)
    for net in game.nets:
        net.to("meta")
    game.theta = list(game.actor.parameters())
    optimizers = [torch.optim.Adam(net.parameters()) for net in game.nets[:2]]
    batch = script.Batch(*(column.to("meta") for column in game.batch))
    coefficients = [c.to("meta") for c in (*game.entropy, torch.tensor(5.0, dtype=torch.float64))]
    run = game.args(**PLAYERS.get(player, {"leader": "none"}), cg_iters=3, unroll=2)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    f_actor, f_critic, info = script.stackelberg_update(game.nets, optimizers, [batch, batch], *coefficients, run)
    found = [f_actor, f_critic, *game.nets[0].parameters(), *(v for v in info.values() if isinstance(v, torch.Tensor))]
    assert {t.device.type for t in found} == {"meta"}


@pytest.mark.parametrize("player", ["none", *PLAYERS])
def test_compiles_in_one_graph(script, player):
    """The gradients are eager's, for another λ without compiling again, and as much noise is drawn."""
    game = Game(script, (4,), seed=1)
    flags = {"cg_iters": 2, **PLAYERS.get(player, {"leader": "none"})}
    eager = [game.gradients(lam, **flags) for lam in (5.0, 50.0)]
    state = torch.get_rng_state()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True, error_on_recompile=True):
        gradients = torch.compile(script.player_gradients, fullgraph=True, backend="eager")
        run = game.args(**flags)
        for lam, expected in zip((5.0, 50.0), eager):
            torch.manual_seed(3)
            lam = torch.tensor(lam, dtype=torch.float64)
            found = gradients(*game.nets, game.batch, *game.entropy, lam, run)
            torch.testing.assert_close(found[:4], expected[:4], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(found[4], expected[4], rtol=1e-12, atol=1e-14)
    assert torch.equal(torch.get_rng_state(), state)
