"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_TITLES = {
    "step": "Training step against stock padded Qwen3",
    "trainer": "Training step against SentenceTransformerTrainer",
    "encode": "Encoding",
    "rate": "Fraction of the device's matrix-product rate",
    "loss": "Cost of the losses",
    "growth": "Growth",
    "preparation": "Preparation of data",
    "pruning": "Pruning",
    "distillation": "Cost of distillation",
}


def markdown(results: dict[str, Any]) -> str:
    """Return hardware, versions, and a section for each suite, in the order in which they ran."""
    parts = ["# Benchmarks", _hardware(results)]
    if results["settings"]["quick"]:
        parts.append("**A quick run: everything is tiny, and no figure here means anything.**")
    for name, suite in results["suites"].items():
        parts.append(f"## {_TITLES.get(name, name)}")
        parts += [_ratios(suite), _seconds(suite), _growth(suite), _facts(suite)]
        if suite["notes"]:
            parts.append("\n".join(f"- {note}" for note in suite["notes"]))
        if suite["skipped"]:
            parts.append("\n".join(f"- Left out: {skipped['what']} ({skipped['why']})" for skipped in suite["skipped"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def number(value: float) -> str:
    """Return three significant digits, without an exponent."""
    if not value:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.5f}"


def _hardware(results: dict[str, Any]) -> str:
    hardware, settings = results["hardware"], results["settings"]
    gpu = f"{hardware['gpu']}, {hardware['gpu_memory_gib']} GiB; " if hardware["gpu"] else ""
    lines = [
        f"Hardware: {gpu}{hardware['processor']}, {hardware['cores']} cores ({hardware['threads']} threads used, "
        f"{', '.join(hardware['instructions'])}), {hardware['memory_gib']} GiB of memory, {hardware['system']}.",
        f"Date: {results['date']}. Versions: "
        + ", ".join(f"{package} {version or 'absent'}" for package, version in results["versions"].items())
        + ".",
        f"Model: shape of {results['model']['name']} ({results['model']['parameters']:,} parameters with a "
        f"vocabulary of {results['model']['vocabulary']:,}), weights random and the same for all contestants.",
        f"Times are medians over rounds ({settings['repeats']}) in which all contestants take turns, with the smallest "
        "and largest in brackets; ratios are taken round by round. Above 1, the contestant is faster than what it is "
        "compared with.",
    ]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _range(values: dict[str, float], decimals: int | None = None) -> str:
    median, low, high = (
        number(values[key]) if decimals is None else f"{values[key]:.{decimals}f}" for key in ("median", "min", "max")
    )
    return f"{median} ({low} – {high})"


def _ratios(suite: dict[str, Any]) -> str:
    rows = []
    for measurement in suite["measurements"]:
        for ratio in measurement["ratios"]:
            # A share may be far below a hundredth, a speed never is.
            value = _range(ratio, None if ratio["label"].startswith("share") else 2)
            case = [measurement["case"], measurement["precision"] or "as named"]
            rows.append([*case, ratio["contestant"], ratio["baseline"], ratio["label"], value])
    return _table(["case", "precision", "contestant", "against", "figure", "value"], rows)


def _seconds(suite: dict[str, Any]) -> str:
    rows = []
    for measurement in suite["measurements"]:
        for name, contestant in measurement["contestants"].items():
            extra = number(contestant["warm_up_extra"]) if "warm_up_extra" in contestant else ""
            case = [measurement["case"], measurement["precision"] or "as named"]
            rows.append([*case, name, _range(contestant), extra])
    return _table(["case", "precision", "contestant", "seconds", "warm-up, extra seconds"], rows)


def _growth(suite: dict[str, Any]) -> str:
    rows = []
    for point in suite["points"]:
        tokens = f"{point['tokens']:,}" if "tokens" in point else ""
        opening = ("opening_seconds", "opening_peak_mib", "first_batch_seconds")
        memory = number(point["peak_mib"] - point["before_mib"])
        known = [number(point[key]) if key in point else "" for key in opening]
        rows.append([point["axis"], f"{point['value']:,}", tokens, _range(point["seconds"]), memory, *known])
    header = ["axis", "value", "tokens", "seconds", "peak memory, MiB"]
    return _table([*header, "to open: s", "to open: MiB", "first batch: s"], rows)


def _facts(suite: dict[str, Any]) -> str:
    """Return what was measured on, one line per case."""
    lines = []
    for measurement in suite["measurements"]:
        facts = ", ".join(f"{name.replace('_', ' ')} {_fact(value)}" for name, value in measurement["facts"].items())
        if facts:
            precision = f", {measurement['precision']}" if measurement["precision"] else ""
            lines.append(f"- {measurement['case']}{precision}: {facts}")
    return "\n".join(lines)


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_fact(each)}" for name, each in value.items()) + ")"
    return f"{value:,}" if isinstance(value, int) else number(value)
