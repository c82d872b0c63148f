"""Figure 3 of the paper and its statistics, from finished runs.

    python benchmark/plot.py runs --out plots

writes to the folder `plots`

- figure3.png: a row for each algorithm, a panel for each task; interquartile mean over the seeds and its 95 % bootstrap
  interval. A point of AC is the mean of five batches.
- terms.png: how long the implicit term is beside the direct one, in the same panels; median, lowest and highest seed.
- table.md, also printed: final scores and areas under the curve, how probably a Stackelberg version is better than the
  plain one and by how much, and both terms at the end. What these are exactly, it says itself.
- curves.csv: every point of every run; flags.json: the flags of each experiment. With --add, the runs stay that are in
  these two and not in the folders.

Where stac_ac_rates.csv lies in that folder, too, its runs of AC on MuJoCo are in the figures and in table.md.

Returns are those that the scripts measure: of the evaluations (stddpg.py, stsac.py) or of the batches (stac_ac.py). A
run counts if it is finished, that is, has a model.pt (--save-model), which also says what the run is.
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
import tyro
from scipy import integrate, stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import seaborn as sns  # noqa: E402

logging.getLogger("tensorboard").setLevel(logging.ERROR)

# Rows of the figure: a flag that only its script has, the tag of its returns, and the paper's tasks
FAMILIES = {
    "AC": ("num_steps", "charts/batch_return", "CartPole-v1 Hopper-v4 Reacher-v4 Walker2d-v4"),
    "DDPG": ("exploration_noise", "eval/episodic_return", "HalfCheetah-v4 Hopper-v4 Reacher-v4 Walker2d-v4"),
    "SAC": ("alpha", "eval/episodic_return", "HalfCheetah-v4 Hopper-v4 Reacher-v4 Walker2d-v4"),
}
LABELS = {  # of experiments, in the order of tables and legends; "control" is drawn in grey
    "ac-m1": "AC, m = 1",
    "ac-m80": "AC, m = 80",
    "stac-released-m1": "STAC as released, m = 1",
    "stac-released-m80": "STAC as released, m = 80",
    "stac-every-m1": "STAC, every state, m = 1",
    "stac-every-m80": "STAC, every state, m = 80",
    "stac-every-gn-m80": "STAC, every state, Gauss–Newton, m = 80",
    "ac-2x-m1": "control: AC, 2 × the rate, m = 1",
    "ac-2x-m80": "control: AC, 2 × the rate, m = 80",
    "ac-1.15x-m80": "control: AC, 1.15 × the rate, m = 80",
    "ddpg": "DDPG",
    "stddpg-al": "STDDPG-AL, full Hessian",
    "stddpg-al-gn": "STDDPG-AL, Gauss–Newton",
    "stddpg-cl": "STDDPG-CL",
    "sac": "SAC",
    "stsac-al": "STSAC-AL, full Hessian",
    "stsac-al-gn": "STSAC-AL, Gauss–Newton",
    "stsac-al-gn-mean": "control: mean of the batch",
    "stsac-al-gn-lam-decay-1e5": "STSAC-AL, Gauss–Newton, λ decays",
    "stsac-cl": "STSAC-CL",
}
STUDY = {  # runs of stac_ac_rates.csv that belong in the figure
    ("AC", 0.1): "ac-m80",
    ("AC", 0.115): "ac-1.15x-m80",
    ("STAC, batch", 0.1): "stac-released-m80",
    ("STAC, every, Gauss–Newton", 0.1): "stac-every-gn-m80",
}
PAIRS = [  # compared besides: STAC with AC at a higher rate, and with AC that takes more critic steps
    ("stac-released-m1", "ac-2x-m1"),
    ("stac-released-m80", "ac-2x-m80"),
    ("stac-released-m80", "ac-1.15x-m80"),
    ("stac-released-m1", "ac-m80"),
]
COLOURS = {"none": "#1f5fa8", "actor": "#c8262b", "critic": "#2f9440", "control": "#7a7a7a"}
THOUSANDS = matplotlib.ticker.EngFormatter(sep="")
DASHES = ["", (4, 1.5), (1, 1), (5, 1.5, 1, 1.5), (5, 1, 1, 1, 1, 1), (8, 2), (2, 3), (8, 2, 2, 2)]
# Flags that change no result but for rounding, and flags of the game, which plain versions do not use
NEUTRAL = set("exp_name seed total_timesteps run_dir evaluate eval_every eval_episodes checkpoint_every".split())
NEUTRAL |= set("save_model cuda compile track capture_video".split())
GAME = set("curvature precondition lam lam_decay start_states cg_iters cg_tol".split())
KEY = ["environment", "experiment", "seed"]
TERMS = ["stackelberg/implicit_norm", "stackelberg/direct_norm", "stackelberg/cosine"]
SCORES = ["final score", "area under the curve"]
AC_STEPS = 20_000  # of a point of AC
LEGEND_ROWS = 6
FEW = 5  # fewer seeds than these are marked
ROUNDING = float(np.finfo(np.float32).eps)  # smaller, an implicit term is lost in the sum


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)  # folders of run folders
    out: Path = Path("plots")  # the folder to write to
    add: bool = False  # add to the curves.csv that is there


def stop(message):
    raise SystemExit(f"plot.py: error: {message}")


def note(message):
    print(f"plot.py: {message}", file=sys.stderr)


# Runs
def family_of(flags):
    return next((family for family, (flag, _, _) in FAMILIES.items() if flag in flags), None)


def as_text(args):
    """The flags that a result hangs on."""
    return {flag: str(args[flag]) for flag in sorted(args.keys() - NEUTRAL)}


def read_model(path):
    """All flags of a finished run; None if the file is damaged or another program's."""
    try:
        model = torch.load(path, map_location="cpu", weights_only=True)
        args = model["args"]
        if not args["exp_name"]:
            algorithm = model["algorithm"]
            names = {"none": algorithm.removeprefix("st"), "actor": f"{algorithm}-al", "critic": f"{algorithm}-cl"}
            args["exp_name"] = names[args["leader"]]
        known = {"env_id", "seed", "total_timesteps"} <= args.keys()
        return args if known and family_of(args) else None
    except Exception:  # a file can hold anything
        return None


