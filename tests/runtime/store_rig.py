"""A small store over a real file; every expert has its own byte pattern, so that a wrong byte shows."""

import zlib
from pathlib import Path

import numpy as np

from gangline.core.keys import ExpertKey
from gangline.core.layout import ExpertCatalog, ExpertLayout, Extent, FieldSpec
from gangline.policies.caches import CachePolicy, LayerLRU
from gangline.runtime.files import ExpertFiles, IOMode
from gangline.runtime.read_plan import plan_reads
from gangline.runtime.slots import SlotPool
from gangline.runtime.store import ExpertStore

FIELD_BYTES = (5000, 9001)


def expected_bytes(key: ExpertKey, field: int) -> np.ndarray:
    """The content of one field: a pattern that no other field or expert has."""
    seed = zlib.crc32(f"{key.layer}.{key.expert}.{field}".encode())
    return np.random.default_rng(seed).integers(0, 256, FIELD_BYTES[field], dtype=np.uint8)


def make_catalog(folder: Path, layers: int, experts: int, *, checksums: bool = True) -> ExpertCatalog:
    """Write the experts with odd gaps between fields, so that offsets are not aligned to anything."""
    path = folder / "experts.bin"
    extents: dict[ExpertKey, tuple[Extent, ...]] = {}
    sums: dict[ExpertKey, int] = {}
    with path.open("wb") as file:
        for layer in range(layers):
            for expert in range(experts):
                key = ExpertKey(layer, expert)
                parts, crc = [], 0
                for field, nbytes in enumerate(FIELD_BYTES):
                    file.write(b"\xee" * ((layer + 3 * expert + field) % 7 * 100))
                    parts.append(Extent(0, file.tell(), nbytes))
                    data = expected_bytes(key, field).tobytes()
                    crc = zlib.crc32(data, crc)
                    file.write(data)
                extents[key], sums[key] = tuple(parts), crc
    fields = tuple(FieldSpec(f"f{i}", (1, n), "raw", n) for i, n in enumerate(FIELD_BYTES))
    layouts = (ExpertLayout(fields),) * layers
    return ExpertCatalog((path,), layouts, extents, sums if checksums else None)


def make_store(
    catalog: ExpertCatalog,
    slots: int,
    top_k: int,
    *,
    mode: IOMode = "auto",
    threads: int = 3,
    policy: CachePolicy | None = None,
    bound: bool = True,
) -> ExpertStore:
    """Open a store whose bound weights are the raw fields themselves; if not ``bound``, nothing binds yet."""
    files = ExpertFiles(catalog.files, mode)
    layers = len(catalog.layouts)
    experts = len(catalog.extents) // layers
    slot_bytes = max(plan_reads(e, files.align).nbytes for e in catalog.extents.values())
    slot_bytes = -(-slot_bytes // 4096) * 4096
    policy = policy or LayerLRU(slots, [top_k] * layers, [experts] * layers)
    pool = SlotPool(slot_bytes, slots, policy)
    bind = (lambda layer, raws: raws) if bound else None
    return ExpertStore(catalog, files, [pool], [0] * layers, bind, threads)
