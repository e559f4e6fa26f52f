//! `cargo xtask bench-report`: the tables in docs/performance.md, made of benches/results, so that no figure there is typed.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

const RESULTS: &str = "benches/results";
const DOCUMENT: &str = "docs/performance.md";
const BEGIN: &str = "<!-- cargo xtask bench-report: begin -->";
const END: &str = "<!-- cargo xtask bench-report: end -->";
/// Whose operators stand in the document where a file has several models'; the file has them all.
const MODEL: &str = "Llama-3.2-1B";

/// What an entry is the timing of, on so many threads.
const IDENTITY: [&str; 5] = ["op", "part", "model", "shape", "dtype"];

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Change nothing; fail if the document is not what the results say.
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    let (path, old) = (root.join(DOCUMENT), read(&root.join(DOCUMENT))?);
    let new = updated(&old, &tables(root)?)?;
    if arguments.check {
        ensure!(old == new, "{DOCUMENT} is not what {RESULTS} says: run cargo xtask bench-report");
    } else {
        fs::write(&path, new).with_context(|| path.display().to_string())?;
    }
    println!("{DOCUMENT}: {}", if arguments.check { "as the results say" } else { "written" });
    Ok(())
}

/// For `cargo xtask check`.
pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let path = root.join(DOCUMENT);
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let old = read(&path)?;
    let is_same = updated(&old, &tables(root)?)? == old;
    Ok(if is_same {
        Vec::new()
    } else {
        vec![format!("{DOCUMENT}: not what {RESULTS} says: cargo xtask bench-report")]
    })
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// The document with other tables between its marks.
fn updated(document: &str, tables: &str) -> Result<String> {
    let (before, rest) = document.split_once(BEGIN).with_context(|| format!("{DOCUMENT} has no line {BEGIN}"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("{DOCUMENT} has no line {END}"))?;
    Ok(format!("{before}{BEGIN}\n\n{tables}{END}{after}"))
}

/// The tables of all files, in the order of their names.
fn tables(root: &Path) -> Result<String> {
    let folder = root.join(RESULTS);
    let entries = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    let is = |path: &Path, kind: &str| path.extension().is_some_and(|extension| extension == kind);
    let mut text = String::new();
    for path in paths.iter().filter(|path| is(path, "json")) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let results: Value = serde_json::from_str(&read(path)?).with_context(|| name.clone())?;
        let table = match (results.get("results"), results.get("runs")) {
            (Some(Value::Array(entries)), _) => timings(&results, entries),
            (_, Some(Value::Array(runs))) => programs(&results, runs),
            _ => match &results["suites"] {
                Value::Array(of_operators) => suites(&results, of_operators),
                _ => Err(anyhow!("no `results`, `runs` or `suites`")),
            },
        };
        let table = table.with_context(|| format!("{RESULTS}/{name}"))?;
        writeln!(text, "### [{name}](../{RESULTS}/{name})\n\n{table}")?;
        // `name.sequence-time.svg` is a picture of `name.json`.
        let stem = name.trim_end_matches("json");
        for picture in paths.iter().filter(|path| is(path, "svg")).filter_map(|path| path.file_name()?.to_str()) {
            if let Some(what) = picture.strip_prefix(stem).and_then(|rest| rest.strip_suffix(".svg")) {
                writeln!(text, "![{}](../{RESULTS}/{picture})\n", what.replace('-', " "))?;
            }
        }
    }
    Ok(text)
}

fn text<'a>(value: &'a Value, field: &str) -> Result<&'a str> {
    value[field].as_str().with_context(|| format!("`{field}` must be text"))
}

fn number(value: &Value, field: &str) -> Result<f64> {
    value[field].as_f64().with_context(|| format!("`{field}` must be a number"))
}

/// What `cargo xtask bench` wrote.
fn timings(report: &Value, entries: &[Value]) -> Result<String> {
    let machine = &report["machine"];
    let mut table = format!("`{}` on {}", text(report, "command")?, text(machine, "model")?);
    if let Some(commit) = report["commit"].as_str() {
        write!(table, ", commit {}", commit.get(..12).unwrap_or(commit))?;
    }
    if let Some(note) = report["note"].as_str() {
        write!(table, ". {}", note.trim_end_matches('.'))?;
    }
    table.push_str(".\n\n| limit | threads | rate | measured by |\n|---|---|---|---|\n");
    let mut main = 1;
    for limits in report["limits"].as_array().context("`limits` must be a list")? {
        let threads = limits["threads"].as_u64().context("`threads` must be a number")?;
        main = main.max(threads);
        for (field, name, unit) in [
            ("f32_flops", "f32 products", "GFLOP/s"),
            ("bf16_flops", "bf16 products", "GFLOP/s"),
            ("f16_flops", "f16 products", "GFLOP/s"),
            ("read_bytes", "reading", "GB/s"),
            ("copy_bytes", "copying", "GB/s"),
        ] {
            let Some(rate) = limits.get(field).filter(|rate| !rate.is_null()) else { continue };
            let (rate, by) = (number(rate, "per_second")? / 1e9, text(rate, "by")?);
            writeln!(table, "| {name} | {threads} | {rate:.1} {unit} | {by} |")?;
        }
    }
    table.push_str(
        "\n| what | median | p90 | rate | of limit | peak | peers' time over ours |\n|---|---|---|---|---|---|---|\n",
    );
    let has_model = entries.iter().any(|entry| entry["model"] == MODEL);
    let is_shown = |entry: &&Value| {
        let is_whole = matches!(entry["op"].as_str(), Some("train_step" | "decode"));
        is_whole || !has_model || entry["model"] == MODEL || entry["model"] == "square"
    };
    let (all, fewer): (Vec<&Value>, Vec<&Value>) =
        entries.iter().filter(is_shown).partition(|entry| entry["threads"].as_u64() == Some(main));
    for entry in &all {
        table.push_str(&timing(entry)?);
    }
    table.push_str(&fewer_threads(&all, &fewer, main)?);
    Ok(table)
}

