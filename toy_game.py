# /// script
# requires-python = ">=3.10"
# dependencies = ["matplotlib", "numpy", "tyro>=0.9"]
# ///
"""The motivating example of Stackelberg actor-critic, in one file: Figures 1, 2, 4, 5, 6, 7, and Theorem 2 at work.

Zheng, Fiez, Alumbaugh, Chasnov, Ratliff: Stackelberg Actor-Critic: Game-Theoretic Reinforcement Learning Algorithms,
2021, Section 3.2 and Appendix A. The actor's θ is its action, the critic is Q_w(θ) = wθ. The actor leads and climbs
J(θ, w) = wθ, the critic follows and descends L(θ, w) = (R(θ) - wθ)², with the reward R(θ) = -cθ².

    python toy_game.py                          # all figures into runs/toy_game, and a table of what the iterates did
    python toy_game.py --sac-reward-scale 0.2   # the SAC version with the reward of the paper's text
    python toy_game.py --steps 4000000          # with λ > 0 the cycling comes back, slowly
"""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro


@dataclass
class Args:
    output_dir: str = "runs/toy_game"
    """the folder of the PNG files; made if it is not there"""
    dpi: int = 80
    """dots per inch of the figures"""
    seed: int = 1
    """seed of all noise: the SAC version's and Theorem 2's"""

    # The game of Section 3.2 (Figures 1, 4, 5)
    theta0: float = -1.0
    """θ_0, where the actor starts"""
    w0: float = 1.0
    """w_0, where the critic starts"""
    theta_lr: float = 0.01
    """α_θ, the actor's learning rate"""
    w_lr: float = 0.01
    """α_w, the critic's learning rate"""
    steps: int = 50_000
    """iterates, counting the first"""
    lam: float = 0.04
    """λ of the regularized Stackelberg gradient (Section 4.5)"""
    reward_scale: float = 0.2
    """c of the reward R(θ) = -cθ²"""

    # The SAC version (Figures 2, 6, 7)
    sigma0: float = 1.0
    """σ_0: the policy is tanh N(μ, σ), both learned; μ_0 and w_0 are `--theta0` and `--w0`"""
    eta: float = 0.2
    """η, the entropy regularization coefficient"""
    samples: int = 3
    """actions sampled for one update"""
    sac_lr: float = 0.01
    """learning rate of μ, σ and w"""
    sac_updates: int = 2_000
    """updates"""
    sac_reward_scale: float = 1.0
    """c of the reward -ca² that the critic regresses on: 1 in the paper's released notebook, 0.2 in its text"""
    sac_runs: int = 20
    """independent runs, each with its own noise; both dynamics see the same"""
    field_draws: int = 500
    """updates averaged for each arrow of the sampled mean vector fields"""

    # Theorem 2
    peak: float = 0.5
    """p of the reward -c(θ - p)², whose game has a differential Stackelberg equilibrium at (p, 0) where p is not 0"""
    noise: float = 0.05
    """standard deviation of the noise on both gradients"""
    theta_decay: float = 0.9
    """α_θ,k = (k + offset) to the power of minus this; Assumption 1 needs 1/2 < w_decay < theta_decay ≤ 1"""
    w_decay: float = 0.6
    """α_w,k = (k + offset) to the power of minus this"""
    offset: float = 10.0
    """keeps the first noisy steps small: the theorem is local"""
    noisy_steps: int = 100_000
    """iterates, counting the first"""
    noisy_runs: int = 10
    """independent runs"""


def stop(message, code=2):
    """Ends the program with one line on stderr: code 2 for bad input, 1 for a run that went wrong."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def check_args(args):
    """Refuses values that no run can have."""
    for name, value in asdict(args).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            stop(f"{flag} must be finite")
        if name in ("eta", "noise", "seed") and value < 0:
            stop(f"{flag} must not be negative")
        if name not in ("output_dir", "theta0", "w0", "peak", "eta", "noise", "seed") and value <= 0:
            stop(f"{flag} must be positive")
    for ok, message in [
        (args.theta0 != 0, "--theta0 must not be 0: there ∇_w²L = 0 and the Stackelberg gradient is not defined"),
        (args.peak != 0, "--peak must not be 0: (0, 0) is no differential Stackelberg equilibrium"),
        (0.5 < args.w_decay < args.theta_decay <= 1, "Assumption 1 needs 1/2 < --w-decay < --theta-decay ≤ 1"),
        (min(args.steps, args.noisy_steps) >= 2, "--steps and --noisy-steps must be at least 2"),
    ]:
        if not ok:
            stop(message)


def require_finite(path, label):
    if not np.isfinite(path).all():
        stop(f"{label}: the iterates diverge; try smaller learning rates", 1)
    return path


# The game: every function takes numbers or arrays. λ = ∞ is the individual gradient (Proposition 2).
def reward(theta, c, peak=0.0):
    """R(θ) = -c(θ - p)²; the paper's game has p = 0."""
    return -c * (theta - peak) * (theta - peak)


