"""Every argument that the kernels of a GPU are given, without the GPU: references that check them stand in."""

from __future__ import annotations

import inspect
import sys
from copy import deepcopy
from types import ModuleType

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import Qwen3Model

from modeling_f2llm import F2LLMConfig, F2LLMModel, attention, packing
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
        patch(attention, "is_flash_attn_2_available", lambda: kernel == "flash")
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

    def used(self):
        """The libraries that ran, in the order of their calls."""
        return ["flash" if "cu_seqlens_q" in call else "torch" for call in self.calls]


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
def test_kernels_take_models_of_every_shape(kernels, model_of, kernel, shape):
    check(kernels, *model_of(**SHAPES[shape]), kernel, TEXTS["many"])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("texts", TEXTS)
@torch.no_grad()
def test_kernels_take_texts_of_every_length(kernels, model_of, kernel, texts):
    check(kernels, *model_of(), kernel, TEXTS[texts])


def check(kernels, model, stock, kernel, lengths):
    """The model in fp16 on a GPU equals stock in fp32, each text alone; every layer that can called the kernel."""
    kernels.install(kernel)
    ids, machine = ids_of(lengths), Machine("cuda:0")
    with machine:
        hidden = machine.to(model.half())(input_ids=machine.to(ids), sequence_lengths=lengths).last_hidden_state
    assert hidden.device == machine.device
    assert_same(hidden.here[0].float(), stock_texts(stock, ids, lengths), tolerance=0.01)
    # Of the versions, torch 2.10 alone has no windows.
    able = [kind for kind in model.config.layer_types if kernel != 10 or kind == "full_attention"]
    assert kernels.used() == ["flash" if kernel == "flash" else "torch"] * len(able)


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_kernels_get_half_precision_under_autocast(kernels, model_of, kernel):
    model, stock = model_of()
    kernels.install(kernel)
    ids, machine = ids_of(TEXTS["many"]), Machine("cuda:0")
    with machine, torch.autocast("cuda", dtype=torch.bfloat16):
        hidden = machine.to(model)(input_ids=machine.to(ids), sequence_lengths=TEXTS["many"]).last_hidden_state
    assert_same(hidden.here[0].float(), stock_texts(stock, ids, TEXTS["many"]), tolerance=0.05)
    assert len(kernels.calls) == 2
    assert all(call[name].dtype == torch.bfloat16 for call in kernels.calls for name in call if name in ("q", "query"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"last_token_only": True}], ids=["all", "last"])
def test_gradients_through_the_kernels_are_those_of_sdpa(kernels, model_of, monkeypatch, kernel, dtype, options):
    # Gradients need the real device: the kernels are chosen for the CPU here.
    monkeypatch.setattr(attention, "_flash_obstacle", lambda query: None)
    lengths = TEXTS["many" if options else "empty"]
    gradients, ids = {}, ids_of(lengths)
    for name in ("sdpa", "packed"):
        model, _ = model_of(use_sliding_window=kernel != 10, sliding_window=3, max_window_layers=1, layer_types=None)
        kernels.install(kernel)
        model.set_attn_implementation(name)
        with torch.autocast("cpu", dtype=dtype):
            hidden = model(input_ids=ids, sequence_lengths=lengths, **options).last_hidden_state
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        gradients[name] = torch.autograd.grad((hidden * weights).sum(), list(model.parameters()))
    assert len(kernels.calls) == 2
    for ours, theirs in zip(gradients["packed"], gradients["sdpa"], strict=True):
        assert_same(ours, theirs, tolerance=0.05)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_padded_batches_reach_the_kernel_packed(kernels, model_of, random_batch, side):
    model, stock = model_of()
    kernels.install(12)
    batch, machine = random_batch([5, 2, 5], side), Machine("cuda:0")
    with machine:
        hidden = machine.to(model.half())(**{name: machine.to(each) for name, each in batch.items()}).last_hidden_state
    expected = stock(**batch).last_hidden_state * batch["attention_mask"][..., None]
    assert_same(hidden.here.float(), expected, tolerance=0.01)
    assert [call["cu_seq_q"].tolist() for call in kernels.calls] == [[0, 2, 7, 12]] * 2


