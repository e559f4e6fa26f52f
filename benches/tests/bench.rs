//! A whole run of the program, of one operator on the processor.
#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

use std::process::Command;

use serde_json::Value;

/// What products bound has the rate of products that was measured beside it; what memory bounds has none.
#[test]
fn products_are_held_to_what_was_measured_beside_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_benches"));
    command.args(["bench", "--quick", "--op", "linear", "--dtype", "f32", "--out"]).arg(folder.path());
    let output = command.output().unwrap();
    let [text, errors] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(output.status.success() && text.contains("not run: PyTorch"), "{text}{errors}");
    let report = std::fs::read_to_string(folder.path().join("bench.json")).unwrap();
    let report: Value = serde_json::from_str(&report).unwrap();
    let (mut by_products, mut by_memory) = (0, 0);
    for entry in report["results"].as_array().unwrap() {
        let number = |field: &str| entry[field].as_f64();
        let percent = number("percent_of_limit").unwrap();
        match number("limit_flops") {
            Some(limit) => {
                let expected = 100.0 * number("flops").unwrap() / limit / number("median_s").unwrap();
                assert!(entry["bound"] == "compute" && (percent / expected - 1.0).abs() < 1e-9, "{entry}");
                by_products += 1;
            }
            None => {
                assert!(entry["bound"] == "memory" && percent > 0.0, "{entry}");
                by_memory += 1;
            }
        }
    }
    assert!(by_products > 0 && by_memory > 0, "{by_products} {by_memory}: {text}");
}
