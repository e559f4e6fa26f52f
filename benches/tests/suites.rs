//! The program that runs the operators' suites on a card, on the first Vulkan device of this machine.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

use std::process::Command;

use serde_json::{Value, json};

/// Exit status, what was printed and what was written.
fn suites(filter: &str) -> (Option<i32>, String, Value) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("suites.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_benches"));
    command.args(["suites", "--device", "vulkan:0", "--filter", filter, "--json"]).arg(&path);
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    (output.status.code(), text, serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap())
}

#[test]
fn a_suite_that_passes() {
    let (status, text, report) = suites("reduce");
    assert_eq!(status, Some(0), "{text}");
    assert!(
        text.contains("reduce: passed on vulkan:0 in ") && text.contains("1 passed, 0 failed, 0 not run"),
        "{text}"
    );
    assert_eq!(report["machine"]["device"], "vulkan:0");
    assert!(report["dtypes"].as_array().unwrap().contains(&json!("f32")), "{report}");
    let [suite] = report["suites"].as_array().unwrap().as_slice() else { panic!("{report}") };
    assert_eq!((&suite["suite"], &suite["passed"]), (&json!("reduce"), &json!(true)));
    assert_eq!((&suite["not_run"], &suite["failure"]), (&Value::Null, &Value::Null));
    assert!(suite["seconds"].as_f64().unwrap() > 0.0);
}

/// What a device does not have is no failure of its kernels, but alone it is no success either.
#[test]
fn a_suite_that_needs_what_the_device_lacks() {
    let (status, text, report) = suites("stochastic_rounding");
    assert!(
        text.contains("stochastic_rounding: not run (") && text.contains("0 passed, 0 failed, 1 not run"),
        "{text}"
    );
    let suite = &report["suites"][0];
    assert_eq!((&suite["passed"], &suite["failure"]), (&json!(false), &Value::Null));
    assert!(suite["not_run"].as_str().unwrap().contains("bf16"), "{suite}");
    assert_eq!(status, Some(1));
}
