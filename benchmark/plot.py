"""Figure 3 and its statistics from the TensorBoard files of runs.

    python benchmark/plot.py runs --out plots

writes to the folder `plots`

- figure3.png: a row for each of AC, DDPG and SAC with its Stackelberg versions, a panel for each task; mean over seeds
  and its 95 % bootstrap interval at each step. Panels with fewer than five seeds are marked.
- terms.png, if there are Stackelberg versions: how long the implicit term is beside the direct one, and their cosine.
- table.md, also printed: final scores and areas under the curve, how probably a Stackelberg version is better than the
  plain one, and both terms at the end. What these are exactly, it says itself.
- curves.csv: every point of every run, and flags.json: the flags of each experiment. With --add, runs that are in these
  two and not in the folders stay.

Returns are those that the scripts measure: of the evaluations (stddpg.py, stsac.py) or of the batches (stac_ac.py).
A run counts if it is finished, that is, has a model.pt; the others are named and left out.
"""

import csv
import json
import logging
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every run that was carried on

FEW = 5  # fewer seeds than these are marked
LEVEL = 95  # per cent
RESAMPLES = 10_000  # of each bootstrap
# rows of the figure: the flag that only its script has, the tag of its returns, and what they are
FAMILIES = {
    "AC, STAC": ("num_steps", "charts/batch_return", "mean return of the batch"),
    "DDPG, STDDPG": ("exploration_noise", "eval/episodic_return", "evaluation return"),
    "SAC, STSAC": ("alpha", "eval/episodic_return", "evaluation return"),
}
# flags of the game, which a Stackelberg version and its plain one may have differently; flags that change no result but
# for rounding
GAME = set("leader curvature precondition lam lam_decay start_states cg_iters cg_tol".split())
NEUTRAL = set(
    "exp_name seed total_timesteps resume evaluate eval_every eval_episodes checkpoint_every save_model cuda "
    "num_threads compile torch_deterministic track wandb_project_name wandb_entity capture_video".split()
)
COLOURS = {
    **{"ac-m1": "#7fb2e5", "ac-m80": "#1f5fa8", "stac-al-m1": "#f0908c", "stac-al-m80": "#b8171c"},
    **{"ac-2x-m1": "#b5b5b5", "ac-2x-m80": "#5f5f5f"},
    **{"ddpg": "#1f5fa8", "stddpg-al": "#b8171c", "stddpg-al-gn": "#e08a1e", "stddpg-cl": "#3a9a44"},
    **{"sac": "#1f5fa8", "stsac-al": "#b8171c", "stsac-al-gn": "#e08a1e", "stsac-cl": "#3a9a44"},
}
OTHER_COLOURS = ["#8458b3", "#17a2a8", "#8a5a2b", "#d45fa5", "#a0a000", "#404080"]


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    """folders of run folders"""
    out: Path = Path("plots")
    """the folder to write to"""
    smooth: int = 1
    """draw the mean of this many last points of a run; the scores are of the runs as they are"""
    unfinished: bool = False
    """count runs that are not finished, too, as far as they are"""
    add: bool = False
    """add to the curves.csv of the folder written to: its runs count, too, unless a folder has the same run"""


class Run(NamedTuple):
    family: str
    environment: str
    experiment: str
    seed: int
    flags: dict[str, str]
    steps: np.ndarray
    """environment steps [T], rising"""
    returns: np.ndarray
    """[T]"""
    terms: np.ndarray
    """[T, 2] |implicit| / |direct| and the cosine of the two, medians over the updates since the last return, or NaN"""


