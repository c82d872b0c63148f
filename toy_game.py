# /// script
# requires-python = ">=3.10"
# dependencies = ["matplotlib", "numpy", "tyro>=0.9"]
# ///
"""The motivating example of Stackelberg actor-critic in one file: Figures 1, 2, 4, 5, 6, 7, and Theorem 2 at work.

Zheng, Fiez, Alumbaugh, Chasnov, Ratliff: Stackelberg Actor-Critic: Game-Theoretic Reinforcement Learning Algorithms,
2021, Section 3.2 and Appendix A. Numbers in parentheses are its equations.

The actor's parameter θ is its action, and earns the reward R(θ) = -cθ². The critic says Q_w(θ) = wθ.
The actor leads: it climbs J(θ, w) = wθ by the total derivative (15). The critic follows: it descends
L(θ, w) = (R(θ) - wθ)². The equilibrium is (0, 0). The paper's bounds θ, w ∈ [-1, 1] are not enforced.

    python toy_game.py                          # all figures into runs/toy_game, and tables of what the iterates did
    python toy_game.py --sac-reward-scale 0.2   # the SAC version with the reward of the paper's text
    python toy_game.py --steps 4000000          # with λ > 0 the cycling comes back, slowly (half a minute)
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure


@dataclass
class Args:
    output_dir: str = "runs/toy_game"  # the folder of the PNG files; made if it is not there
    seed: int = 1  # seed of all noise: the SAC version's and Theorem 2's

    # The game of Section 3.2 (Figures 1, 4, 5)
    theta0: float = -1.0  # θ_0, where the actor starts; not 0, where ∇_w²L = 2θ² vanishes and ∇J is not defined
    w0: float = 1.0  # w_0, where the critic starts
    theta_lr: float = 0.01  # α_θ, the actor's learning rate
    w_lr: float = 0.01  # α_w, the critic's learning rate
    steps: int = 50_000  # iterates, counting the first
    lam: float = 0.04  # λ of the regularized Stackelberg gradient (Section 4.5)
    reward_scale: float = 0.2  # c of the reward R(θ) = -cθ²

    # The SAC version (Figures 2, 6, 7)
    sigma0: float = 1.0  # σ_0: the policy is tanh N(μ, σ), both learned; μ_0 and w_0 are `--theta0` and `--w0`
    eta: float = 0.2  # η, the entropy regularization coefficient
    samples: int = 3  # actions sampled for one update
    sac_lr: float = 0.01  # learning rate of μ, σ and w
    sac_updates: int = 2_000  # updates of each run
    sac_reward_scale: float = 1.0  # c of the reward -ca²: 1 in the paper's released notebook, 0.2 in its text
    sac_runs: int = 20  # independent runs, each with its own noise; both dynamics see the same

    # Theorem 2
    peak: float = 0.5  # p of the reward -c(θ - p)²; not 0, as (p, 0) satisfies Definition 1 only where p is not 0
    noise: float = 0.05  # standard deviation of the noise on both gradients
    theta_decay: float = 0.9  # α_θ,k = (k + 10)^-theta_decay; Assumption 1 needs 1/2 < w_decay < theta_decay ≤ 1
    w_decay: float = 0.6  # α_w,k = (k + 10)^-w_decay
    noisy_steps: int = 100_000  # iterates of each noisy run, counting the first


def check_args(args):
    """Refuses values that no run can have, before anything is made."""
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if name == "output_dir":
            continue
        if not abs(value) < 2**31:  # refuses inf and nan as well
            raise SystemExit(f"toy_game.py: error: {flag} must be a number between -2**31 and 2**31")
        if value < 0 and name not in ("theta0", "w0", "peak"):
            raise SystemExit(f"toy_game.py: error: {flag} must not be negative")
        if value == 0 and name not in ("w0", "eta", "noise", "seed"):
            raise SystemExit(f"toy_game.py: error: {flag} must not be 0")
    if not 0.5 < args.w_decay < args.theta_decay <= 1:
        raise SystemExit("toy_game.py: error: Assumption 1 needs 1/2 < --w-decay < --theta-decay <= 1")


# THE GAME (Section 3.2). θ and w are numbers or arrays.
# Every derivative of J and L takes (θ, w), even where it depends on one of them alone.


def reward(theta, c, peak=0.0):
    """R(θ) = -c(θ - p)². The paper's game has c = 1/5 and p = 0."""
    return -c * (theta - peak) * (theta - peak)


