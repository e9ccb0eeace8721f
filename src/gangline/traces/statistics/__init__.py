"""Statistics of recorded routing, one file each: its definition, its source, and what chance would give."""
