"""The tiered expert store, the memory planner and the experts backend that transformers calls."""
