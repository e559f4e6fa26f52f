//! What goes wrong becomes a typed error that names the operator, before anything is launched or allocated, and the device goes on.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

use std::sync::mpsc;

use cubecl::{CubeDim, prelude::ComputeClient};
use cubecl_wgpu::{WgpuDevice, WgpuRuntime};
use half::bf16;
use unsloth_common::{Launch, LaunchError};
use unsloth_core::{
    Category, DType, Device, Error, Tensor,
    ops::{
        elementwise, embedding, linear,
        lora_linear::{self, Adapter},
    },
};
use unsloth_cube::{CubeBackend, CubeOptions, adapters, vulkan};
use unsloth_pointwise::elementwise as kernels;

type Client = ComputeClient<WgpuRuntime>;

fn device(budget_bytes: Option<u64>) -> Device {
    let adapter = &adapters()[0];
    println!("running on {} ({})", adapter.name, adapter.driver);
    vulkan(0, CubeOptions { budget_bytes, fill_arbitrary_with_nan: true, ..Default::default() }).unwrap()
}

fn backend() -> CubeBackend<WgpuRuntime> {
    let options = CubeOptions { fill_arbitrary_with_nan: true, ..Default::default() };
    CubeBackend::new(&WgpuDevice::DefaultDevice, "vulkan:0", options).unwrap()
}

/// The launch error inside of the error of operator `name`.
fn refused(name: &str, launch: impl FnOnce(&Client) -> Result<(), LaunchError>) -> LaunchError {
    let backend = backend();
    let error = backend.launch("operator", launch).unwrap_err();
    let Error::Launch { op: "operator", source, .. } = error else {
        panic!("{error}");
    };
    let source = *source.downcast::<LaunchError>().unwrap();
    assert!(source.to_string().starts_with(&format!("{name}: ")), "{source}");
    assert_works(&Device::new(backend));
    source
}

/// The device computes.
fn assert_works(device: &Device) {
    let x = device.from_slice(&[1.0f32, 2.0, 3.0], [3], Category::Activations).unwrap();
    let sum = elementwise::add(x.clone(), &x).unwrap();
    assert_eq!(sum.to_vec::<f32>().unwrap(), [2.0, 4.0, 6.0]);
}

#[test]
fn a_type_that_the_device_lacks() {
    let device = device(None);
    assert!(!device.supports(DType::BF16), "this driver stores bf16: the test needs another missing type");
    let error = device.zeros([4], DType::BF16, Category::Activations).unwrap_err();
    assert!(matches!(error, Error::UnsupportedDType { op: "allocate", dtype: DType::BF16, .. }), "{error}");
    let error = device.from_slice(&[bf16::ONE; 4], [4], Category::Weights).unwrap_err();
    assert!(matches!(error, Error::UnsupportedDType { dtype: DType::BF16, .. }), "{error}");
    let x = device.zeros([4], DType::F32, Category::Activations).unwrap();
    let error = elementwise::cast(&x, DType::BF16).unwrap_err();
    assert!(matches!(error, Error::UnsupportedDType { op: "cast", dtype: DType::BF16, .. }), "{error}");
    assert_works(&device);
}

#[test]
fn an_element_type_of_a_kernel() {
    let error = refused("add", |client| {
        let x = client.empty(16);
        let args = kernels::Binary { a: None, b: &client.empty(16), out: &x };
        kernels::binary::<WgpuRuntime, bf16>(client, kernels::BinaryOp::Add, 8, args)
    });
    assert!(matches!(&error, LaunchError::Unsupported { what, .. } if what.contains("bf16")), "{error}");
}

#[test]
fn too_many_units() {
    let error = refused("wide", |client| {
        let units = client.properties().hardware.max_units_per_cube + 1;
        Launch::new(client, "wide").cube(CubeDim::new_1d(units), 0)
    });
    assert!(matches!(error, LaunchError::Limit { what: "units per cube", .. }), "{error}");
}

