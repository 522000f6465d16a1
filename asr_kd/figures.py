"""Figures of the report: matplotlib, as SVG text that takes its colours from the page (light, dark or print)."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

SYSTEMS = ("baseline", "ensemble", "distilled", "control")
NAMES = {"baseline": "Single network", "ensemble": "Ensemble", "distilled": "Distilled student", "control": "Control (hard targets)"}

# colours that no figure uses as such: each is replaced by a variable of the page's style sheet
INK, MUTED, GRID, PAPER = "#010101", "#010102", "#010103", "#010104"
COLOURS = {"baseline": "#010105", "ensemble": "#010106", "distilled": "#010107", "control": "#010108"}
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {colour: system for system, colour in COLOURS.items()}
_MARKERS = {"baseline": "o", "ensemble": "D", "distilled": "s", "control": "^"}
_STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "text.color": INK, "figure.facecolor": "none", "lines.linewidth": 1.8,
    "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelcolor": MUTED, "axes.labelsize": 8.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GRID, "axes.linewidth": 0.8, "axes.facecolor": "none",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 8.5,
    "xtick.color": GRID, "xtick.labelcolor": MUTED, "xtick.labelsize": 8, "xtick.major.size": 0,
    "ytick.color": GRID, "ytick.labelcolor": INK, "ytick.labelsize": 8.5, "ytick.major.size": 0}
_WIDTH_INCHES = 9.4
MAX_SPEAKERS = 40  # that a figure shows


def systems_figure(split: Mapping[str, Any]) -> str:
    """Frame accuracy and WER of every system side by side; members as rings, 95 % intervals as bars."""
    rows = [system for system in SYSTEMS if system in split]
    measures = [measure for measure in ("frame_accuracy", "wer") if any(measure in split[system] for system in rows)]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(len(measures), 0.42 * len(rows) + 1.0, sharey=True)
        for axis, measure in zip(axes, measures, strict=True):
            for y, system in enumerate(rows):
                _draw_system(axis, y, system, split, measure)
            axis.set_yticks(range(len(rows)), [NAMES[system] for system in rows])
            axis.set_ylim(len(rows) - 0.5, -0.5)
            axis.margins(x=0.12)
            axis.grid(visible=False, axis="y")
            axis.set_title("Frame accuracy, %   (right is better)" if measure == "frame_accuracy" else "Word error rate, %   (left is better)")
        return _svg(figure, "systems")


def _draw_system(axis: Axes, y: int, system: str, split: Mapping[str, Any], measure: str) -> None:
    row = split[system]
    if measure not in row:
        return
    colour = COLOURS[system]
    if f"{measure}_ci95" in row:
        low, high = row[f"{measure}_ci95"]
        axis.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=5, alpha=0.28, solid_capstyle="round")
    if system == "baseline":
        values = [100 * member[measure] for member in split.get("members", []) if measure in member]
        axis.plot(values, [y] * len(values), "o", markersize=5, markerfacecolor="none", markeredgecolor=colour, alpha=0.7)
    axis.plot([100 * row[measure]], [y], _MARKERS[system], color=colour, markersize=8, markeredgecolor=PAPER)
    axis.annotate(f"{100 * row[measure]:.{2 if measure == 'frame_accuracy' else 1}f}", (100 * row[measure], y), (0, 8), textcoords="offset points",
                  ha="center", fontsize=8)


def curves_figure(curves: Mapping[str, Mapping[str, Any]]) -> str:
    """Held-out (solid) and training (dotted) frame accuracy against epochs; teachers as their mean within the range of members."""
    with matplotlib.rc_context(_STYLE):
        figure, (axis,) = _panels(1, 3.3)
        for name, system in (("teachers", "baseline"), ("control", "control"), ("distilled", "distilled")):
            if name in curves:
                _draw_curve(axis, curves[name], system, "Teachers (mean and range)" if name == "teachers" else NAMES[system])
        axis.plot([], [], ":", color=MUTED, label="on the training data")
        axis.set_xlabel("epochs over the training data")
        axis.set_ylabel("frame accuracy, %")
        figure.legend(loc="outside upper center", ncols=4)
        return _svg(figure, "curves")


def _draw_curve(axis: Axes, curve: Mapping[str, Any], system: str, label: str) -> None:
    """One network's or several members' curve; a member that diverged has None from there on."""
    for measure, line in (("frame_accuracy", "-"), ("train_frame_accuracy", ":")):
        evaluations = [[100 * value for value in members if value is not None] for members in curve.get(measure, [])]
        points = [(epoch, values) for epoch, values in zip(curve.get("epoch", []), evaluations, strict=False) if values]
        if not points:
            continue
        epochs = [epoch for epoch, _ in points]
        held_out = line == "-"
        axis.plot(epochs, [sum(values) / len(values) for _, values in points], line, color=COLOURS[system], label=label if held_out else None,
                  marker=_MARKERS[system] if held_out and len(points) <= 40 else None, markersize=5, markeredgecolor=PAPER)
        if held_out and any(len(values) > 1 for _, values in points):
            axis.fill_between(epochs, [min(values) for _, values in points], [max(values) for _, values in points], color=COLOURS[system], alpha=0.22,
                              linewidth=0)


def sweep_figure(rows: Sequence[Mapping[str, Any]], references: Mapping[str, Any]) -> str:
    """Student against temperature; `references` (baseline and ensemble rows of the same split) as horizontal lines."""
    measures = [measure for measure in ("frame_accuracy", "wer") if any(measure in row for row in rows)]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(len(measures), 2.8)
        for axis, measure in zip(axes, measures, strict=True):
            there = sorted((row["temperature"], 100 * row[measure]) for row in rows if measure in row)
            axis.plot([t for t, _ in there], [value for _, value in there], "-s", color=COLOURS["distilled"], markeredgecolor=PAPER, label=NAMES["distilled"])
            for system in ("baseline", "ensemble"):
                if measure in references.get(system, {}):
                    axis.axhline(100 * references[system][measure], color=COLOURS[system], linestyle="--", linewidth=1.3, label=NAMES[system])
            axis.set_xscale("log")
            axis.set_xticks([t for t, _ in there], [f"{t:g}" for t, _ in there])
            axis.set_xticks([], minor=True)
            axis.set_xlabel("temperature T")
            axis.set_title("Frame accuracy, %" if measure == "frame_accuracy" else "Word error rate, %")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        return _svg(figure, "sweep")


def speakers_figure(per_speaker: Mapping[str, Mapping[str, Any]], limit: int = MAX_SPEAKERS) -> str:
    """WER of every system for each of the worst speakers, worst first."""
    speakers = sorted(per_speaker, key=lambda speaker: max(row["wer"] for row in per_speaker[speaker].values()))[-limit:]
    present = [system for system in SYSTEMS if any(system in row for row in per_speaker.values())]
    with matplotlib.rc_context(_STYLE):
        figure, (axis,) = _panels(1, 0.26 * len(speakers) + 1.2)
        for y, speaker in enumerate(speakers):
            rates = [100 * row["wer"] for row in per_speaker[speaker].values()]
            axis.plot([min(rates), max(rates)], [y, y], color=GRID, linewidth=3, zorder=1)
        for system in present:
            points = [(100 * per_speaker[speaker][system]["wer"], y) for y, speaker in enumerate(speakers) if system in per_speaker[speaker]]
            axis.plot([x for x, _ in points], [y for _, y in points], _MARKERS[system], color=COLOURS[system], markersize=7, markeredgecolor=PAPER,
                      label=NAMES[system])
        axis.set_yticks(range(len(speakers)), speakers)
        axis.set_ylim(-0.7, len(speakers) - 0.3)
        axis.grid(visible=False, axis="y")
        axis.set_xlabel("word error rate, %")
        figure.legend(loc="outside upper center", ncols=len(present))
        return _svg(figure, "speakers")


def confusions_figure(confusions: Sequence[Mapping[str, Any]], limit: int = 16) -> str:
    """Most frequent phone confusions: bars of how often a phone's frames were given to another."""
    shown = list(confusions)[:limit]
    with matplotlib.rc_context(_STYLE):
        figure, (axis,) = _panels(1, 0.23 * len(shown) + 0.9)
        axis.barh(range(len(shown)), [row["frames"] for row in shown], color=COLOURS["distilled"], height=0.68)
        for y, row in enumerate(shown):
            axis.annotate(f"{100 * row['share']:.1f} % of {row['reference']}", (row["frames"], y), (4, 0), textcoords="offset points", va="center", fontsize=8,
                          color=MUTED)
        axis.set_yticks(range(len(shown)), [f"{row['reference']} → {row['predicted']}" for row in shown])
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.margins(x=0.14)
        axis.grid(visible=False, axis="y")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_xlabel("frames (reference → recognised)")
        return _svg(figure, "confusions")


