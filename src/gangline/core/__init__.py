"""The few words that every other folder speaks: plain dataclasses and errors."""
