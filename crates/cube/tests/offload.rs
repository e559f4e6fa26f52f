//! Tensors that wait in host memory while their device computes.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

use std::sync::Arc;

use half::f16;
use unsloth_core::{Category, DType, Device, Place, Tensor, TensorStore, ops::elementwise};
use unsloth_cube::{CubeOptions, adapters, vulkan};

fn device() -> Device {
    let adapter = &adapters()[0];
    println!("running on {} ({})", adapter.name, adapter.driver);
    vulkan(0, CubeOptions { fill_arbitrary_with_nan: true, ..Default::default() }).unwrap()
}

fn store(device: &Device) -> Arc<dyn TensorStore> {
    device.store(&Place::Host).unwrap()
}

const LENGTH: usize = 100_000;
const BYTES: u64 = (4 * LENGTH).next_multiple_of(256) as u64;

/// `[first, first + 1, ..]`, written by a kernel that was launched and not waited for.
fn counted(device: &Device, first: usize) -> Tensor {
    let halves: Vec<f32> = (0..LENGTH).map(|i| (first + i) as f32 / 2.0).collect();
    elementwise::scale(device.from_slice(&halves, [LENGTH], Category::Activations).unwrap(), 2.0).unwrap()
}

#[track_caller]
fn assert_counted(tensor: &Tensor, first: usize) {
    let values = tensor.to_vec::<f32>().unwrap();
    assert_eq!(values.len(), LENGTH);
    let wrong = values.iter().enumerate().find(|&(i, &value)| value != (first + i) as f32);
    assert_eq!(wrong, None, "from {first} on");
}

#[test]
fn what_is_taken_is_what_was_put_in_any_order() {
    let device = device();
    let store = store(&device);
    for order in [[4, 3, 2, 1, 0], [0, 1, 2, 3, 4], [2, 4, 0, 3, 1]] {
        let mut stored: Vec<_> = (0..5).map(|i| Some(store.put(&counted(&device, i)).unwrap())).collect();
        for i in order {
            assert_counted(&stored[i].take().unwrap().take().unwrap(), i);
        }
    }
    assert_eq!((store.usage().live_bytes, device.usage().total_live_bytes()), (0, 0));
}

/// What is launched after a put, or has been launched on a buffer that is older than the last copy, neither shows in what is copied
/// nor is missing there.
#[test]
fn a_copy_has_what_was_launched_before_and_nothing_later() {
    let device = device();
    let store = store(&device);
    let (early, late) = (counted(&device, 0), counted(&device, 1));
    let first = store.put(&early).unwrap();
    // In place but for the copy that is under way, which is of the values before.
    let early = elementwise::scale(early, 3.0).unwrap();
    // In place in a buffer that was there before the first copy.
    let buffer = late.buffer_id();
    let late = elementwise::scale(elementwise::scale(late, 0.25).unwrap(), 4.0).unwrap();
    assert_eq!(late.buffer_id(), buffer);
    let second = store.put(&late).unwrap();
    let late = elementwise::scale(late, 0.0).unwrap();
    store.settle().unwrap();
    assert_counted(&second.take().unwrap(), 1);
    assert_counted(&first.take().unwrap(), 0);
    assert!(early.to_vec::<f32>().unwrap().iter().enumerate().all(|(i, &value)| value == 3.0 * i as f32));
    assert!(late.to_vec::<f32>().unwrap().iter().all(|&value| value == 0.0));
}

#[test]
fn two_stay_on_the_device_until_they_have_left() {
    let device = device();
    let store = store(&device);
    let mut stored = Vec::new();
    for i in 0..6 {
        stored.push(store.put(&counted(&device, i)).unwrap());
        assert_eq!(device.usage().total_live_bytes(), BYTES * 2.min(i as u64 + 1));
    }
    store.settle().unwrap();
    assert_eq!(device.usage().total_live_bytes(), 0);
    for (i, stored) in stored.into_iter().enumerate().rev() {
        assert_counted(&stored.take().unwrap(), i);
    }
    let (usage, bytes) = (store.usage(), 6 * 4 * LENGTH as u64);
    assert_eq!((usage.put.num, usage.put.bytes), (6, bytes));
    assert_eq!((usage.taken.num, usage.taken.bytes), (6, bytes));
    assert_eq!((usage.live_bytes, usage.peak_bytes), (0, 6 * BYTES));
    // Buffers that are mapped for the host are memory that the system does not move: CubeCL says so.
    assert_eq!(usage.pinned_peak_bytes, 6 * BYTES);
}

#[test]
fn types_and_lengths_that_are_no_whole_words() {
    let device = device();
    let store = store(&device);
    let halves: Vec<f16> = (0..7).map(|i| f16::from_f32(i as f32)).collect();
    let tensors = [
        device.from_slice(&halves, [7], Category::Activations).unwrap(),
        device.from_slice(&[7i32, -8, 9], [3], Category::Activations).unwrap(),
        device.zeros([0, 5], DType::F32, Category::Activations).unwrap(),
        device.zeros([1, 2, 3], DType::F32, Category::Activations).unwrap(),
    ];
    let expected = tensors.each_ref().map(|tensor| (tensor.dtype(), *tensor.shape(), tensor.to_bytes().unwrap()));
    let stored = tensors.map(|tensor| store.put(&tensor).unwrap());
    store.settle().unwrap();
    let taken = stored.map(|stored| stored.take().unwrap());
    assert_eq!(taken.each_ref().map(|tensor| (tensor.dtype(), *tensor.shape(), tensor.to_bytes().unwrap())), expected);
}

#[test]
fn a_tensor_of_another_device_is_refused() {
    let store = store(&device());
    let elsewhere = unsloth_cpu::device().zeros([4], DType::F32, Category::Activations).unwrap();
    let error = store.put(&elsewhere).map(drop).unwrap_err().to_string();
    assert_eq!(error, "put: `tensor` is on cpu, expected vulkan:0");
    assert_eq!((store.usage().live_bytes, store.usage().put.num), (0, 0));
}

/// Two devices of one thread have stores of their own, which outlive neither each other nor what they hold.
#[test]
fn what_outlives_its_store_comes_back() {
    let devices = [device(), device()];
    let stored: Vec<_> = devices
        .iter()
        .map(|device| {
            let store = store(device);
            (0..3).map(|i| store.put(&counted(device, i)).unwrap()).collect::<Vec<_>>()
        })
        .collect();
    for (device, stored) in devices.iter().zip(stored) {
        for (i, stored) in stored.into_iter().enumerate().skip(1) {
            let tensor = stored.take().unwrap();
            assert_eq!(tensor.device(), device);
            assert_counted(&tensor, i);
        }
        assert_eq!(device.usage().total_live_bytes(), 0);
    }
}
