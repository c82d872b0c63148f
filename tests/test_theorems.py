"""The paper's theorems, and stac_ac.py's estimators against them, on a finite MDP where every expectation is a sum."""

import itertools

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

import stac_ac

GAMMA = 0.9
LAYERS, WIDTH, ACTIONS = 3, 3, 3
STATES = LAYERS * WIDTH  # WIDTH states for each time t = 0, 1, 2; an episode ends after the last, or earlier
SPACES = Box(0.0, 1.0, (STATES,)), Discrete(ACTIONS)
ONE_HOT = torch.eye(STATES + 1, STATES, dtype=torch.float64)  # the terminal state is all zeros
FIRST = torch.tensor([1 / WIDTH] * WIDTH + [0.0] * (STATES - WIDTH), dtype=torch.float64)  # the initial states' ρ


@pytest.fixture(autouse=True)
def double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def make_mdp():
    """P [S, A, S + 1] and R [S, A]. Each action leads to two states of the next layer or the end, with 1/2 each."""
    generator = np.random.default_rng(0)
    P = torch.zeros(STATES, ACTIONS, STATES + 1)
    for s, a in itertools.product(range(STATES), range(ACTIONS)):
        layer = s // WIDTH + 1
        ahead = [*range(layer * WIDTH, (layer + 1) * WIDTH), STATES] if layer < LAYERS else [STATES, STATES]
        for outcome in generator.choice(ahead, 2, replace=layer == LAYERS):
            P[s, a, outcome] += 0.5
    return P, torch.from_numpy(generator.normal(size=(STATES, ACTIONS)))


class FeatureV(stac_ac.Critic):
    """The script's V critic with fewer parameters than states: its best response is not V^π."""

    def __init__(self, hidden):
        super().__init__(Box(-1.0, 1.0, (1,)), hidden)

    def forward(self, obs, actions=None):
        return super().forward(features(obs))


class FeatureQ(stac_ac.QCritic):
    """The script's Q critic with fewer parameters than pairs of state and action."""

    def __init__(self, hidden):
        super().__init__(Box(-1.0, 1.0, (1,)), Discrete(ACTIONS), hidden)

    def forward(self, obs, actions):
        return super().forward(features(obs), actions)


def features(obs):
    return (
        obs @ torch.linspace(-2, 2, STATES)[torch.randperm(STATES, generator=torch.Generator().manual_seed(5))][:, None]
    )


