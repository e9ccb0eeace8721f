"""Exchange with other engines: what goes out comes back."""

import numpy as np
import pytest

from gangline.traces import TraceError, TraceWriter, open_trace
from gangline.traces.routed_experts import (
    RoutedRequest,
    export_routed_experts,
    from_base64,
    import_routed_experts,
    to_base64,
)
from traces.made import made_header, made_ids


def test_import_export_is_the_identity(seed, tmp_path):
    header = made_header(layers=3, experts=300, top_k=4, mode="ids")
    rng = np.random.default_rng(seed)
    sent = [made_ids(rng, rows, 3, 300, 4) for rows in (6, 9)]
    with TraceWriter(tmp_path, header) as writer:
        import_routed_experts(writer, RoutedRequest(sent[0], prompt_tokens=4))
        import_routed_experts(writer, RoutedRequest(sent[1], prompt_tokens=0, token_ids=range(9)))
    trace = open_trace(tmp_path)
    for document, ids in enumerate(sent):
        out = export_routed_experts(trace, document)
        assert out.dtype == np.int16 and np.array_equal(out, ids)
    assert [s.stop - s.start for s in trace.passes] == [4, 1, 1] + [1] * 9
    assert trace.tokens.phase.tolist() == [0] * 4 + [1] * 11


def test_base64_forms(seed):
    ids = made_ids(np.random.default_rng(seed), 5, 3, 64, 8)
    assert np.array_equal(from_base64(to_base64(ids)), ids)
    assert np.array_equal(from_base64(to_base64(ids, "int32"), shape=(3, 8)), ids)
    with pytest.raises(TraceError):
        from_base64("not base64!")
    with pytest.raises(TraceError):
        from_base64(to_base64(ids, "int32"))


def test_misfits_are_refused(seed, tmp_path):
    ids = made_ids(np.random.default_rng(seed), 5, 3, 8, 2)
    with TraceWriter(tmp_path / "ids", made_header(3, 8, 2, mode="ids")) as writer:
        for bad, problem in (
            (RoutedRequest(ids[:, :2], 1), "layers and experts"),
            (RoutedRequest(ids + 8, 1), "outside of layer 0"),
            (RoutedRequest(ids.astype(float), 1), "whole numbers"),
            (RoutedRequest(ids, 6), "6 prompt tokens of 5"),
            (RoutedRequest(ids, 1, token_ids=[1]), "1 token ids for 5"),
        ):
            with pytest.raises(TraceError, match=problem):
                import_routed_experts(writer, bad)
    with TraceWriter(tmp_path / "full", made_header(3, 8, 2)) as writer, pytest.raises(TraceError):
        import_routed_experts(writer, RoutedRequest(ids, 1))
