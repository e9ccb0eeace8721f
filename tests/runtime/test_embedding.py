"""The input embedding that stays in its file: the same rows, few pages, and no write of the user's lost."""

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from gangline.runtime.embedding import RESIDENT_BYTES, leave_in_file, lookup_table
from gangline.runtime.planner import PlanRequest, make_plan
from runtime.footprint_rig import MIB, make_footprint
from tiny_models import tiny_model

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/pagemap")

ROWS, WIDTH = 48 * 1024, 512  # 96 MiB in fp32


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "t.safetensors"
    save_file(
        {"weight": torch.arange(ROWS, dtype=torch.float32)[:, None].expand(ROWS, WIDTH).contiguous()}, path
    )
    return path


@pytest.fixture
def table(file):
    with safe_open(file, "pt") as opened:
        found = nn.Embedding(1, 1)
        found.weight = nn.Parameter(opened.get_tensor("weight"), requires_grad=False)
        found.num_embeddings, found.embedding_dim = ROWS, WIDTH
    return found


def resident(weight):
    """Bytes of the weight's pages that are in this process's memory."""
    first, pages = weight.data_ptr() // mmap.PAGESIZE, weight.numel() * 4 // mmap.PAGESIZE
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(first * 8)
        states = np.frombuffer(pagemap.read(pages * 8), dtype=np.uint64)
    return int(np.count_nonzero(states >> np.uint64(63))) * mmap.PAGESIZE


def test_rows_are_right_and_few_pages_stay(table, seed):
    generator = torch.Generator().manual_seed(seed)
    undo = leave_in_file(table)
    for shape in [(3, 700), (1, 1), (2000,)]:
        ids = torch.randint(ROWS, shape, generator=generator)
        found = table(ids)
        assert found.shape == (*shape, WIDTH)
        assert torch.equal(found, ids.float()[..., None].expand(found.shape))
        assert resident(table.weight) <= RESIDENT_BYTES
    before = resident(table.weight)
    for token in [0, ROWS - 1, *torch.randint(ROWS, (200,), generator=generator).tolist()]:
        found = table(torch.tensor([[token]]))
        assert torch.equal(found, torch.full((1, 1, WIDTH), float(token)))
        assert resident(table.weight) <= before
    for outside in (-1, ROWS):
        with pytest.raises(IndexError):
            table(torch.tensor([outside]))
    undo()
    assert table(torch.tensor([5])).tolist() == [[5.0] * WIDTH]
    table(torch.arange(ROWS))
    assert resident(table.weight) > RESIDENT_BYTES


def test_what_the_user_writes_stays(table):
    leave_in_file(table)
    table.weight.data[7] = -1.0
    ids = torch.arange(0, ROWS, 50)
    for _ in range(2):
        table(ids)
        for token in range(40):
            table(torch.tensor([token]))
    assert table(torch.tensor([7, 8]))[:, 0].tolist() == [-1.0, 8.0]


def test_single_rows_see_what_the_user_writes_at_any_time(table, seed):
    generator = torch.Generator().manual_seed(seed)
    leave_in_file(table)
    first, second = torch.randperm(ROWS, generator=generator)[:2].tolist()
    assert table(torch.tensor([first]))[0, 0] == first
    with torch.no_grad():
        table.weight[first] += 0.5
    table.weight.data[second, -1] = -3.0
    for _ in range(40):
        assert table(torch.tensor([first]))[0].unique().tolist() == [first + 0.5]
        assert table(torch.tensor([second]))[0, -1] == -3.0
    table.weight.data = torch.full((ROWS, WIDTH), 9.0)
    assert table(torch.tensor([[first]])).unique().tolist() == [9.0]


def test_a_file_that_was_exchanged_is_not_read(table, file, tmp_path):
    other = tmp_path / "moved.safetensors"
    file.rename(other)
    save_file({"weight": torch.zeros(ROWS, WIDTH)}, file)
    try:
        leave_in_file(table)
        assert table(torch.tensor([77]))[0, 0] == 77.0
    finally:
        other.replace(file)


def test_another_weight_is_used_from_then_on(table):
    leave_in_file(table)
    table.weight = nn.Parameter(torch.full((ROWS, 2), 5.0))
    assert table(torch.tensor([[1, 2, 3]])).tolist() == [[[5.0, 5.0]] * 3]


def test_a_weight_in_memory_is_left_alone(caplog):
    plain = nn.Embedding(100, 8)
    leave_in_file(plain)
    assert "forward" not in plain.__dict__
    assert "not planned" in caplog.text


def test_only_a_table_of_its_own_can_stay_in_its_file():
    assert lookup_table(tiny_model("olmoe")) == "model.embed_tokens.weight"
    tied = tiny_model("olmoe")
    tied.lm_head.weight = tied.model.embed_tokens.weight
    assert lookup_table(tied) is None


NEEDS = make_footprint(8, dense=700 * MIB, table=600 * MIB)


def planned(budget, available=None):
    return make_plan(PlanRequest("m", budget, "stored", 16, available=available), NEEDS)


def test_a_table_with_room_for_all_of_it_is_not_looked_up_in_its_file():
    whole = planned(None)
    assert whole.everything_resident and whole.in_file == 0
    assert planned(whole.peak).in_file == 0
    tight = planned(whole.peak - 1)
    assert tight.everything_resident and tight.in_file == 600 * MIB - RESIDENT_BYTES
    assert planned(None, available=whole.peak - 1).in_file == tight.in_file
    small = planned(tight.smallest)
    assert not small.everything_resident and small.in_file == tight.in_file
    assert whole.smallest == tight.smallest <= tight.peak <= whole.peak - 1
