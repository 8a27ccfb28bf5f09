"""Export a model as a graph for ONNX Runtime or OpenVINO, in fp32 or with 8-bit weights.

The optimum libraries need an older transformers: imports of this file must need no more than torch and transformers 4.
"""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.errors import StoppedError, UserError, in_one_line
from training.common.outputs import check_output, temporary_folder
from training.models.model_folder import (
    WeightFiles,
    check_tokenizer_file,
    copy_settings,
    is_finite,
    load_json,
    recorded_folder,
    user_error,
    write_for_older_readers,
    wrong_weight,
)

# Each backend's package, and its file by precision.
BACKENDS = {"onnx": "optimum.onnxruntime", "openvino": "optimum.intel.openvino"}
_FILES = {
    "onnx": {"fp32": "onnx/model.onnx", "int8": "onnx/model_qint8.onnx"},
    "openvino": {"fp32": "openvino/openvino_model.xml", "int8": "openvino/openvino_model_qint8.xml"},
}
# Least cosine between the embeddings of the graph and of torch, by precision.
LEAST_COSINE = {"fp32": 0.9999, "int8": 0.99}
# Says which model was exported, and how.
RECORD = "export.json"
# One batch pads these to many lengths.
_SAMPLE = (
    "a",
    "Where do giant pandas live?",
    "大熊猫生活在四川的山林里。",
    "تعيش الباندا في غابات الخيزران",
    "Панды живут в бамбуковых лесах, а едят почти только бамбук. " * 4,
)


def export_graph(folder: Path, output: Path, backend: str, precision: str = "fp32") -> str:
    """Write a folder that ``SentenceTransformer(output, backend=…)`` loads; return its ``file_name`` for that.

    It is written whole or not at all; nothing is done if it holds this export already. ``int8`` has 8-bit weights; ONNX
    Runtime then also rounds activations. StoppedError if the embeddings come out differently.
    """
    weights, file_name = WeightFiles(folder), _FILES[backend][precision]
    check_output(output, [folder])
    record = {"backend": backend, "precision": precision, "weights": weights.digest(), "file_name": file_name}
    with recorded_folder(output, RECORD, record) as partial:
        if partial is None:
            return file_name
        # A package in a version that does not fit can fail with any exception.
        with user_error(
            f"the {backend} backend cannot be used here",
            f"it needs its own environment: pip install --group {backend}, with pip 25.1 or newer, in this checkout",
        ):
            import_module(BACKENDS[backend])
        write_settings(folder, weights, partial)
        with temporary_folder() as source:
            shutil.copytree(partial, source, dirs_exist_ok=True)
            for path in folder.glob("model*.safetensors*"):
                (Path(source) / path.name).symlink_to(path.resolve())
            try:
                {"onnx": _write_onnx, "openvino": _write_openvino}[backend](Path(source), partial, precision)
                check_same_embeddings(Path(source), partial, backend, precision)
            except (StoppedError, OSError):
                raise
            # Each of the libraries has its own exceptions.
            except Exception as error:
                raise StoppedError(
                    f"{backend} export failed ({type(error).__name__}: {in_one_line(error)}); pyproject.toml names the "
                    f"versions that work, in the group {backend}"
                ) from error
    return file_name


def write_settings(folder: Path, weights: WeightFiles, target: Path) -> None:
    """Write the settings of stock Qwen3; refuse what libraries replace by random: a damaged tokenizer, bad weights."""
    config = load_json(folder / "config.json")
    if config.get("model_type") != "qwen3":
        raise UserError(f"{folder}: model_type is {config.get('model_type')!r}; only 'qwen3' is exported")
    check_tokenizer_file(folder)
    copy_settings(folder, target, "README.md")
    for name in ("auto_map", "embedding_ranks"):
        config.pop(name, None)
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    # transformers also reads a model that was saved as a language model, with these names.
    shapes = {name.removeprefix("model."): shape for name, shape in weights.shapes.items() if name != "lm_head.weight"}
    with user_error(f"{folder}: its settings are damaged", "fetch or save the model again"):
        write_for_older_readers(target)
        wrong = wrong_weight(shapes, F2LLMConfig.from_pretrained(target))
    if wrong is not None:
        raise UserError(f"{folder}: {wrong}; fetch or save the model again")
    for name in weights.tensors:
        if not is_finite(weights.read(name)):
            raise UserError(f"{folder}: weight {name} is NaN or infinite; take an earlier state of the model")