def read_events(folder, tags):
    """A run's scalars, a row for each step, a column for each tag.

    A run that was carried on has a file for each part, and a part counts up to the first step of the next one. Clocks
    can be set back, so the parts' order is that of their first steps. Two parts have the same if one was killed before
    its next checkpoint; then the longer one is the later one.
    """
    parts = []
    for path in folder.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False)  # 0: all of them
        events.Reload()
        columns = {}
        for tag in set(tags) & set(events.Tags()["scalars"]):
            columns[tag] = pd.Series({event.step: event.value for event in events.Scalars(tag)})
        if columns:
            parts.append(pd.DataFrame(columns).sort_index())
    run = pd.DataFrame(columns=tags, dtype=float)
    for part in sorted(parts, key=lambda part: (part.index[0], part.index[-1])):
        run = pd.concat([run[run.index < part.index[0]], part])
    return run


def read_run(folder, args):
    """The curve of a finished run, with medians of |implicit| / |direct| and of the cosine since the last return."""
    tag = FAMILIES[family_of(args)][1]
    events = read_events(folder, [tag, *TERMS])
    events = events[events.index <= args["total_timesteps"]]  # a finished run may be on its way to more
    returns = events[tag].dropna()
    implicit, direct, cosine = (events[term] for term in TERMS)
    ratio = implicit / direct.clip(lower=np.finfo(np.float32).tiny)  # a policy that has died has no gradient
    since = np.searchsorted(returns.index, events.index)  # of the first return at or after each update
    terms = pd.DataFrame({"ratio": ratio, "cosine": cosine}).groupby(since).median().reindex(range(len(returns)))
    run = {"environment": args["env_id"], "experiment": args["exp_name"], "seed": args["seed"], "step": returns.index}
    return pd.DataFrame(run | {"return": returns.values}).join(terms)


def read_csv(folder):
    """What `write` has written: {(environment, experiment, seed): curve} and {(environment, experiment): flags}."""
    curves = pd.read_csv(folder / "curves.csv").groupby(KEY)
    flags = json.loads((folder / "flags.json").read_text())
    return dict(list(curves)), {tuple(key.split("__", 1)): own for key, own in flags.items()}


