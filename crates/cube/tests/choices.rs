//! Kernels for the same product, forced and measured, on the first Vulkan device of this machine.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

use std::{fs, path::Path};

use unsloth_core::{DType, Device, Tensor, ops::linear};
use unsloth_cube::{Card, Choosing, CubeOptions, product_kernels, vulkan};
use unsloth_testkit::data::{self, Data};

fn device(choosing: Choosing) -> Device {
    vulkan(0, CubeOptions { fill_arbitrary_with_nan: true, choosing, ..Default::default() }).unwrap()
}

fn measured(folder: &Path) -> Choosing {
    let (model, driver) = ("test".to_owned(), "1".to_owned());
    Choosing::Measured(Card { folder: folder.to_path_buf(), model, driver })
}

fn tensor(device: &Device, data: &mut Data, shape: [usize; 2]) -> Tensor {
    let values = data.normal(shape[0] * shape[1], 1.0, DType::F32);
    data::tensor(device, &values, shape, DType::F32).unwrap()
}

/// `x W^T` of fixed numbers.
fn product(device: &Device, [rows, in_features, out_features]: [usize; 3]) -> Vec<f32> {
    let mut data = Data::new(5);
    let x = tensor(device, &mut data, [rows, in_features]);
    let weight = device.prepare_weight(tensor(device, &mut data, [out_features, in_features])).unwrap();
    linear::forward(&x, &weight, None).unwrap().to_vec::<f32>().unwrap()
}

/// Bits of `x W^T + bias`, of both gradients' products, and of one that is added to.
fn products(choosing: Choosing, [rows, in_features, out_features]: [usize; 3]) -> Vec<u32> {
    let device = &device(choosing);
    let mut data = Data::new(6);
    let x = tensor(device, &mut data, [rows, in_features]);
    let dy = tensor(device, &mut data, [rows, out_features]);
    let bias = tensor(device, &mut data, [1, out_features]).reshape([out_features]).unwrap();
    let weight = device.prepare_weight(tensor(device, &mut data, [out_features, in_features])).unwrap();
    let mut dweight = tensor(device, &mut data, [out_features, in_features]);
    let y = linear::forward(&x, &weight, Some(&bias)).unwrap();
    let dx = linear::input_gradient(&dy, &weight).unwrap();
    linear::weight_gradient(&dy, &x, &mut dweight).unwrap();
    [y, dx, dweight].iter().flat_map(|result| result.to_vec::<f32>().unwrap()).map(f32::to_bits).collect()
}

/// The suites hold the rule's to the oracle. So it does not matter either, to a run that goes on, which one was measured to be the
/// fastest.
#[test]
fn every_tile_gives_the_bits_of_the_rules() {
    for size in [[150, 203, 137], [5, 16, 300]] {
        let by_rule = products(Choosing::ByRule, size);
        for name in ["tiled 128x128", "tiled 32x32"] {
            assert!(product_kernels().iter().any(|kernel| kernel == name), "{name}");
            assert!(products(Choosing::Always(name.to_owned()), size) == by_rule, "{name}, {size:?}");
        }
    }
}

/// Large enough to be measured.
const LARGE: [usize; 3] = [512, 512, 256];

fn kept(folder: &Path) -> String {
    let mut files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let file = files.find(|path| path.extension().is_some_and(|extension| extension == "toml")).unwrap();
    fs::read_to_string(file).unwrap()
}

#[test]
fn what_was_measured_is_kept_and_not_measured_again() {
    let folder = tempfile::tempdir().unwrap();
    let by_rule = product(&device(Choosing::ByRule), LARGE);
    let first = device(measured(folder.path()));
    assert_eq!(product(&first, LARGE), by_rule);
    let text = kept(folder.path());
    let (_, choices) = text.split_once("[choices]\n").unwrap();
    let job = "f32 x f32^T -> f32 written, up to 512 whole rows, 256 columns, 512 terms";
    assert!(choices.starts_with(&format!("\"{job}\" = \"tiled ")), "{text}");
    assert_eq!(choices.lines().count(), 1, "{text}");

    // Small products are not measured, and others of the same sizes neither.
    product(&first, [8, 8, 8]);
    product(&first, LARGE);
    assert_eq!(kept(folder.path()), text);
    // A choice that is there is taken as it is, even one of a kernel that does not exist here: the rule's then.
    let name = choices.split('"').nth(3).unwrap();
    let path = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
    let path = path.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "toml")).unwrap();
    fs::write(&path, text.replace(&format!("\"{name}\""), "\"unknown\"")).unwrap();
    assert_eq!(product(&device(measured(folder.path())), LARGE), by_rule);
    assert!(kept(folder.path()).contains("\"unknown\""));
}

#[test]
fn without_a_folder_the_rule_decides() {
    let folder = tempfile::tempdir().unwrap();
    let in_the_way = folder.path().join("file");
    fs::write(&in_the_way, "").unwrap();
    let by_rule = product(&device(Choosing::ByRule), LARGE);
    assert_eq!(product(&device(measured(&in_the_way)), LARGE), by_rule);
}

/// Two devices that measure at once, as two processes do, go on with one choice.
#[test]
fn two_that_measure_at_once_agree() {
    let folder = tempfile::tempdir().unwrap();
    let results = std::thread::scope(|scope| {
        let run = || product(&device(measured(folder.path())), LARGE);
        [scope.spawn(run), scope.spawn(run)].map(|thread| thread.join().unwrap())
    });
    assert_eq!(results[0], results[1]);
    assert_eq!(kept(folder.path()).matches(" = \"tiled ").count(), 1);
}