def _write_onnx(source: Path, folder: Path, precision: str) -> None:
    from optimum.exporters.onnx import main_export
    from optimum.exporters.onnx.model_configs import Qwen3OnnxConfig
    from optimum.onnxruntime.configuration import AutoQuantizationConfig
    from sentence_transformers.backend import export_dynamic_quantized_onnx_model
    from transformers import AutoConfig

    class WithoutPositions(Qwen3OnnxConfig):
        """Positions count from the first token, as padding on the right allows; sentence-transformers gives none."""

        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            return {name: axes for name, axes in super().inputs.items() if name != "position_ids"}

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    with temporary_folder() as exported:
        main_export(
            str(source),
            exported,
            task="feature-extraction",
            library_name="transformers",
            local_files_only=True,
            custom_onnx_configs={"model": WithoutPositions(config, task="feature-extraction")},
        )
        (folder / "onnx").mkdir()
        # A model over 2 GB keeps its weights in a second file.
        for path in Path(exported).glob("model.onnx*"):
            shutil.move(path, folder / "onnx" / path.name)
    if precision == "fp32":
        return
    whole = _load_exported(folder, "onnx", "fp32")
    # Seven bits of eight: without VNNI, products of eight-bit numbers overflow sixteen bits.
    quantization = AutoQuantizationConfig.avx2(is_static=False, per_channel=True, reduce_range=True)
    export_dynamic_quantized_onnx_model(whole, quantization, str(folder), file_suffix="qint8")
    for path in (folder / "onnx").glob("model.onnx*"):
        path.unlink()


def _write_openvino(source: Path, folder: Path, precision: str) -> None:
    from optimum.intel import OVWeightQuantizationConfig
    from sentence_transformers import SentenceTransformer

    # By default OpenVINO rounds the weights of large models to eight bits.
    choice: dict[str, Any] = {"load_in_8bit": False}
    if precision == "int8":
        choice = {"quantization_config": OVWeightQuantizationConfig(bits=8)}
    model = SentenceTransformer(
        str(source), device="cpu", backend="openvino", model_kwargs={"export": True, **choice}, local_files_only=True
    )
    target = folder / _FILES["openvino"][precision]
    with temporary_folder() as exported:
        model.save_pretrained(exported, create_model_card=False)
        target.parent.mkdir()
        for path in (Path(exported) / "openvino").glob("openvino_model.*"):
            shutil.move(path, target.with_suffix(path.suffix))


def check_same_embeddings(source: Path, folder: Path, backend: str, precision: str) -> None:
    """Refuse a graph whose embeddings of a few padded texts are not those of torch."""
    expected = reference_embeddings(source, list(_SAMPLE))
    exported = _load_exported(folder, backend, precision).encode(list(_SAMPLE))
    least = float((expected * exported).sum(axis=1).min())
    # Written so that NaN fails, too.
    if not least >= LEAST_COSINE[precision]:
        raise StoppedError(
            f"the {backend} model in {precision} was not kept: its embeddings have a cosine of {least:.4f} to torch's, "
            f"at least {LEAST_COSINE[precision]} is needed; try fp32, or the versions in pyproject.toml"
        )


def reference_embeddings(source: Path, texts: list[str]) -> Any:
    """``(texts, width)`` embeddings by torch in fp32, as graphs compute them, whatever the checkpoint's precision."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(source), device="cpu", local_files_only=True).float().encode(texts)


def _load_exported(folder: Path, backend: str, precision: str) -> Any:
    from sentence_transformers import SentenceTransformer

    # By default OpenVINO computes in bfloat16 where the processor has it.
    in_fp32 = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    options = {"provider": "CPUExecutionProvider"} if backend == "onnx" else in_fp32
    options["file_name"] = _FILES[backend][precision]
    return SentenceTransformer(str(folder), device="cpu", backend=backend, model_kwargs=options, local_files_only=True)
