"""A model's graph for ONNX Runtime or OpenVINO, made by sentence-transformers' backends and the optimum libraries.

What is exported is stock Qwen3, without remote code. The optimum libraries hold transformers back, so this runs in an
environment of its own: what is imported here of this repository must not need more than torch and transformers 4.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.errors import StoppedError, UserError, in_one_line
from training.common.outputs import temporary_folder
from training.models.checks import check_tokenizer_file, is_finite
from training.models.shapes import wrong_weight
from training.models.weight_files import WeightFiles

# What each backend imports, which no other part of this repository needs.
BACKENDS = {"onnx": "optimum.onnxruntime", "openvino": "optimum.intel.openvino"}
# How near the embeddings must come to those of torch, by precision.
LEAST_COSINE = {"fp32": 0.9999, "int8": 0.99}
# In one batch these are padded to many lengths.
_SAMPLE = (
    "a",
    "Where do giant pandas live?",
    "大熊猫生活在四川的山林里。",
    "تعيش الباندا في غابات الخيزران",
    "Панды живут в бамбуковых лесах, а едят почти только бамбук. " * 4,
)


def check_whole(folder: Path, settings: Path) -> None:
    """Makes sure that a model's tokenizer and weights are whole, before a graph is made of random ones.

    Args:
        folder: Of the model.
        settings: Its settings in the form that older readers know.

    Raises:
        UserError: If the tokenizer has no words, a file of weights is damaged, or a weight is missing or not finite.
    """
    check_tokenizer_file(folder)
    stored = WeightFiles(folder)
    # A model that was saved as a language model has its names, which transformers reads, too.
    shapes = {
        name.removeprefix("model."): each.shape for name, each in stored.tensors.items() if name != "lm_head.weight"
    }
    try:
        wrong = wrong_weight(shapes, F2LLMConfig.from_pretrained(settings))
    # The library's checks raise errors of their own.
    except Exception as error:
        raise UserError(
            f"{folder}: config.json is damaged ({in_one_line(error)}); fetch or save the model again"
        ) from None
    if wrong is not None:
        raise UserError(f"{folder}: {wrong}; fetch or save the model again")
    for name in stored.tensors:
        if not is_finite(stored.read(name)):
            raise UserError(f"{folder}: weight {name} is NaN or infinite; take an earlier state of the model")


def write_graph(source: Path, folder: Path, backend: str, precision: str) -> str:
    """Exports the model in ``source`` and returns the path of the graph in ``folder``, as ``file_name`` takes it.

    Args:
        source: SentenceTransformer folder with weights, in the form that older readers know.
        folder: The same folder without weights; gets a folder named after the backend.
        backend: ``onnx`` or ``openvino``.
        precision: ``fp32``, or ``int8``: 8-bit weights; ONNX Runtime rounds activations, too, as they come.
    """
    return {"onnx": _write_onnx, "openvino": _write_openvino}[backend](source, folder, precision)


def _write_onnx(source: Path, folder: Path, precision: str) -> str:
    from optimum.exporters.onnx import main_export
    from optimum.exporters.onnx.model_configs import Qwen3OnnxConfig
    from optimum.onnxruntime.configuration import AutoQuantizationConfig
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.backend import export_dynamic_quantized_onnx_model
    from transformers import AutoConfig

    class WithoutPositions(Qwen3OnnxConfig):
        """Positions count from the first token, as padding on the right allows; sentence-transformers gives none."""

        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            return {name: axes for name, axes in super().inputs.items() if name != "position_ids"}

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    graph = WithoutPositions(config, task="feature-extraction")
    with temporary_folder() as exported:
        main_export(
            str(source),
            exported,
            task="feature-extraction",
            library_name="transformers",
            local_files_only=True,
            custom_onnx_configs={"model": graph},
        )
        (folder / "onnx").mkdir()
        # A model over 2 GB keeps its weights in a second file.
        for path in Path(exported).glob("model.onnx*"):
            shutil.move(path, folder / "onnx" / path.name)
    if precision == "fp32":
        return "onnx/model.onnx"
    whole = SentenceTransformer(str(folder), **_loading("onnx", "onnx/model.onnx"))
    # Seven bits of eight: without VNNI, products of eight-bit numbers overflow sixteen bits.
    quantization = AutoQuantizationConfig.avx2(is_static=False, per_channel=True, reduce_range=True)
    export_dynamic_quantized_onnx_model(whole, quantization, str(folder), file_suffix="qint8")
    for path in (folder / "onnx").glob("model.onnx*"):
        path.unlink()
    return "onnx/model_qint8.onnx"


def _write_openvino(source: Path, folder: Path, precision: str) -> str:
    from optimum.intel import OVWeightQuantizationConfig
    from sentence_transformers import SentenceTransformer

    # Left to itself, OpenVINO rounds the weights of large models to eight bits.
    choice: dict[str, Any] = {"load_in_8bit": False}
    if precision == "int8":
        choice = {"quantization_config": OVWeightQuantizationConfig(bits=8)}
    model = SentenceTransformer(
        str(source), device="cpu", backend="openvino", model_kwargs={"export": True, **choice}, local_files_only=True
    )
    name = "openvino_model" if precision == "fp32" else "openvino_model_qint8"
    with temporary_folder() as exported:
        model.save_pretrained(exported, create_model_card=False)
        (folder / "openvino").mkdir()
        for path in (Path(exported) / "openvino").glob("openvino_model.*"):
            shutil.move(path, folder / "openvino" / f"{name}{path.suffix}")
    return f"openvino/{name}.xml"


def check_same_embeddings(source: Path, folder: Path, backend: str, precision: str, file_name: str) -> float:
    """Embeds a few padded texts with both and returns the least cosine.

    Raises:
        StoppedError: If it is less than ``LEAST_COSINE``.
    """
    from sentence_transformers import SentenceTransformer

    texts = list(_SAMPLE)
    expected = reference_embeddings(source, texts)
    exported = SentenceTransformer(str(folder), **_loading(backend, file_name)).encode(texts)
    least = float((expected * exported).sum(axis=1).min())
    # Written so that NaN fails, too.
    if not least >= LEAST_COSINE[precision]:
        raise StoppedError(
            f"the {backend} model in {precision} is not the model that was exported (cosine {least:.4f}, at least "
            f"{LEAST_COSINE[precision]} is asked for) and was not kept; "
            + ("export it in fp32" if precision == "int8" else "try the versions that pyproject.toml names")
        )
    return least


def reference_embeddings(source: Path, texts: list[str]) -> Any:
    """``(texts, width)`` embeddings by torch, computed in float32 as graphs compute them.

    A checkpoint in bfloat16 or float16 would otherwise compute in its own precision, whose error is larger than the one
    allowed for here; its weights are the same numbers in float32.
    """
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(source), device="cpu", local_files_only=True).float().encode(texts)


def _loading(backend: str, file_name: str) -> dict[str, Any]:
    choice: dict[str, Any] = {"file_name": file_name}
    if backend == "onnx":
        choice["provider"] = "CPUExecutionProvider"
    else:
        # Left to itself, OpenVINO computes in bfloat16 where the processor has it.
        choice["ov_config"] = {"INFERENCE_PRECISION_HINT": "f32"}
    return {"device": "cpu", "backend": backend, "model_kwargs": choice, "local_files_only": True}
