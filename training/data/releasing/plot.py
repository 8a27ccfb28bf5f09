"""The distribution of languages as a bar chart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from training.common.errors import UserError
from training.common.languages import SEVERAL, language_name

PLOTS = ("languages.svg", "languages.png")
_SHOWN = 40
_NO_LANGUAGE = {SEVERAL: "several languages", "zxx": "programming languages"}
_BAR, _TEXT, _QUIET = "#4c72b0", "#222222", "#777777"


def plot_languages(rows: Mapping[str, int], folder: Path, title: str) -> None:
    """Draws ``languages.svg`` and ``languages.png``: a bar for each of the largest languages, the rest in words.

    Args:
        rows: Rows by ISO 639-3 code.
        folder: Where to write.
        title: What the rows are of.

    Raises:
        UserError: If ``matplotlib`` is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator
    except ImportError:
        raise UserError("the plot of languages needs matplotlib; install it with `pip install matplotlib`") from None

    total = sum(rows.values())
    ordered = sorted(rows.items(), key=lambda item: (-item[1], item[0]))
    shown, rest = ordered[:_SHOWN], ordered[_SHOWN:]
    # A dollar sign would begin a formula; the salt and the missing date make the bytes repeat.
    with rc_context({"svg.hashsalt": "languages", "text.parse_math": False, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(8, 1.3 + 0.2 * len(shown)), layout="constrained")
        axes = figure.subplots()
        counts = [count for _, count in shown]
        axes.barh(range(len(shown)), counts, height=0.72, color=_BAR)
        for place, count in enumerate(counts):
            label = f" {count:,} ({100 * count / total:.1f} %)"
            axes.text(count, place, label, va="center", fontsize=8, color=_TEXT)
        axes.set_yticks(range(len(shown)), [_label(code) for code, _ in shown], fontsize=8)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, 1.22 * max(counts))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(
            f"{title}: {_languages(len(rows.keys() - _NO_LANGUAGE.keys()))}", fontsize=10, loc="left", color=_TEXT
        )
        note = "rows"
        if rest:
            others = sum(count for _, count in rest)
            note += f"; not shown: {len(rest)} more languages with {others:,} rows ({100 * others / total:.1f} %)"
        axes.set_xlabel(note, fontsize=8, color=_QUIET)
        figure.savefig(folder / PLOTS[0], metadata={"Date": None})
        figure.savefig(folder / PLOTS[1], dpi=130, metadata={"Software": None})


def _label(code: str) -> str:
    return _NO_LANGUAGE.get(code) or f"{language_name(code)} ({code})"


def _languages(count: int) -> str:
    return "1 language" if count == 1 else f"{count} languages"
