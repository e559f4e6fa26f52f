//! The facade names what other crates do and does nothing itself.

use syn::Item;
use unsloth_rs::{DType, Error, device};

#[test]
fn re_exports_and_nothing_else() {
    let sources: Vec<_> = std::fs::read_dir("src").unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(sources, ["lib.rs"]);
    let file = syn::parse_file(&std::fs::read_to_string("src/lib.rs").unwrap()).unwrap();
    let mut functions = Vec::new();
    for item in &file.items {
        match item {
            Item::Use(_) => {}
            Item::Fn(function) => functions.push(function.sig.ident.to_string()),
            _ => panic!("the facade holds more than `pub use` and one function"),
        }
    }
    assert_eq!(functions, ["device"]);
}

#[test]
fn devices_by_name() {
    let cpu = device("cpu").unwrap();
    assert_eq!((cpu.name().as_str(), cpu.supports(DType::BF16)), ("cpu", true));
    for name in ["", "CPU", "npu", "cuda:x"] {
        let error = device(name).unwrap_err();
        assert!(matches!(&error, Error::InvalidSpec { value, .. } if value == name), "{error}");
        assert!(error.to_string().contains("cpu, vulkan:N, wgpu or cuda:N"), "{error}");
    }
}

#[test]
fn devices_that_are_not_built_say_what_builds_them() {
    let missing =
        [("vulkan:0", cfg!(feature = "wgpu")), ("wgpu", cfg!(feature = "wgpu")), ("cuda:0", cfg!(feature = "cuda"))];
    for (name, _) in missing.into_iter().filter(|(_, built)| !built) {
        let error = device(name).unwrap_err();
        assert!(matches!(&error, Error::InvalidSpec { value, .. } if value == name), "{error}");
        assert!(error.to_string().contains("cargo build --features"), "{error}");
    }
}