class Waits(TorchFunctionMode):
    """Records the calls that wait for a GPU: copies from and to it, and whatever must know its numbers."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        reads = name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__index__")
        copies = name == "to" and any(isinstance(each, torch.device) for each in args)
        if (
            (reads and args[0].device.type == "cuda")
            or (name == "tensor" and torch.device(kwargs.get("device") or "cpu").type == "cuda")
            or (copies and not kwargs.get("non_blocking"))
            or (name == "repeat_interleave" and isinstance(args[1], torch.Tensor) and "output_size" not in kwargs)
        ):
            self.found.append(name)
        return func(*args, **kwargs)


@torch.no_grad()
def test_a_packed_batch_is_encoded_without_waiting_for_the_gpu(kernels, model_of, monkeypatch):
    model, _ = model_of()
    kernels.install(12)
    # The reference reads the boundaries.
    monkeypatch.setattr(attention, "_torch_varlen", lambda query, key, value, options: query)
    machine = Machine("cuda:0")
    with machine:
        model, ids = machine.to(model.half()), machine.to(ids_of(TEXTS["many"]))
        with Waits() as waits:
            model(input_ids=ids, sequence_lengths=TEXTS["many"])
        assert not waits.found
        with Waits() as waits:
            torch.tensor([1], device=machine.device)
        assert waits.found == ["tensor"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_apples_gpu_runs_sdpa_in_every_precision(kernels, model_of, monkeypatch, dtype):
    # A CPU may take another way in bf16.
    monkeypatch.setattr(attention, "_MOST_SHORT_TOKENS", 0)
    model, _ = model_of()
    kernels.install("flash")
    ids, machine = ids_of(TEXTS["empty"]), Machine("mps:0")
    expected = model.to(dtype)(input_ids=ids, sequence_lengths=TEXTS["empty"]).last_hidden_state
    with machine:
        hidden = machine.to(model)(input_ids=machine.to(ids), sequence_lengths=TEXTS["empty"]).last_hidden_state
    assert hidden.device == machine.device and not kernels.calls
    assert torch.equal(hidden.here, expected)


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs Apple's GPU")
def test_apples_gpu_equals_the_cpu(model_of):
    model, _ = model_of()
    ids, results = ids_of(TEXTS["many"]), []
    for device in ("cpu", "mps"):
        hidden = model.to(device)(input_ids=ids.to(device), sequence_lengths=TEXTS["many"]).last_hidden_state
        gradients = torch.autograd.grad(hidden.square().sum(), list(model.parameters()))
        results.append([hidden.detach().cpu(), *(gradient.cpu() for gradient in gradients)])
    for ours, expected in zip(*reversed(results), strict=True):
        assert_same(ours, expected, tolerance=1e-3)


CALL = {"dtype": torch.bfloat16, "size": 8, "dropout": 0.0, "window": None, "device": "cuda:0", "capability": (8, 0)}


@pytest.mark.parametrize("autocast", [False, True])
def test_short_texts_in_bf16_are_as_exact_on_a_cpu_as_by_torchs_kernel(monkeypatch, autocast):
    lengths, generator = [1, 7, 7, 7, 40, 256, 257], torch.Generator().manual_seed(0)
    exact, gradient = (
        [torch.randn(sum(lengths), heads, 16, generator=generator).bfloat16().double() for heads in of]
        for of in ((4, 2, 2), (4,))
    )
    options = {"sequence_lengths": lengths, "sliding_window": None, "dropout": 0.0, "scaling": 0.25}
    taken = []
    apply = attention._ShortAttention.apply
    monkeypatch.setattr(attention._ShortAttention, "apply", lambda *inputs: taken.append(inputs) or apply(*inputs))

    def run(dtype, most):
        monkeypatch.setattr(attention, "_MOST_SHORT_TOKENS", most)
        monkeypatch.setattr(attention, "_MOST_SCORES", 2 * 4 * 7**2)
        states = [each.to(dtype).requires_grad_() for each in exact]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            output = attention._sdpa(*states, options)
        return [output, *torch.autograd.grad(output, states, gradient[0].to(dtype))]

    found = [run(torch.float64, 256), run(torch.bfloat16, 0), run(torch.bfloat16, 256)]
    # Of three texts of seven tokens, two at once.
    assert [inputs[0].shape[::2] for inputs in taken] == [(2, 7), (1, 7), (1, 40), (1, 256)]
    for expected, kernel, ours in zip(*found, strict=True):
        errors = [(each.double() - expected).norm() for each in (ours, kernel)]
        assert errors[0] <= 1.2 * errors[1] <= 0.02 * expected.norm()
    taken.clear()
    with torch.inference_mode():
        attention._sdpa(*(each.bfloat16() for each in exact), options)
    assert [inputs[0].shape[2] for inputs in taken] == [40, 256]


# What differs from CALL; which library runs with flash-attn installed, and without; what torch's says if asked by name.
CHOICES = [
    ({}, "flash", "torch", None),
    ({"dtype": torch.float32}, "sdpa", "sdpa", r"bf16 or fp16, not in torch.float32: load the model with dtype="),
    ({"size": 12}, "flash", "sdpa", "a head_dim that is a multiple of 8, not 12"),
    ({"size": 256}, "flash", "torch", None),
    ({"size": 264}, "sdpa", "sdpa", "a head_dim of at most 256, not 264"),
    ({"dropout": 0.25}, "flash", "sdpa", "has no dropout: set attention_dropout to 0 in the config"),
    ({"capability": (7, 5)}, "sdpa", "sdpa", r"compute capability 8\.0 \(Ampere\)"),
    ({"capability": (12, 0)}, "flash", "torch", None),
    ({"window": 2, "kernel": 10}, "flash", "sdpa", r"sliding windows from torch 2\.11 on \(found torch"),
    ({"window": 2, "kernel": 11}, "flash", "torch", None),
    ({"device": "mps:0"}, "sdpa", "sdpa", "CUDA devices, not on 'mps'"),
]


@pytest.mark.parametrize(("differs", "with_flash", "without", "message"), CHOICES)
@torch.no_grad()
def test_the_fastest_kernel_that_can_run_is_chosen(kernels, monkeypatch, differs, with_flash, without, message):
    call = {**CALL, "kernel": 12, **differs}
    machine, generator = Machine(call["device"]), torch.Generator().manual_seed(5)
    states = [torch.randn(5, heads, call["size"], generator=generator).to(call["dtype"]) for heads in (4, 2, 2)]
    options = {**packing.boundary_kwargs([2, 3], "cpu"), "sliding_window": call["window"], "dropout": 0.0}
    options["scaling"] = call["size"] ** -0.5
    expected = attention._sdpa(*states, options)
    options |= {name: machine.to(options[name]) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
    options["dropout"] = call["dropout"]
    states = [machine.to(each) for each in states]
    monkeypatch.setattr(attention, "_sdpa", lambda *_: machine.to(expected))
    for kernel, library in (("flash", with_flash), (call["kernel"], without)):
        kernels.install(kernel, call["capability"])
        kernels.calls.clear()
        with machine:
            output = attention._automatic(*states, options)
        assert kernels.used() == ([] if library == "sdpa" else [library])
        if not call["dropout"]:
            assert_same(output.here, expected, tolerance=0.01)
        elif library == "flash":
            assert kernels.calls[0]["dropout_p"] == call["dropout"]
    if message is None:
        assert_same(attention._torch_varlen(*states, options).here, expected, tolerance=0.01)
    else:
        with pytest.raises(ValueError, match=f"^torch's variable-length attention [^\n]*{message}[^\n]*$"):
            attention._torch_varlen(*states, options)
