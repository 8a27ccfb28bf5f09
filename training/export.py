"""Export a model for ONNX Runtime, OpenVINO or llama.cpp, or make a smaller one: static, or of its first layers.

    python training/export.py runs/mine/model --backend onnx --precision int8 --output mine-onnx
    python training/export.py runs/mine/model --backend gguf --dtype f16 --output mine.gguf
    python training/export.py runs/mine/model --backend static --prepared runs/mine/prepared --output mine-static
    python training/export.py runs/mine/model --layers 8 --output mine-8-layers

onnx and openvino run in their own environments, because the optimum libraries need an older transformers; see
training/models/README.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository is not an installed package

from training.common.command import command_parser, run_command
from training.common.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = command_parser("export.py", __doc__)
    parser.add_argument("folder", type=Path, help="folder of the model")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; for gguf the file")
    parser.add_argument("--backend", choices=["onnx", "openvino", "gguf", "static"])
    parser.add_argument("--layers", type=int, help="without --backend: the first layers as a model, such as an exit")
    parser.add_argument("--rank", type=int, help="without --backend: factorised token embeddings at a lower rank")
    parser.add_argument("--precision", choices=["fp32", "int8"], help="of onnx and openvino (fp32)")
    parser.add_argument("--dtype", choices=["f32", "f16", "bf16"], help="of the matrices of gguf (f16)")
    parser.add_argument("--dimensions", type=int, help="of static (the model's, at most 256)")
    parser.add_argument("--prepared", type=Path, help="of static: prepared sources that say the tokens' frequencies")
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = make_parser().parse_args(words)
    return run_command(lambda: _export(arguments))


def _export(arguments: argparse.Namespace) -> None:
    own = {"gguf": {"dtype"}, "static": {"dimensions", "prepared"}, None: {"layers", "rank"}}
    read = own.get(arguments.backend, {"precision"})
    options = ("layers", "rank", "precision", "dtype", "dimensions", "prepared")
    given = [name for name in options if getattr(arguments, name) is not None]
    if arguments.backend is None and not given:
        raise UserError("nothing to export; give --backend, or --layers and --rank of a smaller model")
    if unread := [name for name in given if name not in read]:
        where = f"with --backend {arguments.backend}" if arguments.backend else "without --backend"
        raise UserError(f"--{unread[0]} has no effect {where}; leave it out")
    # The environments of onnx and openvino lack what the others import, and have another transformers.
    if arguments.backend is None:
        from training.models.smaller import export_smaller

        export_smaller(arguments.folder, arguments.output, arguments.layers, arguments.rank)
        return
    if arguments.backend == "static":
        from training.models.static import distil_static

        distil_static(arguments.folder, arguments.output, arguments.dimensions, arguments.prepared)
        return
    if arguments.backend == "gguf":
        from training.models.gguf import export_gguf

        export_gguf(arguments.folder, arguments.output, arguments.dtype or "f16")
        return
    from training.models.export import export_graph

    name = export_graph(arguments.folder, arguments.output, arguments.backend, arguments.precision or "fp32")
    sys.stdout.write(
        f"{arguments.output}: SentenceTransformer({str(arguments.output)!r}, backend={arguments.backend!r}, "
        f'model_kwargs={{"file_name": {name!r}}})\n'
    )


if __name__ == "__main__":
    raise SystemExit(main())