class MDP:
    """A tabular softmax actor, a critic, and the exact J and L as functions of both, with autograd through π and V^π.

    quarters: action probabilities of 1/4, 1/4 and 1/2, so that a finite list of trajectories has exactly the
    distribution of the policy's.
    """

    def __init__(self, critic="v", quarters=False, hidden=(2,)):
        torch.manual_seed(0)
        self.kind = critic
        self.P, self.R = make_mdp()
        self.actor = stac_ac.Actor(*SPACES, hidden=())
        self.critic = {"v": FeatureV, "q": FeatureQ}[critic](hidden)
        for p in self.critic.parameters():
            p.data += torch.randn_like(p)
        logits = torch.randn(STATES, ACTIONS)
        if quarters:
            logits = torch.tensor([0.25, 0.25, 0.5]).log()[torch.stack([torch.randperm(3) for _ in range(STATES)])]
        self.actor.net[0].weight.data.copy_(logits.T)
        self.actor.net[0].bias.data.zero_()
        self.theta, self.w = list(self.actor.parameters()), list(self.critic.parameters())
        self.rho = self.visited()

    def policy(self):
        return torch.softmax(self.actor.net(ONE_HOT[:-1]), -1)

    def exact_q(self):
        """Q^π [S, A] and V^π [S + 1]: the sum over time has as many terms as there are layers."""
        V = torch.zeros(STATES + 1)
        for _ in range(LAYERS):
            Q = self.R + GAMMA * self.P @ V
            V = torch.cat([(self.policy() * Q).sum(-1), torch.zeros(1)])
        return Q, V

    def visited(self):
        """ρ, the distribution of the visited states, [S]; a constant, as (2) and (4) have it."""
        with torch.no_grad():
            at_t, total = FIRST, torch.zeros(STATES)
            for _ in range(LAYERS):
                total = total + at_t
                at_t = torch.einsum("s,sa,sax->x", at_t, self.policy(), self.P)[:-1]
        return total / total.sum()

    def q_values(self):
        """What J averages, [S, A]: Q_w, or r + γ V_w(s')."""
        if isinstance(self.critic, stac_ac.QCritic):
            return self.critic(ONE_HOT[:-1, None].expand(-1, ACTIONS, -1), torch.arange(ACTIONS).expand(STATES, -1))
        V = torch.cat([self.critic(ONE_HOT[:-1]), torch.zeros(1)])
        return self.R + GAMMA * self.P @ V

    def J(self):
        """(2)"""
        return self.rho @ (self.policy() * self.q_values()).sum(-1)

    def L(self, rho=None):
        """(4), or its form with state values"""
        Q, V = self.exact_q()
        if isinstance(self.critic, stac_ac.QCritic):
            errors = (self.policy() * (self.q_values() - Q) ** 2).sum(-1)
        else:
            errors = (self.critic(ONE_HOT[:-1]) - V[:-1]) ** 2
        return (self.rho if rho is None else rho) @ errors

    def paths(self, start):
        """Every trajectory from a start state with its probability: (p, [(s, a, s'), ...])."""
        with torch.no_grad():
            pi = self.policy()
        todo = [(p.item(), [], s) for s, p in enumerate(start) if p > 0]
        while todo:
            p, path, s = todo.pop()
            if s == STATES:
                yield p, path
                continue
            for a in range(ACTIONS):
                for s2 in self.P[s, a].nonzero().flatten().tolist():
                    todo.append((p * (pi[s, a] * self.P[s, a, s2]).item(), [*path, (s, a, s2)], s2))

    def rollout(self, trajectories):
        """The script's batch of a list of trajectories."""
        steps = torch.tensor([[*step, i] for i, path in enumerate(trajectories) for step in path])
        s, a, s2, trajectory = steps.T
        return stac_ac.Rollout(ONE_HOT[s], a, self.R[s, a], ONE_HOT[s2], (s2 == STATES).double(), trajectory)

    def complete_batch(self):
        """A batch of exactly the policy's distribution: every trajectory as often as its probability says."""
        unit = WIDTH * 8**LAYERS
        copies = [([path] * round(p * unit), p * unit) for p, path in self.paths(FIRST)]
        assert all(len(copy) == pytest.approx(n, abs=1e-6) for copy, n in copies)
        return self.rollout(list(itertools.chain.from_iterable(copy for copy, _ in copies)))

    def sampled_batch(self, n, generator):
        """n trajectories of the policy."""
        with torch.no_grad():
            pi, P = self.policy().numpy().cumsum(-1), self.P.numpy().cumsum(-1)
        s, steps, alive = generator.integers(WIDTH, size=n), [], np.arange(n)
        for _ in range(LAYERS):
            a = (generator.random((len(s), 1)) > pi[s]).sum(-1)
            s2 = (generator.random((len(s), 1)) > P[s, a]).sum(-1)
            steps.append(np.stack([s, a, s2, alive], -1))
            s, alive = s2[s2 < STATES], alive[s2 < STATES]
        steps = np.concatenate(steps)
        steps = torch.from_numpy(steps[np.argsort(steps[:, 3], kind="stable")])
        s, a, s2, trajectory = steps.T
        return stac_ac.Rollout(ONE_HOT[s], a, self.R[s, a], ONE_HOT[s2], (s2 == STATES).double(), trajectory)

    def args(self, **flags):
        return stac_ac.Args(**{"critic": self.kind, "gamma": GAMMA, "gae_lambda": 0.0, **flags})

    def score(self, batch):
        return stac_ac.score_function(self.actor(batch.obs), batch.actions)

    def surrogates(self, batch, start_states="every", gae_lambda=0.0, gamma=GAMMA, curvature="hessian"):
        """The script's f1 and f2."""
        args = self.args(gamma=gamma, gae_lambda=gae_lambda, start_states=start_states, curvature=curvature)
        estimates = stac_ac.estimate(self.actor, self.critic, batch, args)
        score = self.score(batch)
        f1 = stac_ac.actor_surrogate(self.critic, batch, score, estimates.advantages, args)
        return f1, stac_ac.critic_surrogate(self.critic, batch, score, estimates, args)


