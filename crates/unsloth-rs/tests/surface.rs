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
    for name in ["", "CPU", "cuda:0", "npu"] {
        let error = device(name).unwrap_err();
        assert!(matches!(&error, Error::InvalidSpec { value, .. } if value == name), "{error}");
        assert!(error.to_string().contains("cpu, the one device of this build"));
    }
}
