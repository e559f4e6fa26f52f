//! What the pool of a device tells its user.
#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

use unsloth_core::{Category, ClassUsage, DType, Tensor};
use unsloth_cpu::{CpuBackend, CpuOptions};

#[test]
fn sizes_and_reuse_by_device() {
    let device = unsloth_core::Device::new(CpuBackend::new(CpuOptions::default()).unwrap());
    assert!(device.pool_classes().is_empty());
    let tensor = |rows: usize| -> Tensor { device.zeros([rows, 256], DType::F32, Category::Activations).unwrap() };
    for _ in 0..3 {
        drop((tensor(64), tensor(640)));
    }
    let held = tensor(64);
    let counts =
        |class: &ClassUsage| (class.block_bytes, class.num_lent, class.num_idle, class.num_fresh, class.num_reused);
    let classes: Vec<_> = device.pool_classes().iter().map(counts).collect();
    assert_eq!(classes, [(64 << 10, 1, 0, 1, 3), (640 << 10, 0, 1, 1, 2)]);
    let usage = device.pool_usage().unwrap();
    assert_eq!((usage.reserved_bytes, usage.idle_bytes), (704 << 10, 640 << 10));
    drop(held);
    device.trim().unwrap();
    assert_eq!(device.pool_usage().unwrap().reserved_bytes, 0);
}