def vector(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def second(gradient, x):
    """The Jacobian of a gradient with its graph, [len(gradient), len(x)]."""
    return torch.stack([vector(stac_ac.grad(row, x)) for row in gradient])


def derivatives(f1, f2, f2_mixed, theta, w):
    """∇_θf1, ∇_wf1, ∇_wf2, ∇_w²f2, ∇_θ∇_wf2: all that the Stackelberg gradient is made of."""
    grad2 = vector(stac_ac.grad(f2, w, create_graph=True))
    mixed = grad2 if f2_mixed is f2 else vector(stac_ac.grad(f2_mixed, w, create_graph=True))
    return {
        "∇_θf1": vector(stac_ac.grad(f1, theta)),
        "∇_wf1": vector(stac_ac.grad(f1, w)),
        "∇_wf2": grad2.detach(),
        "∇_w²f2": second(grad2, w),
        "∇_θ∇_wf2": second(mixed, theta),
    }


def exact_derivatives(mdp, start_states):
    """By automatic differentiation of the exact J and L. The critic's loss is over every visited state; where
    `initial` says so, the mixed derivative is that of the proposition as written."""
    L = mdp.L()
    return derivatives(-mdp.J(), L, mdp.L(FIRST) if start_states == "initial" else L, mdp.theta, mdp.w)


class TestTheorems:
    """The statements themselves, as sums over all trajectories."""

    @pytest.mark.parametrize("start_states", ["initial", "every"])
    def test_proposition_1(self, start_states):
        mdp = MDP("v")
        rho = FIRST if start_states == "initial" else mdp.rho
        Q, V = (x.detach() for x in mdp.exact_q())
        V_w, coefficients = mdp.critic(ONE_HOT[:-1]).detach(), torch.zeros(STATES, ACTIONS)
        for p, path in mdp.paths(rho):
            s0 = path[0][0]
            for t, (s, a, _) in enumerate(path):
                coefficients[s, a] += 2 * p * GAMMA**t * (V[s0] - V_w[s0]) * Q[s, a]
        stated = vector(torch.autograd.grad((coefficients * mdp.policy().log()).sum(), mdp.theta))
        exact = vector(torch.autograd.grad(mdp.L(rho), mdp.theta))
        assert exact.norm() > 0.1
        assert (stated - exact).norm() < 1e-8 * exact.norm()

    @pytest.mark.parametrize("start_states", ["initial", "every"])
    def test_theorem_1_needs_its_factor_2(self, start_states):
        mdp = MDP("q")
        rho = FIRST if start_states == "initial" else mdp.rho
        Q, Q_w = mdp.exact_q()[0].detach(), mdp.q_values().detach()
        first_sum, second_sum = torch.zeros(STATES, ACTIONS), torch.zeros(STATES, ACTIONS)
        for p, path in mdp.paths(rho):
            s0, a0, _ = path[0]
            first_sum[s0, a0] += p * (Q_w[s0, a0] - Q[s0, a0]) ** 2
            for t, (s, a, _) in enumerate(path[1:], 1):
                second_sum[s, a] += p * GAMMA**t * (Q[s0, a0] - Q_w[s0, a0]) * Q[s, a]
        log_pi = mdp.policy().log()

        def gradient(coefficients):
            return vector(stac_ac.grad((coefficients * log_pi).sum(), mdp.theta))

        exact = vector(torch.autograd.grad(mdp.L(rho), mdp.theta))
        assert (gradient(first_sum + 2 * second_sum) - exact).norm() < 1e-8 * exact.norm()
        printed = gradient(first_sum + second_sum)  # the statement: Appendix B loses the 2 in its last line
        assert (printed - exact).norm() > 0.1 * exact.norm()
        torch.testing.assert_close(exact - printed, gradient(second_sum), rtol=0, atol=1e-9)


@pytest.mark.parametrize("start_states", ["every", "initial"])
@pytest.mark.parametrize("critic", ["v", "q"])
class TestEstimators:
    """The script's surrogates."""

    def test_are_exact_on_a_batch_with_the_policys_distribution(self, critic, start_states):
        """Each of the five derivatives, all of its entries, with no sampling error."""
        mdp = MDP(critic, quarters=True)
        f1, f2 = mdp.surrogates(mdp.complete_batch(), start_states)
        assert f1.item() == pytest.approx(-mdp.J().item(), abs=1e-10)
        found = derivatives(f1, f2, f2, mdp.theta, mdp.w)
        for name, exact in exact_derivatives(mdp, start_states).items():
            assert exact.norm() > 1e-2, name
            assert (found[name] - exact).norm() < 1e-8 * exact.norm(), name

    def test_converge(self, critic, start_states):
        """On sampled trajectories: each entry within five standard errors."""
        mdp, generator = MDP(critic), np.random.default_rng(1)
        exact = exact_derivatives(mdp, start_states)
        samples = {name: [] for name in exact}
        for _ in range(40):
            f1, f2 = mdp.surrogates(mdp.sampled_batch(500, generator), start_states)
            for name, value in derivatives(f1, f2, f2, mdp.theta, mdp.w).items():
                samples[name].append(value)
        for name, values in samples.items():
            values, truth = torch.stack(values), exact[name]
            error = (values.mean(0) - truth).abs()
            bound = values.std(0) / 40**0.5
            # the ratio of two sums over 500 trajectories of random length has a bias of a few thousandths
            assert (error < 5 * bound + 2e-3 * truth.abs().max()).all(), name
            assert bound.norm() < 0.12 * truth.norm(), name  # so the bounds above say something


def test_gae_is_exact():
    """∇_θf1 with GAE: the policy gradient of the exact expectation of Σ (γλ)ˡ δ_{t+l}."""
    mdp = MDP("v", quarters=True)
    batch = mdp.complete_batch()
    with torch.no_grad():
        delta = mdp.q_values() - mdp.critic(ONE_HOT[:-1])[:, None]
        A = torch.zeros(STATES, ACTIONS)
        for _ in range(LAYERS):
            A = delta + GAMMA * 0.7 * mdp.P[..., :-1] @ (mdp.policy() * A).sum(-1)
    weights = mdp.rho[:, None] * mdp.policy().detach() * A
    exact = vector(torch.autograd.grad(-(weights * mdp.policy().log()).sum(), mdp.theta))
    f1, _ = mdp.surrogates(batch, gae_lambda=0.7)
    assert (vector(stac_ac.grad(f1, mdp.theta)) - exact).norm() < 1e-9


def set_vector(params, values):
    for p, v in zip(params, values.split([p.numel() for p in params])):
        p.data.copy_(v.view_as(p))


def best_response(mdp, lam):
    """Moves w to the minimum of L(θ, w) + (λ/2)‖w‖², by Newton's method with backtracking.

    The step is |H|⁻¹g, which descends where H is indefinite, too, and leaves flat directions alone.
    """

    def cost():
        return mdp.L() + lam / 2 * sum((p**2).sum() for p in mdp.w)

    for _ in range(200):
        before = cost()
        g = vector(stac_ac.grad(before, mdp.w, create_graph=True))
        eigenvalues, vectors = torch.linalg.eigh(second(g, mdp.w))
        curved = eigenvalues.abs() > 1e-9  # a Q critic's bias and its inputs for the actions are one too many
        inverse = torch.where(curved, 1 / eigenvalues.abs(), 0)
        newton = vectors @ (inverse * (vectors.T @ g.detach()))
        w, size = vector(mdp.w).detach(), 1.0
        set_vector(mdp.w, w - newton)
        if newton.norm() < 1e-12:
            assert eigenvalues[0] > -1e-9
            return
        while cost() > before and size > 1e-3:
            size /= 2
            set_vector(mdp.w, w - size * newton)
    raise AssertionError("Newton's method did not converge")


@pytest.mark.parametrize("hidden, lam", [((), 0.0), ((2,), 0.1)], ids=["linear-unregularized", "tanh-regularized"])
@pytest.mark.parametrize("critic", ["v", "q"])
def test_total_derivative_is_that_of_the_best_response(critic, hidden, lam):
    """(15), from the script's surrogates, against central differences of J(θ, w*(θ)); ρ is held fixed.

    A tanh critic has no minimum (its units saturate) unless it is regularized; then w* minimises what the leader
    believes the follower to minimise (Section 4.5), and the regularized total derivative is exact.
    """
    mdp = MDP(critic, quarters=True, hidden=hidden)
    best_response(mdp, lam)
    assert mdp.L() > 1e-3  # the critic cannot represent V^π: ∇_w²L has its term with the residual
    f1, f2 = mdp.surrogates(mdp.complete_batch())
    total, info = stac_ac.stackelberg_gradient(f1, f2, mdp.theta, mdp.w, lam, 200, 1e-13)
    assert info["residual"] < 1e-9 and not info["negative_curvature"]
    assert info["implicit_norm"] > 0.3 * info["direct_norm"]
    total = vector(total)
    theta, w, eps = vector(mdp.theta).detach(), vector(mdp.w).detach(), 1e-5
    for direction in (total, torch.randn_like(theta), torch.randn_like(theta)):
        direction = direction / direction.norm()
        f1_at = []
        for sign in (1, -1):
            set_vector(mdp.theta, theta + sign * eps * direction)
            set_vector(mdp.w, w)
            best_response(mdp, lam)
            f1_at.append(-mdp.J().item())
        difference = (f1_at[0] - f1_at[1]) / (2 * eps)
        assert difference == pytest.approx((total @ direction).item(), abs=1e-6 * total.norm().item())


class TestCosine:
    """With one start state per batch and batch means, `initial` is vanilla actor-critic at another rate."""

    def cosine(self, start_states, gamma, starts, n=50):
        """Between the direct and the implicit term; the policy gradient has the same advantages in both."""
        mdp = MDP("v")
        trajectories = mdp.sampled_batch(5 * n, np.random.default_rng(3))
        kept = [i.item() for i in trajectories.trajectory.unique() if self.start(trajectories, i) in starts][:n]
        batch = stac_ac.Rollout(*(x[torch.isin(trajectories.trajectory, torch.tensor(kept))] for x in trajectories))
        f1, f2 = mdp.surrogates(batch, start_states, 1.0, gamma)
        _, info = stac_ac.stackelberg_gradient(f1, f2, mdp.theta, mdp.w, 0.1, 100, 1e-12)
        assert info["implicit_norm"] > 1e-3
        return info["cosine"].item()

    def start(self, batch, i):
        return batch.obs[batch.trajectory == i][0].argmax().item()

    def test_one_start_state_is_parallel(self):
        assert abs(self.cosine("initial", 1.0, {0})) == pytest.approx(1, abs=1e-10)
        assert abs(self.cosine("initial", 1.0, {0}, n=1)) == pytest.approx(1, abs=1e-10)
        # γᵗ, which the policy gradient does not have, alone makes a small difference
        assert 0.95 < abs(self.cosine("initial", GAMMA, {0})) < 1 - 1e-6

    def test_every_is_not(self):
        """A direction of its own, even from one start state and without discounting."""
        assert abs(self.cosine("every", 1.0, {0})) < 0.99
        assert abs(self.cosine("every", GAMMA, {0, 1, 2})) < 0.99

    def test_several_start_states_are_not(self):
        assert abs(self.cosine("initial", 1.0, {0, 1, 2})) < 0.99


class TestReleasedEstimator:
    """`--start-states released`: one start state, and the batch's mean policy gradient for ∇_θV^π(s_0)."""

    def factor(self, mdp, batch, lam, curvature="hessian", iterations=200):
        """total = factor · direct, and the solver's info; fails unless it is so to rounding."""
        f1, f2 = mdp.surrogates(batch, "released", 0.97, curvature=curvature)
        total, info = stac_ac.stackelberg_gradient(f1, f2, mdp.theta, mdp.w, lam, iterations, 1e-13)
        total, direct = vector(total), vector(stac_ac.grad(f1, mdp.theta))
        factor = (total @ direct / (direct @ direct)).item()
        assert (total - factor * direct).norm() < 1e-12 * max(1, abs(factor)) * direct.norm()  # rounding
        assert direct.norm() > 1e-2
        return factor, info

    @pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
    @pytest.mark.parametrize("lam", [10.0, 500.0])
    def test_is_a_multiple_of_the_plain_gradient(self, lam, curvature):
        """1 + 2 ⟨∇_wV_w(s_0), v⟩ times, with v from a dense solve."""
        mdp = MDP("v", hidden=(3,))
        batch = mdp.sampled_batch(50, np.random.default_rng(2))
        factor, info = self.factor(mdp, batch, lam, curvature)
        assert abs(info["cosine"].item()) == pytest.approx(1, abs=1e-12)
        assert info["residual"] < 1e-12 and not info["negative_curvature"]
        values = mdp.critic(batch.obs)
        J = second(values, mdp.w)
        H = 2 / len(values) * J.T @ J
        if curvature == "hessian":
            returns = stac_ac.estimate(mdp.actor, mdp.critic, batch, mdp.args()).returns
            loss = ((values - returns) ** 2).mean()
            H = second(vector(stac_ac.grad(loss, mdp.w, create_graph=True)), mdp.w)
        v = torch.linalg.solve(H + lam * torch.eye(len(H)), J.mean(0))
        expected = 1 + 2 * (J[0] @ v).item()
        assert abs(expected - 1) > 1e-3
        assert factor == pytest.approx(expected, abs=1e-10)

    @pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
    def test_linear_critic(self, curvature):
        """Linear with a constant feature, the bias, and fitted over the batch: 2 as λ → 0, 1 as λ → ∞."""
        mdp = MDP("v", hidden=())
        batch = mdp.sampled_batch(50, np.random.default_rng(2))
        returns = stac_ac.estimate(mdp.actor, mdp.critic, batch, mdp.args()).returns
        phi = torch.cat([features(batch.obs), torch.ones(len(returns), 1)], 1)  # the order of weight and bias
        set_vector(mdp.w, torch.linalg.lstsq(phi, returns[:, None]).solution[:, 0])
        # v = (H + λI)⁻¹ H e/2 = e/2 - λ (H + λI)⁻¹ e/2: off by λ over H's smallest eigenvalue, 0.1 here
        smallest = torch.linalg.eigvalsh(2 / len(phi) * phi.T @ phi)[0].item()
        assert smallest > 0.1
        for lam, bound in ((1e-3, 0.1), (1e-6, 1e-4), (0.0, 1e-11)):
            factor, _ = self.factor(mdp, batch, lam, curvature)
            assert factor == pytest.approx(2, abs=bound)
        factor, _ = self.factor(mdp, batch, 1e9, curvature)
        assert factor == pytest.approx(1, abs=1e-7)

    def test_any_critic_with_an_output_bias(self):
        """With the Gauss-Newton matrix the same is true of a network: its last bias makes 𝒥e = 1."""
        mdp = MDP("v", hidden=(3,))
        batch = mdp.sampled_batch(50, np.random.default_rng(2))
        assert self.factor(mdp, batch, 0.0, "gauss-newton")[0] == pytest.approx(2, abs=1e-6)
        assert self.factor(mdp, batch, 1e9, "gauss-newton")[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "critic, start_states", [("v", "every"), ("v", "initial"), ("v", "released"), ("q", "every"), ("q", "initial")]
)
class TestGaussNewton:
    """`--curvature gauss-newton`: of the derivatives of f1 and f2 it changes ∇_w²f2 alone, into (2/N) 𝒥ᵀ𝒥."""

    def test_derivatives(self, critic, start_states):
        mdp = MDP(critic, hidden=(3, 2))
        batch = mdp.sampled_batch(50, np.random.default_rng(2))
        found = {}
        for curvature in ("hessian", "gauss-newton"):
            f1, f2 = mdp.surrogates(batch, start_states, curvature=curvature)
            found[curvature] = {"f2": f2, **derivatives(f1, f2, f2, mdp.theta, mdp.w)}
        hessian = found["hessian"].pop("∇_w²f2")
        J = second(mdp.critic(batch.obs, batch.actions), mdp.w)
        gauss_newton = found["gauss-newton"].pop("∇_w²f2")
        torch.testing.assert_close(gauss_newton, 2 / len(J) * J.T @ J)
        assert torch.linalg.eigvalsh(gauss_newton)[0] > -1e-12
        assert (hessian - gauss_newton).norm() > 0.1 * hessian.norm()
        torch.testing.assert_close(found["gauss-newton"], found["hessian"])

    def test_total_derivative(self, critic, start_states):
        mdp, lam = MDP(critic, hidden=(3, 2)), 0.1
        batch = mdp.sampled_batch(50, np.random.default_rng(2))
        f1, f2 = mdp.surrogates(batch, start_states, curvature="gauss-newton")
        total, info = stac_ac.stackelberg_gradient(f1, f2, mdp.theta, mdp.w, lam, 200, 1e-13)
        f1_hessian, _ = mdp.surrogates(batch, start_states)  # the actor's cost has no curvature
        d = derivatives(f1_hessian, f2, f2, mdp.theta, mdp.w)
        J = second(mdp.critic(batch.obs, batch.actions), mdp.w)
        v = torch.linalg.solve(2 / len(J) * J.T @ J + lam * torch.eye(J.shape[1]), d["∇_wf1"])
        expected = d["∇_θf1"] - d["∇_θ∇_wf2"].T @ v
        assert info["implicit_norm"] > 0.1 * info["direct_norm"]
        assert (vector(total) - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("activation", [torch.nn.ReLU, torch.nn.SiLU, torch.nn.GELU])
def test_a_changed_network_and_loss(activation, curvature, monkeypatch):
    """Another activation, a normalisation and Huber's loss with weights: changed in one place, followed everywhere.

    With slope_i = ∂L/∂V_i, bend_i = ∂²L/∂V_i² and 𝒥 = ∂V/∂w: ∇_wL = 𝒥ᵀ slope, and its Hessian is 𝒥ᵀ bend 𝒥 plus
    Σ slope_i ∇_w²V_i. θ moves target i by influence_i, so that ∇_θ∇_wL = -𝒥ᵀ bend influence.
    """
    mdp = MDP("v")
    mdp.critic.v = torch.nn.Sequential(
        torch.nn.Linear(1, 4), activation(), torch.nn.LayerNorm(4), torch.nn.Linear(4, 1)
    )
    mdp.w = list(mdp.critic.parameters())
    batch = mdp.sampled_batch(50, np.random.default_rng(2))
    n, weights = len(batch.obs), torch.rand(len(batch.obs)) + 0.5

    def changed(values, targets, ratio=1):
        return (ratio * weights * torch.nn.functional.huber_loss(values, targets, reduction="none")).mean()

    monkeypatch.setattr(stac_ac, "critic_loss", changed)
    f1, f2 = mdp.surrogates(batch, curvature=curvature)
    found = derivatives(f1, f2, f2, mdp.theta, mdp.w)
    est = stac_ac.estimate(mdp.actor, mdp.critic, batch, mdp.args())
    values = mdp.critic(batch.obs)
    error, J = (values - est.returns).detach(), second(values, mdp.w)
    slope, bend = weights * error.clamp(-1, 1) / n, weights * (error.abs() < 1) / n
    assert 0.1 < (bend > 0).double().mean() < 0.9  # both parts of Huber's loss
    score = mdp.score(batch)
    influence = second(stac_ac.discounted_sum(score * est.mc_advantages, GAMMA, batch.trajectory), mdp.theta)
    torch.testing.assert_close(found["∇_wf2"], J.T @ slope)
    torch.testing.assert_close(found["∇_θ∇_wf2"], -J.T @ (bend[:, None] * influence))
    hessian = J.T @ (bend[:, None] * J)
    if curvature == "hessian":
        hessian = second(vector(stac_ac.grad(slope @ values, mdp.w, create_graph=True)), mdp.w) + hessian
    torch.testing.assert_close(found["∇_w²f2"], hessian)
