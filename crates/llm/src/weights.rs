//! Tensors of a safetensors checkpoint.
