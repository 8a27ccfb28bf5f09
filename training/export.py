"""Export a model for ONNX Runtime, OpenVINO or llama.cpp, or distil a static one from it.

    python training/export.py runs/mine/model --backend onnx --precision int8 --output mine-onnx
    python training/export.py runs/mine/model --backend gguf --dtype f16 --output mine.gguf
    python training/export.py runs/mine/model --backend static --prepared runs/mine/prepared --output mine-static

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
    parser.add_argument("--backend", choices=["onnx", "openvino", "gguf", "static"], required=True)
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
    read = {"gguf": ["dtype"], "static": ["dimensions", "prepared"]}.get(arguments.backend, ["precision"])
    for option in ("precision", "dtype", "dimensions", "prepared"):
        if option not in read and getattr(arguments, option) is not None:
            raise UserError(f"--{option} has no effect with --backend {arguments.backend}; leave it out")
    # The environments of onnx and openvino lack what the others import, and have another transformers.
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
