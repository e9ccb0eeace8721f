"""What is built on meta is the same with and without torch's compiler, which nothing needs for it."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evaluation.tiny_text import saved_model
from gangline.runtime import on_meta
from gangline.runtime.on_meta import WithoutCompiler

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64]
DTYPES = st.sampled_from([None, *TYPES])


def same(compute):
    """The tensor that ``compute`` gives on meta, alike with and without."""
    with torch.device("meta"):
        expected = compute()
    with WithoutCompiler(), torch.device("meta"):
        found = compute()
    assert found.device == expected.device and found.dtype == expected.dtype
    assert found.shape == expected.shape and found.stride() == expected.stride()
    assert found.requires_grad == expected.requires_grad and type(found) is type(expected)
    return found


@given(
    st.integers(-50, 50),
    st.integers(0, 70_000),
    st.integers(1, 9),
    DTYPES,
    st.sampled_from(["", "end", "step"]),
)
def test_positions(start, count, step, dtype, named):
    end = start + count
    if named == "end":
        assert same(lambda: torch.arange(end=abs(end), dtype=dtype)).numel() == abs(end)
    elif named == "step":
        same(lambda: torch.arange(start, end, step=step, dtype=dtype, requires_grad=False))
    else:
        same(lambda: torch.arange(start, end, step, dtype=dtype))


@given(st.integers(1, 90), st.sampled_from(TYPES[:3]), st.sampled_from([10_000, 1e6, 2]), st.booleans())
def test_frequencies_of_positions(size, dtype, base, as_tensor):
    def compute():
        steps = torch.arange(0, 2 * size, 2, dtype=torch.int64).to(dtype).float() / (2 * size)
        scale = torch.empty(size) if as_tensor else 0.5
        return (1.0 / (base**steps)).reciprocal() * scale + 1

    assert same(compute).shape == (size,)


@given(st.integers(0, 300), st.integers(0, 300), DTYPES, st.booleans())
def test_an_empty_tensor_like_another(rows, columns, dtype, turned):
    def compute():
        tensor = torch.empty(rows, columns)
        return torch.empty_like(tensor.T if turned else tensor, dtype=dtype)

    same(compute)


def test_what_trains_and_what_is_large_goes_its_usual_way(monkeypatch):
    monkeypatch.setattr(on_meta, "_on_cpu", lambda tensor: pytest.fail("computed on the CPU"))
    assert same(lambda: nn.Parameter(torch.empty(4)) / 2).requires_grad
    assert same(lambda: torch.empty(on_meta._SMALL + 1) / 2).is_meta
    assert same(lambda: torch.arange(on_meta._SMALL + 1)).is_meta
    assert same(lambda: torch.arange(0.0, 5.0, 0.5)).numel() == 10


def test_other_devices_are_left_alone(seed):
    generator = torch.get_rng_state()
    expected = torch.nn.init.normal_(torch.empty(5)), torch.empty(3).fill_(2), torch.arange(4) / 3
    torch.set_rng_state(generator)
    with WithoutCompiler():
        found = torch.nn.init.normal_(torch.empty(5)), torch.empty(3).fill_(2), torch.arange(4) / 3
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    with WithoutCompiler(), pytest.raises((RuntimeError, NotImplementedError)):
        _ = torch.empty(3, device="meta").to("cpu")
    meta = torch.empty(3, device="meta")
    with WithoutCompiler(), pytest.raises(RuntimeError):
        _ = meta * torch.ones(3)


def test_modules_are_built_alike_and_draw_nothing(seed):
    def build():
        return nn.ModuleList(
            [nn.Linear(3, 4), nn.Embedding(5, 6, padding_idx=0), nn.LayerNorm(7), nn.Conv1d(2, 2, 3)]
        )

    before = torch.get_rng_state()
    with WithoutCompiler(), torch.device("meta"):
        built = build()
    assert torch.get_rng_state().equal(before)
    state = {name: (tensor.shape, tensor.dtype) for name, tensor in build().state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in built.state_dict().items()} == state
    assert all(tensor.is_meta for tensor in built.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_a_model_is_loaded_without_what_it_does_not_need(tmp_path, family):
    folder = saved_model(tmp_path / "model", family, seed=1)
    code = (
        "import sys, gangline\n"
        f"model = gangline.load({str(folder)!r})\n"
        "print(*sorted({'torch._dynamo', 'sympy', 'accelerate'} & set(sys.modules)))\n"
        "import torch\n"
        "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item() == 2\n"
        "assert torch._dynamo is sys.modules['torch._dynamo']\n"
        "model.gangline.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
