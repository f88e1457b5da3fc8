"""The results of `evaluate`, as a table, a plot and JSON."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_bebop.durable import write_json
from vllm_bebop.train.evaluate import RULES

_LABELS = {"rejection_sampling": "rejection sampling", "target_only": "target-only"}
_COLOURS = {"rejection_sampling": "#2166ac", "target_only": "#5aae61"}


def write_report(results: Mapping[str, Any], path: Path) -> None:
    """JSON at `path`, and the plot beside it as PNG; both atomically: a reader sees the old file or the new one."""
    write_json(path, results)
    plot_evaluation(results, path.with_suffix(".png"))


def table(results: Mapping[str, Any]) -> str:
    """The results in a few lines."""
    sections = dict(results["domains"])
    if len(sections) > 1:
        sections["all"] = results["all"]
    width = max(len("domain"), *map(len, sections))
    header = f"{'domain':<{width}} {'chains':>8} {'entropy':>8}  {'rejection sampling':<24}{'target-only':<24}"
    lines = [header + "alpha by step"]
    for name, section in sections.items():
        lengths = "".join(f"{_with_interval(section['acceptance_length'][rule]):<24}" for rule in RULES)
        alphas = " ".join(f"{value:.3f}" for value in section["by_step"]["rejection_sampling"]["mean"])
        entropy = section["by_step"]["target_entropy"]["mean"][0]
        lines.append(f"{name:<{width}} {section['num_chains']:>8} {entropy:>8.3f}  {lengths}{alphas}")
    lines += ["", "Acceptance lengths: accepted drafts + 1 per round, 95 % interval over prompts. Entropy in nats."]
    wins = results["all"]["by_step"]["rejection_sampling_wins"]["mean"]
    share = sum(wins) / len(wins)
    lines.append(f"Rejection sampling accepts more than target-only at {share:.1%} of the positions (Eq. 48).")
    if outside := results["all"]["tokens_outside_policy"]["mean"]:
        lines.append(
            f"The policy cannot sample {outside:.2%} of the text's tokens: the text is not its own, and an engine "
            "will accept otherwise."
        )
    return "\n".join(lines)


def _with_interval(value: Mapping[str, Any]) -> str:
    interval = value["interval_95"]
    return f"{value['mean']:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def plot_evaluation(results: Mapping[str, Any], path: Path) -> None:
    """Chance of acceptance by entropy of the target, and acceptance length by output position, of all domains."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_entropy, by_position) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")  # inches
    section = results["all"]
    for rule in RULES:
        _draw(by_entropy, section["by_entropy"]["edges"], section["by_entropy"][rule], rule)
        _draw(by_position, section["by_position"]["edges"], section["by_position"]["acceptance_length"][rule], rule)
    by_entropy.set(xlabel="entropy of the target (nats)", ylabel="chance that a draft is accepted", ylim=(0, 1.02))
    by_position.set(xlabel="output position (tokens)", ylabel="acceptance length\n(accepted drafts + 1)")
    by_position.set_ylim(1, results["num_steps"] + 1)
    for axis in (by_entropy, by_position):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    by_entropy.legend(frameon=False)
    policy = ", ".join(f"{key} {value}" for key, value in results["policy"].items() if value is not None)
    figure.supxlabel(
        f"{section['num_documents']} documents, {section['num_chains']} positions, {results['num_steps']} draft "
        f"tokens, {policy}; bars: 95 % bootstrap over documents",
        fontsize=8,
        color="#444444",
    )
    temporary = path.with_name(path.name + ".new")
    figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
    os.replace(temporary, path)


def _draw(axis: Any, edges: list[float | None], value: Mapping[str, Any], rule: str) -> None:
    """A point per bin that holds anything, bins evenly spaced."""
    bins = [index for index, mean in enumerate(value["mean"]) if mean is not None]
    means = [value["mean"][index] for index in bins]
    intervals = [value["interval_95"][index] or (mean, mean) for index, mean in zip(bins, means, strict=True)]
    errors = [[mean - low for mean, (low, _) in zip(means, intervals, strict=True)]]
    errors.append([high - mean for mean, (_, high) in zip(means, intervals, strict=True)])
    errors = [[max(0.0, error) for error in side] for side in errors]  # rounding
    axis.errorbar(bins, means, errors, label=_LABELS[rule], color=_COLOURS[rule], marker=".", elinewidth=1)
    names = [
        f"{edges[index]:g}+" if edges[index + 1] is None else f"{edges[index]:g}\u2013{edges[index + 1]:g}"
        for index in bins
    ]
    axis.set_xticks(bins, names, rotation=40, ha="right", fontsize=8)