/// What was timed with `fewer` threads besides, next to `all` of them, which are `main`.
fn fewer_threads(all: &[&Value], fewer: &[&Value], main: u64) -> Result<String> {
    let mut table = String::new();
    for entry in fewer {
        let is_same = |other: &&&Value| IDENTITY.iter().all(|&field| other[field] == entry[field]);
        let Some(with_all) = all.iter().find(is_same) else { continue };
        let median = number(entry, "median_s")?;
        let (what, ratio) = (identity(entry)?, median / number(with_all, "median_s")?);
        writeln!(table, "| {what} | {} | {} | {ratio:.2} |", number(entry, "threads")?, seconds(median))?;
    }
    if !table.is_empty() {
        table =
            format!("\n| with fewer threads | threads | median | over that with {main} |\n|---|---|---|---|\n{table}");
    }
    Ok(table)
}

fn identity(entry: &Value) -> Result<String> {
    Ok(IDENTITY.iter().map(|field| text(entry, field)).collect::<Result<Vec<_>>>()?.join(", "))
}

fn timing(entry: &Value) -> Result<String> {
    let (median, bound) = (number(entry, "median_s")?, text(entry, "bound")?);
    let rate = match bound {
        "compute" => format!("{:.1} GFLOP/s", number(entry, "flops")? / median / 1e9),
        _ => format!("{:.1} GB/s", number(entry, "bytes")? / median / 1e9),
    };
    let rate =
        entry["tokens_per_second"].as_f64().map_or(rate.clone(), |tokens| format!("{tokens:.1} tokens/s, {rate}"));
    let peers = entry["peers"].as_array().map(Vec::as_slice).unwrap_or_default();
    let peers = peers.iter().map(|peer| Ok(format!("{} {:.2}", text(peer, "name")?, number(peer, "ratio")?)));
    let peers = peers.collect::<Result<Vec<_>>>()?.join(", ");
    let what = identity(entry)?;
    let (p90, of_limit) = (seconds(number(entry, "p90_s")?), number(entry, "percent_of_limit")?);
    let peak = number(entry, "peak_bytes")? / f64::from(1 << 20);
    Ok(format!("| {what} | {} | {p90} | {rate} | {of_limit:.0}% | {peak:.1} MiB | {peers} |\n", seconds(median)))
}

fn seconds(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.3} s"),
        s if s >= 1e-3 => format!("{:.3} ms", s * 1e3),
        s => format!("{:.1} us", s * 1e6),
    }
}

/// What the operators' suites said of a device.
fn suites(report: &Value, suites: &[Value]) -> Result<String> {
    let (mut passed, mut others) = (Vec::new(), String::new());
    for suite in suites {
        let name = text(suite, "suite")?;
        match (suite["passed"].as_bool(), suite["not_run"].as_str()) {
            (Some(true), _) => passed.push(name),
            (_, Some(reason)) => writeln!(others, "- {name}: not run ({reason})")?,
            _ => writeln!(others, "- {name}: failed ({})", text(suite, "failure")?)?,
        }
    }
    let dtypes = report["dtypes"].as_array().context("`dtypes` must be a list")?;
    let dtypes: Vec<&str> = dtypes.iter().filter_map(Value::as_str).collect();
    let (model, commit) = (text(&report["machine"], "model")?, report["commit"].as_str().unwrap_or("unknown"));
    let (types, count) = (dtypes.join(", "), suites.len());
    let head = format!("`benches suites` on {model}, commit {}, in {types}: ", commit.get(..12).unwrap_or(commit));
    Ok(format!("{head}{} of {count} passed.\n\n- passed: {}\n{others}", passed.len(), passed.join(", ")))
}

