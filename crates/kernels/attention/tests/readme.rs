//! The README's example, by somebody who has this crate and a runtime, and nothing else.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{env, fs, path::Path, process::Command};

const README: &str = include_str!("../README.md");

/// The code between the fences that begin with ```` ```rust ````.
fn example() -> String {
    let blocks = README.split("```rust").skip(1);
    let code = blocks.map(|block| block.split_once('\n').unwrap().1.split_once("```").unwrap().0);
    code.collect::<Vec<_>>().join("\n")
}

#[test]
fn has_an_example_with_a_main() {
    assert_eq!(example().matches("fn main()").count(), 1);
}

/// A project outside of the workspace, with the versions of the workspace's lock file.
#[test]
#[ignore = "full: builds CubeCL and wgpu anew, and needs a Vulkan device"]
fn runs_in_a_project_of_two_dependencies() {
    let folder = tempfile::tempdir().unwrap();
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest = format!(
        "[package]\nname = \"scratch\"\nedition = \"2024\"\n\n[dependencies]\nunsloth-attention = {{ path = {:?} }}\n\
         cubecl-wgpu = {{ version = \"=0.10.0\", default-features = false, features = [\"std\"] }}\n",
        here.display().to_string()
    );
    fs::create_dir(folder.path().join("src")).unwrap();
    fs::write(folder.path().join("Cargo.toml"), manifest).unwrap();
    fs::write(folder.path().join("src/main.rs"), example()).unwrap();
    fs::copy(here.join("../../../Cargo.lock"), folder.path().join("Cargo.lock")).unwrap();
    let output = Command::new(env::var_os("CARGO").unwrap())
        .args(["run", "--quiet", "--target-dir", "target"])
        .current_dir(folder.path())
        .output()
        .unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stderr}");
    assert_eq!(stdout.trim(), "[1.0, 2.0, 2.0, 4.0]", "{stderr}");
}
