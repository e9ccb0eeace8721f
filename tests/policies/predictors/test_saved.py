"""Trained networks survive a file bit by bit, and bad files are one clear error."""

import pytest
import torch
from safetensors.torch import save_file

from gangline.core.errors import UsageError
from gangline.models import find_moe
from gangline.policies.predictors import PREDICTORS
from gangline.policies.predictors.expertflow import RoutingPathPredictor
from gangline.policies.predictors.identity import describe_model, require_same_model
from gangline.policies.predictors.pregate import PreGates
from gangline.policies.predictors.read_me import DecoupledRouter
from gangline.policies.predictors.saved import load_predictor, save_predictor
from gangline.policies.predictors.sida import HashFunction
from gangline.policies.predictors.token_statistics import TokenStatistics
from gangline.policies.predictors.token_table import TokenTable
from tiny_models import tiny_model

NETWORKS = {
    "sida": (HashFunction, {"embedding": 6, "experts": [4, 4, 8], "hidden": 8, "causal": True}),
    "expertflow": (
        RoutingPathPredictor,
        {"vocabulary": 11, "layers": 2, "experts": 4, "feed_forward": 16, "depth": 1},
    ),
    "read-me": (DecoupledRouter, {"vocabulary": 11, "layers": 2, "experts": 4, "hidden": 16}),
}


@pytest.mark.parametrize("kind", sorted(NETWORKS))
def test_a_file_gives_the_same_network(kind, tmp_path, seed):
    build, config = NETWORKS[kind]
    network = build(**config).eval()
    path = save_predictor(tmp_path / "p.safetensors", kind, network, config, {"model": "demo"})
    found = load_predictor(path)
    assert (found.kind, dict(found.config), found.about["model"]) == (kind, config, "demo")
    inputs = torch.randn(1, 3, 6) if kind == "sida" else torch.randint(11, (1, 3))
    ours, theirs = found.network(inputs), network(inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [item.name for item in tmp_path.iterdir()] == ["p.safetensors"]


def test_pregates(tmp_path, seed):
    gates = [torch.randn(4, 5), torch.randn(4, 5), torch.randn(8, 5)]
    save_predictor(tmp_path / "p", "pre-gate", PreGates(gates), {"shapes": [[4, 5], [8, 5]]})
    network = load_predictor(tmp_path / "p").network
    x = torch.randn(2, 5)
    assert torch.equal(network(1, x), x @ gates[2].T)


def test_bad_files(tmp_path):
    with pytest.raises(UsageError, match="cannot be read as a predictor"):
        load_predictor(tmp_path / "none")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(UsageError, match="cannot be read as a predictor"):
        load_predictor(tmp_path / "text")
    save_file({"x": torch.zeros(2)}, tmp_path / "model")
    with pytest.raises(UsageError, match="not a predictor that this gangline knows"):
        load_predictor(tmp_path / "model")
    build, config = NETWORKS["sida"]
    save_predictor(tmp_path / "p", "sida", build(**config), config | {"hidden": 12})
    with pytest.raises(UsageError, match="is damaged"):
        load_predictor(tmp_path / "p")
    with pytest.raises(UsageError, match="cannot write"):
        save_predictor(tmp_path / "none" / "p", "sida", build(**config), config)


def test_token_statistics(tmp_path, seed):
    statistics = TokenStatistics([4, 6])
    token_ids = torch.randint(0, 9, (40,)).numpy()
    for layer, experts in enumerate((4, 6)):
        statistics.count(layer, token_ids, torch.rand(40, experts).topk(2).indices.numpy())
    table = TokenTable.of(statistics)
    save_predictor(tmp_path / "p", "token-id", table, table.config)
    found = load_predictor(tmp_path / "p")
    again = PREDICTORS["token-id"](None, network=found.network)
    for layer in range(2):
        for token in range(12):
            assert (again.share(layer, token) == statistics.share(layer, token)).all()


def test_another_model_is_refused(seed):
    view = find_moe(tiny_model("mixtral", seed=1))
    about = describe_model(view, "mine")
    assert require_same_model(about, view, "p") == [block.layer for block in view.blocks]
    half = find_moe(tiny_model("mixtral", seed=1, dtype=torch.bfloat16))
    assert require_same_model(about, half, "p") == require_same_model(about, view, "p")
    with pytest.raises(UsageError, match="routers of this model are others"):
        require_same_model(about, find_moe(tiny_model("mixtral", seed=2)), "p")
    with pytest.raises(UsageError, match="has no layer"):
        require_same_model(about, find_moe(tiny_model("dbrx", seed=1)), "p")
    with pytest.raises(UsageError, match="does not say which model"):
        require_same_model({}, view, "p")
    other = {**about, "layers": [layer | {"experts": 5} for layer in about["layers"]]}
    with pytest.raises(UsageError, match=r"not 5 and"):
        require_same_model(other, view, "p")