def grad_reward(theta, c, peak=0.0):
    """R'(θ)"""
    return -2 * c * (theta - peak)


def J(theta, w):
    """The actor's objective: the value Q_w(θ) that the critic gives its action."""
    return w * theta


def L(theta, w, c, peak=0.0):
    """The critic's objective: its squared error."""
    return (reward(theta, c, peak) - w * theta) ** 2


def grad_theta_J(theta, w):
    """∇_θJ"""
    return w


def grad_w_J(theta, w):
    """∇_wJ"""
    return theta


def grad_w_L(theta, w, c, peak=0.0):
    """∇_wL"""
    return 2 * theta * (w * theta - reward(theta, c, peak))


def hess_w_L(theta, w):
    """∇_w²L"""
    return 2 * theta * theta


def grad_wtheta_L(theta, w, c, peak=0.0):
    """∇_wθL, the derivative of ∇_wL by θ"""
    return 4 * w * theta - 2 * reward(theta, c, peak) - 2 * theta * grad_reward(theta, c, peak)


def stackelberg_direction(theta, w, lam, c, peak=0.0):
    """∇J(θ, w) of (15), with λ added to the critic's Hessian (Section 4.5): the direction in which the actor steps.

    λ = math.inf makes it the individual gradient ∇_θJ (Proposition 2).
    """
    direct = grad_theta_J(theta, w)
    implicit = grad_wtheta_L(theta, w, c, peak) * grad_w_J(theta, w) / (hess_w_L(theta, w) + lam)
    return direct - implicit


def vector_field(theta, w, lam, c, peak=0.0):
    """(dθ/dt, dw/dt) = (∇J, -∇_wL), the continuous-time limit of the updates (Theorem 2)."""
    return stackelberg_direction(theta, w, lam, c, peak), -grad_w_L(theta, w, c, peak)


def second_order(lam, c, peak=0.0):
    """The leader's ∇²f1 and the follower's ∇_2²f2 at (p, 0), of which Definition 1 wants that both are > 0.

    Both gradients vanish there (for p = 0 and λ = 0 in the limit θ → 0). f2 = L + λ/2 w² is how the leader sees the
    follower's cost (Section 4.5); the follower itself descends L. The best response to f2 is
    w*(θ) = 2θR(θ) / (2θ² + λ). Along it the leader's cost f1 = -J is 2cθ²(θ - p)² / (2θ² + λ). With λ = 0 that is
    c(θ - p)².
    """
    follower = hess_w_L(peak, 0.0) + lam
    if lam == 0:
        leader = 2 * c  # also at p = 0, where the quotient below is 0/0
    else:
        leader = 4 * c * peak**2 / (2 * peak**2 + lam)
    return leader, follower


# ITERATES


def simulate(theta0, w0, alpha_theta, alpha_w, noise_theta, noise_w, *, lam, c, peak=0.0):
    """The updates (17)-(18), which without noise are (11)-(12).

    α and the noise have an entry for every update k. θ_0 and w_0 are numbers, or arrays with an entry for every run.
    Returns all θ_k and all w_k: two arrays [updates + 1] or [updates + 1, runs].
    """
    updates = len(alpha_theta)
    theta = np.empty((updates + 1, *np.shape(theta0)))
    w = np.empty_like(theta)
    theta[0] = theta0
    w[0] = w0
    for k in range(updates):
        # Take both gradients at (θ_k, w_k).
        grad_J = stackelberg_direction(theta[k], w[k], lam, c, peak)
        grad_L = grad_w_L(theta[k], w[k], c, peak)
        theta[k + 1] = theta[k] + alpha_theta[k] * (grad_J + noise_theta[k])
        w[k + 1] = w[k] - alpha_w[k] * (grad_L + noise_w[k])
    require_finite(lam, theta, w)
    return theta, w


