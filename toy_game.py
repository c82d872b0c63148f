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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure


@dataclass
class Args:
    output_dir: str = "runs/toy_game"
    """the folder of the PNG files; made if it is not there"""
    seed: int = 1
    """seed of all noise: the SAC version's and Theorem 2's"""

    # The game of Section 3.2 (Figures 1, 4, 5)
    theta0: float = -1.0
    """θ_0, where the actor starts; not 0, where ∇_w²L = 2θ² vanishes and ∇J is not defined"""
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

    # Theorem 2
    peak: float = 0.5
    """p of the reward -c(θ - p)², whose game has a differential Stackelberg equilibrium at (p, 0) where p is not 0"""
    noise: float = 0.05
    """standard deviation of the noise on both gradients"""
    theta_decay: float = 0.9
    """α_θ,k = (k + 10) to the power of minus this; Assumption 1 needs 1/2 < w_decay < theta_decay ≤ 1"""
    w_decay: float = 0.6
    """α_w,k = (k + 10) to the power of minus this"""
    noisy_steps: int = 100_000
    """iterates, counting the first"""


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
        if value == 0 and name not in ("w0", "eta", "noise", "seed"):
            stop(f"{flag} must not be 0")
        if name not in ("output_dir", "theta0", "w0", "peak") and value < 0:
            stop(f"{flag} must not be negative")
    if not 0.5 < args.w_decay < args.theta_decay <= 1:
        stop("Assumption 1 needs 1/2 < --w-decay < --theta-decay ≤ 1")


def require_finite(path, lam):
    if not np.isfinite(path).all():
        stop(f"λ = {lam:g}: the iterates diverge, or one has θ = 0; try smaller learning rates", 1)
    return path


# The game: every function takes numbers or arrays. λ = ∞ is the individual gradient (Proposition 2).
def reward(theta, c, peak=0.0):
    """R(θ) = -c(θ - p)²; the paper's game has p = 0."""
    return -c * (theta - peak) * (theta - peak)


def grad_reward(theta, c, peak=0.0):
    return -2 * c * (theta - peak)


def J(theta, w):
    return w * theta


def L(theta, w, c, peak=0.0):
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
    return 4 * w * theta - 2 * reward(theta, c, peak) - 2 * theta * grad_reward(theta, c, peak)


def stackelberg_direction(theta, w, lam, c, peak=0.0):
    """∇J(θ, w) of (15) with the regularization of Section 4.5: the direction in which the actor steps."""
    implicit = grad_wtheta_L(theta, w, c, peak) * grad_w_J(theta, w) / (hess_w_L(theta, w) + lam)
    return grad_theta_J(theta, w) - implicit


def dynamics(theta, w, lam, c, peak=0.0):
    """(θ', w') = (∇J, -∇_w L), the continuous-time limit of the updates (Theorem 2)."""
    return stackelberg_direction(theta, w, lam, c, peak), -grad_w_L(theta, w, c, peak)


def simulate(theta, w, alpha_theta, alpha_w, noise_theta, noise_w, lam, c, peak=0.0):
    """Iterates of (17)-(18), without noise (11)-(12): [steps + 1, 2, ...]. θ and w may be arrays, a run each."""
    path = np.empty((len(alpha_theta) + 1, 2, *np.shape(theta)))
    path[0] = theta, w
    for k, (a_theta, a_w, e_theta, e_w) in enumerate(zip(alpha_theta, alpha_w, noise_theta, noise_w)):
        theta, w = path[k]
        d_theta, d_w = dynamics(theta, w, lam, c, peak)  # both at (θ_k, w_k)
        path[k + 1] = theta + a_theta * (d_theta + e_theta), w + a_w * (d_w - e_w)
    return require_finite(path, lam)


def error(path, peak=0.0):
    """(θ - p)² + w² of iterates (θ, w), or of the SAC version's (μ, σ, w)."""
    return (path[:, 0] - peak) ** 2 + path[:, -1] ** 2


# What kind of point it converges to
def jacobian(theta, w, lam, c, peak=0.0, h=1e-6):
    """Jacobian of the dynamics by central differences. With λ = 0 and θ = 0 that of their continuous extension."""
    theta = theta or 1e-9  # at θ = 0, λ = 0 the implicit term is 0/0, and near it 2w + 3cθ
    moved = np.array(dynamics(theta + np.array([h, -h, 0, 0]), w + np.array([0, 0, h, -h]), lam, c, peak))
    return (moved[:, ::2] - moved[:, 1::2]) / (2 * h)