def stop(message):
    """Ends the program with one line on stderr."""
    print(f"plot.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def note(message):
    print(f"plot.py: {message}", file=sys.stderr)


# Runs
def read_run(folder):
    """The run in a folder; None if it is of no family or has no returns yet."""
    # critical: without the sizes TensorBoard keeps a random sample. It drops what a killed run wrote after its last
    # checkpoint: the scripts say from which step on (purge_step).
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    if "hyperparameters/text_summary" not in tags["tensors"]:
        return None
    (table,) = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val
    flags = dict(line[1:-1].split("|", 1) for line in table.decode().splitlines()[2:])
    _, experiment, seed, _ = folder.name.rsplit("__", 3)
    for family, (flag, tag, _) in FAMILIES.items():
        if flag in flags and tag in tags["scalars"]:
            points = np.array([(event.step, event.value) for event in events.Scalars(tag)])
            key = family, flags["env_id"], experiment, int(seed)
            return Run(*key, flags, *points.T, read_terms(events, points[:, 0]))
    return None


def read_terms(events, steps):
    """A run's `terms` at the steps of its returns."""
    terms = np.full((len(steps), 2), np.nan)
    tags = [f"stackelberg/{name}" for name in ("direct_norm", "implicit_norm", "cosine")]
    if set(tags) <= set(events.Tags()["scalars"]):
        when = np.array([event.step for event in events.Scalars(tags[0])])
        direct, implicit, cosine = ([event.value for event in events.Scalars(tag)] for tag in tags)
        values = np.column_stack([implicit / np.maximum(direct, np.finfo(np.float32).tiny), cosine])
        for i, end in enumerate(np.searchsorted(when, steps, side="right")):
            begin = np.searchsorted(when, steps[i - 1], side="right") if i else 0
            if begin < end:
                terms[i] = np.median(values[begin:end], axis=0)
    return terms


def read_csv(folder):
    """{key: run} of what `write` has written there."""
    flags, rows = json.loads((folder / "flags.json").read_text()), defaultdict(list)
    with open(folder / "curves.csv", newline="") as file:
        for environment, experiment, seed, *values in list(csv.reader(file))[1:]:
            rows[environment, experiment, int(seed)].append([float(value or "nan") for value in values])
    found = {}
    for (environment, experiment, seed), values in rows.items():
        mine, values = flags[f"{environment}__{experiment}"], np.array(values)
        family = next(family for family, (flag, _, _) in FAMILIES.items() if flag in mine)
        key = family, environment, experiment, seed
        found[key] = Run(*key, mine, values[:, 0], values[:, 1], values[:, 2:])
    return found


def read(folders, unfinished, earlier=None):
    """All runs that count, those of one experiment one after the other; `earlier` is {key: run}."""
    found = {}
    for folder in folders:
        if not folder.is_dir():
            stop(f"no folder {folder}")
        for path in sorted(path.parent for path in folder.glob("*__*/checkpoint.pt")):
            run = read_run(path)
            if run is None:
                note(f"left out, no returns yet: {path}")
            elif not unfinished and not (path / "model.pt").exists():
                total = int(run.flags["total_timesteps"])
                note(f"left out, not finished: {path} (step {run.steps[-1]:,.0f} of {total:,})")
            else:
                key = (*run[:4],)
                if key in found:
                    note(
                        f"more than one run of {run.experiment}, {run.environment}, seed {run.seed}: the longest counts"
                    )
                found[key] = max(run, found.get(key, run), key=lambda run: run.steps[-1])
    found = (earlier or {}) | found
    names = list({**COLOURS, **{run.experiment: "" for run in found.values()}})
    return sorted(
        found.values(),
        key=lambda run: (list(FAMILIES).index(run.family), run[1], names.index(run.experiment), run.seed),
    )


def group(runs):
    """{family: {environment: {experiment: list of runs}}}; stops if an experiment has runs with unequal flags."""
    groups = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for run in runs:
        same = groups[run.family][run.environment][run.experiment]
        same.append(run)
        for flag in same[0].flags.keys() & run.flags.keys() - NEUTRAL:
            if same[0].flags[flag] != run.flags[flag]:
                values = f"{same[0].flags[flag]} with seed {same[0].seed}, {run.flags[flag]} with seed {run.seed}"
                stop(f"{run.experiment}, {run.environment}: runs of one name have unequal flags: {flag} is {values}")
    return groups


def align(runs, of=lambda run: run.returns):
    """Steps [T] to the last that all runs have come to, and returns [runs, T], interpolated where one has no point.

    of: what to take of a run instead of its returns, [T].
    """
    first, last = max(run.steps[0] for run in runs), min(run.steps[-1] for run in runs)
    steps = np.unique(np.concatenate([run.steps for run in runs]))
    steps = steps[(steps >= first) & (steps <= last)]
    if not len(steps):
        stop(f"{runs[0].environment}: no step is common to all runs of {runs[0].family}")
    return steps, np.array([np.interp(steps, run.steps, of(run)) for run in runs])


# Statistics, in numpy: rliable, which has these definitions, brings half a gigabyte of packages and does not work with
# pandas 3, and it wants as many seeds in each task.
def generator():
    """A new one for each estimate, so that none depends on which others are made."""
    return np.random.default_rng(0)


def resample(values, rng):
    """values [n] -> [RESAMPLES, n], each row drawn from them with replacement."""
    return values[rng.integers(len(values), size=(RESAMPLES, len(values)))]


def interval(samples):
    """The percentile interval of bootstrap samples, first axis RESAMPLES."""
    return np.percentile(samples, [50 - LEVEL / 2, 50 + LEVEL / 2], axis=0)


def mean_interval(returns, rng):
    """returns [n, T] -> the interval [2, T] of their mean over n."""
    draws = rng.multinomial(len(returns), np.full(len(returns), 1 / len(returns)), size=RESAMPLES)
    return interval(draws @ returns / len(returns))


def iqm(scores):
    """Interquartile mean over the last axis: without the best and the worst quarter (of n: n/4 rounded down) each."""
    cut = scores.shape[-1] // 4
    return np.sort(scores)[..., cut : scores.shape[-1] - cut].mean(-1)


def iqm_interval(tasks, rng):
    """tasks: an array of scores for each task. The IQM of all, and its interval; seeds are drawn within each task."""
    return iqm(np.concatenate(tasks)), interval(iqm(np.concatenate([resample(x, rng) for x in tasks], axis=1)))


def improvement(x, y):
    """P(X > Y) + P(X = Y) / 2 for scores x [..., n] and y [..., m], over all their pairs."""
    x, y = x[..., :, None], y[..., None, :]
    return ((x > y) + 0.5 * (x == y)).mean((-2, -1))


def improvement_interval(tasks, rng):
    """tasks: (x, y) for each task. Their improvement, mean over the tasks, and its interval; drawn within each task."""
    samples = np.mean([improvement(resample(x, rng), resample(y, rng)) for x, y in tasks], axis=0)
    return np.mean([improvement(x, y) for x, y in tasks]), interval(samples)


# Scores
def final_score(steps, returns):
    """Mean of the points in the last tenth of the steps: returns [n, T] -> [n]."""
    return returns[:, steps > 0.9 * steps[-1]].mean(1)


def area_under_curve(steps, returns):
    """Trapezoid rule, divided by the length in steps, so that it is a mean return: returns [n, T] -> [n]."""
    if len(steps) == 1:
        return returns[:, 0]
    return ((returns[:, 1:] + returns[:, :-1]) / 2 * np.diff(steps)).sum(1) / (steps[-1] - steps[0])


SCORES = {"final score": final_score, "area under the curve": area_under_curve}


def score(panel):
    """{experiment: {name of the score: [n]}} of a panel's runs, up to the last step common to all, and that step."""
    steps, returns = align([run for runs in panel.values() for run in runs])
    seeds = np.cumsum([len(runs) for runs in panel.values()])[:-1]
    parts = zip(panel, np.split(returns, seeds))
    return {name: {key: f(steps, part) for key, f in SCORES.items()} for name, part in parts}, int(steps[-1])


def by_length(panel):
    """For each step at which an experiment of the panel ends: the panel of the experiments that have come to it."""
    ends = {name: min(run.steps[-1] for run in runs) for name, runs in panel.items()}
    return [{name: panel[name] for name in panel if ends[name] >= end} for end in sorted({*ends.values()})]


def plain(run, panel):
    """The name of the plain experiment in a run's panel that has the flags of `run` but for the game's; else None."""
    for name, (other, *_) in panel.items():
        common = run.flags.keys() & other.flags.keys() - NEUTRAL - GAME
        if other.flags["leader"] == "none" and all(run.flags[flag] == other.flags[flag] for flag in common):
            return name
    return None


# Tables
def cell(estimate, seeds, digits):
    """An estimate and its interval, if more than one seed stands behind it."""
    value, (low, high) = estimate
    form = lambda x: f"{x:,.{digits}f}".replace("-", "−")  # noqa: E731
    return f"{form(value)} ({form(low)} to {form(high)})" if seeds > 1 else form(value)


def span(values):
    """A number, or "lowest to highest"."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def mark(seeds):
    """The number of seeds, marked where it is small."""
    return span(seeds) + " †" * (min(seeds) < FEW)


def table(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def digits(values):
    """Decimals that leave about four digits."""
    return int(np.clip(3 - np.floor(np.log10(np.abs(values).max() + 1e-9)), 0, 3))


def score_rows(panels):
    """Rows of the table of scores of one family; at the end over tasks, of the experiments that all of them have."""
    for environment, panel in panels.items():
        for part in by_length(panel):
            values, horizon = score(part)
            places = digits(np.concatenate([x for both in values.values() for x in both.values()]))
            for name, both in values.items():
                n = len(part[name])
                cells = [cell(iqm_interval([x], generator()), n, places) for x in both.values()]
                yield environment, name, mark([n]), f"{horizon:,}", *cells
    names = [name for name in next(iter(panels.values())) if all(name in panel for panel in panels.values())]
    if len(panels) == 1 or len(names) < 2:
        return
    values, horizons = zip(*(score({name: panel[name] for name in names}) for panel in panels.values()))
    for name in names:
        cells, seeds = [], [len(panel[name]) for panel in panels.values()]
        for key in SCORES:
            pools = [np.concatenate([both[key] for both in value.values()]) for value in values]
            tasks = [(v[name][key] - pool.min()) / max(np.ptp(pool), 1e-9) for v, pool in zip(values, pools)]
            cells.append(cell(iqm_interval(tasks, generator()), min(seeds), 3))
        yield f"{len(panels)} tasks, 0 to 1", name, mark(seeds), span(horizons), *cells


def improvement_rows(panels):
    """Rows of the table of improvements of one family: Stackelberg versions over their plain one and their base."""
    pairs = defaultdict(list)
    for environment, panel in panels.items():
        for name, (run, *_) in panel.items():
            if run.flags["leader"] != "none":
                base = max((other for other in panel if name.startswith(f"{other}-")), key=len, default=None)
                for other in dict.fromkeys((plain(run, panel), base)):  # once, if both are the same
                    if other:
                        pairs[name, other].append(environment)
    for (name, other), environments in pairs.items():
        for tasks in [*([e] for e in environments), *([environments] if len(environments) > 1 else [])]:
            seeds = [len(panels[environment][x]) for environment in tasks for x in (name, other)]
            both = [{x: panels[environment][x] for x in (name, other)} for environment in tasks]
            values, horizons = zip(*map(score, both))
            cells = []
            for key in SCORES:
                scores = [(value[name][key], value[other][key]) for value in values]
                cells.append(cell(improvement_interval(scores, generator()), min(seeds), 2))
            title = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
            yield title, name, other, mark(seeds), span(horizons), *cells


def term_rows(panels):
    """Rows of the table of both terms: of each run the median in the last tenth of its steps, lowest and highest."""
    for environment, panel in panels.items():
        for name, runs in panel.items():
            if any(has_terms(run) for run in runs):
                last = [run.terms[run.steps > 0.9 * run.steps[-1]] for run in runs if has_terms(run)]
                ends = np.array([np.nanmedian(terms, axis=0) for terms in last])
                cells = [f"{low:.2g} to {high:.2g}".replace("-", "−") for low, high in zip(ends.min(0), ends.max(0))]
                yield environment, name, mark([len(ends)]), *cells


def report(groups):
    """The text of table.md."""
    rows, improvements, terms = [], [], []
    for panels in groups.values():
        rows += score_rows(panels)
        improvements += improvement_rows(panels)
        terms += term_rows(panels)
    text = f"""Interquartile mean over seeds (without the best and the worst quarter, rounded down) and its {LEVEL} %
bootstrap interval. Steps: a task has a row for each step at which one of its experiments ends, and each experiment that
has come to it; no later point counts. Final score: mean of a run's returns in the last tenth of these steps. Area under
the curve: mean return over these steps (trapezoid rule). † fewer than {FEW} seeds: the interval is too narrow, do not
rely on it.

"""
    text += table(["task", "run", "seeds", "steps", *SCORES], rows)
    if any("tasks" in row[0] for row in rows):
        text += """
Over tasks: the experiments made in each of them, to the last step that they have in common there; each score scaled to
0 (the worst run of the task) to 1 (the best); the interval draws seeds within each task.
"""
    if improvements:
        text += f"""
Probability of improvement: how often a seed of the Stackelberg version beats a seed of the plain one with the same
other flags, or of the version whose name its own extends, to the last step that both have come to; ties count half;
{LEVEL} % bootstrap interval, seeds drawn within each task. 0.5: no difference. Where every seed of one beats every seed
of the other, the interval has no width, however few the seeds.

"""
        text += table(["task", "version", "over", "seeds", "steps", *SCORES], improvements)
    if terms:
        text += """
Both terms of the total derivative at the end: medians over the last tenth of a run, from the lowest to the highest
seed.

"""
        text += table(["task", "version", "seeds", "implicit / direct", "cosine"], terms)
    return text


# Figure
def smoothed(returns, points):
    """The mean of a run's last `points` points, or of as many as there are: [n, T] -> [n, T]."""
    sums = np.cumsum(np.pad(returns, [(0, 0), (1, 0)]), 1)
    stops = np.arange(1, returns.shape[1] + 1)
    starts = np.maximum(stops - points, 0)
    return (sums[:, stops] - sums[:, starts]) / (stops - starts)


def style(axes):
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.set_xlabel("environment steps")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_panel(axes, environment, panel, colours, points, rng):
    """One panel: a curve for each experiment, as far as all its seeds are."""
    seeds, horizons = [len(runs) for runs in panel.values()], []
    for name, runs in panel.items():
        steps, returns = align(runs)
        returns = smoothed(returns, points)
        axes.plot(steps, returns.mean(0), color=colours[name], lw=1.3, label=name, marker="." * (len(steps) == 1))
        if len(runs) > 1:
            axes.fill_between(steps, *mean_interval(returns, rng), color=colours[name], alpha=0.18, lw=0)
        horizons.append(int(steps[-1]))
    axes.set_title(environment, fontsize=11, pad=21)
    few, thousand = min(seeds) < FEW, matplotlib.ticker.EngFormatter(sep="")
    text = f"{span(seeds)} seed{'s' * (max(seeds) > 1)}"
    text += f" ({'some ' * (max(seeds) >= FEW)}fewer than {FEW})" if few else ""
    text += f", {' to '.join(thousand(step) for step in sorted({min(horizons), max(horizons)}))} steps"
    box = {"boxstyle": "round", "facecolor": "#ffe08a" if few else "none", "edgecolor": "none"}
    where = {"xy": (0.5, 1), "xytext": (0, 9), "xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(text, **where, ha="center", fontsize=8, bbox=box)
    style(axes)


def colours_of(groups):
    """{experiment: colour}"""
    names = {name: None for panels in groups.values() for panel in panels.values() for name in panel}
    others = iter(OTHER_COLOURS * len(names))
    return {name: COLOURS[name] if name in COLOURS else next(others) for name in names}


def draw(groups, points, path):
    """Figure 3: a row for each family, a panel for each task."""
    rng, colours = np.random.default_rng(0), colours_of(groups)
    columns = max(len(panels) for panels in groups.values())
    curves = [len({name for panel in panels.values() for name in panel}) for panels in groups.values()]
    heights = [max(3.2, 1 + 0.2 * number) for number in curves]  # inches, room for the legend
    figure = plt.figure(figsize=(1.8 + 3.3 * columns, sum(heights)), layout="constrained")
    rows = np.atleast_1d(figure.subfigures(len(groups), 1, height_ratios=heights))
    for row, (family, panels) in zip(rows, groups.items()):
        all_axes = row.subplots(1, columns, squeeze=False)[0]
        for axes, (environment, panel) in zip(all_axes, panels.items()):
            draw_panel(axes, environment, panel, colours, points, rng)
        for axes in all_axes[len(panels) :]:
            axes.set_axis_off()
        smoothing = f",\nmean of the last {points} points" if points > 1 else ""
        all_axes[0].set_ylabel(FAMILIES[family][2] + smoothing)
        handles = {label: h for axes in all_axes for h, label in zip(*axes.get_legend_handles_labels())}
        legend = {name: handles[name] for name in colours if name in handles}
        place = {"frameon": False, "fontsize": 9, "alignment": "left"}
        title = f"{family}\nmean and {LEVEL} %\nbootstrap interval"
        row.legend(legend.values(), legend.keys(), loc="outside right upper", title=title, **place)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def has_terms(run):
    return not np.isnan(run.terms).all()


def draw_terms(groups, path):
    """Two panels for each task, length and cosine of the implicit term; median over the seeds, lowest and highest."""
    panels = [
        (environment, name, [run for run in runs if has_terms(run)])
        for family in groups.values()
        for environment, panel in family.items()
        for name, runs in panel.items()
        if any(map(has_terms, runs))
    ]
    titles = list(dict.fromkeys((environment, runs[0].family) for environment, _, runs in panels))
    colours, size = colours_of(groups), (1 + 3.3 * len(titles), 5.5)
    figure, axes = plt.subplots(2, len(titles), figsize=size, layout="constrained", squeeze=False)
    for environment, name, runs in panels:
        column = titles.index((environment, runs[0].family))
        for i, ax in enumerate(axes[:, column]):
            steps, values = align(runs, lambda run: run.terms[:, i])  # noqa: B023
            ax.plot(steps, np.median(values, axis=0), color=colours[name], lw=1.3, label=name)
            ax.fill_between(steps, values.min(0), values.max(0), color=colours[name], alpha=0.18, lw=0)
    for (top, bottom), (environment, _) in zip(axes.T, titles):
        style(top)  # critical: only now, because its set_xlim ends autoscaling
        style(bottom)
        top.set_title(environment, fontsize=11)
        top.set(yscale="log", ylabel="|implicit| / |direct|")
        low, high = top.get_ylim()
        top.yaxis.set_major_formatter("{x:g}")
        top.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else matplotlib.ticker.NullFormatter())
        top.legend(fontsize=8, frameon=False)
        bottom.set(ylabel="cosine of the two terms")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(runs, folder):
    """curves.csv and flags.json: every point of every run, and the flags of each experiment that are not neutral."""
    with open(folder / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["environment", "experiment", "seed", "step", "return", "ratio", "cosine"])
        for run in runs:
            for step, value, terms in zip(run.steps, run.returns, run.terms):
                cells = ["" if np.isnan(x) else f"{x:.4g}" for x in terms]
                writer.writerow([run.environment, run.experiment, run.seed, int(step), f"{value:.7g}", *cells])
    flags = {f"{run.environment}__{run.experiment}": run.flags for run in runs}
    kept = {key: {flag: mine[flag] for flag in sorted(mine.keys() - NEUTRAL)} for key, mine in flags.items()}
    (folder / "flags.json").write_text(json.dumps(kept, indent=1) + "\n")


def main():
    args = tyro.cli(Args, description=__doc__)
    if args.smooth < 1:
        stop("--smooth must be at least 1")
    runs = read(args.folders, args.unfinished, read_csv(args.out) if args.add else {})
    if not runs:
        stop(f"no finished run in {', '.join(map(str, args.folders))}")
    groups = group(runs)
    args.out.mkdir(parents=True, exist_ok=True)
    write(runs, args.out)
    text = report(groups)
    (args.out / "table.md").write_text(text)
    draw(groups, args.smooth, args.out / "figure3.png")
    if any(map(has_terms, runs)):
        draw_terms(groups, args.out / "terms.png")
    print(text)
    note(f"{len(runs)} runs; wrote to {args.out}")


if __name__ == "__main__":
    main()
