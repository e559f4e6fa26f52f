//! Limits of a device that kernels run on: its largest products and copies.

use std::time::{Duration, Instant};

use anyhow::Result;
use unsloth_rs::{
    DType, Device,
    core::ops::{elementwise, linear},
};

use super::{Limits, Rate};
use crate::case::random;

/// Measures a device by the fastest of square products of this size in each type, and by copies of `bytes` bytes.
///
/// # Errors
/// [`unsloth_rs::Error::OutOfMemory`] if they do not fit; [`unsloth_rs::Error::Launch`].
pub fn measure(device: &Device, time: Duration, (size, bytes): (usize, usize)) -> Result<Limits> {
    let product = |dtype: DType| -> Result<Rate> {
        let (x, dense) = (random(device, [size, size], dtype, 1)?, random(device, [size, size], dtype, 2)?);
        let weight = device.prepare_weight(dense)?;
        let seconds = fastest(device, time, || linear::forward(&x, &weight, None).map(drop))?;
        let by = format!("this library's product of {size} x {size} {dtype}");
        Ok(Rate::new(2.0 * (size as f64).powi(3) / seconds, by))
    };
    let supported = |dtype| device.supports(dtype).then(|| product(dtype)).transpose();
    let elements = bytes / size_of::<f32>();
    let x = random(device, [elements], DType::F32, 3)?;
    let seconds = fastest(device, time, || elementwise::copy(&x).map(drop))?;
    let copy = Rate::new(
        2.0 * (elements * size_of::<f32>()) as f64 / seconds,
        format!("copies of {bytes} bytes, read and written"),
    );
    Ok(Limits {
        f32_flops: product(DType::F32)?,
        bf16_flops: supported(DType::BF16)?,
        f16_flops: supported(DType::F16)?,
        read_bytes: copy.clone(),
        copy_bytes: copy,
    })
}

/// Runs that are sent to the device at once, so that waiting for it does not count.
const TOGETHER: u32 = 10;

/// Seconds of a run, by the fastest of many times [`TOGETHER`].
fn fastest(device: &Device, time: Duration, mut run: impl FnMut() -> unsloth_rs::Result<()>) -> Result<f64> {
    run()?;
    device.synchronize()?;
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while best.is_infinite() || start.elapsed() < time {
        let begin = Instant::now();
        for _ in 0..TOGETHER {
            run()?;
        }
        device.synchronize()?;
        best = best.min(begin.elapsed().as_secs_f64() / f64::from(TOGETHER));
    }
    Ok(best)
}