def read(folders, curves, flags):
    """Adds all finished runs to what read_csv returns; stops where the runs of one experiment have unequal flags."""
    found = {}
    for folder in sorted({path.parent for top in folders for path in top.rglob("*.pt")}):
        if not (folder / "model.pt").exists():
            note(f"left out, not finished: {folder}")
            continue
        args = read_model(folder / "model.pt")
        if args is None:
            note(f"left out, damaged or of another program: {folder / 'model.pt'}")
            continue
        run = read_run(folder, args)
        key = args["env_id"], args["exp_name"], args["seed"]
        if run.empty:
            note(f"left out, no returns: {folder}")
            continue
        if key in found:
            note(f"left out, the same run as {found[key]}: {folder}")
            continue
        curves[key] = run
        found[key] = folder
        mine = as_text(args)
        known = flags.setdefault(key[:2], mine)
        unused = GAME if args["leader"] == "none" else set()
        for flag in sorted(mine.keys() & known.keys() - unused):
            if mine[flag] != known[flag]:
                stop(f"{folder} has {flag} {mine[flag]}, another run of {key[1]} on {key[0]} has {known[flag]}")


def in_order(runs):
    """The experiments in the order of LABELS."""
    runs["experiment"] = pd.Categorical(runs.experiment, [*dict.fromkeys([*LABELS, *runs.experiment])])
    return runs.sort_values(["family", *KEY, "step"], ignore_index=True)


def with_study(runs, flags, path):
    """Adds runs of stac_ac_rates.csv, on tasks where AC was not run else."""
    done = set(runs.environment[runs.family == "AC"])
    study = pd.read_csv(path)
    study = study[(study.m == 80) & ~study.environment.isin(done)]
    study["experiment"] = [STUDY.get(key) for key in zip(study.arm, study.rate)]
    study = study.dropna(subset="experiment")
    study["leader"] = np.where(study.arm == "AC", "none", "actor")
    for _, run in study.drop_duplicates(KEY[:2]).iterrows():
        flags[run.environment, run.experiment] = {"leader": run.leader, "policy_lr": str(run.rate)}
    return in_order(pd.concat([runs, study.assign(family="AC")[runs.columns]]))


def write(runs, flags, folder):
    """curves.csv and flags.json."""
    curves = runs[[*KEY, "step", "return", "ratio", "cosine"]].copy()
    for name, form in (("return", "{:.7g}"), ("ratio", "{:.4g}"), ("cosine", "{:.4g}")):
        curves[name] = curves[name].map(form.format, na_action="ignore")
    curves.to_csv(folder / "curves.csv", index=False)
    kept = {"__".join(key): mine for key, mine in flags.items()}
    (folder / "flags.json").write_text(json.dumps(kept, indent=1) + "\n")


# Statistics
def iqm(*tasks, axis=-1):
    """Mean over tasks of the interquartile mean: without the best and the worst quarter of the scores, rounded down."""
    return np.mean([stats.trim_mean(scores, 0.25, axis) for scores in tasks], axis=0)


def improvement(*tasks, axis=-1):
    """P(X > Y) + P(X = Y) / 2 over all pairs of the scores X and Y of a task; mean over tasks X1, Y1, X2, Y2, …

    axis: that of the seeds. It is the last one, also where scipy says it.
    """
    shares = []
    for x, y in zip(tasks[::2], tasks[1::2]):
        difference = x[..., :, None] - y[..., None, :]
        better = np.where(difference == 0, 0.5, difference > 0)
        shares.append(better.mean((-2, -1)))
    return np.mean(shares, axis=0)


def interval(samples, statistic=iqm):
    """The 95 % bootstrap interval. Seeds are drawn within each sample; each call draws anew from the same seed."""
    options = {"method": "percentile", "n_resamples": 10_000, "rng": np.random.default_rng(0)}
    return stats.bootstrap(samples, statistic, **options).confidence_interval


def last_steps(runs):
    """The last step of each run, by experiment and seed."""
    return runs.groupby(KEY[1:], observed=True).step.max()


def score(runs, experiments):
    """The SCORES of each run, by experiment and seed, to the last step that all have come to; and this step."""
    runs = runs[runs.experiment.isin(experiments)]
    last = last_steps(runs).min()
    scores = {}
    for (experiment, seed), curve in runs.groupby(KEY[1:], observed=True):
        curve = curve[curve.step <= last]
        steps = curve.step.values
        returns = curve["return"].values
        late = steps > 0.9 * last
        if not late.any():
            stop(f"{runs.environment.iloc[0]}: {experiment}, seed {seed}, has no return shortly before step {last}")
        final = returns[late].mean()
        length = steps[-1] - steps[0]
        area = integrate.trapezoid(returns, steps) / length if length else final
        scores[experiment, seed] = final, area
    return pd.DataFrame(scores.values(), pd.MultiIndex.from_tuples(scores), SCORES), last