def grad_reward(theta, c, peak=0.0):
    """R'(θ)"""
    return -2 * c * (theta - peak)


def J(theta, w):
    """Q_w(θ) = wθ, which the actor maximizes."""
    return w * theta


def L(theta, w, c, peak=0.0):
    """(R(θ) - Q_w(θ))², which the critic minimizes."""
    return (reward(theta, c, peak) - w * theta) ** 2


def grad_theta_J(theta, w):
    return w


def grad_w_J(theta, w):
    return theta


def grad_w_L(theta, w, c, peak=0.0):
    return 2 * theta * (w * theta - reward(theta, c, peak))


def hess_w_L(theta, w):
    return 2 * theta * theta


def grad_wtheta_L(theta, w, c, peak=0.0):
    """∂/∂θ of ∇_w L"""
    return 4 * w * theta - 2 * reward(theta, c, peak) - 2 * theta * grad_reward(theta, c, peak)


def stackelberg_direction(theta, w, lam, c, peak=0.0):
    """∇J(θ, w) of (15) with the regularization of Section 4.5: the direction in which the actor steps."""
    implicit = grad_wtheta_L(theta, w, c, peak) * grad_w_J(theta, w) / (hess_w_L(theta, w) + lam)
    return grad_theta_J(theta, w) - implicit


def dynamics(theta, w, lam, c, peak=0.0):
    """(θ', w') = (∇J, -∇_w L), the continuous-time limit of the updates (Theorem 2)."""
    return stackelberg_direction(theta, w, lam, c, peak), -grad_w_L(theta, w, c, peak)


def simulate(theta, w, alpha_theta, alpha_w, noise_theta, noise_w, lam, c, peak=0.0):
    """Iterates of (17)-(18), which without noise are (11)-(12). One step for each entry of the four sequences.

    Returns [steps + 1, 2, ...]; θ and w may be arrays of independent runs.
    """
    path = np.empty((len(alpha_theta) + 1, 2, *np.shape(theta)))
    path[0] = theta, w
    for k, (a_theta, a_w, e_theta, e_w) in enumerate(zip(alpha_theta, alpha_w, noise_theta, noise_w)):
        d_theta, d_w = dynamics(theta, w, lam, c, peak)  # both at (θ_k, w_k)
        theta, w = theta + a_theta * (d_theta + e_theta), w + a_w * (d_w - e_w)
        path[k + 1] = theta, w
    return path


# What kind of point it converges to
def jacobian(theta, w, lam, c, peak=0.0, h=1e-6):
    """Jacobian of the dynamics by central differences. With λ = 0 and θ = 0 that of their continuous extension."""
    theta = theta or 1e-9  # at θ = 0, λ = 0 the implicit term is 0/0, and near it 2w + 3cθ
    columns = []
    for d_theta, d_w in (h, 0), (0, h):
        above = np.array(dynamics(theta + d_theta, w + d_w, lam, c, peak))
        below = np.array(dynamics(theta - d_theta, w - d_w, lam, c, peak))
        columns.append((above - below) / (2 * h))
    return np.stack(columns, axis=1)


def second_order(theta, lam, c, peak=0.0, h=1e-6):
    """The two Hessians of Definition 1 for the game (-J, L + λ/2 w²): the leader's ∇²f1 and the follower's ∇_2²f2.

    ∇f1 is the total derivative, so ∇²f1 is its derivative along the follower's best response w*(θ), the root of
    ∇_w L + λw = 0.
    """

    def total_derivative(theta):
        best_response = 2 * theta * reward(theta, c, peak) / (2 * theta * theta + lam)
        return -stackelberg_direction(theta, best_response, lam, c, peak)

    leader = (total_derivative(theta + h) - total_derivative(theta - h)) / (2 * h)
    return leader, hess_w_L(theta, 0.0) + lam


