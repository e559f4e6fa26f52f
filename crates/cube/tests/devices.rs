//! Several devices at once.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

use half::{bf16, f16};
use unsloth_core::{Category, DType, Device, Error, PoolUsage, Tensor, ops::elementwise};
use unsloth_cube::{CubeOptions, adapters, vulkan};
use unsloth_memory::Staging;

fn open() -> Device {
    let adapter = &adapters()[0];
    println!("running on {} ({})", adapter.name, adapter.driver);
    vulkan(0, CubeOptions { fill_arbitrary_with_nan: true, ..Default::default() }).unwrap()
}

/// There and back, with other bits in between, and on to a second device of the same kind: contents, what was moved, and who holds what.
#[test]
fn tensors_go_from_device_to_device_through_the_host() {
    let (cpu, first, second) = (unsloth_cpu::device(), open(), open());
    let staging = Staging::new(None);
    // Every pattern of 32 bits would do but those that arithmetic may not keep.
    let values: Vec<f32> =
        (0..5001u32).map(|i| f32::from_bits(0x3F80_0000 ^ i.wrapping_mul(2_654_435_761) >> 9)).collect();
    let tensor = cpu.from_slice(&values, [3, 1667], Category::Weights).unwrap();
    let (bytes, held) = (4 * 5001, (4 * 5001u64).next_multiple_of(256));
    let live = |device: &Device| device.usage().total_live_bytes();

    let there = staging.copy(&tensor, &first).unwrap();
    assert_eq!((there.device(), there.shape(), there.dtype()), (&first, tensor.shape(), DType::F32));
    assert_eq!([live(&cpu), live(&first), live(&second)], [held, held, 0]);
    assert_eq!(first.usage().live_bytes[Category::Activations.index()], held);
    let doubled = elementwise::add(there.clone(), &there).unwrap();
    let on = staging.copy(&doubled, &second).unwrap();
    assert_eq!([live(&cpu), live(&first), live(&second)], [held, 2 * held, held]);
    drop((there, doubled));
    let back = staging.copy(&on, &cpu).unwrap();
    drop(on);
    assert_eq!([live(&cpu), live(&first), live(&second)], [2 * held, 0, 0]);
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    let expected: Vec<f32> = values.iter().map(|value| value + value).collect();
    assert_eq!(bits(&back.to_vec::<f32>().unwrap()), bits(&expected));

    let transfers = staging.transfers();
    assert_eq!(transfers.map(|transfers| (transfers.num, transfers.bytes)), [(3, 3 * bytes); 2]);
    assert!(transfers.iter().all(|transfers| !transfers.time.is_zero()));
    // One buffer served all copies, and nobody has it now.
    assert_eq!(staging.pool().ledger().usage().total_live_bytes(), 0);
    let [class] = staging.pool().classes()[..] else { panic!("{:?}", staging.pool().classes()) };
    assert_eq!((class.num_fresh, class.num_reused, class.num_idle), (1, 2, 1));
}

#[test]
fn types_go_along_and_one_that_a_device_lacks_is_refused() {
    let (cpu, vulkan, staging) = (unsloth_cpu::device(), open(), Staging::new(None));
    let there_and_back = |tensor: Tensor| {
        let back = staging.copy(&staging.copy(&tensor, &vulkan).unwrap(), &cpu).unwrap();
        assert_eq!((back.dtype(), back.to_bytes().unwrap()), (tensor.dtype(), tensor.to_bytes().unwrap()));
    };
    there_and_back(cpu.from_slice(&[i32::MIN, -1, 7], [3], Category::Activations).unwrap());
    there_and_back(cpu.from_slice(&[f16::NAN, f16::NEG_ZERO, f16::EPSILON], [3], Category::Activations).unwrap());
    let missing = cpu.from_slice(&[bf16::ONE], [1], Category::Activations).unwrap();
    let refused = staging.copy(&missing, &vulkan).map(drop);
    assert!(matches!(refused, Err(Error::UnsupportedDType { dtype: DType::BF16, .. })), "{refused:?}");
}

/// Two backends on one thread: what one holds, has done or gives back is none of the other's.
#[test]
fn backends_share_no_stream() {
    let [one, other] = [open(), open()];
    let held = one.zeros([1000, 1000], DType::F32, Category::Activations).unwrap();
    let usage = one.pool_usage().unwrap();
    assert!(usage.reserved_bytes >= 4_000_000, "{usage:?}");
    assert_eq!(other.pool_usage().unwrap(), PoolUsage::default());
    other.trim().unwrap();
    assert_eq!(one.pool_usage().unwrap(), usage);
    drop(other);
    assert_eq!(held.to_vec::<f32>().unwrap(), vec![0.0; 1_000_000]);
}
