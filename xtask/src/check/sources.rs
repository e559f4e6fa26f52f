//! Rules for single source files.

use std::path::Path;

use anyhow::Result;

use super::files;

const MAX_LINES: usize = 500;

/// Built from halves so that this file does not contain what it looks for.
const UNFINISHED: [&str; 4] =
    [concat!("to", "do!("), concat!("unimpl", "emented!("), concat!("FIX", "ME"), concat!("TO", "DO")];

/// Every source folder of the workspace.
const FOLDERS: [&str; 3] = ["crates", "benches", "xtask"];

/// No source file is longer than 500 lines.
pub(super) fn length(root: &Path) -> Result<Vec<String>> {
    each_file(root, |text| {
        let num_lines = text.lines().count();
        (num_lines > MAX_LINES).then(|| format!("{num_lines} lines, at most {MAX_LINES}")).into_iter().collect()
    })
}

/// No placeholder in code or comments.
pub(super) fn unfinished(root: &Path) -> Result<Vec<String>> {
    each_file(root, |text| {
        let numbered = text.lines().enumerate();
        let found = numbered.filter_map(|(i, line)| {
            let marker = UNFINISHED.into_iter().find(|marker| line.contains(marker))?;
            Some(format!("line {}: {}", i + 1, marker.trim_end_matches('(')))
        });
        found.collect()
    })
}

/// The facade defines no function but `device`.
pub(super) fn facade(root: &Path) -> Result<Vec<String>> {
    let mut violations = Vec::new();
    for path in files::walk(&root.join("crates/unsloth-rs/src"), "rs")? {
        for name in functions(&files::read(&path)?).into_iter().filter(|name| name != "device") {
            violations.push(format!("{}: defines `{name}`", files::shown(root, &path)));
        }
    }
    Ok(violations)
}

/// Names after `fn` outside line comments.
fn functions(text: &str) -> Vec<String> {
    let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let words: Vec<&str> = code.flat_map(str::split_whitespace).collect();
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let names = words.windows(2).filter(|pair| pair[0] == "fn").map(|pair| pair[1].split(|c| !is_name(c)).next());
    names.flatten().filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn each_file(root: &Path, rule: impl Fn(&str) -> Vec<String>) -> Result<Vec<String>> {
    let mut violations = Vec::new();
    for folder in FOLDERS {
        for path in files::walk(&root.join(folder), "rs")? {
            let found = rule(&files::read(&path)?);
            violations.extend(found.into_iter().map(|what| format!("{}: {what}", files::shown(root, &path))));
        }
    }
    Ok(violations)
}

#[cfg(test)]
mod tests {
    use super::{MAX_LINES, UNFINISHED, facade, length, unfinished};
    use crate::check::files::plant;

    #[test]
    fn finds_a_long_file() {
        let tree = plant(&[
            ("crates/core/src/long.rs", &"//\n".repeat(MAX_LINES + 1)),
            ("crates/core/src/short.rs", &"//\n".repeat(MAX_LINES)),
        ]);
        assert_eq!(length(tree.path()).unwrap(), ["crates/core/src/long.rs: 501 lines, at most 500"]);
    }

    #[test]
    fn finds_each_placeholder() {
        for marker in UNFINISHED {
            let tree = plant(&[("benches/src/lib.rs", &format!("fn f() {{\n    {marker}\n}}\n"))]);
            assert_eq!(unfinished(tree.path()).unwrap().len(), 1, "{marker}");
        }
    }

    #[test]
    fn finds_a_function_in_the_facade() {
        let text = "//! fn in_a_comment\npub use unsloth_core::Tensor;\npub fn device(name: &str) {}\npub const fn helper<T>() {}\n";
        let tree = plant(&[("crates/unsloth-rs/src/lib.rs", text)]);
        assert_eq!(facade(tree.path()).unwrap(), ["crates/unsloth-rs/src/lib.rs: defines `helper`"]);
    }
}
