"""Pure decisions, one file a method; the engine and the simulator run the same objects."""
