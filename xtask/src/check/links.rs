//! Relative links in markdown lead to a file, and to a heading where they name one.

use std::path::Path;

use anyhow::Result;

use super::files;

pub(super) fn check(root: &Path) -> Result<Vec<String>> {
    let mut violations = Vec::new();
    for path in files::walk(root, "md")? {
        for link in links(&files::read(&path)?) {
            let (file, heading) = link.split_once('#').unwrap_or((&link, ""));
            let target = if file.is_empty() { path.clone() } else { path.parent().unwrap_or(root).join(file) };
            let found = if heading.is_empty() || target.extension().is_none_or(|extension| extension != "md") {
                target.exists()
            } else {
                target.is_file() && headings(&files::read(&target)?).contains(&heading.to_owned())
            };
            if !found {
                violations.push(format!("{}: {link} leads nowhere", files::shown(root, &path)));
            }
        }
    }
    Ok(violations)
}

/// Targets of `[text](target)` outside code, without those on the web.
fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in prose(text) {
        // Odd parts lie between backticks.
        for part in line.split('`').step_by(2).collect::<Vec<_>>().join("").split("](").skip(1) {
            let target = part.split(')').next().unwrap_or_default();
            if !target.contains("://") && !target.starts_with("mailto:") {
                found.push(target.to_owned());
            }
        }
    }
    found
}

/// Names that a link can use for the headings of a document, as GitHub makes them.
fn headings(text: &str) -> Vec<String> {
    let titles = prose(text).filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    let slug = |title: &str| -> String {
        let kept = title.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
    };
    titles.map(slug).collect()
}

/// The lines outside fenced blocks.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut fenced = false;
    text.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fenced && !fence
    })
}

#[cfg(test)]
mod tests {
    use super::check;
    use crate::check::files::plant;

    #[test]
    fn finds_dead_links_and_headings() {
        let text = "[a](docs/a.md) [b](docs/missing.md) [c](docs/a.md#the-heading) [d](docs/a.md#other)\n\
            `[e](in_code)` [f](https://example.org/x) [g](#here)\n# Here\n```\n[h](fenced)\n```\n";
        let tree = plant(&[("README.md", text), ("docs/a.md", "## The `heading`\n[up](../README.md)\n")]);
        let violations = check(tree.path()).unwrap();
        assert_eq!(
            violations,
            ["README.md: docs/missing.md leads nowhere", "README.md: docs/a.md#other leads nowhere"]
        );
    }
}