def spectrum(matrix):
    """Eigenvalues in words, to four decimals: real ones, or a complex pair, which is a rotation."""
    values = np.round(np.sort_complex(np.linalg.eigvals(matrix)), 4) + 0.0
    return f"{values[1].real:.4f} ± {values[1].imag:.4f}i" if values[1].imag else "{:.4f}, {:.4f}".format(*values.real)


# SAC version: an action a = tanh(μ + σε) sampled from the policy takes the place of θ
def sac_directions(mu, sigma, w, noise, lam, c, eta):
    """Directions in which (μ, σ, w) step, estimated from the actions of noise ε [samples, ...].

    J = E[wa - η log π(a)] (9), L = E[(r(a) - wa)²], r(a) = -ca². Every expectation is replaced by the mean over the
    samples, also each of the factors of the implicit term (Appendix D).
    """
    a = np.tanh(mu + sigma * noise)
    # log π(a) = -ε²/2 - log σ - log(1 - tanh²(μ + σε)) + const. μ and σ move a by grad_a and log π by grad_log_pi
    grad_a = [1 - a**2, (1 - a**2) * noise]
    grad_log_pi = [2 * a, 2 * a * noise - 1 / sigma]
    v = grad_w_J(a, w).mean(0) / (hess_w_L(a, w).mean(0) + lam)
    actor = [
        (w * d_a - eta * d_log_pi).mean(0) - (grad_wtheta_L(a, w, c) * d_a).mean(0) * v
        for d_a, d_log_pi in zip(grad_a, grad_log_pi)
    ]
    return *actor, -grad_w_L(a, w, c).mean(0)


def simulate_sac(args, noise, lam):
    """All runs at once, on noise [updates, samples, runs]. Returns the iterates (μ, σ, w), [updates + 1, 3, runs]."""
    path = [np.repeat([[args.theta0], [args.sigma0], [args.w0]], noise.shape[-1], axis=1)]
    for eps in noise:
        step = np.array(sac_directions(*path[-1], eps, lam, args.sac_reward_scale, args.eta))
        path.append(path[-1] + args.sac_lr * step)
    return np.array(path)


def sac_field(mu, w, noise, lam, args):
    """The mean update of (μ, w) at σ = σ_0 over noise [samples, draws, *mu.shape]: each draw is one update."""
    d_mu, _, d_w = sac_directions(mu, args.sigma0, w, noise, lam, args.sac_reward_scale, args.eta)
    return d_mu.mean(0), d_w.mean(0)


# Figures
COLORS = {"individual": "#D55E00", "Stackelberg": "#0072B2", "regularized": "#009E73"}  # Okabe and Ito's
STYLES = {"individual": "-", "Stackelberg": "--", "regularized": "-."}


def grid(center=0.0, width=1.15, n=14):
    """Points for arrows; an even n leaves out θ = 0, where the Stackelberg gradient with λ = 0 is not defined."""
    return np.meshgrid(np.linspace(center - width, center + width, n), np.linspace(-width, width, n))


def thin(path, n=4_000):
    """Indices of about n iterates, dense at the start where most happens."""
    return np.unique(np.geomspace(1, len(path), min(n, len(path))).astype(int)) - 1


def draw_field(ax, points, field, paths, color, title, equilibrium=0.0, xlabel="θ (actor)"):
    """Arrows of one length (direction alone), trajectories [steps, 2, runs], start and equilibrium."""
    (theta, w), length = points, np.hypot(*field)
    ax.quiver(theta, w, *(f / length for f in field), color="0.6", scale=19, width=0.005, pivot="mid")
    paths, one = paths[thin(paths)], paths.shape[-1] == 1
    ax.plot(paths[:, 0], paths[:, 1], color=color, lw=1.8 if one else 0.9, alpha=1 if one else 0.6)
    ax.plot(*paths[0], "o", ms=9 if one else 6, mfc="white", mec="black", mew=1.4, ls="", label="start")
    ax.plot(equilibrium, 0, "*", ms=14, color="black", mec="white", ls="", label="equilibrium", zorder=5)
    ax.set(title=title, xlabel=xlabel, ylabel="w (critic)", xlim=(theta.min(), theta.max()), ylim=(w.min(), w.max()))
    ax.set_box_aspect(1)