#[test]
fn too_much_shared_memory() {
    let error = refused("greedy", |client| {
        let bytes = client.properties().hardware.max_shared_memory_size + 1;
        Launch::new(client, "greedy").cube(CubeDim::new_1d(64), bytes)
    });
    assert!(matches!(error, LaunchError::Limit { what: "bytes of shared memory", .. }), "{error}");
}

#[test]
fn too_many_cubes() {
    let error = refused("long", |client| {
        let most = client.properties().hardware.max_cube_count.0 as usize;
        Launch::new(client, "long").cubes(most + 1, 1, 1).map(drop)
    });
    assert!(matches!(error, LaunchError::Limit { what: "cubes in x", .. }), "{error}");
}

#[test]
fn a_buffer_shorter_than_its_shape() {
    let error = refused("scale", |client| kernels::scale::<WgpuRuntime, f32>(client, 5, &client.empty(16), 2.0));
    assert!(matches!(error, LaunchError::Length { arg: "x", expected: 20, actual: 16, .. }), "{error}");
}

#[test]
fn a_buffer_beyond_the_largest_of_the_device() {
    let (device, backend) = (device(None), backend());
    let largest = backend_limit(&backend);
    let len = largest as usize / 4 + 1;
    for error in [
        device.zeros([len], DType::F32, Category::Weights).unwrap_err(),
        device.empty([len], DType::F32, Category::Weights).unwrap_err(),
        // Sizes that wrap around when they are multiplied.
        device.empty([usize::MAX / 2, 16], DType::F32, Category::Weights).unwrap_err(),
    ] {
        let Error::BufferTooLarge { requested_bytes, category: Category::Weights, limit_bytes, .. } = error else {
            panic!("{error}");
        };
        assert!(requested_bytes > largest && limit_bytes == largest, "{requested_bytes} of {limit_bytes}");
    }
    assert_eq!(device.usage().total_peak_bytes(), 0);
    assert_works(&device);
}

/// A result or scratch beyond the limit is refused in the name of its operator, before anything is launched; nothing stays behind.
#[test]
fn a_result_beyond_the_largest_buffer_of_the_device() {
    let (device, largest) = (device(None), backend_limit(&backend()));
    // Factors of little memory whose product is one row more than fits.
    let columns = 1usize << 14;
    let rows = largest as usize / 4 / columns + 1;
    let tensor = |shape: [usize; 2]| device.zeros(shape, DType::F32, Category::Activations).unwrap();
    let weight = |shape| device.prepare_weight(tensor(shape)).unwrap();
    let (x, ids) = (tensor([rows, 1]), device.zeros([rows], DType::I32, Category::Activations).unwrap());
    let (up, down, table) = (weight([columns, 1]), weight([1, columns]), weight([1, columns]));
    let (lora_a, lora_b) = (tensor([1, 1]), tensor([columns, 1]));
    let adapter = Adapter { lora_a: &lora_a, lora_b: &lora_b, scale: 1.0, dropout: None };
    device.synchronize().unwrap();
    device.backend().reset_peak();
    let before = device.usage();
    for (name, result) in [
        ("linear_forward", linear::forward(&x, &up, None).map(drop)),
        ("linear_input_gradient", linear::input_gradient(&x, &down).map(drop)),
        ("embedding_forward", embedding::forward(&table, &ids, DType::F32).map(drop)),
        ("lora_linear_forward", lora_linear::forward(&x, &up, None, adapter).map(drop)),
    ] {
        let error = result.unwrap_err();
        let message = error.to_string();
        let Error::BufferTooLarge { op, requested_bytes, category: Category::Activations, limit_bytes, .. } = error
        else {
            panic!("{name}: {error}");
        };
        assert_eq!((op, requested_bytes, limit_bytes), (name, (rows * columns * 4) as u64, largest));
        assert!(message.contains("vulkan:0 binds at most"), "{message}");
        assert_eq!(device.usage().live_bytes, before.live_bytes, "{name}");
    }
    assert_works(&device);
}

