//! Attention and feed-forward halves of a decoder layer.
