//! An op has a contract, a host implementation, a differentiable form, an oracle, a suite and a section in the documents, all under
//! one name.

use std::path::Path;

use anyhow::Result;

use super::files;

/// Files of the ops folder that are not operators.
const NOT_OPS: [&str; 4] = ["mod", "check", "cost", "rope_table"];
/// Where else an op must stand; `{}` is its name.
const COUNTERPARTS: [&str; 4] =
    ["crates/cpu/src/{}", "crates/autograd/src/ops/{}", "crates/oracle/src/{}", "crates/testkit/src/suite/{}"];
/// Operators that nothing is differentiated through.
const NOT_DIFFERENTIABLE: [&str; 7] = ["adafactor", "adamw", "adamw8bit", "lion", "muon", "sgd", "stochastic_rounding"];

pub(super) fn check(root: &Path) -> Result<Vec<String>> {
    let document = root.join("docs/ops.md");
    let text = if document.is_file() { files::read(&document)? } else { String::new() };
    let mut violations = Vec::new();
    for path in files::walk(&root.join("crates/core/src/ops"), "rs")? {
        let op = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if NOT_OPS.contains(&op.as_str()) {
            continue;
        }
        for place in COUNTERPARTS {
            if place.contains("autograd") && NOT_DIFFERENTIABLE.contains(&op.as_str()) {
                continue;
            }
            let stem = place.replace("{}", &op);
            if !root.join(format!("{stem}.rs")).is_file() && !root.join(format!("{stem}/mod.rs")).is_file() {
                violations.push(format!("{op}: no {stem}.rs"));
            }
        }
        if !text.lines().any(|line| line.strip_prefix("## ").is_some_and(|title| title.trim() == op)) {
            violations.push(format!("{op}: no section in docs/ops.md"));
        }
    }
    Ok(violations)
}

#[cfg(test)]
mod tests {
    use super::check;
    use crate::check::files::plant;

    #[test]
    fn finds_each_missing_part() {
        let all = [
            ("crates/core/src/ops/mod.rs", ""),
            ("crates/core/src/ops/glu.rs", ""),
            ("crates/cpu/src/glu.rs", ""),
            ("crates/autograd/src/ops/glu.rs", ""),
            ("crates/oracle/src/glu.rs", ""),
            ("crates/testkit/src/suite/glu/mod.rs", ""),
            ("docs/ops.md", "# Operators\n\n## glu\n"),
        ];
        assert_eq!(check(plant(&all).path()).unwrap(), Vec::<String>::new());
        for missing in 2..all.len() {
            let mut some = all.to_vec();
            some.remove(missing);
            assert_eq!(check(plant(&some).path()).unwrap().len(), 1, "without {}", all[missing].0);
        }
    }
}
