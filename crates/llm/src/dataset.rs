//! Pre-tokenised data.
