"""Searches names in many languages by short, quantized vectors first and full ones last, beside exact search.

The leading dimensions of a matryoshka embedding are an embedding, too. A few of them, in a bit or a byte each, find a
shortlist; the full vectors, which need not lie in memory, rank it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

# Run as a script from a checkout: the recipe is not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
from numpy.typing import NDArray
from sentence_transformers.util.quantization import quantize_embeddings

from training.common.command import run_command
from training.common.errors import UserError
from training.data.cldr.names import read_names
from training.models.encoders import load_encoder
from training.models.reference import resolve

DEFAULT_MODEL = "runs/quickstart/stage2/model"
# Results asked for, and rounds of which the fastest counts.
TOP, ROUNDS = 10, 5

Vectors = NDArray[np.float32]
Places = NDArray[np.int64]


class Searched(NamedTuple):
    """A way to search, measured.

    Attributes:
        name: Of the way.
        index_bytes: Bytes of the vectors in the index.
        recall: Share of the ten nearest texts that are among the ten found.
        milliseconds: For one query of all that are searched together, on one thread.
    """

    name: str
    index_bytes: int
    recall: float
    milliseconds: float


class _Index(NamedTuple):
    """A FAISS index that holds the texts, and the queries as it takes them."""

    name: str
    faiss: Any
    queries: NDArray[Any]
    size: int

    def nearest(self, count: int) -> Places:
        return self.faiss.search(self.queries, count)[1]


def compare(texts: Vectors, queries: Vectors, short: int, shortlist: int) -> Iterator[Searched]:
    """Searches in several ways: the first is exact, and what the others are measured by.

    Args:
        texts: ``(n, d)`` embeddings of unit length.
        queries: ``(q, d)`` embeddings of unit length.
        short: Leading dimensions that the smaller indices have.
        shortlist: Texts that the full vectors rank.

    Raises:
        UserError: If FAISS is not installed, or ``short`` or ``shortlist`` cannot be.
    """
    width = texts.shape[1]
    _check(width, len(texts), short, shortlist)
    import faiss

    faiss.omp_set_num_threads(1)
    per_query = 1000 / len(queries)
    whole = _floats(faiss, texts, queries, width)
    exact, seconds = _timed(partial(whole.nearest, TOP))
    yield Searched(f"{whole.name}, exact", whole.size, 1.0, seconds * per_query)
    for build, dims in ((_floats, short), (_bytes, width), (_bytes, short), (_bits, width), (_bits, short)):
        index = build(faiss, texts, queries, dims)
        found, seconds = _timed(partial(index.nearest, TOP))
        yield Searched(index.name, index.size, _recall(found, exact), seconds * per_query)
        found, seconds = _timed(partial(_two_steps, texts, queries, index, shortlist))
        yield Searched(f"{index.name}, then full", index.size, _recall(found, exact), seconds * per_query)


def _check(width: int, texts: int, short: int, shortlist: int) -> None:
    if find_spec("faiss") is None:
        raise UserError("this example searches with FAISS; pip install 'f2llm[mine]'")
    if width < 8:
        raise UserError(f"the model has {width} dimensions, and a binary index takes 8 at a time; name a wider model")
    if not 8 <= short <= width or short % 8:
        raise UserError(f"--short {short}: give a multiple of 8 up to the model's width, {width}")
    if not TOP <= shortlist <= texts:
        raise UserError(f"--shortlist {shortlist}: give a number from {TOP} to that of the texts, {texts}")


def _floats(faiss: Any, texts: Vectors, queries: Vectors, dims: int) -> _Index:
    index = faiss.IndexFlatIP(dims)
    index.add(_leading(texts, dims))
    return _Index(f"{dims} × float32", index, _leading(queries, dims), len(texts) * dims * 4)


def _bytes(faiss: Any, texts: Vectors, queries: Vectors, dims: int) -> _Index:
    # Of vectors of unit length the nearest are the most similar. By the inner product, the lengths of the vectors taken
    # back from the codes would count, which differ a little: that finds less.
    index = faiss.IndexScalarQuantizer(dims, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2)
    index.train(_leading(texts, dims))
    index.add(_leading(texts, dims))
    return _Index(f"{dims} × int8", index, _leading(queries, dims), len(texts) * dims)


def _bits(faiss: Any, texts: Vectors, queries: Vectors, dims: int) -> _Index:
    packed, asked = (quantize_embeddings(each[:, :dims], "ubinary") for each in (texts, queries))
    index = faiss.IndexBinaryFlat(packed.shape[1] * 8)
    index.add(packed)
    return _Index(f"{dims} × binary", index, asked, packed.nbytes)


def _leading(embeddings: Vectors, dims: int) -> Vectors:
    """``(n, dims)`` embeddings of unit length."""
    leading = embeddings[:, :dims]
    return np.ascontiguousarray(leading / np.linalg.norm(leading, axis=1, keepdims=True))


def _two_steps(texts: Vectors, queries: Vectors, index: _Index, shortlist: int) -> Places:
    """``(q, 10)`` the nearest by the full vectors among those of each query's shortlist."""
    found = index.nearest(shortlist)
    scores = np.einsum("qd,qkd->qk", queries, texts[found])
    return np.take_along_axis(found, np.argsort(-scores, axis=1)[:, :TOP], axis=1)


