//! Training and evaluation from files to files.
