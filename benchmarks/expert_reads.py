"""How fast the store brings experts from disk: in place or from a pack, past or through the page cache, and
how deep.

    python benchmarks/expert_reads.py FOLDER --rounds 5 --out benchmarks/results/expert_reads.json

FOLDER holds a safetensors checkpoint whose experts can be read in place (three matrices of one expert lie
apart). The first layers are packed (one record an expert) into a temporary folder on the same disk. Every
reading takes random experts of those layers through the store itself, with nothing computed, page cache
emptied before; the ways take turns in each round. The default (in place, direct, 4 threads) is "ours", the
other ways stand as peers.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from gangline.benchmarks.confine import drop_page_cache
from gangline.benchmarks.result import Row, write_result
from gangline.checkpoint.locate import LocalCheckpoint, resolve_checkpoint
from gangline.checkpoint.pack import write_pack
from gangline.checkpoint.source import ExpertSource
from gangline.core.keys import ExpertKey
from gangline.core.layout import ExpertCatalog
from gangline.policies.caches import RandomEviction
from gangline.runtime.files import ExpertFiles, IOMode
from gangline.runtime.opened import largest_reads, open_model
from gangline.runtime.slots import SlotPool
from gangline.runtime.store import ExpertStore

SLOTS = 24
WAYS: dict[str, tuple[str, IOMode, int]] = {
    "in place, direct, 4 threads": ("in place", "direct", 4),
    "in place, direct, 1 thread": ("in place", "direct", 1),
    "in place, direct, 2 threads": ("in place", "direct", 2),
    "in place, direct, 8 threads": ("in place", "direct", 8),
    "in place, cached, 4 threads": ("in place", "cached", 4),
    "pack, direct, 4 threads": ("pack", "direct", 4),
    "pack, cached, 4 threads": ("pack", "cached", 4),
}
DEFAULT = "in place, direct, 4 threads"


class FirstLayers:
    """The first layers of a source, so that the pack stays small."""

    def __init__(self, source: ExpertSource, layers: int) -> None:
        self.layouts = source.layouts[:layers]
        self.experts = source.experts[:layers]
        self.notes = source.notes
        self.catalog = None
        self.read_layer = source.read_layer


def first_layers(catalog: ExpertCatalog, layers: int) -> ExpertCatalog:
    """The same part of a catalog."""
    extents = {key: value for key, value in catalog.extents.items() if key.layer < layers}
    return ExpertCatalog(catalog.files, catalog.layouts[:layers], extents)


def reading(catalog: ExpertCatalog, mode: IOMode, threads: int, experts: int, seed: int) -> float:
    """Bytes/s of reading random experts, ``threads`` reads in flight."""
    drop_page_cache()
    files = ExpertFiles(catalog.files, mode)
    pool = SlotPool(max(largest_reads(catalog, files.align)), SLOTS, RandomEviction(seed))
    layers = len(catalog.layouts)
    store = ExpertStore(catalog, files, [pool], [0] * layers, lambda layer, raws: raws, threads)
    keys = random.Random(seed).sample(sorted(catalog.extents), experts)
    started = time.perf_counter()
    for key in keys:
        store.wait_below(SLOTS // 2)
        store.request(ExpertKey(*key))
    store.wait_idle()
    speed = store.stats.total_bytes_read / (time.perf_counter() - started)
    store.close()
    return speed


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", type=int, default=96, help="experts per reading")
    parser.add_argument("--layers", type=int, default=4, help="layers that are packed and read")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    checkpoint = resolve_checkpoint(arguments.folder)
    assert isinstance(checkpoint, LocalCheckpoint)
    source = open_model(checkpoint, None).source
    if source.catalog is None:
        parser.error("the experts of this checkpoint cannot be read in place")
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(dir=arguments.folder.parent) as folder:
        packed = write_pack(FirstLayers(source, arguments.layers), Path(folder) / "pack", key="reads")
        unchecked = ExpertCatalog(packed.files, packed.layouts, packed.extents)
        catalogs = {"in place": first_layers(source.catalog, arguments.layers), "pack": unchecked}
        for turn in range(arguments.rounds):
            for way, (place, mode, threads) in WAYS.items():
                speed = reading(catalogs[place], mode, threads, arguments.experts, turn)
                speeds[way].append(speed)
                print(f"round {turn + 1}: {way}: {speed / 1e9:.2f} GB/s", flush=True)
    ours = speeds[DEFAULT]
    rows = [
        Row(
            work=f"random experts of {catalogs['in place'].layouts[0].nbytes / 2**20:.1f} MiB, {DEFAULT}",
            metric="bytes/s",
            ours=statistics.median(ours),
            peer=way,
            peer_value=statistics.median(peer),
            ratio=statistics.median(a / b for a, b in zip(ours, peer, strict=True)),
            n=len(ours),
            spread=max(ours) - min(ours),
        )
        for way, peer in speeds.items()
        if way != DEFAULT
    ]
    if arguments.out is not None:
        write_result(arguments.out.stem, rows, folder=arguments.out.parent)


if __name__ == "__main__":
    main()
