"""STAC against AC, each at its best step size: tables and figures of the study in stac_ac_rates.csv.

    python benchmark/rates.py

For five batches each of every run, the CSV has the mean return, and medians of |implicit| / |direct| and of the cosine.
The commands are in results/README.md. Beside it are written

- stac_ac_rates.md, also printed: the score of each arm at each rate, and the comparison at the best one;
- stac_ac_rates.png: score against rate, learning curves at the best rate, and the size of the implicit term;
  stac_ac_curves.png: the same of the tasks on which an arm has one rate only. Scores are interquartile means.

An arm's best rate is that of the largest mean area under the curve over the seeds up to 10. The seeds from 11 on are
compared, which had no part in the choice. An arm that had no choice is compared with all its seeds.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import plot
import seaborn as sns

CHOOSING = 10  # the last seed that chooses the rate
ARMS = [
    "AC",
    "STAC, every",
    "STAC, initial",
    "STAC, released",
    "STAC, every, Gauss–Newton",
    "STAC, released, Gauss–Newton",
    "control: STAC, every, as long as AC",
]
RUN = ["title", "arm", "rate", "seed"]


def read(path):
    """The CSV, and a table of its runs with their scores. A title is a task with m and noise."""
    rows = pd.read_csv(path)
    rows["arm"] = rows.arm.str.replace("batch", "released")  # what it was called then
    unknown = set(rows.arm) - set(ARMS)
    if unknown:
        raise SystemExit(f"rates.py: error: {path} has unknown arms: {', '.join(sorted(unknown))}")
    rows["arm"] = pd.Categorical(rows.arm, ARMS)
    rows["title"] = rows.environment + ", m = " + rows.m.astype(str)
    rows.loc[rows.noise > 0, "title"] += ", noise " + rows.noise.astype(str)
    last = rows.step > 0.9 * rows.groupby("title").step.transform("max")
    runs = rows.groupby(RUN, observed=True, sort=False)
    runs = runs.agg(area=("return", "mean"), ratio=("ratio", "median"), cosine=("cosine", "median"))
    runs["final"] = rows[last].groupby(RUN, observed=True)["return"].mean()
    return rows, runs.reset_index().sort_values(["arm", "rate", "seed"])


def best(runs):
    """An arm's best rate, the runs that are compared there, and a mark of what is wrong with them."""
    rates = runs[runs.seed <= CHOOSING].groupby("rate").area.mean()
    if runs.rate.nunique() == 1:
        return runs.rate.iloc[0], runs, ""
    rate = rates.idxmax()
    wrong = " ‡" if rate in (rates.index.min(), rates.index.max()) else ""
    runs = runs[runs.rate == rate]
    others = runs[runs.seed > CHOOSING]
    return (rate, runs, wrong + " §") if others.empty else (rate, others, wrong)


def by_arm(runs):
    return runs.groupby("arm", observed=True)


def rate_rows(runs):
    runs = runs[runs.seed <= CHOOSING]
    runs = runs[runs.groupby(["title", "arm"], observed=True).rate.transform("nunique") > 1]
    for title, task in runs.groupby("title", sort=False):
        for name, mine in by_arm(task):
            seeds = mine.groupby("rate").size().max()
            row = {"task": title, "run": name, "seeds": seeds} | dict.fromkeys(sorted(runs.rate.unique()), "")
            for rate, part in mine.groupby("rate"):
                places = max(0, plot.digits(task.area) - 1)
                mean, low, high = (plot.number(value, places) for value in part.area.agg(["mean", "min", "max"]))
                row[rate] = f"{mean} ({low} to {high})"
                if len(part) < seeds:
                    row[rate] += f" ({plot.mark([part])})"
            row[best(mine)[0]] = f"**{row[best(mine)[0]]}**"
            yield row


def comparison_rows(runs):
    for title, task in runs.groupby("title", sort=False):
        arms = {name: best(mine) for name, mine in by_arm(task)}
        places = plot.digits(pd.concat(mine for _, mine, _ in arms.values())[["final", "area"]].values)
        for name, (rate, mine, wrong) in arms.items():
            row = {"task": title, "run": name, "rate": f"{rate:g}{wrong}", "seeds": plot.mark([mine])}
            for score, title_of_score in (("final", "final score"), ("area", "area under the curve")):
                row[title_of_score] = plot.cell([mine[score].values], plot.iqm, places)
            for score, title_of_score in (("final", "better than AC at the end"), ("area", "in the area")):
                pair = [mine[score].values, arms["AC"][1][score].values]
                row[title_of_score] = plot.cell(pair, plot.improvement, 2) if name != "AC" else ""
            for term, title_of_term in (("ratio", "implicit / direct"), ("cosine", "cosine")):
                row[title_of_term] = f"{mine[term].min():.3g} to {mine[term].max():.3g}" if name != "AC" else ""
            yield row


