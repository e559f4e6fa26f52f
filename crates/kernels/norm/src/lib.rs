//! Normalisation kernels in CubeCL, generic over the runtime and the element type. All arrays are contiguous, row-major.

pub mod rms_norm;