# Tables
def label(experiment):
    return LABELS.get(experiment, experiment)


def digits(values):
    """Decimals that leave about four digits."""
    return int(np.clip(3 - np.floor(np.log10(np.abs(values).max() + 1e-9)), 0, 3))


def number(value, places):
    return f"{value:,.{places}f}".replace("-", "−")


def span(values):
    """A number, or "lowest to highest"."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def mark(samples):
    """The number of seeds, marked where it is small."""
    seeds = [len(sample) for sample in samples]
    few = " †" if min(seeds) < FEW else ""
    return span(seeds) + few


def cell(samples, statistic, places):
    """An estimate, if there is a seed, and its interval, if there are several."""
    seeds = min(map(len, samples))
    if seeds == 0:
        return ""
    samples = [np.asarray(sample) for sample in samples]
    text = number(statistic(*samples), places)
    if seeds > 1:
        low, high = interval(samples, statistic)
        text += f" ({number(low, places)} to {number(high, places)})"
    return text


def table(rows):
    """Rows of equal keys as markdown."""
    if not rows:
        return "(none)\n"
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def scores_of(tasks, environments, experiments):
    """How a row of these tasks begins; the scores in each, scaled to 0 to 1 if there are several; their decimals."""
    scores, lasts = zip(*(score(tasks[environment], experiments) for environment in environments))
    if len(environments) == 1:
        return {"task": environments[0], "steps": span(lasts)}, scores, digits(scores[0].values)
    scaled = []
    for task in scores:
        width = (task.max() - task.min()).replace(0, 1)  # all the same: all 0
        scaled.append((task - task.min()) / width)
    return {"task": f"{len(environments)} tasks", "steps": span(lasts)}, scaled, 3


def score_row(start, scores, places, name):
    """An experiment's row; the first three are what scores_of returns."""
    samples = [task.loc[name] for task in scores]
    row = start | {"run": label(name), "seeds": mark(samples)}
    for column in SCORES:
        row[column] = cell([sample[column] for sample in samples], iqm, places)
    return row


def pair_row(start, scores, places, name, other):
    """An experiment held against another; the first three are what scores_of returns."""
    samples = [task.loc[experiment] for task in scores for experiment in (name, other)]
    gains = [(task.loc[name] - task.loc[other]).dropna() for task in scores]  # of the seeds that both have
    row = start | {"run": f"{label(name)} over {label(other)}", "seeds": mark([*samples, *gains])}
    for column in SCORES:
        row[column] = cell([sample[column] for sample in samples], improvement, 2)
    for column in SCORES:
        row[f"gain, {column}"] = cell([gain[column] for gain in gains], iqm, places)
    return row


def score_rows(tasks):
    """The scores on each task at each step where an experiment ends; over all tasks, of the experiments in each."""
    common = None
    for environment, runs in tasks.items():
        ends = last_steps(runs).groupby("experiment", observed=True).min()
        for end in sorted(set(ends)):
            names = ends.index[ends >= end]
            start = scores_of(tasks, [environment], names)
            yield from (score_row(*start, name) for name in names)
        common = [name for name in ends.index if common is None or name in common]
    if len(tasks) > 1 and len(common) > 1:
        start = scores_of(tasks, [*tasks], common)
        yield from (score_row(*start, name) for name in common)


def others(name, flags):
    """What an experiment of a task is held against.

    A Stackelberg version: the plain one with the same other flags. The actor as leader: also the critic as leader with
    these and the same lam. All: the one whose name its own extends, and PAIRS.
    """
    own = flags[name]
    rivals = {}  # their leader, and the flags that may differ
    if own["leader"] != "none":
        rivals["none"] = GAME
    if own["leader"] == "actor":
        rivals["critic"] = GAME - {"lam", "lam_decay"}
    for leader, may_differ in rivals.items():
        for other, theirs in flags.items():
            same = (own.keys() & theirs.keys()) - may_differ - {"leader"}
            if theirs["leader"] == leader and all(own[flag] == theirs[flag] for flag in same):
                yield other
                break
    yield from sorted((other for other in flags if name.startswith(f"{other}-")), key=len)[-1:]
    yield from (other for first, other in PAIRS if first == name and other in flags)