def doubled_rows(runs):
    for title, task in runs[runs.seed <= CHOOSING].groupby("title", sort=False):
        areas = dict(iter(task.groupby(["arm", "rate"], observed=True).area))
        for name in ("STAC, released", "STAC, released, Gauss–Newton"):
            rates = [rate for arm, rate in areas if arm == name and ("AC", 2 * rate) in areas]
            if rates:
                pairs = [areas[key].values for rate in rates for key in ((name, rate), ("AC", 2 * rate))]
                row = {"task": title, "run": name, "seeds each": plot.mark(pairs)}
                row["pairs of rates"] = ", ".join(f"{rate:g}/{2 * rate:g}" for rate in rates)
                yield row | {"better in the area": plot.cell(pairs, plot.improvement, 2)}


def report(runs):
    return f"""\
Area under the curve (mean return of the batches) at each learning rate of the actor; mean, lowest and highest of the
seeds up to {CHOOSING}. **Bold**: the best.

{plot.table([*rate_rows(runs)])}
At each arm's best rate, with other seeds where there was a choice: interquartile mean and 95 % bootstrap interval.
Final score: mean of the batches in the last tenth. Better than AC: how often a seed beats one of AC at AC's best rate,
0.5 is no difference. Last two columns: medians over a run's batches, from the lowest to the highest seed. † few seeds;
‡ the best rate is an end of those that were tried; § the seeds that chose are the ones compared, so the score is too
high.

{plot.table([*comparison_rows(runs)])}
STAC as released against AC at twice its rate, seeds up to {CHOOSING}: how often a seed of it beats one of AC, mean over
the rates.

{plot.table([*doubled_rows(runs)])}"""


def draw(rows, runs, path):
    """A column for each title: score against rate, curves at the best rate, size of the implicit term."""
    titles = runs.title.unique()
    figure, grid = plt.subplots(3, len(titles), figsize=(1 + 3.2 * len(titles), 9), layout="constrained", squeeze=False)
    style = {"hue": "arm", "palette": dict(zip(ARMS, sns.color_palette("tab10")))}
    for (top, middle, bottom), title in zip(grid.T, titles):
        task = runs[runs.title == title]
        curves = rows.merge(pd.concat(best(mine)[1] for _, mine in by_arm(task))[RUN])
        areas = task[task.seed <= CHOOSING]
        bars = {"err_style": "bars", "marker": "o", **plot.LINES}
        sns.lineplot(areas, x="rate", y="area", ax=top, legend=False, **bars, **style)
        sns.lineplot(curves, x="step", y="return", ax=middle, legend=False, **plot.LINES, **style)
        sns.lineplot(curves, x="step", y="ratio", estimator="median", errorbar=None, ax=bottom, legend=False, **style)
        top.set(title=title, xscale="log", xlabel="actor's learning rate", ylabel="area under the curve")
        middle.set(xlabel="environment steps", ylabel="return of the batch")
        bottom.set(xlabel="environment steps", ylabel="|implicit| / |direct|")
        bottom.set_yscale("log", nonpositive="mask")  # a solve that ends at once has no implicit term
        for ax in (middle, bottom):
            ax.xaxis.set_major_formatter(plot.THOUSANDS)
    lines = [plt.Line2D([], [], color=style["palette"][name], label=name) for name, _ in by_arm(runs)]
    figure.legend(handles=lines, ncols=3, loc="outside lower center", frameon=False)
    sns.despine(figure)
    figure.savefig(path, dpi=130)


def main():
    folder = Path(sys.argv[1] if sys.argv[1:] else Path(__file__).parent / "results")
    rows, runs = read(folder / "stac_ac_rates.csv")
    text = report(runs)
    (folder / "stac_ac_rates.md").write_text(text)
    print(text)
    rates = runs.groupby(["title", "arm"], observed=True).rate.nunique().groupby("title")
    for name, titles in (("rates", rates.min() > 1), ("curves", (rates.min() == 1) & (rates.size() > 1))):
        if titles.any():
            draw(rows, runs[runs.title.map(titles)], folder / f"stac_ac_{name}.png")


if __name__ == "__main__":
    main()
