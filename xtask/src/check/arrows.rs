//! Which crate may depend on which.

use std::path::Path;

use anyhow::{Context, Result};
use toml::{Table, Value};

use super::files;

/// Crates from the lowest layer up, by folder, and the crates of this workspace that each may name under `[dependencies]`. A crate
/// names only crates above its own line here, and siblings do not see each other.
const ARROWS: [(&str, &[&str]); 25] = [
    ("crates/core", &[]),
    ("crates/memory", &["unsloth-core"]),
    ("crates/oracle", &["unsloth-core"]),
    ("crates/testkit", &["unsloth-core", "unsloth-oracle"]),
    ("crates/cpu", &["unsloth-core", "unsloth-memory"]),
    ("crates/exact", &["unsloth-core", "unsloth-memory", "unsloth-oracle"]),
    // Kernels know CubeCL alone, so that a user of CubeCL can take one crate of them.
    ("crates/kernels/common", &[]),
    ("crates/kernels/norm", &["unsloth-common"]),
    ("crates/kernels/rope", &["unsloth-common"]),
    ("crates/kernels/glu", &["unsloth-common"]),
    ("crates/kernels/attention", &["unsloth-common"]),
    ("crates/kernels/pointwise", &["unsloth-common"]),
    ("crates/kernels/quant", &["unsloth-common"]),
    ("crates/kernels/linear", &["unsloth-common", "unsloth-quant"]),
    ("crates/kernels/loss", &["unsloth-common", "unsloth-linear"]),
    (
        "crates/cube",
        &[
            "unsloth-core",
            "unsloth-memory",
            "unsloth-common",
            "unsloth-norm",
            "unsloth-rope",
            "unsloth-glu",
            "unsloth-attention",
            "unsloth-pointwise",
            "unsloth-quant",
            "unsloth-linear",
            "unsloth-loss",
        ],
    ),
    ("crates/plan", &["unsloth-core", "unsloth-memory"]),
    ("crates/autograd", &["unsloth-core"]),
    ("crates/train", &["unsloth-core", "unsloth-autograd"]),
    ("crates/llm", &["unsloth-core", "unsloth-plan", "unsloth-autograd", "unsloth-train"]),
    (
        "crates/unsloth-rs",
        &[
            "unsloth-core",
            "unsloth-memory",
            "unsloth-cpu",
            "unsloth-cube",
            "unsloth-plan",
            "unsloth-exact",
            "unsloth-autograd",
            "unsloth-train",
            "unsloth-llm",
        ],
    ),
    ("crates/cli", &["unsloth-rs"]),
    ("benches", &["unsloth-rs", "unsloth-testkit"]),
    ("xtask", &[]),
    ("xtask/cuda-check", &["unsloth-core", "unsloth-cube"]),
];

/// What tests of any crate may use besides: a device to run on, and the oracles.
const DEV_ONLY: [&str; 2] = ["unsloth-cpu", "unsloth-testkit"];

/// Crates that may name CubeCL: its types stay behind the kernels and their backend.
const CUBECL_USERS: [&str; 3] = ["crates/kernels/", "crates/cube", "xtask"];

/// Features of candle-core that link CUDA into every binary.
const CANDLE_GPU_FEATURES: [&str; 4] = ["cuda", "cudnn", "nccl", "metal"];

pub(super) fn check(root: &Path) -> Result<Vec<String>> {
    let mut violations = Vec::new();
    for path in files::walk(root, "toml")? {
        if !path.ends_with("Cargo.toml") {
            continue;
        }
        let manifest: Table = files::read(&path)?.parse().with_context(|| path.display().to_string())?;
        let folder = files::shown(root, path.parent().unwrap_or(root));
        violations.extend(manifest_violations(&folder, &manifest));
    }
    Ok(violations)
}

fn manifest_violations(folder: &str, manifest: &Table) -> Vec<String> {
    let mut violations = candle_features(folder, manifest);
    if !manifest.contains_key("package") {
        return violations;
    }
    let Some((_, arrows)) = ARROWS.iter().find(|(name, _)| *name == folder) else {
        violations.push(format!("{folder}: no line in the table of arrows (xtask/src/check/arrows.rs)"));
        return violations;
    };
    for dependency in dependencies(manifest) {
        let (package, dev) = (dependency.package.as_str(), dependency.dev);
        if package.starts_with("unsloth-") {
            let allowed = arrows.contains(&package) || (dev && DEV_ONLY.contains(&package));
            if !allowed {
                let table = if dev { "dev-dependencies" } else { "dependencies" };
                violations.push(format!("{folder}: [{table}] names {package}, which it must not see"));
            }
        }
        let is_cubecl = package.starts_with("cubecl") || package.starts_with("cubek");
        if is_cubecl && !CUBECL_USERS.iter().any(|user| folder.starts_with(user)) {
            violations.push(format!("{folder}: names {package}; only kernel crates and their backend may"));
        }
    }
    violations
}

