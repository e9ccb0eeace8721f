"""How the engine handles an event, in numbers that the simulator shares. Nothing heavy is imported here."""

DENSE_PAIRS_PER_EXPERT = 2
"""A prompt that brings this many pairs per expert uses nearly every expert of the next layer as well."""

RUN_EXPERTS = 8
"""Experts of one call for a prompt: enough work for all threads, few enough outputs to hold."""

RUN_PAIRS_PER_ROW = 2
"""Pairs of one call for each row of a prompt: the memory plan counts their outputs. Where all rows choose the
same experts, a run is cut."""
