//! Rotary position embedding in CubeCL, generic over the runtime and the element type. All arrays are contiguous, row-major.

pub mod rope;
