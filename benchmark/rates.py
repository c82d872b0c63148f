"""STAC against AC, each at its best step size: the study that stac_ac.sh makes with ARMS, RATES and UNROLLS.

    python benchmark/rates.py runs --out benchmark/results

reads the finished runs of experiments named ARM-lrRATE-mM (ARM-mM: rate 0.1) and writes

- stac_ac_rates.csv: for five batches each of every run the mean return, and medians of |implicit| / |direct| and of the
  cosine. Runs of an earlier CSV that are not in the folders stay.
- stac_ac_rates.md, also printed: the score of each arm at each rate, and the comparison at the best one.
- stac_ac_rates.png: score against rate, learning curves at the best rate, and the size of the implicit term.

An arm's best rate is that of the largest area under the curve, interquartile mean over the seeds up to 10. The seeds
from 11 on are compared, which had no part in the choice; where there are none (one rate, no choice), those that there
are.
"""

import csv
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from plot import cell, digits, final_score, improvement_interval, iqm, iqm_interval, mark, mean_interval, stop, table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BATCHES = 5  # in a row of the CSV
FIRST_COMPARED = 11  # the first seed that is compared, not chosen by
COLUMNS = ["environment", "arm", "m", "rate", "seed", "step", "return", "ratio", "cosine"]
ARMS = {
    "ac": ("AC", "#1f5fa8"),
    "stac-al": ("STAC, every", "#b8171c"),
    "stac-al-initial": ("STAC, initial", "#e08a1e"),
    "stac-al-batch": ("STAC, batch", "#3a9a44"),
    "stac-al-gn": ("STAC, every, Gauss–Newton", "#8458b3"),
}


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    """folders of run folders"""
    out: Path = Path("benchmark/results")
    """the folder to write to"""