fn backend_limit(backend: &CubeBackend<WgpuRuntime>) -> u64 {
    let mut limit = 0;
    backend
        .launch("limit", |client| {
            limit = client.properties().memory.max_page_size;
            Ok(())
        })
        .unwrap();
    limit
}

#[test]
fn a_buffer_beyond_the_budget() {
    let device = device(Some(1 << 20));
    let held = device.zeros([1 << 17], DType::F32, Category::Weights).unwrap();
    let before = device.usage();
    let error = device.zeros([(1 << 17) + 1], DType::F32, Category::Gradients).unwrap_err();
    let Error::OutOfMemory { requested_bytes, category: Category::Gradients, budget_bytes, breakdown, .. } = error
    else {
        panic!("{error}");
    };
    assert_eq!((requested_bytes, budget_bytes), ((1 << 19) + 256, 1 << 20));
    assert_eq!(breakdown.total_live_bytes(), 1 << 19);
    assert_eq!(device.usage(), before);
    drop(held);
    device.zeros([(1 << 17) + 1], DType::F32, Category::Gradients).unwrap();
    assert_works(&device);
}

/// Buffers that are filled on the device, and buffers that are filled from the host.
#[test]
fn fresh_buffers_hold_what_was_asked_for() {
    let device = device(None);
    for len in [0usize, 1, 3, 16_383, 16_384, 16_385, 100_003] {
        let zeros = device.zeros([len], DType::F32, Category::Weights).unwrap();
        assert!(zeros.to_vec::<f32>().unwrap().iter().all(|x| x.to_bits() == 0), "{len} zeros");
        let arbitrary = device.empty([len], DType::F32, Category::Weights).unwrap();
        assert!(arbitrary.to_vec::<f32>().unwrap().iter().all(|x| x.is_nan()), "{len} NaN");
        let halves = device.zeros([len], DType::F16, Category::Weights).unwrap();
        assert!(halves.to_f32_vec().unwrap().iter().all(|x| x.to_bits() == 0), "{len} f16 zeros");
    }
}

/// One tensor goes back and forth between two threads, without a read that would order them: a stream of its own for each
/// would add to stale values.
#[test]
fn two_threads_share_one_stream() {
    const LEN: usize = 100_003;
    const ROUNDS: usize = 50;
    let device = device(None);
    let one = device.from_slice(&vec![1.0f32; LEN], [LEN], Category::Activations).unwrap();
    let start = device.zeros([LEN], DType::F32, Category::Activations).unwrap();
    let (to_second, from_first) = mpsc::channel::<Tensor>();
    let (to_first, from_second) = mpsc::channel::<Tensor>();
    let total = std::thread::scope(|scope| {
        let one = &one;
        scope.spawn(move || {
            for x in from_first {
                to_first.send(elementwise::add(x, one).unwrap()).unwrap();
            }
        });
        let mut x = start;
        for _ in 0..ROUNDS {
            to_second.send(elementwise::add(x, one).unwrap()).unwrap();
            x = from_second.recv().unwrap();
        }
        drop(to_second);
        x
    });
    assert_eq!(total.to_vec::<f32>().unwrap(), vec![2.0 * ROUNDS as f32; LEN]);
}

/// Two threads that compute at the same time, each on tensors of its own.
#[test]
fn two_threads_at_once() {
    let device = device(None);
    let work = |factor: f32| {
        let x = device.from_slice(&vec![factor; 4099], [4099], Category::Activations).unwrap();
        let mut sum = device.zeros([4099], DType::F32, Category::Activations).unwrap();
        for round in 1..=20 {
            elementwise::accumulate(&mut sum, &x).unwrap();
            assert_eq!(sum.to_vec::<f32>().unwrap(), vec![factor * round as f32; 4099]);
        }
    };
    std::thread::scope(|scope| {
        let work = &work;
        scope.spawn(move || work(2.0));
        scope.spawn(move || work(3.0));
    });
}