def calibration_figure(systems: Mapping[str, Mapping[str, Any]]) -> str:
    """Reliability diagrams: accuracy in bins of confidence against the diagonal."""
    present = [system for system in SYSTEMS if system in systems]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(len(present), 2.9, sharey=True)
        for axis, system in zip(axes, present, strict=True):
            bins = systems[system]["bins"]
            largest = max(row["frames"] for row in bins)
            confidences = [100 * row["confidence"] for row in bins]
            axis.bar(confidences, [22 * row["frames"] / largest for row in bins], width=5, color=COLOURS[system], alpha=0.3)
            axis.plot([0, 100], [0, 100], "--", color=MUTED, linewidth=1)
            axis.plot(confidences, [100 * row["accuracy"] for row in bins], "-" + _MARKERS[system], color=COLOURS[system], markersize=4.5,
                      markeredgecolor=PAPER)
            axis.set(xlim=(0, 100), ylim=(0, 100), aspect="equal", xlabel="confidence, %")
            axis.set_title(f"{NAMES[system]}\nECE {100 * systems[system]['ece']:.1f} %")
        axes[0].set_ylabel("accuracy, %")
        return _svg(figure, "calibration")


def stages_figure(stages: Mapping[str, float]) -> str:
    """Wall time per stage, in the order they ran."""
    with matplotlib.rc_context(_STYLE):
        figure, (axis,) = _panels(1, 0.23 * len(stages) + 0.8)
        minutes = [seconds / 60 for seconds in stages.values()]
        axis.barh(range(len(stages)), minutes, color=COLOURS["ensemble"], height=0.62)
        for y, seconds in enumerate(stages.values()):
            axis.annotate(duration(seconds), (seconds / 60, y), (4, 0), textcoords="offset points", va="center", fontsize=8, color=MUTED)
        axis.set_yticks(range(len(stages)), list(stages))
        axis.set_ylim(len(stages) - 0.4, -0.6)
        axis.margins(x=0.1)
        axis.grid(visible=False, axis="y")
        axis.set_xlabel("minutes")
        return _svg(figure, "stages")


def duration(seconds: float) -> str:
    """Wall time for people.

    >>> duration(3.21), duration(75), duration(4000)
    ('3.2 s', '1 min 15 s', '1 h 06 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _panels(count: int, height_inches: float, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout=ConstrainedLayoutEngine(wspace=0.06))
    return figure, list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])


def _svg(figure: Figure, name: str) -> str:
    """The figure as inline SVG: page fonts and colours, no metadata, addresses, or ids that could collide with another figure's."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", svg)
    return re.sub("|".join(_VARIABLES), lambda match: f"var(--{_VARIABLES[match.group()]})", svg)
