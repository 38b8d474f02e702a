"""The figures of a page, as plotly's specifications. Colors are names of CSS variables: the page has two sets of them.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import log10
from typing import Any

import plotly.graph_objects as go

Shares = Sequence[Sequence[float | None]]

#: classes that the bars show, and classes whose names fit beside a matrix
MOST_BARS, MOST_NAMES = 40, 32
#: of terms, in the order of the log; the dash tells apart what the color does not
TERM_COLORS = tuple(f"var(--term-{i})" for i in range(6))
DASHES = ("solid", "dash", "dot", "dashdot")
ROLE_COLORS = {"teacher": "var(--teacher)", "plain": "var(--plain)", "distilled": "var(--distilled)"}
SEQUENTIAL = [[0, "var(--scale-0)"], [0.5, "var(--scale-1)"], [1, "var(--scale-2)"]]
DIVERGING = [[0, "var(--less-2)"], [0.25, "var(--less-1)"], [0.5, "var(--scale-0)"], [0.75, "var(--more-1)"],
             [1, "var(--more-2)"]]


def _figure(height: int, x: Mapping[str, Any], y: Mapping[str, Any], **layout: Any) -> go.Figure:
    """An empty figure in the style of the page."""
    axis = {"gridcolor": "var(--line)", "linecolor": "var(--line)", "zerolinecolor": "var(--line)", "ticks": "",
            "automargin": True, "fixedrange": True}
    return go.Figure(layout={
        "template": "none", "height": height, "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--ink)", "size": 13, "family": "var(--sans)"},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "hoverlabel": {"bgcolor": "var(--paper)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)"}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"}, "showlegend": True,
        "xaxis": axis | x, "yaxis": axis | y, **layout})


def _title(text: str) -> dict[str, Any]:
    return {"text": text, "font": {"size": 13}, "standoff": 6}


def as_json(figure: go.Figure) -> dict[str, Any]:
    """{"data", "layout"} as plain values."""
    return json.loads(figure.to_json())


def validation(curves: Mapping[str, Sequence[Mapping[str, float]]], goal: float | None = None) -> go.Figure:
    """mIoU on the validation split over the iterations. curves: {role: points with "step" and "mIoU", a fraction}.
    goal: that of the teacher."""
    figure = _figure(320, {"title": _title("iteration"), "rangemode": "tozero", "showgrid": False},
                     {"ticksuffix": " %", "rangemode": "tozero"}, hovermode="x unified")
    for role, points in curves.items():
        figure.add_scatter(x=[p["step"] for p in points], y=[100 * p["mIoU"] for p in points], name=role,
                           mode="lines+markers", line={"color": ROLE_COLORS[role], "width": 2.5},
                           marker={"size": 6, "symbol": "circle" if role == "plain" else "diamond"},
                           hovertemplate="%{y:.2f} %")
    if goal is not None:
        last = max(p["step"] for points in curves.values() for p in points)
        figure.add_scatter(x=[0, last], y=[100 * goal] * 2, name="teacher", mode="lines",
                           line={"color": ROLE_COLORS["teacher"], "width": 2, "dash": "dot"},
                           hovertemplate="%{y:.2f} %")
    return figure


def terms(losses: Mapping[str, Mapping[str, Any]]) -> dict[str, go.Figure]:
    """The weighted loss terms over the iterations, a figure per run with one vertical axis for all.

    losses: {role: {"step": [N], "weighted": {term: [N]}}}. The axis is logarithmic if no value is below 0."""
    values = [v for one in losses.values() for term in one["weighted"].values() for v in term]
    logarithmic = all(v >= 0 for v in values)
    positive = [v for v in values if v > 0]
    names = list(dict.fromkeys(term for one in losses.values() for term in one["weighted"]))
    axis: dict[str, Any] = {"rangemode": "tozero"}
    if logarithmic and positive:
        axis = {"type": "log", "tickformat": "~g", "dtick": 1, "range": _decades(min(positive), max(positive))}
    figures = {}
    for role, one in losses.items():
        figure = _figure(320, {"title": _title("iteration"), "rangemode": "tozero", "showgrid": False}, axis,
                         hovermode="x unified")
        for term, line in one["weighted"].items():
            place = names.index(term)
            style = {"color": TERM_COLORS[place % len(TERM_COLORS)], "width": 2,
                     "dash": DASHES[place // len(TERM_COLORS) % len(DASHES)]}
            shown = [v if v > 0 or not logarithmic else None for v in line]
            figure.add_scatter(x=one["step"], y=shown, name=term, mode="lines", line=style, hovertemplate="%{y:.4g}")
        figures[role] = figure
    return figures


def _decades(low: float, high: float) -> list[float]:
    """The range of a logarithmic axis: a little more than the values span."""
    return [log10(low) - 0.15, log10(high) + 0.15]


def shown_classes(iou: Mapping[str, Sequence[float]]) -> list[int]:
    """The classes that get bars, in their order: all, or those that distillation changes most."""
    change = [abs(a - b) for a, b in zip(iou["distilled"], iou["plain"], strict=True)]
    return sorted(sorted(range(len(change)), key=lambda k: (-change[k], k))[:MOST_BARS])


def class_bars(classes: Sequence[str], iou: Mapping[str, Sequence[float]]) -> go.Figure:
    """IoU of every class, a bar per network. iou: {role: [K], fractions}."""
    shown = shown_classes(iou)
    figure = _figure(70 + len(shown) * (14 * len(iou) + 12),
                     {"ticksuffix": " %", "range": [0, 100 * max(0.1, *(max(v) for v in iou.values())) * 1.02]},
                     {"autorange": "reversed", "showgrid": False}, bargap=0.3, bargroupgap=0.08)
    for role, values in iou.items():
        figure.add_bar(y=[classes[k] for k in shown], x=[100 * values[k] for k in shown], name=role, orientation="h",
                       marker={"color": ROLE_COLORS[role], "line": {"width": 0}},
                       hovertemplate="%{y}: %{x:.2f} %")
    figure.update_layout(legend={"traceorder": "normal"})
    return figure


def confusion(classes: Sequence[str], shares: Shares) -> go.Figure:
    """What the pixels of each class were taken for, a matrix [K][K] of fractions by rows."""
    return _matrix(classes, shares, SEQUENTIAL, 0, 100, "%{z:.1f} %")


def confusion_change(classes: Sequence[str], before: Shares, after: Shares) -> go.Figure:
    """The second matrix less the first, in points."""
    change = [[None if a is None or b is None else b - a for a, b in zip(*rows, strict=True)]
              for rows in zip(before, after, strict=True)]
    most = 100 * max((abs(v) for row in change for v in row if v is not None), default=0) or 1
    return _matrix(classes, change, DIVERGING, -most, most, "%{z:+.1f} points")


def _matrix(classes: Sequence[str], values: Shares, scale: Sequence, low: float, high: float,
            text: str) -> go.Figure:
    names = list(classes)
    labels = {"showticklabels": len(names) <= MOST_NAMES, "showgrid": False, "dtick": 1, "tickfont": {"size": 11},
              "type": "category"}
    figure = _figure(400, {**labels, "tickangle": -60, "title": _title("predicted")},
                     {**labels, "autorange": "reversed", "title": _title("truth")})
    figure.add_heatmap(z=[[None if v is None else 100 * v for v in row] for row in values], x=names, y=names,
                       colorscale=scale, zmin=low, zmax=high, xgap=1, ygap=1,
                       colorbar={"thickness": 8, "outlinewidth": 0, "len": 0.9, "tickfont": {"size": 11}},
                       hovertemplate=f"%{{y}} taken for %{{x}}: {text}<extra></extra>")
    return figure