struct Dependency {
    package: String,
    dev: bool,
}

/// All dependencies of a manifest, those of `[target.*]` included, by package name.
fn dependencies(manifest: &Table) -> Vec<Dependency> {
    let targets = manifest.get("target").and_then(Value::as_table).into_iter().flat_map(Table::values);
    let scopes = targets.filter_map(Value::as_table).chain([manifest]);
    let mut found = Vec::new();
    for scope in scopes {
        for (key, dev) in [("dependencies", false), ("build-dependencies", false), ("dev-dependencies", true)] {
            for (name, value) in scope.get(key).and_then(Value::as_table).into_iter().flatten() {
                let package = value.get("package").and_then(Value::as_str).unwrap_or(name).to_owned();
                found.push(Dependency { package, dev });
            }
        }
    }
    found
}

/// candle-core's GPU features, asked for by a dependency table or forwarded by a feature, anywhere in a manifest.
fn candle_features(folder: &str, manifest: &Table) -> Vec<String> {
    let mut violations = Vec::new();
    let mut values: Vec<(&str, &Value)> = manifest.iter().map(|(key, value)| (key.as_str(), value)).collect();
    while let Some((key, value)) = values.pop() {
        if let Some(table) = value.as_table() {
            values.extend(table.iter().map(|(key, value)| (key.as_str(), value)));
        }
        let strings = |value: &Value| -> Vec<String> {
            value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let mut features = Vec::new();
        if key == "candle-core" {
            features.extend(value.get("features").map(strings).unwrap_or_default());
        }
        let forwarded = strings(value).into_iter().filter_map(|s| {
            s.strip_prefix("candle-core/").or_else(|| s.strip_prefix("candle-core?/")).map(str::to_owned)
        });
        features.extend(forwarded);
        for feature in features.iter().filter(|feature| CANDLE_GPU_FEATURES.contains(&feature.as_str())) {
            violations.push(format!("{folder}: candle-core with feature {feature}; it is the CPU side only"));
        }
    }
    violations
}

#[cfg(test)]
mod tests {
    use super::{ARROWS, check};
    use crate::check::files::plant;

    fn violations(path: &str, dependencies: &str) -> Vec<String> {
        let text = format!("[package]\nname = \"planted\"\n{dependencies}");
        check(plant(&[(path, &text)]).path()).unwrap()
    }

    #[test]
    fn the_table_points_down_only() {
        let mut below: Vec<String> = Vec::new();
        for (folder, arrows) in ARROWS {
            assert!(arrows.iter().all(|arrow| below.iter().any(|name| name == arrow)), "{folder}: {arrows:?}");
            let name = folder.rsplit('/').next().unwrap_or(folder);
            below.push(format!("unsloth-{}", name.trim_start_matches("unsloth-")));
        }
    }

    #[test]
    fn accepts_what_is_allowed() {
        let dependencies =
            "[dependencies]\nunsloth-core.workspace = true\n[dev-dependencies]\nunsloth-testkit.workspace = true";
        assert_eq!(violations("crates/autograd/Cargo.toml", dependencies), Vec::<String>::new());
    }

    #[test]
    fn finds_an_upward_arrow() {
        assert_eq!(violations("crates/core/Cargo.toml", "[dependencies]\nunsloth-train.workspace = true").len(), 1);
    }

    #[test]
    fn finds_a_sibling_under_another_name_and_target() {
        let sibling = "[target.'cfg(unix)'.dependencies]\ndevice = { package = \"unsloth-cpu\", path = \"../cpu\" }";
        assert_eq!(violations("crates/autograd/Cargo.toml", sibling).len(), 1);
    }

    #[test]
    fn finds_testkit_outside_tests() {
        assert_eq!(violations("crates/train/Cargo.toml", "[dependencies]\nunsloth-testkit.workspace = true").len(), 1);
    }

    #[test]
    fn finds_cubecl_above_the_kernels() {
        assert_eq!(violations("crates/llm/Cargo.toml", "[dependencies]\ncubecl-cuda = \"=0.10.0\"").len(), 1);
    }

    #[test]
    fn finds_cuda_in_candle() {
        assert_eq!(
            violations("crates/cpu/Cargo.toml", "[dependencies]\ncandle-core = { features = [\"cuda\"] }").len(),
            1
        );
        assert_eq!(violations("crates/cpu/Cargo.toml", "[features]\ncuda = [\"candle-core/cuda\"]").len(), 1);
    }

    #[test]
    fn finds_a_crate_without_a_line() {
        assert_eq!(violations("crates/new/Cargo.toml", "").len(), 1);
    }
}
