"""The results as a figure that can be read in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Grey and hatch of the bars: neighbours differ in both.
_STYLES = [("0.85", ""), ("0.55", "//"), ("0.25", ""), ("0.7", "xx"), ("0.95", "..")]
_AXES = {
    "batch": "rows of the batch",
    "length": "tokens per text",
    "corpus": "rows of the corpus",
}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``results.svg`` and ``results.png``; nothing if there is nothing to draw.

    Raises:
        ImportError: If matplotlib is missing.
    """
    from matplotlib.figure import Figure

    rows = _rows(results["suites"])
    if not rows:
        return []
    figure = Figure(figsize=(15, 4.3 * len(rows) + 0.5), layout="constrained")
    grid = figure.add_gridspec(len(rows), 6)
    for number, panels in enumerate(rows):
        span = 6 // len(panels)
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(grid[number, place * span : (place + 1) * span])
            (_draw_bars if "groups" in panel else _draw_growth)(axes, panel)
    hardware = results["hardware"]
    quick = "quick run, figures mean nothing · " if results["settings"]["quick"] else ""
    figure.suptitle(
        f"{quick}{hardware['gpu'] or hardware['processor']}, threads: {hardware['threads']} · "
        f"{results['model']['name']} · torch {results['versions']['torch']} · {results['date'][:10]}",
        fontsize=11,
    )
    files = [folder / "results.svg", folder / "results.png"]
    for file in files:
        figure.savefig(file, dpi=110)
    return files


def _rows(suites: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Steps beside rates, encoding over the whole width, growth: what was measured of it."""
    points = [point for name in ("growth", "preparation") for point in suites.get(name, {}).get("points", [])]
    growth = [{"axis": axis, "points": [point for point in points if point["axis"] == axis]} for axis in _AXES]
    rows = [
        [panel for panel in (_speeds(suites), _fractions(suites)) if panel["groups"]],
        [panel for panel in (_encode_speeds(suites),) if panel["groups"]],
        [panel for panel in growth if panel["points"]],
    ]
    return [row for row in rows if row]


def _speeds(suites: dict[str, Any]) -> dict[str, Any]:
    """Return a panel of steps: groups are what we are compared with and in which precision."""
    groups: dict[str, dict[str, Any]] = {}
    for suite, against in (("step", "stock padded"), ("trainer", "ST trainer")):
        for measurement in suites.get(suite, {}).get("measurements", []):
            label = f"{against}\n{measurement['precision']}"
            groups[label] = {ratio["contestant"]: ratio for ratio in measurement["ratios"]}
    return {"title": "Training step", "ylabel": "times as fast", "groups": groups}


def _encode_speeds(suites: dict[str, Any]) -> dict[str, Any]:
    """Return a panel of encoding: groups are distributions, bars the compiled model or ours against each baseline."""
    groups: dict[str, dict[str, Any]] = {}
    for measurement in suites.get("encode", {}).get("measurements", []):
        ratios = measurement["ratios"]
        best = "ours_compiled" if any("compiled" in ratio["contestant"] for ratio in ratios) else "ours"
        found = {}
        for ratio in ratios:
            model, precision = ratio["contestant"].rsplit("_", 1)
            baseline = ratio["baseline"].removesuffix(f"_{precision}").replace("_", " ")
            if model == best:
                found[f"{precision} against {baseline.replace('openvino', 'OpenVINO')}"] = ratio
        distribution = measurement["case"].removeprefix("encode, ").replace("_", "-")
        groups[distribution] = dict(sorted(found.items(), key=lambda item: "OpenVINO" in item[0]))
    return {
        "title": "Encoding, compiled model where there is one (baseline at the same precision unless named)",
        "ylabel": "times as fast",
        "groups": groups,
    }


def _fractions(suites: dict[str, Any]) -> dict[str, Any]:
    groups = {
        measurement["precision"]: {ratio["contestant"]: ratio for ratio in measurement["ratios"]}
        for measurement in suites.get("rate", {}).get("measurements", [])
    }
    return {
        "title": "Fraction of the matrix-product rate",
        "ylabel": "fraction of torch.mm's operations per second",
        "groups": groups,
    }


def _draw_bars(axes: Any, panel: dict[str, Any]) -> None:
    """Draw bars of medians, with the median written above."""
    groups = panel["groups"]
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / len(series)
    for number, name in enumerate(series):
        found = {place: group[name] for place, group in enumerate(groups.values()) if name in group}
        places = [place + (number - (len(series) - 1) / 2) * width for place in found]
        ratios = list(found.values())
        grey, hatch = _STYLES[number % len(_STYLES)]
        style = {"color": grey, "hatch": hatch, "edgecolor": "black", "label": name.replace("_", " ")}
        axes.bar(places, [ratio["median"] for ratio in ratios], width, **style)
        _draw_ranges(axes, places, ratios, fmt="none", ecolor="black", linewidth=1)
        above = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        for place, ratio in zip(places, ratios, strict=True):
            axes.annotate(f"{ratio['median']:.2g}", (place, ratio["max"]), **above)
    axes.axhline(1.0, color="black", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=9)
    axes.set_ylabel(panel["ylabel"])
    axes.set_title(panel["title"], fontsize=11)
    # Room for the legend above the tallest bar.
    axes.set_ylim(0, axes.get_ylim()[1] * 1.3)
    axes.legend(fontsize=8, ncols=2, loc="upper center")


def _draw_ranges(axes: Any, places: Sequence[float], values: Sequence[dict[str, float]], **style: Any) -> Any:
    """Draw medians with whiskers from smallest to largest."""
    medians = [value["median"] for value in values]
    whiskers = [
        [value["median"] - value["min"] for value in values],
        [value["max"] - value["median"] for value in values],
    ]
    return axes.errorbar(places, medians, whiskers, capsize=3, **style)


def _draw_growth(axes: Any, panel: dict[str, Any]) -> None:
    """Draw seconds on the left scale, solid with circles, and memory on the right, dashed with squares.

    Along the length, the number of tokens stays the same, so proportional growth is level. Otherwise both scales are
    logarithmic, and the dotted line shows proportional growth.
    """
    axis, points = panel["axis"], panel["points"]
    values = [point["value"] for point in points]
    seconds = [point["seconds"] for point in points]
    memory = [(point["peak_mib"] - point["before_mib"]) / 1024 for point in points]
    handles = [_draw_ranges(axes, values, seconds, fmt="-o", color="black", label="time")]
    right = axes.twinx()
    handles += right.plot(values, memory, "--s", color="0.5", label="peak memory")
    axes.set_xscale("log", base=10 if axis == "corpus" else 2)
    if axis == "length":
        for scale in (axes, right):
            scale.set_ylim(0, scale.get_ylim()[1] * 1.25)
    else:
        in_proportion = [seconds[-1]["median"] * value / values[-1] for value in values]
        handles += axes.plot(values, in_proportion, ":", color="black", label="time in proportion")
        axes.set_yscale("log")
        right.set_yscale("log")
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.xaxis.minorticks_off()
    axes.set_xlabel(_AXES[axis])
    axes.set_ylabel("seconds of preparation" if axis == "corpus" else "seconds")
    right.set_ylabel("GiB above model and libraries")
    axes.set_title(f"Growth with the {'length of texts' if axis == 'length' else axis}", fontsize=11)
    axes.legend(handles=handles, fontsize=8, loc="upper left")
