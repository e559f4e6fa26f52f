//! Adapters in the format of Python's PEFT.