/// Whole programs that did the same, the first of them ours.
fn programs(results: &Value, runs: &[Value]) -> Result<String> {
    let mut table = format!("{}. On {}.\n\n", text(results, "what")?, text(results, "machine")?);
    for (program, command) in results["commands"].as_object().context("`commands` must be an object")? {
        writeln!(table, "- {program}: `{}`", command.as_str().context("a command must be text")?)?;
    }
    table.push_str(
        "\n| model | type | program | seconds (each round) | tokens/s | peak memory, MB |\n|---|---|---|---|---|---|\n",
    );
    for run in runs {
        let list = |field: &str| -> Result<String> {
            let values = run[field].as_array().with_context(|| format!("`{field}` must be a list"))?;
            let values = values.iter().map(|value| value.as_f64().map(|value| value.to_string()));
            Ok(values.collect::<Option<Vec<_>>>().with_context(|| format!("`{field}` must hold numbers"))?.join(", "))
        };
        let (model, dtype, program) = (text(run, "model")?, text(run, "dtype")?, text(run, "program")?);
        let (median, tokens, peak) = (list("median_s")?, list("tokens_per_second")?, number(run, "peak_rss_mb")?);
        writeln!(table, "| {model} | {dtype} | {program} | {median} | {tokens} | {peak} |")?;
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::{Arguments, BEGIN, END, check, run};
    use crate::check::plant;

    const SUITES: &str = r#"{"machine": {"model": "Card"}, "commit": "0123456789abcdef", "dtypes": ["f32", "f16"], "suites": [
        {"suite": "glu", "passed": true, "not_run": null, "failure": null, "seconds": 1.0},
        {"suite": "rope", "passed": false, "not_run": "no card", "failure": null, "seconds": 1.0},
        {"suite": "linear", "passed": false, "not_run": null, "failure": "wrong", "seconds": 1.0}]}"#;
    const BENCH: &str = r#"{"version": 1, "note": "Typed off.", "command": "cargo xtask bench --quick", "commit": "0123456789abcdef",
        "machine": {"model": "a processor"}, "limits": [{"threads": 2,
            "f32_flops": {"per_second": 2e11, "by": "FMA"}, "bf16_flops": null,
            "read_bytes": {"per_second": 2e10, "by": "sums"}, "copy_bytes": {"per_second": 1e10, "by": "copies"}}],
        "results": [{"op": "glu", "part": "forward", "model": "m", "shape": "2 x 3", "dtype": "f32", "threads": 2,
            "median_s": 0.002, "p90_s": 0.003, "min_s": 0.002, "samples": 9, "flops": 0, "bytes": 20000000, "bound": "memory",
            "percent_of_limit": 50.0, "peak_bytes": 1048576, "tokens_per_second": null,
            "peers": [{"name": "candle", "median_s": 0.004, "ratio": 2.0}]},
            {"op": "glu", "part": "forward", "model": "m", "shape": "2 x 3", "dtype": "f32", "threads": 1, "median_s": 0.003,
            "peers": []}]}"#;
    const PROGRAMS: &str = r#"{"what": "one step", "machine": "two cores", "commands": {"ours": "train"},
        "runs": [{"model": "small", "dtype": "f32", "program": "ours", "median_s": [1.5], "tokens_per_second": [700.0],
            "peak_rss_mb": 445}]}"#;

    #[test]
    fn figures_come_from_the_files_and_drift_is_found() {
        let document = format!("# Performance\n\n{BEGIN}\n{END}\n\nThe end.\n");
        let files = [
            ("docs/performance.md", &*document),
            ("benches/results/a.json", BENCH),
            ("benches/results/b.json", PROGRAMS),
            ("benches/results/c.json", SUITES),
            ("benches/results/a.sequence-time.svg", "<svg/>"),
        ];
        let tree = plant(&files);
        assert_eq!(check(tree.path()).unwrap().len(), 1, "an empty table is not what the results say");
        assert!(run(tree.path(), &Arguments { check: true }).is_err());
        run(tree.path(), &Arguments { check: false }).unwrap();
        assert_eq!(check(tree.path()).unwrap(), Vec::<String>::new());
        let path = tree.path().join("docs/performance.md");
        let text = std::fs::read_to_string(&path).unwrap();
        let row = "| glu, forward, m, 2 x 3, f32 | 2.000 ms | 3.000 ms | 10.0 GB/s | 50% | 1.0 MiB | candle 2.00 |";
        for part in [
            row,
            "| glu, forward, m, 2 x 3, f32 | 1 | 3.000 ms | 1.50 |",
            "![sequence time](../benches/results/a.sequence-time.svg)",
            "| small | f32 | ours | 1.5 | 700 | 445 |",
            "0123456789ab. Typed off.\n",
            "200.0 GFLOP/s",
            "The end.",
            "in f32, f16: 1 of 3 passed",
            "- passed: glu",
            "- rope: not run (no card)",
            "- linear: failed (wrong)",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        std::fs::write(&path, text.replace("2.000 ms", "1.000 ms")).unwrap();
        assert_eq!(check(tree.path()).unwrap().len(), 1, "a figure that was typed");
    }

    #[test]
    fn a_file_of_another_kind_is_named() {
        let document = format!("{BEGIN}\n{END}\n");
        let tree = plant(&[("docs/performance.md", &*document), ("benches/results/a.json", "{}")]);
        let error = format!("{:#}", check(tree.path()).unwrap_err());
        assert!(error.contains("a.json: no `results`"), "{error}");
    }
}