def draw_curves(ax, curves, title, ylabel, log=True):
    """{name: (label, y [steps] or [steps, runs])}: a line, or the median and quartiles of the runs."""
    for name, (label, y) in curves.items():
        y = y.reshape(len(y), -1)
        k = thin(y)
        low, median, high = np.quantile(y[k], (0.25, 0.5, 0.75), axis=1)
        ax.plot(k + 1, median, STYLES[name], color=COLORS[name], lw=1.8, label=label)
        ax.fill_between(k + 1, low, high, color=COLORS[name], alpha=0.2, lw=0)
    ax.set(title=title, xlabel="iterate", ylabel=ylabel, xscale="log", yscale="log" if log else "linear")
    ax.grid(alpha=0.3)


def save_figure(figure, args, name, note, axes):
    """Writes a figure with the legend of `axes` and a note below the panels, clear of the data."""
    inches = figure.get_figheight()
    legend = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.3 / inches), "ncols": 6, "frameon": False}
    figure.legend(legend.values(), legend.keys(), **place)
    figure.text(0.5, 0.1 / inches, note, ha="center", fontsize=11, color="0.3")
    figure.tight_layout(rect=(0, 0.75 / inches, 1, 1), w_pad=2)
    path = Path(args.output_dir) / f"{name}.png"
    try:
        figure.savefig(path, dpi=args.dpi)
    except OSError as e:
        stop(f"cannot write {path}: {e.strerror}")
    plt.close(figure)


def panels(n):
    return plt.subplots(1, n, figsize=(4.1 * n, 4.7))