def pair_rows(tasks, flags):
    """Each pair on each task that has it, and over these tasks."""
    pairs = {}
    for environment, runs in tasks.items():
        of_task = {name: flags[environment, name] for name in runs.experiment.unique()}
        for name in of_task:
            for other in dict.fromkeys(others(name, of_task)):
                pairs.setdefault((name, other), []).append(environment)
    for pair, environments in pairs.items():
        for environment in environments:
            yield pair_row(*scores_of(tasks, [environment], pair), *pair)
        if len(environments) > 1:
            yield pair_row(*scores_of(tasks, environments, pair), *pair)


def term_rows(tasks):
    """Both terms at the end: of each run the medians in the last tenth of its steps, the lowest and the highest."""
    for environment, runs in tasks.items():
        lasts = last_steps(runs)
        ends = runs.groupby(KEY[1:], observed=True).step.transform("max")
        runs = runs[runs.step > 0.9 * ends].dropna().groupby(KEY[1:], observed=True)[["ratio", "cosine"]].median()
        for name, medians in runs.groupby("experiment", observed=True):
            low = medians.min()
            high = medians.max()
            row = {"task": environment, "steps": span(lasts[name]), "version": label(name), "seeds": mark([medians])}
            for key, title in (("ratio", "implicit / direct"), ("cosine", "cosine")):
                row[title] = f"{low[key] + 0.0:.2g} to {high[key] + 0.0:.2g}".replace("-", "−")  # 0.0: not -0
            yield row


def report(runs, flags):
    """The text of table.md."""
    scores, pairs, terms = [], [], []
    for _, of_family in runs.groupby("family"):
        tasks = dict(list(of_family.groupby("environment")))
        scores += score_rows(tasks)
        pairs += pair_rows(tasks, flags)
        terms += term_rows(tasks)
    return f"""\
Interquartile mean over seeds (without the best and the worst quarter, rounded down: of three seeds all, of five the
middle three) and its 95 % bootstrap interval. Steps: a task has a row for each step at which one of its experiments
ends, and each experiment that has come to it; no later point counts. Final score: mean of a run's returns in the last
tenth of these steps, which of stddpg.py and stsac.py can be one or two evaluations. Area under the curve: mean return
over these steps (trapezoid rule). Over tasks: the experiments made in each of them, to the last step that they have in
common there; each score scaled to 0 (the worst of these runs of the task) to 1 (the best); mean over the tasks; seeds
are drawn within each task. † fewer than {FEW} seeds: the interval is too narrow, do not rely on it.

{table(scores)}
Probability of improvement: how often a seed of the Stackelberg version beats a seed of the plain one with the same
other flags, of the critic as leader with these and the same λ, of the version whose name its own extends, or, for STAC,
of AC at a higher rate or with more critic steps, to the last step that both have come to; ties count half; 95 %
bootstrap interval. 0.5: no difference. Where every seed of one beats every seed of the other, the interval has no
width, however few the seeds. Gain: of a seed over the same seed of the other, which begins with the same weights, and
of stddpg.py and stsac.py, if both are of one commit, is evaluated on the same episodes; interquartile mean, over tasks
as above. Of so many intervals one in twenty misses its number by chance.

{table(pairs)}
Both terms of the total derivative at the end: medians over the last tenth of a run, the lowest and the highest seed.

{table(terms)}"""


# Figures
def styles(runs):
    """How seaborn draws the experiments of a family: one colour for each role, and dashes within it."""
    colours, dashes = {}, {}
    for name, leader in runs.groupby("experiment", observed=True).leader.first().items():
        colour = COLOURS["control" if label(name).startswith("control") else leader]
        dashes[name] = DASHES[[*colours.values()].count(colour) % len(DASHES)]
        colours[name] = colour
    order = [*colours]
    lines = {"hue": "experiment", "hue_order": order, "palette": colours}
    return lines | {"style": "experiment", "style_order": order, "dashes": dashes}


def band(returns):
    return interval([returns.values])


LINES = {"estimator": iqm, "errorbar": band}  # how seaborn draws returns


def draw_panel(ax, runs, style, value, how):
    """One task: a curve for each experiment, and how many seeds and steps stand behind it."""
    ends = last_steps(runs).groupby("experiment", observed=True).agg(["min", "size"])
    title = f"{span(ends['size'])} seeds, {' to '.join(map(THOUSANDS, sorted(set(ends['min']))))} steps"
    if runs.family.iloc[0] == "AC":
        title += ", noise " + " and ".join(f"{noise:g}" for noise in sorted(set(runs.noise)))
        runs = runs.assign(step=np.ceil(runs.step / AC_STEPS) * AC_STEPS)
        runs = runs.groupby([*KEY, "step"], as_index=False, observed=True)[value].mean()
    sns.lineplot(runs, x="step", y=value, ax=ax, legend=False, lw=1.2, **how, **style)
    ax.set_title(f"{runs.environment.iloc[0]}\n{title}", fontsize=9)
    ax.xaxis.set_major_formatter(THOUSANDS)
    lowest, low, highest = np.percentile(runs[value], [0, 5, 100])
    far_below = low - lowest > highest - low  # a start that would flatten the rest
    if far_below and ax.get_yscale() == "linear":  # the logarithmic panels share their axis
        ax.set_ylim(bottom=low)


