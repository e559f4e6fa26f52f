//! The list of devices.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of a test may panic like the test itself")]

mod support;

use support::*;

#[test]
fn lists_the_processor_first() {
    let found = unsloth(["devices", "--json"]).succeeded().json();
    let cpu = &found[0];
    assert_eq!(cpu["name"], "cpu");
    assert!(cpu["memory_bytes"].as_u64().unwrap() > 1 << 28);
    assert_eq!(cpu["driver"], serde_json::Value::Null);
    assert_eq!(cpu["dtypes"], serde_json::json!(["f32", "f16", "bf16"]));
    assert!(cpu["features"][0].as_str().unwrap().ends_with(" threads"));
    for device in found.as_array().unwrap() {
        let mut keys: Vec<_> = device.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["driver", "dtypes", "features", "lacks", "memory_bytes", "model", "name"]);
    }
}

#[test]
fn text_says_what_is_not_built() {
    let outcome = unsloth(["devices"]).succeeded();
    assert!(outcome.stdout.starts_with("cpu  "), "{}", outcome.stdout);
    assert_eq!(outcome.stderr.contains("feature `wgpu`"), !cfg!(feature = "wgpu"));
    assert_eq!(outcome.stderr.contains("feature `cuda`"), !cfg!(feature = "cuda"));
}

#[cfg(feature = "wgpu")]
#[test]
fn lists_vulkan_devices_with_what_they_offer() {
    let found = unsloth(["devices", "--json"]).succeeded().json();
    let devices = found.as_array().unwrap();
    let vulkan = devices.iter().find(|device| device["name"] == "vulkan:0").expect("no Vulkan device on this machine");
    assert!(vulkan["memory_bytes"].as_u64().unwrap() > 1 << 20);
    assert!(!vulkan["driver"].as_str().unwrap().is_empty() && !vulkan["model"].as_str().unwrap().is_empty());
    assert_eq!(vulkan["dtypes"][0], "f32");
    assert!(vulkan["features"][0].as_str().unwrap().starts_with("buffers up to "));
    let strings = |key: &str| {
        let list = vulkan[key].as_array().unwrap().iter();
        list.map(|text| text.as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let (dtypes, lacks) = (strings("dtypes"), strings("lacks"));
    for dtype in ["f32", "f16", "bf16"].map(str::to_owned) {
        assert_ne!(dtypes.contains(&dtype), lacks.contains(&dtype), "{dtype}: {vulkan}");
    }
    // Shaders in WGSL have none of these.
    assert!(lacks.ends_with(&["bf16", "tensor cores", "copy engine"].map(str::to_owned)), "{lacks:?}");
    let text = unsloth(["devices"]).succeeded().stdout;
    let of_vulkan = text.split_once("vulkan:0  ").expect("the same device in the text").1;
    assert!(of_vulkan.contains(&format!("\n    lacks     {}\n", lacks.join(", "))), "{of_vulkan}");
}
