//! The examples of the kernel crates' READMEs, by somebody who has one crate and a runtime, and nothing else.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Every kernel crate.
const CRATES: [&str; 8] = ["attention", "common", "glu", "linear", "loss", "norm", "pointwise", "rope"];

fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels")
}

/// The code between the fences that begin with ```` ```rust ````, and what its comment says that it prints.
fn example(name: &str) -> (String, String) {
    let readme = fs::read_to_string(kernels().join(name).join("README.md")).unwrap();
    let blocks = readme.split("```rust").skip(1);
    let code: Vec<&str> = blocks.map(|block| block.split_once('\n').unwrap().1.split_once("```").unwrap().0).collect();
    let code = code.join("\n");
    let printed = code.lines().find_map(|line| line.trim().strip_prefix("println!(")?.split_once("); // "));
    let printed = printed.unwrap_or_else(|| panic!("{name}: no line says what it prints")).1.to_owned();
    (code, printed)
}

#[test]
fn each_has_an_example_with_a_main() {
    let mut folders: Vec<String> =
        fs::read_dir(kernels()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    folders.sort_unstable();
    assert_eq!(folders, CRATES);
    for name in CRATES {
        assert_eq!(example(name).0.matches("fn main()").count(), 1, "{name}");
    }
}

/// A project outside of the workspace for each, with the versions of the workspace's lock file.
#[test]
#[ignore = "full: builds CubeCL and wgpu anew, and needs a Vulkan device"]
fn each_runs_in_a_project_of_two_dependencies() {
    let folder = tempfile::tempdir().unwrap();
    for name in CRATES {
        let project = folder.path().join(name);
        let manifest = format!(
            "[package]\nname = \"scratch-{name}\"\nedition = \"2024\"\n\n[dependencies]\n\
             unsloth-{name} = {{ path = {:?} }}\n\
             cubecl-wgpu = {{ version = \"=0.10.0\", default-features = false, features = [\"std\"] }}\n",
            kernels().join(name).display().to_string()
        );
        let (code, printed) = example(name);
        fs::create_dir_all(project.join("src")).unwrap();
        fs::write(project.join("Cargo.toml"), manifest).unwrap();
        fs::write(project.join("src/main.rs"), code).unwrap();
        fs::copy(kernels().join("../../Cargo.lock"), project.join("Cargo.lock")).unwrap();
        let output = Command::new(env::var_os("CARGO").unwrap())
            .args(["run", "--quiet", "--target-dir", "../target"])
            .current_dir(&project)
            .output()
            .unwrap();
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{name}: {stderr}");
        assert_eq!(stdout.trim(), printed, "{name}: {stderr}");
        println!("{name}: {printed}");
    }
}
