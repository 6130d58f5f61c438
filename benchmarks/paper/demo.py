# SPDX-License-Identifier: MIT
"""What LPSGD and LPSGDM do, in two pictures and a table: `make demo`.

The paper's quadratics (`quadratics`) and a small network on real data (`digits`). Writes
quadratics.png, digits.png and digits.json.
"""

import argparse
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper import digits, quadratics

COLORS = {
    "SGD": "#999999",
    "SGDM": "#0072B2",
    "AdamW": "#E69F00",
    "LPSGD 6→2": "#56B4E9",
    "LPSGDM 6→2": "#009E73",
    "LPSGDM p=6": "#CC79A7",
    "LPSGDM p=∞": "#D55E00",
}
CAVEAT = (
    "The schedule of p is also a decay of the step: |u| is about 1 for large p and about |m| for\n"
    "p = 2. So compare within each panel: under a cosine learning rate the advantage goes."
)


def spread(values: list[float]) -> float:
    """The standard deviation over seeds, 0 for one seed."""
    return stdev(values) if len(values) > 1 else 0.0


def table(study: digits.Study, lr_schedule: str) -> str:
    """One line per method: accuracy, loss, the chosen learning rate, the time."""
    lines = [
        f"Digits, {lr_schedule} learning rate",
        f"{'optimizer':<12} {'test accuracy, %':>18} {'training loss':>14} {'lr':>8} "
        f"{'seconds':>8}",
    ]
    for result in study.results:
        run = result.final
        if run.trial.lr_schedule != lr_schedule:
            continue
        accuracy = [100 * value for value in run.held_out_accuracy]
        edge = " (the grid's edge)" if result.at_edge else ""
        lines.append(
            f"{run.trial.method:<12} {fmean(accuracy):>11.1f} ± {spread(accuracy):<4.1f} "
            f"{fmean(run.train_loss):>14.4f} {run.trial.lr:>8g} {run.seconds:>8.1f}{edge}"
        )
    return "\n".join(lines)


def draw_losses(ax: Axes, study: digits.Study, lr_schedule: str) -> None:
    """Training loss over epochs: the mean of the seeds, and a band of their range."""
    for result in study.results:
        run = result.final
        if run.trial.lr_schedule != lr_schedule:
            continue
        epochs = range(1, len(run.epoch_losses) + 1)
        color = COLORS[run.trial.method]
        accuracy = 100 * fmean(run.held_out_accuracy)
        text = f"{run.trial.method}, lr {run.trial.lr:g}: {accuracy:.1f} %"
        means = [fmean(losses) for losses in run.epoch_losses]
        ax.semilogy(epochs, means, color=color, label=text)
        least = [min(losses) for losses in run.epoch_losses]
        greatest = [max(losses) for losses in run.epoch_losses]
        ax.fill_between(epochs, least, greatest, color=color, alpha=0.12, linewidth=0)
    ax.set(xlabel="epoch", ylabel="training loss", title=f"{lr_schedule} learning rate")
    ax.legend(
        title="test accuracy, mean over seeds",
        fontsize=8,
        title_fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=2,
        frameon=False,
    )
    ax.grid(alpha=0.3)


def draw_digits(study: digits.Study) -> Figure:
    """Loss curves for both learning-rate schedules, and p over time."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.6))
    draw_losses(left, study, "constant")
    draw_losses(middle, study, "cosine")
    middle.sharey(left)
    for result in study.results:
        run = result.final
        if run.trial.lr_schedule == "constant" and run.trial.method == "LPSGDM 6→2":
            right.plot(range(1, len(run.p) + 1), run.p, color=COLORS[run.trial.method], marker=".")
    right.set(xlabel="epoch", ylabel="p", title="p of 6→2")
    right.grid(alpha=0.3)
    seeds = len(study.results[0].final.trial.settings.seeds)
    figure.suptitle(
        "scikit-learn digits, MLP 6x64 without normalisation, "
        f"mean and range of {seeds} seeds\n{CAVEAT}",
        fontsize=11,
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/demo"))
    parser.add_argument("--quick", action="store_true", help="a few seconds' worth, for tests")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    figure, final = quadratics.run()
    figure.savefig(args.output / "quadratics.png", dpi=90)
    for problem, losses in final.items():
        print(f"{problem}, loss after the last step")
        for method, loss in losses.items():
            print(f"  {method:<18} {loss:.1e}")
    print()

    study = digits.study(digits.QUICK if args.quick else digits.Settings(), args.jobs)
    draw_digits(study).savefig(args.output / "digits.png", dpi=90)
    for lr_schedule in digits.LR_SCHEDULES:
        print(f"\n{table(study, lr_schedule)}")
    print(f"\n{CAVEAT}\n")
    print(f"{study.seconds:.0f} s of training, the search for learning rates included.")
    records = [asdict(result) for result in study.results]
    text = json.dumps({"results": records, "seconds": study.seconds}, default=str)
    (args.output / "digits.json").write_text(text.replace(str(math.inf), '"inf"'))
    print(f"Pictures and figures: {args.output}")


if __name__ == "__main__":
    main()
