"""Plots the loss from the trainer's log."""

from pathlib import Path


def plot_loss(log_history: list[dict], path: Path) -> bool:
    """Plot the loss of training and evaluation over the steps. Returns False if the log has no loss.

    Args:
        log_history: the trainer's entries, {"step": …, "loss": …} or {"step": …, "eval_loss": …}.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    if not axes.lines:
        return False
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return True
