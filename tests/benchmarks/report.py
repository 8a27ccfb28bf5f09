"""The results as Markdown."""

from __future__ import annotations

_RATIOS = ("case", "precision", "contestant", "against", "figure", "value")
_SECONDS = ("case", "precision", "contestant", "seconds", "warm-up, extra seconds")
_GROWTH = ("axis", "value", "tokens", "seconds", "peak memory, MiB")
_OPENING = {
    "opening_seconds": "to open: s",
    "opening_mib": "to open: MiB",
    "first_batch_seconds": "first batch: s",
}


def markdown(results):
    """Return hardware, versions, and a section for each suite, in the order in which they ran."""
    hardware, model = results["hardware"], results["model"]
    gpu = f"{hardware['gpu']}, {hardware['gpu_memory_gib']} GiB; " if hardware["gpu"] else ""
    parts = [
        "# Benchmarks",
        f"Hardware: {gpu}{hardware['processor']}, {hardware['cores']} cores ({hardware['threads']} threads used, "
        f"{', '.join(hardware['instructions'])}), {hardware['memory_gib']} GiB of memory, {hardware['system']}.\n"
        f"Date: {results['date']}. Versions: {_value(results['versions'])}.\n"
        f"Model: shape of {model['name']} ({model['parameters']:,} parameters with a vocabulary of "
        f"{model['vocabulary']:,}), weights random and the same for all contestants.\n"
        f"Times are medians over {results['settings']['repeats']} rounds in which all contestants take turns, with "
        "the smallest and largest in brackets; ratios are taken round by round. Above 1, the contestant is faster "
        "than what it is compared with. What each suite measures stands in tests/benchmarks/README.md.",
    ]
    if results["settings"]["quick"]:
        parts.append("**A quick run: everything is tiny, and no figure here means anything.**")
    for name, suite in results["suites"].items():
        parts += [f"## {name}", *_tables(suite)]
        facts = ((each["case"], each["precision"] or "as named", each["facts"]) for each in suite["measurements"])
        lines = [f"{case}, {precision}: {_value(known)}" for case, precision, known in facts]
        lines += [*suite["notes"], *(f"Left out: {each['what']} ({each['why']})" for each in suite["skipped"])]
        parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(part for part in parts if part) + "\n"


def _tables(suite):
    ratios, seconds, growth = [], [], []
    for measurement in suite["measurements"]:
        case = [measurement["case"], measurement["precision"] or "as named"]
        for each in measurement["ratios"]:
            ratios.append([*case, each["contestant"], each["baseline"], each["label"], _range(each)])
        for name, each in measurement["contestants"].items():
            seconds.append([*case, name, _range(each), each.get("warm_up_extra", "")])
    for point in suite["points"]:
        known = [point["axis"], point["value"], point.get("tokens", ""), _range(point["seconds"])]
        growth.append([*known, point["peak_mib"] - point["before_mib"], *(point.get(key, "") for key in _OPENING)])
    yield table(_RATIOS, ratios)
    yield table(_SECONDS, seconds)
    yield table([*_GROWTH, *_OPENING.values()], growth)


def table(header, rows):
    """Return a Markdown table; nothing without rows."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_value, line))} |" for line in lines) if rows else ""


def _range(values):
    return f"{_value(values['median'])} ({_value(values['min'])} – {_value(values['max'])})"


def _value(value):
    """Return a text as it is, a mapping as a list, and a number with three significant digits, without an exponent."""
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_value(each)}" for name, each in value.items())
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if abs(value) >= 100 or not value:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.5f}"
