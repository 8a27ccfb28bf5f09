"""Every argument that the kernels of a GPU are given, without the GPU: references that check them stand in."""

from __future__ import annotations

import inspect
import sys
from copy import deepcopy
from types import ModuleType

import pytest
import torch
from transformers import Qwen3Model

from modeling_f2llm import F2LLMConfig, F2LLMModel, packing
from tests.modeling_f2llm import reference_kernels
from tests.modeling_f2llm.comparing import assert_same
from tests.modeling_f2llm.elsewhere import Machine

TORCH = {version: getattr(reference_kernels, f"varlen_attn_2_{version}") for version in (10, 11, 12)}
KERNELS = ["flash", *TORCH]
SHAPES = {
    "grouped": {},
    "ungrouped": {"num_key_value_heads": 4},
    "one-key-head": {"num_key_value_heads": 1},
    "wide-heads": {"head_dim": 128},
    "widest-heads": {"head_dim": 256},
    "window": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1, "layer_types": None},
    "window-of-one": {"use_sliding_window": True, "sliding_window": 1, "max_window_layers": 0, "layer_types": None},
}
TEXTS = {
    "many": [7, 3, 5, 3, 1],
    "one": [9],
    "one-token": [1],
    "single-tokens": [1, 1, 1],
    "empty": [0, 3, 0, 4, 0],
    "empty-beside-single-tokens": [1, 0, 1, 0],
    "longest": [2, 512],  # max_position_embeddings
}


class Kernels:
    """The attention that stands in for a library's, and what it was called with."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.calls = monkeypatch, []

    def install(self, kernel, capability=(9, 0)):
        """Make ``kernel``, ``"flash"`` or a version of torch, the one of this machine, and give it a GPU."""
        patch = self.monkeypatch.setattr
        patch(packing, "is_flash_attn_2_available", lambda: kernel == "flash")
        patch(torch.cuda, "is_available", lambda: True)
        patch(torch.cuda, "get_device_capability", lambda device=None: capability)
        patch(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        patch(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        package = ModuleType("flash_attn")
        package.flash_attn_varlen_func = self.recorded(reference_kernels.flash_attn_varlen_func)
        self.monkeypatch.setitem(sys.modules, "flash_attn", package)
        torchs = TORCH.get(kernel, TORCH[12])
        self.monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", self.recorded(torchs))

    def recorded(self, function):
        def call(*args, **kwargs):
            self.calls.append(inspect.signature(function).bind(*args, **kwargs).arguments)
            return function(*args, **kwargs)

        call.__signature__ = inspect.signature(function)
        return call

    @property
    def used(self):
        """The library that ran all attention since the start of the test."""
        names = {"flash" if "cu_seqlens_q" in call else "torch" for call in self.calls} or {"sdpa"}
        (name,) = names
        return name


@pytest.fixture
def kernels(monkeypatch):
    return Kernels(monkeypatch)


@pytest.fixture
def model_of(tiny_config):
    """``model_of(**fields)``: a model and stock Qwen3Model of the same shape and weights."""

    def build(**fields):
        config = F2LLMConfig(**{**deepcopy(tiny_config).to_dict(), **fields})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, stock = F2LLMModel(deepcopy(config)), Qwen3Model(deepcopy(config))
        stock.load_state_dict(model.state_dict())
        return model.eval(), stock.eval()

    return build


def ids_of(lengths):
    return torch.randint(3, 320, (1, sum(lengths)), generator=torch.Generator().manual_seed(4))


def stock_texts(stock, ids, lengths):
    """What stock Qwen3Model makes of each text alone."""
    texts = [ids[:, start:end] for start, end in zip(*ends_of(lengths), strict=True) if end > start]
    return torch.cat([stock(input_ids=text).last_hidden_state[0] for text in texts])


def ends_of(lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return ends[:-1], ends[1:]


def test_the_references_have_the_signature_of_the_installed_torch():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    shapes = [
        [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]
        for function in (varlen.varlen_attn, *TORCH.values())
    ]
    assert shapes[0] in shapes[1:]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_kernels_take_the_model_of_every_shape(kernels, model_of, kernel, shape):
    model, stock = model_of(**SHAPES[shape])
    check(kernels, model, stock, kernel, TEXTS["many"], "sdpa" if (kernel, shape[:6]) == (10, "window") else None)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("texts", TEXTS)
@torch.no_grad()
def test_kernels_take_texts_of_every_length(kernels, model_of, kernel, texts):
    check(kernels, *model_of(), kernel, TEXTS[texts])


def check(kernels, model, stock, kernel, lengths, expected=None):
    """The model in fp16 on a GPU equals stock fp32, each text alone, and called the kernel once in every layer."""
    kernels.install(kernel)
    ids, machine = ids_of(lengths), Machine("cuda:0")
    with machine:
        hidden = machine.to(model.half())(input_ids=machine.to(ids), sequence_lengths=lengths).last_hidden_state
    assert hidden.device == machine.device
    assert_same(hidden.here[0].float(), stock_texts(stock, ids, lengths), tolerance=0.01)
    assert kernels.used == (expected or ("flash" if kernel == "flash" else "torch"))
    assert len(kernels.calls) in (0, model.config.num_hidden_layers)
