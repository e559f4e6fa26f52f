//! Greedy generation.