def require_finite(lam, *iterates):
    """Ends the program if the dynamics with this λ went wrong."""
    for values in iterates:
        if not np.isfinite(values).all():
            raise SystemExit(f"toy_game.py: error: with λ = {lam:g} iterates diverge or meet θ = 0, try smaller steps")


def squared_error(theta, w, peak=0.0):
    """||θ - θ*||² + ||w - w*||² of Figures 1(c), 5(a), 7(a), with (θ*, w*) = (p, 0)."""
    return (theta - peak) ** 2 + w**2


# THE SAC VERSION. An action a = tanh(μ + σε), ε ~ N(0, 1), takes the place of θ: the actor's parameters are μ and σ.


def sac_directions(mu, sigma, w, noise, lam, c, eta):
    """The directions in which μ, σ and w step, estimated from the actions of noise ε [samples, ...].

    J = E[wa - η log π(a)], as in (9), and L = E[(r(a) - wa)²] with r(a) = -ca². Each expectation is replaced by the
    mean over the samples, also that of each factor of the implicit term. All factors share the samples, which biases
    their product.
    """
    # Derivatives for a fixed ε, with log π(a) = -ε²/2 - log σ - log(1 - a²) + const.
    a = np.tanh(mu + sigma * noise)
    da_dmu = 1 - a**2
    da_dsigma = (1 - a**2) * noise
    dlogpi_dmu = 2 * a
    dlogpi_dsigma = 2 * a * noise - 1 / sigma

    direct_mu = np.mean(grad_theta_J(a, w) * da_dmu - eta * dlogpi_dmu, axis=0)
    direct_sigma = np.mean(grad_theta_J(a, w) * da_dsigma - eta * dlogpi_dsigma, axis=0)

    # The factor (∇_w²L + λ)⁻¹ ∇_wJ is the same for μ and σ.
    v = np.mean(grad_w_J(a, w), axis=0) / (np.mean(hess_w_L(a, w), axis=0) + lam)
    implicit_mu = np.mean(grad_wtheta_L(a, w, c) * da_dmu, axis=0) * v
    implicit_sigma = np.mean(grad_wtheta_L(a, w, c) * da_dsigma, axis=0) * v

    step_w = -np.mean(grad_w_L(a, w, c), axis=0)
    return direct_mu - implicit_mu, direct_sigma - implicit_sigma, step_w


def simulate_sac(args, noise, lam):
    """All runs at once, on noise [updates, samples, runs]. Returns all μ_k, σ_k, w_k, each [updates + 1, runs]."""
    c = args.sac_reward_scale
    updates, _, runs = noise.shape
    mu = np.empty((updates + 1, runs))
    sigma = np.empty_like(mu)
    w = np.empty_like(mu)
    mu[0] = args.theta0
    sigma[0] = args.sigma0
    w[0] = args.w0
    for k in range(updates):
        step_mu, step_sigma, step_w = sac_directions(mu[k], sigma[k], w[k], noise[k], lam, c, args.eta)
        mu[k + 1] = mu[k] + args.sac_lr * step_mu
        sigma[k + 1] = sigma[k] + args.sac_lr * step_sigma
        w[k + 1] = w[k] + args.sac_lr * step_w
    require_finite(lam, mu, sigma, w)
    return mu, sigma, w


def sac_vector_field(mu, w, noise, lam, args):
    """The mean step of μ and w over noise [samples, updates, *mu.shape], at σ = σ_0."""
    step_mu, _, step_w = sac_directions(mu, args.sigma0, w, noise, lam, args.sac_reward_scale, args.eta)
    return step_mu.mean(axis=0), step_w.mean(axis=0)


