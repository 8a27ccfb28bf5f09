"""Search names in many languages by short, quantized vectors first and full ones last, beside exact search.

The leading dimensions of a matryoshka embedding are an embedding, too. A few of them, in a bit or a byte each, find a
shortlist; the full vectors, which need not be in memory, rank it.

python training/examples/two_step_search.py [MODEL] [--short 64] [--shortlist 100]
"""

from __future__ import annotations

import argparse
import itertools
import sys
import timeit
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# Run as a script from a checkout: the recipe is not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from sentence_transformers.util.quantization import quantize_embeddings

from training.common.command import command_parser, run_command
from training.common.errors import UserError
from training.data.cldr.names import read_names
from training.evaluation.encoding import unit_length
from training.evaluation.records import bytes_per_vector
from training.models.encoders import load_encoder
from training.models.model_ref import resolve

DEFAULT_MODEL = "runs/quickstart/stage2/model"
# Results per query, and rounds of which the fastest counts.
TOP, ROUNDS = 10, 5


class Searched(NamedTuple):
    """A measured way to search."""

    name: str
    index_bytes: int
    recall: float  # share of the ten nearest texts that are among the ten found
    milliseconds: float  # per query, all queries in one call, on one thread


def compare(texts: np.ndarray, queries: np.ndarray, short: int, shortlist: int) -> Iterator[Searched]:
    """Search ``(n, d)`` texts for ``(q, d)`` queries of unit length in several ways, of which the first is exact.

    Smaller indices have ``short`` leading dimensions, and the full vectors rank a ``shortlist`` of texts.
    """
    width = texts.shape[1]
    _check(width, len(texts), short, shortlist)
    exact = None
    for precision, dims in itertools.product(("float32", "int8", "binary"), (width, short)):
        nearest, size = _index(texts, queries, dims, precision)
        name, two_steps = f"{dims} × {precision}", partial(_two_steps, texts, queries, nearest, shortlist)
        searches = {name: partial(nearest, TOP), f"{name}, then full": two_steps}
        if exact is None:
            exact, searches = nearest(TOP), {f"{name}, exact": searches[name]}
        for way, search in searches.items():
            recall = np.mean([len(set(one) & set(other)) / TOP for one, other in zip(search(), exact, strict=True)])
            seconds = min(timeit.repeat(search, number=1, repeat=ROUNDS))
            yield Searched(way, size, float(recall), 1000 * seconds / len(queries))


def _check(width: int, texts: int, short: int, shortlist: int) -> None:
    if find_spec("faiss") is None:
        raise UserError("this example searches with FAISS; pip install 'f2llm[mine]'")
    if not 8 <= short <= width or short % 8:
        raise UserError(f"--short {short}: give a multiple of 8 up to the model's width, {width}")
    if not TOP <= shortlist <= texts:
        raise UserError(f"--shortlist {shortlist}: give a number from {TOP} to that of the texts, {texts}")


def _index(
    texts: np.ndarray, queries: np.ndarray, dims: int, precision: str
) -> tuple[Callable[[int], np.ndarray], int]:
    """Return a search of the texts for a number of neighbours of each query, and the bytes of its index."""
    import faiss

    faiss.omp_set_num_threads(1)
    if precision == "binary":
        stored, asked = (quantize_embeddings(each[:, :dims], "ubinary") for each in (texts, queries))
        index = faiss.IndexBinaryFlat(stored.shape[1] * 8)
    else:
        stored, asked = (unit_length(each[:, :dims]) for each in (texts, queries))
        # Of unit vectors the nearest are the most similar; the inner product depends on the lengths of decoded ones.
        kinds = {"float32": ("Flat", faiss.METRIC_INNER_PRODUCT), "int8": ("SQ8", faiss.METRIC_L2)}
        index = faiss.index_factory(dims, *kinds[precision])
        index.train(stored)
    index.add(stored)
    return lambda count: index.search(asked, count)[1], bytes_per_vector(dims, precision) * len(texts)


def _two_steps(
    texts: np.ndarray, queries: np.ndarray, nearest: Callable[[int], np.ndarray], shortlist: int
) -> np.ndarray:
    """Return the ``(q, 10)`` nearest by the full vectors in each query's shortlist."""
    found = nearest(shortlist)
    scores = np.einsum("qd,qkd->qk", queries, texts[found])
    return np.take_along_axis(found, np.argsort(-scores, axis=1)[:, :TOP], axis=1)


def read_texts(texts: int, queries: int) -> tuple[list[str], list[str]]:
    """Return distinct names of Unicode CLDR in all languages: texts to search, and others as queries."""
    names = read_names(seed=0)
    distinct = list(dict.fromkeys(names.texts[row] for row in np.argsort(names.draw_key)))
    if min(texts, queries) < 1 or texts + queries > len(distinct):
        raise UserError(f"--texts and --queries: {texts} and {queries} are not available of {len(distinct)} names")
    return distinct[:texts], distinct[texts : texts + queries]


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = command_parser("two_step_search.py", __doc__)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="folder, run or Hub name (%(default)s)")
    parser.add_argument("--texts", type=int, default=20_000, help="names to search (%(default)s)")
    parser.add_argument("--queries", type=int, default=500, help="names to search for (%(default)s)")
    parser.add_argument("--short", type=int, help="dimensions that find the shortlist (64, or what the model has)")
    parser.add_argument("--shortlist", type=int, default=100, help="names ranked by the full vectors (%(default)s)")
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(partial(_run, make_parser().parse_args(words)))


def _run(arguments: argparse.Namespace) -> None:
    texts, queries = read_texts(arguments.texts, arguments.queries)
    model = load_encoder(resolve(arguments.model, "MODEL"), "MODEL")
    width = model.get_embedding_dimension()
    short = min(64, width // 8 * 8) if arguments.short is None else arguments.short
    # Before the texts are encoded, which takes a while.
    _check(width, len(texts), short, arguments.shortlist)
    stored = model.encode_document(texts, batch_size=256, normalize_embeddings=True)
    asked = model.encode_query(queries, batch_size=256, normalize_embeddings=True)
    sys.stdout.write("| search | index, MB | recall@10 | ms per query |\n| --- | --- | --- | --- |\n")
    for way in compare(stored, asked, short, arguments.shortlist):
        size = way.index_bytes / 1e6
        sys.stdout.write(f"| {way.name} | {size:.2f} | {way.recall:.3f} | {way.milliseconds:.3f} |\n")


if __name__ == "__main__":
    raise SystemExit(main())