def second_order(theta, lam, c, peak=0.0, h=1e-6):
    """The leader's ∇²f1 and the follower's ∇_2²f2 of Definition 1, for the game (-J, L + λ/2 w²).

    ∇f1 is the total derivative, so ∇²f1 is its derivative along the best response w*(θ), where ∇_w L + λw = 0.
    """
    moved = theta + np.array([h, -h])
    best_response = -grad_w_L(moved, 0.0, c, peak) / (hess_w_L(moved, 0.0) + lam)
    grad_f1 = -stackelberg_direction(moved, best_response, lam, c, peak)
    return (grad_f1[0] - grad_f1[1]) / (2 * h), hess_w_L(theta, 0.0) + lam


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
    # by μ and by σ the derivatives of a, and of log π(a) = -ε²/2 - log σ - log(1 - a²) + const
    grad_a = np.array([1 - a**2, (1 - a**2) * noise])
    grad_log_pi = np.array([2 * a, 2 * a * noise - 1 / sigma])
    v = grad_w_J(a, w).mean(0) / (hess_w_L(a, w).mean(0) + lam)
    direct = (w * grad_a - eta * grad_log_pi).mean(1)
    implicit = (grad_wtheta_L(a, w, c) * grad_a).mean(1) * v
    return *(direct - implicit), -grad_w_L(a, w, c).mean(0)


def simulate_sac(args, noise, lam):
    """All runs at once, on noise [updates, samples, runs]. Returns the iterates (μ, σ, w), [updates + 1, 3, runs]."""
    path = [np.repeat([[args.theta0], [args.sigma0], [args.w0]], noise.shape[-1], axis=1)]
    for eps in noise:
        step = np.array(sac_directions(*path[-1], eps, lam, args.sac_reward_scale, args.eta))
        path.append(path[-1] + args.sac_lr * step)
    return require_finite(np.array(path), lam)


def sac_field(mu, w, noise, lam, args):
    """The mean update of (μ, w) at σ = σ_0 over noise [samples, draws, *mu.shape]: each draw is one update."""
    d_mu, _, d_w = sac_directions(mu, args.sigma0, w, noise, lam, args.sac_reward_scale, args.eta)
    return d_mu.mean(0), d_w.mean(0)


# Figures and tables. `results` is {name: (label, λ, iterates [steps, 2 or 3] or [steps, 2 or 3, runs])}.
COLORS = {"individual": "#D55E00", "Stackelberg": "#0072B2", "regularized": "#009E73"}  # Okabe and Ito's
STYLES = {"individual": "-", "Stackelberg": "--", "regularized": "-."}


def grid(center=0.0, width=1.15, n=14):
    """Points for arrows; an even n leaves out θ = 0, where the Stackelberg gradient with λ = 0 is not defined."""
    return np.meshgrid(np.linspace(center - width, center + width, n), np.linspace(-width, width, n))


def thin(path, n=4_000):
    """Indices of about n iterates, dense at the start where most happens."""
    return np.unique(np.geomspace(1, len(path), min(n, len(path))).astype(int)) - 1


@contextmanager
def panels(args, name, n, note):
    """Lends n panels to draw on, then puts one legend and a note below them and writes the figure."""
    figure = Figure(figsize=(4.1 * n, 4.7))
    yield figure.subplots(1, n)
    legend = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(legend.values(), legend.keys(), loc="lower center", bbox_to_anchor=(0.5, 0.064), ncols=6)
    figure.text(0.5, 0.021, note, ha="center", fontsize=11, color="0.3")
    figure.tight_layout(rect=(0, 0.16, 1, 1), w_pad=2)
    figure.savefig(Path(args.output_dir) / f"{name}.png", dpi=80)


def draw_fields(axes, results, field, center=0.0, width=1.15, xlabel="θ (actor)"):
    """A panel for each of the results: its trajectories, and arrows of field(θ, w, λ), all of one length."""
    theta, w = grid(center, width)
    for ax, letter, (name, (label, lam, path)) in zip(axes, "abc", results.items()):
        arrows = np.array(field(theta, w, lam=lam))
        ax.quiver(theta, w, *arrows / np.hypot(*arrows), color="0.6", scale=19, width=0.005, pivot="mid")
        x, y = path[thin(path), 0], path[thin(path), -1]
        lw, alpha, ms = (1.8, 1, 9) if path.ndim == 2 else (0.9, 0.6, 6)
        ax.plot(x, y, color=COLORS[name], lw=lw, alpha=alpha)
        ax.plot(x[0], y[0], "o", ms=ms, mfc="white", mec="black", mew=1.4, label="start")
        ax.plot(center, 0, "*", ms=14, color="black", mec="white", ls="", label="equilibrium", zorder=5)
        ax.set(title=f"({letter}) {label}", xlabel=xlabel, ylabel="w (critic)", box_aspect=1)
        ax.set(xlim=(theta.min(), theta.max()), ylim=(w.min(), w.max()))