# Experiments
def print_table(header, rows):
    """Markdown, with columns of equal width for the eye."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for i, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print()


def simulate_toy(args):
    """{name: (label, λ, iterates [steps, 2])} of the three dynamics of Section 3.2."""
    kinds = {"individual": ("individual gradient", math.inf), "Stackelberg": ("Stackelberg, λ = 0", 0.0)}
    kinds["regularized"] = f"Stackelberg, λ = {args.lam:g}", args.lam
    constants = [[value] * (args.steps - 1) for value in (args.theta_lr, args.w_lr, 0.0, 0.0)]
    results = {}
    for name, (label, lam) in kinds.items():
        try:
            path = simulate(args.theta0, args.w0, *constants, lam, args.reward_scale)
        except ZeroDivisionError:
            stop(f"{label}: θ came to 0 exactly, where ∇J is not defined; start elsewhere", 1)
        results[name] = label, lam, require_finite(path, label)
    return results


def summarize(path, c):
    """{k: distance to (0, 0) at the k-th iterate}, sign changes of θ, largest θ, worst return after update 1,000.

    path[k] is the iterate that update k leads to, so the k-th iterate is path[k - 1], and after update 1,000 comes
    path[1001].
    """
    theta, distance = path[:, 0], np.hypot(*path.T)
    distances = {k: distance[k - 1] for k in sorted({min(k, len(path)) for k in (1_000, 10_000, len(path))})}
    late = reward(theta[min(1_001, len(path) - 1) :], c)
    return distances, int((np.diff(np.sign(theta)) != 0).sum()), theta.max(), late.min()


def toy(args):
    """The game of Section 3.2: table and Figures 1, 4, 5."""
    c, results, rows = args.reward_scale, simulate_toy(args), []
    for label, _, path in results.values():
        distances, sign_changes, largest, worst = summarize(path, c)
        row = " / ".join(f"{d:.3g}" for d in distances.values()), str(sign_changes), f"{largest:.3g}", f"{worst:.3g}"
        rows.append([label, *row])
    at = " / ".join(f"{k:,}" for k in distances)
    header = f"√(θ²+w²) at iterate {at}", "sign changes of θ", "largest θ", "worst R(θ) after update 1,000"
    print_table(["dynamics", *header], rows)

    points, note = grid(), f"R(θ) = −{c:g}θ². Arrows show the direction alone, all have one length."
    errors = {name: (label, (path**2).sum(1)) for name, (label, _, path) in results.items()}
    returns = {name: (label, reward(path[:, 0], c)) for name, (label, _, path) in results.items()}

    def draw_fields(axes):
        for ax, letter, (name, (label, lam, path)) in zip(axes, "abc", results.items()):
            field = dynamics(*points, lam, c)
            draw_field(ax, points, field, path[..., None], COLORS[name], f"({letter}) {label}")

    figure, axes = panels(3)
    draw_fields(axes[:2])
    draw_curves(axes[2], errors, "(c) error", "θ² + w²")
    save_figure(figure, args, "figure1", note, axes)
    figure, axes = panels(3)
    draw_fields(axes)
    save_figure(figure, args, "figure4", note, axes)
    figure, axes = panels(2)
    draw_curves(axes[0], errors, "(a) error", "θ² + w²")
    draw_curves(axes[1], returns, "(b) return of the actor", "R(θ)", log=False)
    save_figure(figure, args, "figure5", f"R(θ) = −{c:g}θ².", axes)
    return results


def equilibria(args, results):
    """What kind of point each of the dynamics converges to (Definition 1, Theorem 2)."""
    c, rows = args.reward_scale, []
    games = [(label, lam, 0.0, path[-1]) for label, lam, path in results.values()]
    games.append(("Stackelberg, λ = 0, moved peak", 0.0, args.peak, None))
    for label, lam, peak, end in games:
        row = [label, f"({peak:g}, 0)", spectrum(jacobian(peak, 0.0, lam, c, peak))]
        row.append("" if end is None else spectrum(jacobian(*end, lam, c)))
        if lam == math.inf:
            row += ["", "", ""]  # no leader, no follower
        else:
            leader, follower = second_order(peak, lam, c, peak)
            row += [f"{follower:.4f}", f"{leader:.4f}", "yes" if min(leader, follower) > 1e-6 else "no"]
        rows.append(row)
    header = "dynamics", "equilibrium", "spectrum there", "at the last iterate", "∇_w²L + λ", "∇²f1", "Definition 1"
    print_table(header, rows)
    print(KIND_OF_POINT)


KIND_OF_POINT = """\
(0, 0) attracts for every λ: w² + cθ⁴ falls along the dynamics. But it is no differential Stackelberg equilibrium.
λ = 0: ∇_w²L = 2θ² is 0 there, so the follower's condition fails. ∇J itself is 0/0 on θ = 0, and the spectrum is that
of its continuous extension -w - 3cθ. λ > 0, the game (-J, L + λ/2 w²): the follower's condition holds, but along the
best response -J is 2cθ⁴/(2θ² + λ), a strict minimum with ∇²f1 = 0, so the leader's condition fails.
The spectra there are not in the open left half plane: convergence is slower than exponential, and Theorem 2 is silent.
With λ > 0 the implicit term is of third order there: the dynamics turn into the individual gradient's, which cycle
(a complex pair). With the reward's peak moved to p ≠ 0, ∇_w²L = 2p² and ∇²f1 = 2c at (p, 0): Theorem 2 applies.
"""


def sac(args):
    """The entropy-regularized version: Figures 2, 6, 7."""
    c, rng = args.sac_reward_scale, np.random.default_rng(args.seed)
    which = {1.0: "reward −a² (released notebook)", 0.2: "reward −a²/5 (paper's text)"}.get(c, f"reward −{c:g}a²")
    kinds = {"individual": ("SAC", math.inf), "Stackelberg": ("STSAC-AL, λ = 0", 0.0)}
    noise = rng.standard_normal((args.sac_updates, args.samples, args.sac_runs))
    paths = {name: require_finite(simulate_sac(args, noise, lam), label) for name, (label, lam) in kinds.items()}

    errors, returns, rows = {}, {}, []
    for name, (label, _) in kinds.items():
        mu, sigma, w = paths[name].transpose(1, 0, 2)
        distance = np.hypot(mu, w)
        first = np.where((distance < 0.1).any(0), (distance < 0.1).argmax(0), np.inf)
        late = distance[len(distance) // 2 :]
        row = [f"{np.median(first):.0f} ({first.min():.0f} to {first.max():.0f})", f"{np.median(late):.3g}"]
        rows.append([label, *row, f"{late.max():.3g}", f"{np.median(sigma[-1]):.3g}"])
        errors[name], returns[name] = (label, distance**2), (label, reward(np.tanh(mu), c))
    print(f"Entropy-regularized version: {which}, {args.samples} samples an update, {args.sac_runs} runs\n")
    header = "updates to √(μ²+w²) < 0.1: median (range)", "its median in the second half", "its largest", "last σ"
    print_table(["dynamics", *header], rows)

    points = grid()
    noise = rng.standard_normal((args.samples, args.field_draws, *points[0].shape))
    fields = {name: sac_field(*points, noise, lam, args) for name, (_, lam) in kinds.items()}
    note = f"{which}. Arrows: mean of {args.field_draws} updates at σ = {args.sigma0:g}, direction alone."
    for figure_name, runs in ("figure2", 1), ("figure6", args.sac_runs):
        figure, axes = panels(2)
        for ax, letter, (name, (label, _)) in zip(axes, "ab", kinds.items()):
            path = paths[name][:, ::2, :runs]
            draw_field(ax, points, fields[name], path, COLORS[name], f"({letter}) {label}", xlabel="μ (actor)")
        save_figure(figure, args, figure_name, note, axes)

    figure, axes = panels(2)
    draw_curves(axes[0], errors, "(a) error", "μ² + w²")
    draw_curves(axes[1], returns, "(b) return of the mean action", "r(tanh μ)", log=False)
    save_figure(figure, args, "figure7", f"{which}. Median and quartiles of {args.sac_runs} runs.", axes)


def theorem2(args):
    """Theorem 2 at work: noisy gradients, and step sizes of Assumption 1, in a game to which it applies.

    The toy game with the reward's peak moved from 0 to p. The maps of Assumption 1 are Lipschitz and bounded near
    (p, 0), though not near θ = 0: the theorem is local, and so is this.
    Returns the distances to (p, 0), [noisy_steps, noisy_runs].
    """
    c, p, rng = args.reward_scale, args.peak, np.random.default_rng(args.seed)
    k = np.arange(args.noisy_steps - 1) + args.offset
    alphas = k**-args.theta_decay, k**-args.w_decay  # the ratio vanishes, sums diverge, sums of squares converge
    noise = args.noise * rng.standard_normal((len(k), 2, args.noisy_runs))
    angle, radius = 2 * math.pi * np.arange(args.noisy_runs) / args.noisy_runs, 0.2 * abs(p)
    start = p + radius * np.cos(angle), radius * np.sin(angle)
    path = simulate(*start, *alphas, noise[:, 0], noise[:, 1], 0.0, c, p)
    distance = np.hypot(require_finite(path, "Theorem 2")[:, 0] - p, path[:, 1])

    print(f"Theorem 2: R(θ) = -{c:g}(θ - {p:g})², noise of standard deviation {args.noise:g}, {args.noisy_runs} runs,")
    print(f"α_θ,k = (k + {args.offset:g})^-{args.theta_decay:g}, α_w,k = (k + {args.offset:g})^-{args.w_decay:g}\n")
    at = sorted({min(10**e, args.noisy_steps) for e in range(8)})
    rows = [[f"{i:,}", f"{np.median(distance[i - 1]):.3g}", f"{distance[i - 1].max():.3g}"] for i in at]
    print_table(["iterate", f"distance to ({p:g}, 0): median", "largest"], rows)

    figure, axes = panels(2)
    points, t = grid(p, 0.45 * abs(p)), thin(distance)
    field = dynamics(*points, 0.0, c, p)
    draw_field(axes[0], points, field, path, COLORS["Stackelberg"], "(a) noisy iterates", equilibrium=p)
    axes[1].plot(t + 1, distance[t], color=COLORS["Stackelberg"], lw=0.7, alpha=0.5)
    axes[1].plot(
        t[1:] + 1, args.noise * np.sqrt(alphas[1][t[1:] - 1]), "k--", lw=1.8, label=r"noise $\sqrt{\alpha_{w,k}}$"
    )
    axes[1].set(title="(b) distance to the equilibrium", xlabel="iterate", ylabel=f"‖(θ, w) − ({p:g}, 0)‖")
    axes[1].set(xscale="log", yscale="log")
    axes[1].grid(alpha=0.3)
    alpha = r"$\alpha_{%s,k} = (k + %g)^{-%g}$"
    steps = alpha % (r"\theta", args.offset, args.theta_decay) + ", " + alpha % ("w", args.offset, args.w_decay)
    note = f"R(θ) = −{c:g}(θ − {p:g})²; {steps}; noise {args.noise:g}; {args.noisy_runs} runs"
    save_figure(figure, args, "theorem2", note, axes)
    return distance


def draw_all(args):
    """What the command line calls: prints the tables and draws the figures."""
    check_args(args)
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        stop(f"cannot make the folder {args.output_dir}: {e.strerror}")
    plt.rcParams.update({"font.size": 13, "axes.titlesize": 14})
    with np.errstate(all="ignore"):  # `require_finite` tells in one line what numpy would warn of
        equilibria(args, toy(args))
        sac(args)
        theorem2(args)
    print(f"figures: {args.output_dir}")


def main():
    """The command line."""
    draw_all(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
