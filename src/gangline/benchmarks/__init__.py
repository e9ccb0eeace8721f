"""Reproducible measurements: model shapes with random weights, routing replay, results with one schema."""