def draw(runs, path, value, name, how, scale="linear"):
    """A column of `runs` in the paper's panels, Figure 3, and further ones for other tasks; below: what the lines are.

    how: the estimate and the band of seaborn's lines.
    """
    tasks = {}
    for family, (_, _, names) in FAMILIES.items():
        tasks[family] = [*dict.fromkeys([*names.split(), *runs.environment[runs.family == family]])]
    columns = max(map(len, tasks.values()))
    together = {"sharey": scale == "log", "layout": "constrained"}  # sizes are compared, returns of tasks are not
    figure, grid = plt.subplots(len(tasks), columns, figsize=(2.75 * columns, 9), **together)
    legend = []
    for axes, family in zip(grid, tasks):
        of_family = runs[runs.family == family]
        style = styles(of_family)
        of_family = of_family.dropna(subset=value)
        for ax, task in zip(axes, tasks[family]):
            ax.set_yscale(scale)
            if task in set(of_family.environment):
                draw_panel(ax, of_family[of_family.environment == task], style, value, how)
            else:
                ax.text(0.5, 0.5, "no data", ha="center", transform=ax.transAxes, color="grey")
                ax.set_title(task, fontsize=9)
                ax.set_xticks([])
                if scale == "linear":  # else the ticks are those of all panels
                    ax.set_yticks([])
            ax.set(xlabel="", ylabel="")
        for ax in axes[len(tasks[family]) :]:
            ax.set_axis_off()
        axes[0].set_ylabel(f"{family}: {name}")
        for line, colour in style["palette"].items():
            if line in set(of_family.experiment):
                dashes = style["dashes"][line] or (1, 0)
                legend.append(plt.Line2D([], [], color=colour, dashes=dashes, label=label(line)))
        legend += [plt.Line2D([], [], alpha=0, label=" ")] * (-len(legend) % LEGEND_ROWS)  # a new column
    first = grid[0, 0]  # logarithmic panels share its axis
    if scale == "log" and first.get_ylim()[0] < ROUNDING:  # the terms of a policy that is at its bounds everywhere
        first.set_ylim(bottom=ROUNDING)
    for ax in grid[-1]:
        ax.set_xlabel("environment steps")
    figure.legend(
        handles=legend, ncols=len(legend) // LEGEND_ROWS, loc="outside lower center", frameon=False, fontsize=8
    )
    sns.despine(figure)
    figure.savefig(path, dpi=150)


def main():
    args = tyro.cli(Args, description=__doc__)
    curves, flags = {}, {}
    if args.add and (args.out / "curves.csv").exists():
        curves, flags = read_csv(args.out)
    read(args.folders, curves, flags)
    if not curves:
        stop(f"no finished run in {', '.join(map(str, args.folders))}")
    runs = pd.concat(curves.values(), ignore_index=True)
    run_flags = [flags[key] for key in zip(runs.environment, runs.experiment)]
    runs["family"] = [family_of(own) for own in run_flags]
    runs["leader"] = [own["leader"] for own in run_flags]
    runs["noise"] = [float(own.get("grad_noise", 0)) for own in run_flags]
    runs = in_order(runs)
    args.out.mkdir(parents=True, exist_ok=True)
    write(runs, flags, args.out)
    if (args.out / "stac_ac_rates.csv").exists():  # only now: it stays out of curves.csv
        runs = with_study(runs, flags, args.out / "stac_ac_rates.csv")
    text = report(runs, flags)
    (args.out / "table.md").write_text(text)
    print(text)
    draw(runs, args.out / "figure3.png", "return", "return", LINES)
    if runs.ratio.notna().any():
        middle = {"estimator": "median", "errorbar": ("pi", 100)}
        draw(runs, args.out / "terms.png", "ratio", "|implicit| / |direct|", middle, "log")
    note(f"{len(curves)} runs; wrote to {args.out}")


if __name__ == "__main__":
    main()
