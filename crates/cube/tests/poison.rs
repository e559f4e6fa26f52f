//! A panic on the device's thread. A test binary of its own, because the device stays unusable for the rest of the process.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

use std::error::Error as _;

use cubecl::prelude::*;
use cubecl_wgpu::{WgpuDevice, WgpuRuntime};
use half::bf16;
use unsloth_common::Launch;
use unsloth_core::{Category, DType, Device, Error, Init, Memory, Place, Result};
use unsloth_cube::{CubeBackend, CubeOptions};

/// A kernel like any other, launched below with a type that WGSL does not have.
#[cube(launch)]
fn double_kernel<E: Float>(x: &mut Array<E>) {
    x[ABSOLUTE_POS] = x[ABSOLUTE_POS] + x[ABSOLUTE_POS];
}

/// The error names the operator that was running and what the thread said.
fn assert_names_the_kernel<T: std::fmt::Debug>(call: &str, result: Result<T>) {
    let error = result.unwrap_err();
    let Error::Launch { op, ref device, .. } = error else {
        panic!("{call}: {error}");
    };
    assert_eq!((op, device.as_str()), (call, "vulkan:0"));
    let source = error.source().unwrap().to_string();
    assert!(source.contains("panicked while running double"), "{call}: {source}");
    assert!(source.contains("bf16"), "{call}: {source}");
}

#[test]
fn a_panic_on_the_device_thread_is_an_error_of_every_later_call() {
    let backend =
        CubeBackend::<WgpuRuntime>::new(&WgpuDevice::DefaultDevice, "vulkan:0", CubeOptions::default()).unwrap();
    let mut buffer = backend.allocate(256, Category::Activations, Init::Zero).unwrap();
    let mut bytes = [0xAA; 256];
    backend.read(&*buffer, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 256]);

    // Copies of another backend of this device: one has left when the device fails, two are on their way.
    let other =
        CubeBackend::<WgpuRuntime>::new(&WgpuDevice::DefaultDevice, "vulkan:0", CubeOptions::default()).unwrap();
    let other = Device::new(other);
    let store = other.store(&Place::Host).unwrap();
    let tensor = other.zeros([64], DType::F32, Category::Activations).unwrap();
    let stored = [(); 3].map(|()| store.put(&tensor).unwrap());

    // The check of the element type is what a kernel of this repository does first, and what is left out here.
    let launched = backend.launch("double", |client| {
        assert!(Launch::new(client, "double").element::<bf16>().is_err());
        let x = Launch::new(client, "double").array::<bf16>("x", &client.empty(512), 256)?;
        double_kernel::launch::<bf16, WgpuRuntime>(client, CubeCount::Static(1, 1, 1), CubeDim::new_1d(256), x);
        Ok(())
    });
    launched.unwrap();

    bytes = [0xAA; 256];
    assert_names_the_kernel("read", backend.read(&*buffer, &mut bytes));
    assert_eq!(bytes, [0xAA; 256], "a failed read writes nothing");
    for _ in 0..2 {
        assert_names_the_kernel("synchronize", backend.synchronize());
        assert_names_the_kernel("read", backend.read(&*buffer, &mut bytes));
        assert_names_the_kernel("write", backend.write(std::sync::Arc::get_mut(&mut buffer).unwrap(), &[0; 4]));
        let allocated = backend.allocate(16, Category::Activations, Init::Zero);
        assert_names_the_kernel("allocate", allocated.map(drop));
        let mut ran = false;
        let next = backend.launch("next", |_| {
            ran = true;
            Ok(())
        });
        assert_names_the_kernel("next", next);
        assert!(!ran, "nothing is launched on a device that failed");
    }
    assert!(matches!(store.put(&tensor), Err(Error::Launch { op: "put", .. })));
    let refused = stored.map(|stored| match stored.take() {
        Err(Error::Launch { op, .. }) => op,
        other => panic!("{other:?}"),
    });
    assert_eq!(refused, ["take", "take", "put"]);
    assert_eq!((other.usage().total_live_bytes(), store.usage().live_bytes), (256, 0));
    // Opening the same device again does not hide the failure.
    let again = CubeBackend::<WgpuRuntime>::new(&WgpuDevice::DefaultDevice, "vulkan:0", CubeOptions::default());
    assert!(matches!(again.map(drop), Err(Error::Launch { op: "open device", .. })));
}
