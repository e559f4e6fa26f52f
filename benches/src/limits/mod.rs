//! What the machine can do at most, measured: the numbers that times are held against.

mod cpu;
mod device;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use unsloth_rs::{DType, core::ops::Cost};

pub use cpu::{Products, measure as cpu};
pub use device::measure as device;

/// Measured rates of one device with one number of threads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Multiplications and additions of f32 per second.
    pub f32_flops: Rate,
    /// Those of bf16 pairs summed in f32, where the device has instructions for them.
    pub bf16_flops: Option<Rate>,
    /// Those of f16 pairs summed in f32, where the device has instructions for them.
    pub f16_flops: Option<Rate>,
    /// Bytes read per second.
    pub read_bytes: Rate,
    /// Bytes read and written per second by a copy.
    pub copy_bytes: Rate,
}

/// A rate and how it was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// Per second.
    pub per_second: f64,
    /// By what it was measured.
    pub by: String,
}

impl Rate {
    fn new(per_second: f64, by: impl Into<String>) -> Self {
        Self { per_second, by: by.into() }
    }
}

/// What bounds a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// Its products.
    Compute,
    /// Its traffic.
    Memory,
}

impl Limits {
    /// Least time that the device needs for this work, and what it is bound by: products at their measured rate; traffic at that of
    /// copying as far as as much is written as read, and what is read beside that at the rate of reading.
    pub fn least_time(&self, cost: Cost, dtype: DType) -> (Duration, Bound) {
        let flops = match dtype {
            DType::BF16 => self.bf16_flops.as_ref(),
            DType::F16 => self.f16_flops.as_ref(),
            _ => None,
        };
        let compute = cost.flops as f64 / flops.unwrap_or(&self.f32_flops).per_second;
        let read_alone = cost.read.saturating_sub(cost.written);
        let copied = cost.bytes() - read_alone;
        let memory = read_alone as f64 / self.read_bytes.per_second + copied as f64 / self.copy_bytes.per_second;
        let bound = if compute > memory { Bound::Compute } else { Bound::Memory };
        (Duration::from_secs_f64(compute.max(memory)), bound)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use unsloth_rs::{DType, core::ops::Cost};

    use super::{Bound, Limits, Rate, cpu};

    #[test]
    fn the_slower_of_products_and_traffic_bounds() {
        let rate = |per_second| Rate::new(per_second, "by hand");
        let (read_bytes, copy_bytes) = (rate(10.0), rate(8.0));
        let limits =
            Limits { f32_flops: rate(100.0), bf16_flops: Some(rate(200.0)), f16_flops: None, read_bytes, copy_bytes };
        // Three read, one of them copied.
        let cost = Cost { flops: 400, read: 24, written: 8 };
        assert_eq!(limits.least_time(cost, DType::F32), (Duration::from_secs(4), Bound::Compute));
        assert_eq!(limits.least_time(cost, DType::F16), (Duration::from_secs(4), Bound::Compute));
        assert_eq!(limits.least_time(cost, DType::BF16), (Duration::from_millis(3600), Bound::Memory));
        let written = Cost { flops: 0, read: 8, written: 24 };
        assert_eq!(limits.least_time(written, DType::F32), (Duration::from_secs(4), Bound::Memory));
    }

    #[test]
    fn this_processor_has_limits() {
        let (limits, products) = cpu(1, Duration::from_millis(5), 1 << 22);
        for rate in
            [Some(&limits.f32_flops), limits.bf16_flops.as_ref(), Some(&limits.read_bytes), Some(&limits.copy_bytes)]
        {
            assert!(rate.is_none_or(|rate| rate.per_second > 1e8 && rate.per_second.is_finite()), "{rate:?}");
        }
        // One sprint beside other tests is slower than the best of several; it counts the same products, though.
        let bf16 = limits.bf16_flops.as_ref().unwrap_or(&limits.f32_flops);
        for (dtype, rate) in [(DType::F32, &limits.f32_flops), (DType::F16, &limits.f32_flops), (DType::BF16, bf16)] {
            let share = 1e7 / products.time(dtype, 1e7).as_secs_f64() / rate.per_second;
            assert!((0.01..4.0).contains(&share), "{dtype}: {share} of {rate:?}");
        }
    }
}