def draw_curves(ax, results, f, title, ylabel, yscale="log", band=(0.25, 0.75)):
    """f(iterates) for each of the results: a line, or the runs' median and a band between two of their quantiles."""
    for name, (label, _, path) in results.items():
        k = thin(path)
        y = f(path)[k].reshape(len(k), -1)
        ax.plot(k + 1, np.median(y, axis=1), STYLES[name], color=COLORS[name], lw=1.8, label=label)
        ax.fill_between(k + 1, *np.quantile(y, band, axis=1), color=COLORS[name], alpha=0.2, lw=0)
    ax.set(title=title, xlabel="iterate", ylabel=ylabel, xscale="log", yscale=yscale)
    ax.grid(alpha=0.3)


def print_table(header, rows):
    """Markdown, with columns of equal width for the eye."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows)]
    for row in header, ["-" * width for width in widths], *rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    print()


# Experiments
def simulate_toy(args):
    """The results of the three dynamics of Section 3.2."""
    kinds = {"individual": ("individual gradient", math.inf), "Stackelberg": ("Stackelberg, λ = 0", 0.0)}
    kinds["regularized"] = f"Stackelberg, λ = {args.lam:g}", args.lam
    constants = [[value] * (args.steps - 1) for value in (args.theta_lr, args.w_lr, 0.0, 0.0)]
    play = partial(simulate, args.theta0, args.w0, *constants, c=args.reward_scale)
    return {name: (label, lam, play(lam=lam)) for name, (label, lam) in kinds.items()}


def summarize(path, c):
    """{k: distance to (0, 0) at the k-th iterate}, sign changes of θ, largest θ, worst return after update 1,000."""
    theta, steps = path[:, 0], len(path)
    distances = {k: np.sqrt(error(path)[k - 1]) for k in sorted({min(k, steps) for k in (1_000, 10_000, steps)})}
    late = reward(theta[min(1_001, steps - 1) :], c)  # path[k] is the iterate that update k leads to
    return distances, int((np.diff(np.sign(theta)) != 0).sum()), theta.max(), late.min()


def toy(args):
    """The game of Section 3.2: table and Figures 1, 4, 5."""
    c, results, rows = args.reward_scale, simulate_toy(args), []
    for label, _, path in results.values():
        distances, sign_changes, largest, worst = summarize(path, c)
        at = " / ".join(f"{d:.3g}" for d in distances.values())
        rows.append([label, at, str(sign_changes), f"{largest:.3g}", f"{worst:.3g}"])
    iterates = " / ".join(f"{k:,}" for k in distances)
    header = f"√(θ²+w²) at iterate {iterates}", "sign changes of θ", "largest θ", "worst R(θ) after update 1,000"
    print_table(["dynamics", *header], rows)

    field, note = partial(dynamics, c=c), f"R(θ) = −{c:g}θ². Arrows show the direction alone, all have one length."
    with panels(args, "figure1", 3, note) as axes:
        draw_fields(axes[:2], results, field)
        draw_curves(axes[2], results, error, "(c) error", "θ² + w²")
    with panels(args, "figure4", 3, note) as axes:
        draw_fields(axes, results, field)
    with panels(args, "figure5", 2, f"R(θ) = −{c:g}θ².") as axes:
        draw_curves(axes[0], results, error, "(a) error", "θ² + w²")
        draw_curves(axes[1], results, lambda path: reward(path[:, 0], c), "(b) return", "R(θ)", "linear")
    return results


def equilibria(args, results):
    """What kind of point each of the dynamics converges to (Definition 1, Theorem 2)."""
    c, rows = args.reward_scale, []
    games = [(label, lam, 0.0, spectrum(jacobian(*path[-1], lam, c))) for label, lam, path in results.values()]
    games.append(("Stackelberg, λ = 0, moved peak", 0.0, args.peak, ""))
    for label, lam, peak, at_end in games:
        leader, follower = second_order(peak, lam, c, peak)
        holds = "yes" if min(leader, follower) > 1e-6 else "no"
        conditions = [f"{follower:.4f}", f"{leader:.4f}", holds] if lam < math.inf else ["", "", ""]
        rows.append([label, f"({peak:g}, 0)", spectrum(jacobian(peak, 0.0, lam, c, peak)), at_end, *conditions])
    header = "dynamics", "equilibrium", "spectrum there", "at the last iterate", "∇_w²L + λ", "∇²f1", "Definition 1"
    print_table(header, rows)
    print("No λ makes (0, 0) a differential Stackelberg equilibrium, though it attracts: λ = 0 fails the follower's")
    print("condition, λ > 0 the leader's. Theorem 2 applies when the reward's peak is moved to p ≠ 0, at (p, 0).\n")


def sac(args):
    """The entropy-regularized version: table and Figures 2, 6, 7."""
    c, rng = args.sac_reward_scale, np.random.default_rng(args.seed)
    which = {1.0: "reward −a² (released notebook)", 0.2: "reward −a²/5 (paper's text)"}.get(c, f"reward −{c:g}a²")
    noise = rng.standard_normal((args.sac_updates, args.samples, args.sac_runs))
    results, rows = {}, []
    for name, label, lam in ("individual", "SAC", math.inf), ("Stackelberg", "STSAC-AL, λ = 0", 0.0):
        path = simulate_sac(args, noise, lam)
        results[name] = label, lam, path
        distance = np.sqrt(error(path))
        near, late = distance < 0.1, distance[len(path) // 2 :]
        first = np.where(near.any(0), near.argmax(0), np.inf)
        row = [f"{value:.3g}" for value in (np.median(late), late.max(), np.median(path[-1, 1]))]
        rows.append([label, f"{np.median(first):.0f} ({first.min():.0f} to {first.max():.0f})", *row])
    print(f"Entropy-regularized version: {which}, {args.samples} samples an update, {args.sac_runs} runs\n")
    header = "updates to √(μ²+w²) < 0.1: median (range)", "its median in the second half", "its largest", "last σ"
    print_table(["dynamics", *header], rows)

    field = partial(sac_field, noise=rng.standard_normal((args.samples, 500, *grid()[0].shape)), args=args)
    one_run = {name: (label, lam, path[..., 0]) for name, (label, lam, path) in results.items()}
    note = f"{which}. Arrows: mean of 500 updates at σ = {args.sigma0:g}, direction alone."
    for figure, runs in ("figure2", one_run), ("figure6", results):
        with panels(args, figure, 2, note) as axes:
            draw_fields(axes, runs, field, xlabel="μ (actor)")
    with panels(args, "figure7", 2, f"{which}. Median and quartiles of {args.sac_runs} runs.") as axes:
        draw_curves(axes[0], results, error, "(a) error", "μ² + w²")
        draw_curves(axes[1], results, lambda path: reward(np.tanh(path[:, 0]), c), "(b) return", "r(tanh μ)", "linear")


def theorem2(args):
    """Theorem 2 at work, in the game with the reward's peak at p: noisy gradients, and step sizes of Assumption 1.

    Near (p, 0), though not near θ = 0, its maps are Lipschitz and bounded. Returns distances to (p, 0), [steps, runs].
    """
    c, p, runs, rng = args.reward_scale, args.peak, 10, np.random.default_rng(args.seed)
    k = np.arange(args.noisy_steps - 1) + 10  # not from 0: the theorem is local, so the first steps must be small
    alphas = k**-args.theta_decay, k**-args.w_decay  # the ratio vanishes, sums diverge, sums of squares converge
    noise = args.noise * rng.standard_normal((len(k), 2, runs))
    angle, radius = 2 * math.pi * np.arange(runs) / runs, 0.2 * abs(p)
    start = p + radius * np.cos(angle), radius * np.sin(angle)
    path = simulate(*start, *alphas, noise[:, 0], noise[:, 1], 0.0, c, p)
    distance = np.sqrt(error(path, p))

    print(f"Theorem 2: R(θ) = -{c:g}(θ - {p:g})², noise of standard deviation {args.noise:g}, {runs} runs,")
    print(f"α_θ,k = (k + 10)^-{args.theta_decay:g}, α_w,k = (k + 10)^-{args.w_decay:g}\n")
    at = sorted({min(10**e, args.noisy_steps) for e in range(8)})
    rows = [[f"{i:,}", f"{np.median(distance[i - 1]):.3g}", f"{distance[i - 1].max():.3g}"] for i in at]
    print_table(["iterate", f"distance to ({p:g}, 0): median", "largest"], rows)

    note = f"R(θ) = −{c:g}(θ − {p:g})², noise {args.noise:g}. Median and range of {runs} runs."
    results = {"Stackelberg": ("noisy iterates", 0.0, path)}
    with panels(args, "theorem2", 2, note) as axes:
        draw_fields(axes, results, partial(dynamics, c=c, peak=p), p, 0.45 * abs(p))
        draw_curves(axes[1], results, partial(error, peak=p), "(b) error", "(θ − p)² + w²", band=(0, 1))
        axes[1].plot(k - 8, args.noise**2 * alphas[1], "k:", lw=1.8, label="noise² α_w")
    return distance


def main(args):
    """Prints the tables and draws the figures."""
    check_args(args)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams.update({"font.size": 13, "axes.titlesize": 14, "legend.frameon": False})
    with np.errstate(all="ignore"):  # `require_finite` tells in one line what numpy would warn of
        equilibria(args, toy(args))
        sac(args)
        theorem2(args)
    print(f"figures: {args.output_dir}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
