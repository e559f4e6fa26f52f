//! The pool of a device, divided as it was asked to be. A test binary of its own: a device is opened once in a process.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

use cubecl_wgpu::{WgpuDevice, WgpuRuntime};
use unsloth_core::{Category, DType, Device, Error, PoolUsage, Tensor};
use unsloth_cube::{CubeBackend, CubeOptions, Pools, adapters, vulkan, wgpu};

fn with(pools: Pools) -> CubeOptions {
    CubeOptions { pools, ..Default::default() }
}

fn tensors(device: &Device, num: usize) -> Vec<Tensor> {
    (0..num).map(|_| device.zeros([300, 1000], DType::F32, Category::Activations).unwrap()).collect()
}

/// What a pool lends is what the ledger says but for its rounding; what nobody has it gives back, page by page, and the rest when nobody
/// has that either. Gives what it holds for twelve tensors, for five and for one.
fn follows_the_ledger(device: &Device) -> [PoolUsage; 3] {
    assert_eq!(device.pool_usage().unwrap(), PoolUsage::default(), "a stream that nobody else has");
    assert!(device.pool_classes().is_empty(), "CubeCL does not tell sizes");
    let mut held = tensors(device, 12);
    let usages = [12, 5, 1].map(|num| {
        held.truncate(num);
        device.trim().unwrap();
        let (usage, counted) = (device.pool_usage().unwrap(), device.usage().total_live_bytes());
        assert_eq!(counted, num as u64 * 1_200_128);
        let lent = usage.reserved_bytes - usage.idle_bytes;
        assert!((counted - 256 * num as u64..=counted).contains(&lent), "{num}: {lent} bytes lent for {counted}");
        usage
    });
    drop(held);
    let usage = device.pool_usage().unwrap();
    assert_eq!(usage, PoolUsage { idle_bytes: usages[2].reserved_bytes, ..usages[2] });
    device.trim().unwrap();
    assert_eq!(device.pool_usage().unwrap(), PoolUsage::default());
    println!("for 12, 5 and 1 tensors: {usages:?}");
    usages
}

#[test]
fn pools_are_as_asked_for_and_follow_the_ledger() {
    println!("running on {} ({})", adapters()[0].name, adapters()[0].driver);
    let device = vulkan(0, with(Pools::Pages)).unwrap();
    let [twelve, five, one] = follows_the_ledger(&device);
    // A page has one buffer: what stays is a page for each.
    assert_eq!([twelve, five].map(|usage| usage.reserved_bytes), [12, 5].map(|num| num * one.reserved_bytes));
    assert!(one.reserved_bytes < 2_000_000, "{one:?}");

    // Another way is refused for this device, and the same one, or none, is not.
    let error = vulkan(0, with(Pools::Slices)).unwrap_err();
    let message = "open device: pools = Slices, must be as this process has opened the device first";
    assert_eq!(error.to_string(), message);
    for pools in [Pools::Pages, Pools::Runtime] {
        let again = vulkan(0, with(pools)).unwrap();
        assert_eq!(again.pool_usage().unwrap(), PoolUsage::default());
        assert_eq!(tensors(&again, 2)[1].to_vec::<f32>().unwrap(), [0.0; 300_000]);
    }

    // `wgpu` is a device of its own to CubeCL. Slices are what it takes by default.
    let other = wgpu(with(Pools::Slices)).unwrap();
    let [twelve, _, one] = follows_the_ledger(&other);
    // A page has several, and stays for one of them.
    assert!(one.reserved_bytes > 4_000_000 && twelve.reserved_bytes > one.reserved_bytes, "{twelve:?}, {one:?}");
    assert!(twelve.reserved_bytes < 12 * one.reserved_bytes, "{twelve:?}, {one:?}");
    assert!(wgpu(with(Pools::Runtime)).is_ok());
    assert!(matches!(wgpu(with(Pools::Pages)), Err(Error::InvalidSpec { field: "pools", .. })));
}

#[test]
fn a_runtime_without_a_choice_refuses_one() {
    let opened = CubeBackend::<WgpuRuntime>::new(&WgpuDevice::Cpu, "cuda:0", with(Pools::Pages));
    let error = opened.map(drop).unwrap_err().to_string();
    assert_eq!(error, "open device: a choice of pools is not supported on cuda:0");
}