# FIGURES AND TABLES

# Colours that the colour-blind can tell apart (Okabe and Ito)
ORANGE = "#D55E00"
BLUE = "#0072B2"
GREEN = "#009E73"


@dataclass
class Result:
    """What one of the dynamics did, and how figures show it."""

    label: str
    lam: float  # λ; math.inf: the individual gradient
    color: str
    line: str
    actor: np.ndarray  # θ_k, in the SAC version μ_k: [iterates] or [iterates, runs]
    critic: np.ndarray  # w_k, of the same shape


def new_figure(panels, note):
    """A figure with a note below it, and its panels side by side."""
    figure = Figure(figsize=(4.1 * panels, 4.4), layout="constrained")
    figure.supxlabel(note, fontsize=11, color="0.3")
    return figure, figure.subplots(1, panels)


def save_figure(figure, args, name):
    """Writes a PNG file into the output folder."""
    figure.savefig(Path(args.output_dir) / f"{name}.png", dpi=80)


def grid(center=0.0, width=1.15):
    """Where the arrows are: two arrays, θ (or μ) and w, both [n, n]."""
    n = 14  # even, which leaves out θ = 0, where the Stackelberg gradient with λ = 0 is not defined
    return np.meshgrid(np.linspace(center - width, center + width, n), np.linspace(-width, width, n))


def draw_planes(axes, results, arrows, center=0.0, width=1.15, xlabel="θ (actor)"):
    """A panel for each result: its runs in the plane of actor and critic, over its arrows on `grid(center, width)`."""
    x, y = grid(center, width)
    for ax, letter, result, (dx, dy) in zip(axes, "abc", results, arrows):
        length = np.hypot(dx, dy)
        ax.quiver(x, y, dx / length, dy / length, color="0.6", scale=19, width=0.005, pivot="mid")
        ax.plot(result.actor, result.critic, color=result.color, lw=1.5, alpha=0.8)
        ax.plot(result.actor[0], result.critic[0], "o", color="white", mec="black")
        ax.plot(center, 0, "*", color="black", mec="white", ms=14)
        ax.set(title=f"({letter}) {result.label}", xlabel=xlabel, ylabel="w (critic)", box_aspect=1)
        ax.set(xlim=(center - width, center + width), ylim=(-width, width))


def draw_curves(ax, title, ylabel, yscale, results, curves):
    """A curve [iterates] for each result; of several runs [iterates, runs] the median, with a band of quartiles."""
    for result, values in zip(results, curves):
        iterate = np.geomspace(1, len(values), 4_000).astype(int)  # as many as a logarithmic axis can show
        runs = values[iterate - 1].reshape(len(iterate), -1)
        lower, median, upper = np.quantile(runs, [0.25, 0.5, 0.75], axis=1)
        ax.plot(iterate, median, result.line, color=result.color, lw=1.8, label=result.label)
        ax.fill_between(iterate, lower, upper, color=result.color, alpha=0.2, lw=0)
    ax.set(title=title, xlabel="iterate", ylabel=ylabel, xscale="log", yscale=yscale)
    ax.grid(alpha=0.3)


