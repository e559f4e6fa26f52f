//! A decoder-only transformer.
