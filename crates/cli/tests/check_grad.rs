//! `unsloth check-grad`: what it prints, and how it ends.
#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

mod support;

use support::*;

fn check_grad(model: &str, options: &str) -> Outcome {
    let folder = fixture(model).join("model");
    unsloth(line(&format!("check-grad --model {{}} --tokens 6 {options}"), &[&folder]))
}

#[test]
fn right_gradients_pass() {
    let outcome = check_grad("shapes/llama", "").succeeded();
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    assert!(lines[0].starts_with("loss ") && lines[0].ends_with(" in f64, over 5 targets"), "{}", lines[0]);
    let last = lines.last().unwrap();
    let (passed, all) = last.strip_suffix(" gradients are within the tolerances").unwrap().split_once(" of ").unwrap();
    assert_eq!(passed, all);

    let report = check_grad("shapes/llama", "--json").succeeded().json();
    let gradients = report["gradients"].as_array().unwrap();
    assert_eq!((gradients.len().to_string().as_str(), &report["num_wrong"]), (all, &Value::from(0)));
    let difference = |gradient: &Value| gradient["difference"].as_f64().unwrap();
    assert!(gradients.iter().all(|gradient| difference(gradient) <= 1e-3), "{report}");
    assert!(gradients.iter().any(|gradient| difference(gradient) > 0.0), "{report}");
    assert!(gradients.iter().all(|gradient| gradient["numeric_difference"].as_f64().unwrap() <= 1e-4), "{report}");
}

/// A tolerance that f32 cannot keep: the worst is named, with its table, and the status says so.
#[test]
fn wrong_gradients_fail_and_the_worst_is_named() {
    let outcome = check_grad("shapes/llama", "--tolerance 1e-12");
    let worst = outcome.stdout.lines().nth(2).unwrap().split(' ').next().unwrap().to_owned();
    assert!(worst.starts_with("model.") || worst.starts_with("lm_head."), "{worst}");
    outcome.failed_with(&["gradients are wrong, the worst that of ", &worst]);
}

#[test]
fn of_an_adapter_and_of_data() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data.jsonl");
    std::fs::write(&data, "{\"input_ids\": [5, 9, 3, 7], \"labels\": [-100, 9, -100, 7]}\n").unwrap();
    let adapter = fixture("tiny-llama").join("adapter");
    let model = fixture("tiny-llama").join("model");
    let text = "check-grad --model {} --adapter {} --data {} --json";
    let report = unsloth(line(text, &[&model, &adapter, &data])).succeeded().json();
    assert_eq!((&report["num_targets"], &report["num_wrong"]), (&Value::from(2), &Value::from(0)));
    let names = report["gradients"].as_array().unwrap().iter().map(|gradient| gradient["name"].as_str().unwrap());
    assert!(names.clone().count() > 0 && names.clone().all(|name| name.contains("lora_")), "{report}");
}

#[cfg(feature = "wgpu")]
#[test]
fn on_vulkan() {
    let outcome = check_grad("shapes/llama", "--device vulkan:0 --json").succeeded();
    assert_eq!(outcome.json()["num_wrong"], 0);
}