def _recall(found: Places, exact: Places) -> float:
    return float(np.mean([len(set(one) & set(other)) / TOP for one, other in zip(found, exact, strict=True)]))


def _timed(search: Callable[[], Places]) -> tuple[Places, float]:
    """What a search finds, and the seconds of its fastest round."""
    fastest = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        found = search()
        fastest = min(fastest, time.perf_counter() - started)
    return found, fastest


def read_texts(texts: int, queries: int) -> tuple[list[str], list[str]]:
    """Distinct names of Unicode CLDR in all languages: those to be found, and others to ask for.

    Raises:
        UserError: If there are not so many.
    """
    names = read_names(seed=0)
    distinct = list(dict.fromkeys(names.texts[row] for row in np.argsort(names.draw_key)))
    if min(texts, queries) < 1 or texts + queries > len(distinct):
        raise UserError(f"--texts and --queries: {texts} and {queries} are not to be had of {len(distinct)} names")
    return distinct[:texts], distinct[texts : texts + queries]


def main(words: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status, as :func:`~training.common.command.run_command` has it."""
    parser = argparse.ArgumentParser(prog="two_step_search.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="folder, run or Hub name (%(default)s)")
    parser.add_argument("--texts", type=int, default=20_000, help="names to be found (%(default)s)")
    parser.add_argument("--queries", type=int, default=500, help="names to ask for (%(default)s)")
    parser.add_argument("--short", type=int, help="dimensions that find the shortlist (64, or what the model has)")
    parser.add_argument("--shortlist", type=int, default=100, help="names ranked by the full vectors (%(default)s)")
    arguments = parser.parse_args(words)
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    texts, queries = read_texts(arguments.texts, arguments.queries)
    model = load_encoder(resolve(arguments.model, "MODEL"), "MODEL")
    width = model.get_embedding_dimension()
    short = min(64, width // 8 * 8) if arguments.short is None else arguments.short
    # Before the texts are encoded, which takes a while.
    _check(width, len(texts), short, arguments.shortlist)
    stored = model.encode_document(texts, batch_size=256, normalize_embeddings=True)
    asked = model.encode_query(queries, batch_size=256, normalize_embeddings=True)
    sys.stdout.write("| search | index, MB | recall@10 | ms a query |\n| --- | --- | --- | --- |\n")
    for way in compare(stored, asked, short, arguments.shortlist):
        size = way.index_bytes / 1e6
        sys.stdout.write(f"| {way.name} | {size:.2f} | {way.recall:.3f} | {way.milliseconds:.3f} |\n")


if __name__ == "__main__":
    raise SystemExit(main())