def print_table(header, rows):
    """Columns for the eye, which are Markdown as well."""
    widths = []
    for column in zip(header, *rows):
        widths.append(max(len(cell) for cell in column))
    rule = ["-" * width for width in widths]
    for row in (header, rule, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        print("| " + " | ".join(cells) + " |")
    print()


# EXPERIMENTS: the game of Section 3.2


def simulate_toy(args):
    """The three dynamics: individual, Stackelberg and regularized Stackelberg gradient. Returns a `Result` for each."""
    updates = args.steps - 1
    alpha_theta = np.full(updates, args.theta_lr)
    alpha_w = np.full(updates, args.w_lr)
    no_noise = np.zeros(updates)
    results = []
    for label, lam, color, line in [
        ("individual gradient", math.inf, ORANGE, "-"),
        ("Stackelberg, λ = 0", 0.0, BLUE, "--"),
        (f"Stackelberg, λ = {args.lam:g}", args.lam, GREEN, "-."),
    ]:
        start = args.theta0, args.w0
        theta, w = simulate(*start, alpha_theta, alpha_w, no_noise, no_noise, lam=lam, c=args.reward_scale)
        results.append(Result(label, lam, color, line, theta, w))
    return results


def print_toy(args, results):
    """How close each of the dynamics came, and how."""
    iterates = [k for k in (1_000, 10_000) if k < args.steps] + [args.steps]
    late = min(1_000, args.steps - 1)
    rows = []
    for result in results:
        theta = result.actor
        distance = np.sqrt(squared_error(theta, result.critic))
        distances = " / ".join(f"{distance[k - 1]:.3g}" for k in iterates)
        sign_changes = np.count_nonzero(np.diff(np.sign(theta)))
        worst = reward(theta[late:], args.reward_scale).min()
        rows.append([result.label, distances, f"{sign_changes}", f"{theta.max():.3g}", f"{worst:.3g}"])
    at = " / ".join(f"{k:,}" for k in iterates)
    from_late = f"worst R(θ) from iterate {late + 1:,} on"
    columns = [f"√(θ²+w²) at iterate {at}", "sign changes of θ", "largest θ", from_late]
    print_table(["dynamics", *columns], rows)


def draw_toy(args, results):
    """Figures 1, 4, 5."""
    c = args.reward_scale
    arrows = [vector_field(*grid(), lam=result.lam, c=c) for result in results]
    errors = [squared_error(result.actor, result.critic) for result in results]
    returns = [reward(result.actor, c) for result in results]
    note = f"R(θ) = −{c:g}θ².  ○ start, ★ equilibrium.  Arrows show the direction alone."

    figure, axes = new_figure(3, note)
    draw_planes(axes[:2], results[:2], arrows[:2])  # these panels leave out λ > 0
    draw_curves(axes[2], "(c) error", "θ² + w²", "log", results, errors)
    axes[2].legend()
    save_figure(figure, args, "figure1")

    figure, axes = new_figure(3, note)
    draw_planes(axes, results, arrows)
    save_figure(figure, args, "figure4")

    figure, axes = new_figure(2, f"R(θ) = −{c:g}θ².")
    draw_curves(axes[0], "(a) error", "θ² + w²", "log", results, errors)
    draw_curves(axes[1], "(b) return", "R(θ)", "linear", results, returns)
    axes[0].legend()
    save_figure(figure, args, "figure5")


def toy(args):
    """The game of Section 3.2: a table, and Figures 1, 4, 5."""
    results = simulate_toy(args)
    print_toy(args, results)
    draw_toy(args, results)


def definition_1(args):
    """A table of which equilibria are differential Stackelberg equilibria."""
    rows = []
    for lam, peak in [(0.0, 0.0), (args.lam, 0.0), (0.0, args.peak)]:
        leader, follower = second_order(lam, args.reward_scale, peak)
        holds = "yes" if leader > 0 and follower > 0 else "no"
        rows.append([f"({peak:g}, 0)", f"{lam:g}", f"{follower:.3g}", f"{leader:.3g}", holds])
    print_table(["equilibrium", "λ", "∇_w²L + λ", "∇²f1", "Definition 1"], rows)
    print("No λ makes (0, 0) a differential Stackelberg equilibrium, though it attracts: λ = 0 fails the follower's")
    print("condition, λ > 0 the leader's. Theorem 2 applies when the reward's peak is moved to p ≠ 0, at (p, 0).\n")


# EXPERIMENTS: its SAC version


def sac_columns(mu, sigma, w):
    """How soon the runs come near the equilibrium, and where they are later."""
    distance = np.sqrt(squared_error(mu, w))
    near = distance < 0.1
    first = near.argmax(axis=0).astype(float)  # each run's first True
    first[~near.any(axis=0)] = np.inf
    late = distance[len(distance) // 2 :]
    updates = f"{np.median(first):.0f} ({first.min():.0f} to {first.max():.0f})"
    return updates, f"{np.median(late):.3g}", f"{late.max():.3g}", f"{np.median(sigma[-1]):.3g}"


def draw_sac(args, results, noise_of_arrows, name):
    """Figure 2 (one run), Figures 6 and 7 (all runs)."""
    arrows = [sac_vector_field(*grid(), noise_of_arrows, result.lam, args) for result in results]
    errors = [squared_error(result.actor, result.critic) for result in results]
    returns = [reward(np.tanh(result.actor), args.sac_reward_scale) for result in results]
    one_run = [replace(result, actor=result.actor[:, 0], critic=result.critic[:, 0]) for result in results]
    note = f"{name}.  ○ start, ★ equilibrium.  Arrows: mean step at σ = {args.sigma0:g}."

    figure, axes = new_figure(2, note)
    draw_planes(axes, one_run, arrows, xlabel="μ (actor)")
    save_figure(figure, args, "figure2")

    figure, axes = new_figure(2, note)
    draw_planes(axes, results, arrows, xlabel="μ (actor)")
    save_figure(figure, args, "figure6")

    figure, axes = new_figure(2, f"{name}.  Median and quartiles of {args.sac_runs} runs.")
    draw_curves(axes[0], "(a) error", "μ² + w²", "log", results, errors)
    draw_curves(axes[1], "(b) return", "r(tanh μ)", "linear", results, returns)
    axes[0].legend()
    save_figure(figure, args, "figure7")


def sac(args):
    """The entropy-regularized version: a table, and Figures 2, 6, 7."""
    rng = np.random.default_rng(args.seed)
    noise = rng.standard_normal((args.sac_updates, args.samples, args.sac_runs))
    results = []
    rows = []
    for label, lam, color, line in [
        ("SAC", math.inf, ORANGE, "-"),
        ("STSAC-AL, λ = 0", 0.0, BLUE, "--"),
    ]:
        mu, sigma, w = simulate_sac(args, noise, lam)
        results.append(Result(label, lam, color, line, mu, w))
        rows.append([label, *sac_columns(mu, sigma, w)])

    names = {1.0: "reward −a² (released notebook)", 0.2: "reward −a²/5 (paper's text)"}
    name = names.get(args.sac_reward_scale, f"reward −{args.sac_reward_scale:g}a²")
    print(f"Entropy-regularized version: {name}, {args.samples} samples an update, {args.sac_runs} runs\n")
    columns = ["updates to √(μ²+w²) < 0.1: median (range)", "√(μ²+w²) in the second half: median", "largest", "last σ"]
    print_table(["dynamics", *columns], rows)
    n = len(grid()[0])
    updates = max(1, 1_500 // args.samples)  # each arrow is the mean of so many, which keeps the array small
    noise_of_arrows = rng.standard_normal((args.samples, updates, n, n))
    draw_sac(args, results, noise_of_arrows, name)


# EXPERIMENTS: Theorem 2. The reward's peak is at p ≠ 0, so that (p, 0) is a differential Stackelberg equilibrium.
# Assumption 1 asks for a Lipschitz ∇_wL and a Lipschitz and bounded ∇J everywhere. Here they are so only near (p, 0):
# ∇J has a pole at θ = 0. The runs stay away from it.


def step_sizes(args):
    """α_θ,k and α_w,k of Assumption 1: α_θ / α_w vanishes, both sums diverge, both sums of squares converge."""
    k = np.arange(args.noisy_steps - 1)
    # Start at 10: the theorem is local, and larger steps would leave the neighbourhood of the equilibrium.
    alpha_theta = (k + 10) ** -args.theta_decay
    alpha_w = (k + 10) ** -args.w_decay
    return alpha_theta, alpha_w


def simulate_theorem2(args, runs=10):
    """Noisy iterates that start on a circle around (p, 0). Returns all θ_k and all w_k, each [iterates, runs]."""
    p = args.peak
    angle = 2 * math.pi * np.arange(runs) / runs
    radius = 0.2 * abs(p)
    theta0 = p + radius * np.cos(angle)
    w0 = radius * np.sin(angle)
    alpha_theta, alpha_w = step_sizes(args)
    rng = np.random.default_rng(args.seed)
    noise = args.noise * rng.standard_normal((args.noisy_steps - 1, 2, runs))
    noise_theta, noise_w = noise[:, 0], noise[:, 1]
    return simulate(theta0, w0, alpha_theta, alpha_w, noise_theta, noise_w, lam=0.0, c=args.reward_scale, peak=p)


def print_theorem2(args, error):
    """How fast the runs come closer to (p, 0)."""
    c = args.reward_scale
    p = args.peak
    runs = error.shape[1]
    print(f"Theorem 2: R(θ) = -{c:g}(θ - {p:g})², noise of standard deviation {args.noise:g}, {runs} runs,")
    print(f"α_θ,k = (k + 10)^-{args.theta_decay:g}, α_w,k = (k + 10)^-{args.w_decay:g}\n")
    iterates = [k for k in (1, 10, 100, 1_000, 10_000, 100_000) if k < args.noisy_steps] + [args.noisy_steps]
    rows = []
    for k in iterates:
        distance = np.sqrt(error[k - 1])
        rows.append([f"{k:,}", f"{np.median(distance):.3g}", f"{distance.max():.3g}"])
    print_table(["iterate", f"distance to ({p:g}, 0): median", "largest"], rows)


def draw_theorem2(args, theta, w, error):
    """The runs, and their error beside the variance that the noise of the critic's steps alone gives w."""
    c = args.reward_scale
    p = args.peak
    width = 0.45 * abs(p)
    result = Result("noisy iterates", 0.0, BLUE, "-", theta, w)
    arrows = vector_field(*grid(p, width), lam=0.0, c=c, peak=p)
    game = f"R(θ) = −{c:g}(θ − {p:g})², noise {args.noise:g}."
    figure, axes = new_figure(2, f"{game}  ○ start, ★ equilibrium.  Median and quartiles of {theta.shape[1]} runs.")
    draw_planes(axes[:1], [result], [arrows], p, width)
    draw_curves(axes[1], "(b) error", "(θ − p)² + w²", "log", [result], [error])
    iterate = np.arange(2, args.noisy_steps + 1)  # those that the updates make
    _, alpha_w = step_sizes(args)
    # The variance of w under its own noise: noise² α_w / (2 ∇_w²L).
    variance = args.noise**2 * alpha_w / (2 * hess_w_L(p, 0.0))
    axes[1].plot(iterate, variance, "k:", lw=1.8, label="variance of w from its noise")
    axes[1].legend()
    save_figure(figure, args, "theorem2")


def theorem2(args):
    """How noisy iterates converge to (p, 0): a table, and a figure."""
    theta, w = simulate_theorem2(args)
    error = squared_error(theta, w, args.peak)
    print_theorem2(args, error)
    draw_theorem2(args, theta, w, error)


def main():
    """The command line."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that knows ASCII alone shows "?" for θ and λ instead of a traceback.
        stream.reconfigure(errors="replace")
    args = tyro.cli(Args, description=__doc__)
    check_args(args)
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"toy_game.py: error: --output-dir: {error}") from error
    matplotlib.rcParams.update({"font.size": 13, "axes.titlesize": 14, "legend.frameon": False})
    np.seterr(all="ignore")  # `require_finite` says in one line what numpy would warn of

    toy(args)
    definition_1(args)
    sac(args)
    theorem2(args)
    print(f"figures: {args.output_dir}")


if __name__ == "__main__":
    main()