# Runs. A run's key: (environment, arm, m, rate, seed); its value: [T, 4], step, return, ratio, cosine
def read_run(folder):
    """Key and values of a finished run of the study; None for another."""
    environment, experiment, seed, _ = folder.name.rsplit("__", 3)
    name = re.fullmatch(r"(.+?)(?:-lr([\d.]+))?-m(\d+)", experiment)
    if not name or name[1] not in ARMS or not (folder / "model.pt").exists():
        return None
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # critical: 0 is all of them
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("charts/batch_return")]
    terms = np.full((len(points), 3), np.nan)
    for column, tag in enumerate(("implicit_norm", "direct_norm", "cosine")):
        if f"stackelberg/{tag}" in events.Tags()["scalars"]:
            found = {event.step: event.value for event in events.Scalars(f"stackelberg/{tag}")}
            terms[:, column] = [found[step] for step, _ in points]
    ratio = terms[:, 0] / np.maximum(terms[:, 1], np.finfo(np.float32).tiny)  # a policy that has died has no gradient
    values = np.column_stack([points, ratio, terms[:, 2]])
    values = values[: len(values) // BATCHES * BATCHES].reshape(-1, BATCHES, 4)
    rows = [values[:, -1, 0], values[:, :, 1].mean(1), *np.median(values[:, :, 2:], 1).T]
    return (environment, name[1], int(name[3]), float(name[2] or 0.1), int(seed)), np.column_stack(rows)


def read_csv(path):
    rows = defaultdict(list)
    with open(path, newline="") as file:
        for environment, arm, m, rate, seed, *values in list(csv.reader(file))[1:]:
            rows[environment, arm, int(m), float(rate), int(seed)].append([float(x or "nan") for x in values])
    return {key: np.array(values) for key, values in rows.items()}


def write_csv(runs, path):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for key in sorted(runs):
            for step, *values in runs[key]:
                writer.writerow([*key, int(step), *("" if np.isnan(x) else f"{x:.4g}" for x in values)])


def panels_of(runs):
    """{(environment, m): {arm: {rate: {seed: [T, 4]}}}}, in the order of ARMS."""
    panels = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for key in sorted(runs, key=lambda key: (key[0], key[2], list(ARMS).index(key[1]), *key)):
        environment, arm, m, rate, seed = key
        panels[environment, m][arm][rate][seed] = runs[key]
    return panels


def chosen(seeds):
    """A rate's runs that the best one is chosen by."""
    return [run for seed, run in seeds.items() if seed < FIRST_COMPARED]


def area(runs):
    """Area under the curve of each run, divided by its length in steps: the mean return of its batches."""
    return np.array([run[:, 1].mean() for run in runs])


def best(rates):
    """An arm's best rate, and its runs that are compared."""
    rate = max(rates, key=lambda rate: iqm(area(chosen(rates[rate]) or rates[rate].values())))
    compared = [run for seed, run in rates[rate].items() if seed >= FIRST_COMPARED]
    return rate, compared or chosen(rates[rate])


# Tables
def returns_of(runs):
    """[runs, T]"""
    return np.array([run[:, 1] for run in runs])


def rate_rows(panels):
    rng = np.random.default_rng(0)
    everything = sorted({rate for panel in panels.values() for rates in panel.values() for rate in rates})
    yield ["task", "run", *everything]
    for (environment, m), panel in panels.items():
        for arm, rates in panel.items():
            if len(rates) == 1:
                continue
            cells, (top, _) = [], best(rates)
            for rate in everything:
                runs = chosen(rates.get(rate, {}))
                text = cell(iqm_interval([area(runs)], rng), len(runs), 0) if runs else ""
                cells.append(f"**{text}**" if rate == top else text)
            yield [f"{environment}, m = {m}", ARMS[arm][0], *cells]


def comparison_rows(panels):
    rng = np.random.default_rng(0)
    head = "task, run, rate, seeds, final score, area under the curve, better than AC at the end, in the area"
    yield [*head.split(", "), "implicit / direct", "cosine"]
    for (environment, m), panel in panels.items():
        compared = {arm: best(rates) for arm, rates in panel.items()}
        scores = {
            arm: (final_score(runs[0][:, 0], returns_of(runs)), area(runs)) for arm, (_, runs) in compared.items()
        }
        places = digits(np.concatenate([x for both in scores.values() for x in both]))
        for arm, (rate, runs) in compared.items():
            cells = [cell(iqm_interval([x], rng), len(runs), places) for x in scores[arm]]
            for mine, plain in zip(scores[arm], scores["ac"]) if arm != "ac" and "ac" in scores else []:
                cells.append(cell(improvement_interval([(mine, plain)], rng), len(runs), 2))
            terms = np.array([np.median(run[:, 2:], 0) for run in runs])
            sizes = [f"{low:.2g} to {high:.2g}" for low, high in zip(terms.min(0), terms.max(0)) if not np.isnan(low)]
            cells += [""] * (4 - len(cells)) + sizes + [""] * (2 - len(sizes))
            yield [f"{environment}, m = {m}", ARMS[arm][0], rate, mark([len(runs)]), *cells]


def report(panels):
    rates, comparison = (list(rows(panels)) for rows in (rate_rows, comparison_rows))
    return f"""Area under the curve (mean return of the batches) at each rate of the actor; interquartile mean and its
95 % bootstrap interval over the seeds up to {FIRST_COMPARED - 1}; **bold**: the best.

{table(rates[0], rates[1:])}
At each arm's best rate, with other seeds where there was a choice. Final score: mean of the batches in the last tenth.
Better than AC: how often a seed beats one of AC at AC's best rate, 0.5 is no difference. Last two columns: medians over
a run's batches, from the lowest to the highest seed.

{table(comparison[0], comparison[1:])}"""


# Figure
def draw(panels, path):
    """A column for each task and m; score against rate, curves at the best rate, size of the implicit term."""
    rng, columns = np.random.default_rng(0), len(panels)
    figure, axes = plt.subplots(3, columns, figsize=(1 + 3.2 * columns, 8.5), layout="constrained", squeeze=False)
    for (top, middle, bottom), ((environment, m), panel) in zip(axes.T, panels.items()):
        top.set_title(f"{environment}, m = {m}")
        top.set_axis_off() if max(map(len, panel.values())) == 1 else None
        for arm, rates in panel.items():
            label, colour = ARMS[arm]
            scores = {rate: iqm_interval([area(chosen(seeds))], rng) for rate, seeds in rates.items() if chosen(seeds)}
            if len(scores) > 1:
                value, bounds = (np.array(x) for x in zip(*scores.values()))
                low, high = bounds.T
                top.errorbar([*scores], value, [value - low, high - value], color=colour, marker="o", ms=3, capsize=2)
            rate, runs = best(rates)
            steps, returns = runs[0][:, 0], returns_of(runs)
            middle.plot(steps, returns.mean(0), color=colour, label=f"{label}" + f", {rate:g}" * (len(rates) > 1))
            middle.fill_between(steps, *mean_interval(returns, rng), color=colour, alpha=0.18, lw=0)
            if not np.isnan(runs[0][0, 2]):
                bottom.plot(steps, np.median([run[:, 2] for run in runs], 0), color=colour)
        top.set(xscale="log", xlabel="actor's learning rate", ylabel="area under the curve")
        middle.set(xlabel="environment steps", ylabel="return of the batch")
        middle.legend(fontsize=7, frameon=False)
        bottom.set(xlabel="environment steps", ylabel="|implicit| / |direct|", yscale="log")
        bottom.set_ylim(bottom=max(bottom.get_ylim()[0], 1e-3))
        for ax in (top, middle, bottom):
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(alpha=0.25)
        for ax in (middle, bottom):
            ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main():
    args = tyro.cli(Args, description=__doc__)
    path = args.out / "stac_ac_rates.csv"
    runs = read_csv(path) if path.exists() else {}
    folders = sorted(file.parent for folder in args.folders for file in folder.glob("*__*/model.pt"))
    runs |= dict(found for folder in folders if (found := read_run(folder)))
    if not runs:
        stop(f"no finished run of the study in {', '.join(map(str, args.folders))}")
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(runs, path)
    runs = read_csv(path)  # as the CSV has it: the same tables come of the CSV alone
    text = report(panels_of(runs))
    (args.out / "stac_ac_rates.md").write_text(text)
    draw(panels_of(runs), args.out / "stac_ac_rates.png")
    print(text)


if __name__ == "__main__":
    main()
