"""Gate formulas: recognised by trying the module, and computed by the native core to fp32's accuracy."""

import math

import pytest
import torch
from torch.nn.functional import silu
from transformers.activations import ACT2FN

from gangline.kernels.cpu import native
from gangline.kernels.cpu.gates import GateForm, formula, recognise_gate
from gangline.kernels.reference import ExpertMath

core = native()
if core is None:
    pytest.skip("the native CPU core is not built here", allow_module_level=True)


@pytest.fixture(params=core.usable_kernels())
def table(request: pytest.FixtureRequest):
    before = core.kernels_name()
    core.use_kernels(request.param)
    yield request.param
    core.use_kernels(before)


def gated(activation):
    def apply(h):
        gate, up = h.chunk(2, dim=-1)
        return activation(gate) * up

    return apply


def clamped(h):
    gate, up = h.chunk(2, dim=-1)
    return silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0)


def clamped_late(h):
    gate, up = h.chunk(2, dim=-1)
    return silu(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0)


def oai(gate, up, limit=7.0):
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def oai_interleaved(h):
    return oai(h[..., ::2], h[..., 1::2])


def oai_concatenated(h):
    return oai(*h.chunk(2, dim=-1), limit=5.5)


FORMS = [
    *(GateForm(f"{p}{n}") for p in ("", "plain:") for n in ("silu", "gelu", "gelu_tanh", "relu", "relu2")),
    GateForm("plain:silu", 1.702),
    GateForm("identity"),
    GateForm("silu", 1.0, 10.0),
    GateForm("silu:late", 1.0, 7.0),
    GateForm("gelu", 1.0, 3.0),
    GateForm("swiglu_oai", 1.702, 7.0),
    GateForm("swiglu_oai", 1.5, 5.5),
]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("silu", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
        ("relu2", "relu2"),
    ],
)
def test_activations_are_recognised_with_and_without_a_gate(name: str, known: str) -> None:
    assert recognise_gate(ExpertMath(gated(ACT2FN[name])), 24, gated=True) == GateForm(known)
    assert recognise_gate(ExpertMath(ACT2FN[name]), 24, gated=False) == GateForm(f"plain:{known}")


def test_slopes_limits_and_shifts_are_recognised() -> None:
    assert recognise_gate(ExpertMath(gated(ACT2FN["quick_gelu"])), 8, gated=True) == GateForm("silu", 1.702)
    assert recognise_gate(ExpertMath(clamped), 40, gated=True) == GateForm("silu", 1.0, 10.0)
    assert recognise_gate(ExpertMath(clamped_late), 40, gated=True) == GateForm("silu:late", 1.0, 7.0)
    form = recognise_gate(ExpertMath(oai_interleaved, interleaved=True), 33, gated=True)
    assert form == GateForm("swiglu_oai", 1.702, 7.0)
    assert recognise_gate(ExpertMath(oai_concatenated), 33, gated=True) == GateForm("swiglu_oai", 1.702, 5.5)


@pytest.mark.parametrize("name", ["mish", "tanh", "sigmoid", "gelu_10", "leaky_relu", "relu6"])
def test_an_unknown_activation_is_not_mistaken_for_a_known_one(name: str) -> None:
    assert recognise_gate(ExpertMath(gated(ACT2FN[name])), 24, gated=True) is None
    assert recognise_gate(ExpertMath(ACT2FN[name]), 24, gated=False) is None


def test_gates_that_are_only_nearly_known_are_refused() -> None:
    def swapped(h):
        gate, up = h.chunk(2, dim=-1)
        return gate * silu(up)

    def scaled(h):
        return gated(silu)(h) * 1.001

    def one_sided(h):
        gate, up = h.chunk(2, dim=-1)
        return silu(gate.clamp(max=10.0)) * up.clamp(max=10.0)

    def normed(h):
        h = gated(silu)(h)
        return h / h.norm(dim=-1, keepdim=True)

    for gate in (swapped, scaled, one_sided, normed):
        assert recognise_gate(ExpertMath(gate), 24, gated=True) is None
    # The right formula on columns in the other order.
    assert recognise_gate(ExpertMath(gated(silu), interleaved=True), 24, gated=True) is None


def test_a_gate_that_fails_on_fp32_rows_is_left_to_torch() -> None:
    def half_only(h):
        if h.dtype != torch.float16:
            raise RuntimeError("half only")
        return h

    assert recognise_gate(ExpertMath(half_only), 24, gated=True) is None


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.name}-{form.alpha}-{form.limit}")
def test_the_native_gate_is_as_good_as_fp32_allows(form: GateForm, table: str, seed: int) -> None:
    """Weights of one 1 a row let chosen numbers through: rows of x are gates and ups."""
    width = 67
    is_gated = not form.name.startswith("plain:")
    columns = 2 * width if is_gated else width
    scale_T1 = torch.tensor([1e-3, 0.1, 1.0, 5.0, 30.0, 120.0, 1e4])[:, None]
    x_TG = torch.randn(7, columns) * scale_T1
    x_TG[0, :2] = 0.0
    h_TF = _identity_experts(x_TG, width, form)
    gate = x_TG[:, :width].double() if is_gated else None
    up = x_TG[:, -width:].double()
    want_TF = formula(form, gate, up)
    # An exponential is as good as its argument, which fp32 holds to some 6e-8 of its size.
    x = (up if gate is None else gate).abs()
    exponent = {"gelu": x.square() / 2, "gelu_tanh": 1.6 * x * (1 + 0.0447 * x.square())}.get(
        form.name.removeprefix("plain:"), form.alpha * x
    )
    room = 8e-7 + 2.5e-7 * exponent.clamp(max=104.0)
    assert ((h_TF - want_TF).abs() <= room * want_TF.abs() + 1e-33).all()


def test_the_names_of_gates_are_checked() -> None:
    with pytest.raises(ValueError, match="gate 'swish'"):
        core.MoELayer(8, 8, "swish", 1.0, math.inf, False)
    with pytest.raises(ValueError, match="limit"):
        core.MoELayer(8, 8, "silu", 1.0, 0.0, False)


def _identity_experts(x_TG: torch.Tensor, width: int, form: GateForm) -> torch.Tensor:
    tokens, columns = x_TG.shape
    first, down = torch.eye(columns), torch.zeros(columns, width)
    down[:width] = torch.eye(width)
    layer = core.MoELayer(columns, width, form.name, form.alpha, form.limit, False)
    expert = core.Expert(
        [
            core.Matrix(first.data_ptr(), columns, columns, "fp32"),
            core.Matrix(down.data_ptr(), columns, width, "fp32"),
        ]
    )
    y_TG = torch.empty(tokens, columns)
    token_P = torch.arange(tokens)
    core.experts_forward(
        layer, x_TG.data_ptr(), "f32", tokens, token_P.data_ptr(), [0, tokens], [expert], y_TG.data_ptr()
    )
    return y_TG[:, :width]
