//! Limits on memory: runs that do not fit, what is said of them, and what is chosen so that they do.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of a test may panic like the test itself")]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use serde_json::json;
#[cfg(feature = "wgpu")]
use support::shapes::SMALL;
use support::{shapes::DEEP, *};
use tempfile::TempDir;
use unsloth_rs::{
    Category, Device,
    cpu::{CpuBackend, CpuOptions},
    recipe::{RunLength, TrainConfig, train},
};

const SEQ: usize = 200;

/// Documents of `SEQ` tokens for `tiny-llama`, and output folders.
struct Runs(TempDir);

impl Runs {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let document = |i: usize| json!({"input_ids": (0..SEQ).map(|j| (7 * i + 3 * j) % 100).collect::<Vec<_>>()});
        let lines: String = (0..8).map(|i| format!("{}\n", document(i))).collect();
        fs::write(folder.path().join("data.jsonl"), lines).unwrap();
        Self(folder)
    }

    fn output(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn train(&self, name: &str, options: &str) -> Outcome {
        let (model, data) = (fixture("tiny-llama").join("model"), self.output("data.jsonl"));
        let text = format!(
            "train --model {{}} --data {{}} --output {{}} --steps 2 --packing false --learning-rate 1e-2 --warmup-steps 0 \
             --max-seq-len {SEQ} --batch-size 4"
        );
        let mut args = line(&text, &[&model, &data, &self.output(name)]);
        // What is named again takes the place of what stands above.
        for option in options.split(' ').filter(|option| option.starts_with("--")) {
            if let Some(at) = args.iter().position(|arg| arg == option) {
                args.drain(at..at + 2);
            }
        }
        args.extend(options.split(' ').filter(|option| !option.is_empty()).map(Into::into));
        unsloth(args)
    }

    fn peak(&self, name: &str) -> u64 {
        read_metrics(&self.output(name)).last().unwrap()["peak_bytes"].as_u64().unwrap()
    }

    fn peak_of(&self, name: &str, options: &str) -> u64 {
        self.train(name, options).succeeded();
        self.peak(name)
    }
}

/// The options of each suggestion that is said to fit.
fn fitting(stderr: &str) -> Vec<String> {
    let options = |line: &str| Some(line.split_once(" with ")?.1.strip_suffix(", which fits")?.to_owned());
    stderr.lines().filter_map(options).collect()
}

#[test]
fn what_does_not_fit_is_refused_before_it_begins_and_each_suggestion_works() {
    let runs = Runs::new();
    let free = runs.peak_of("free", "");
    let limit = free * 3 / 4;
    let refused = runs.train("refused", &format!("--memory {limit}"));
    assert_eq!((refused.status, refused.stdout.as_str()), (1, ""));
    let head = refused.stderr.lines().find(|line| line.starts_with("error: ")).unwrap();
    assert!(head.contains("the run needs ") && head.contains(" are allowed"), "{head}");
    for category in ["weights", "adapters", "gradients", "optimiser", "activations", "workspace"] {
        assert!(refused.stderr.contains(&format!("\n  {category} ")), "{category}: {}", refused.stderr);
    }
    assert!(!runs.output("refused").exists(), "nothing was written");

    let suggestions = fitting(&refused.stderr);
    for kind in ["--checkpointing ", "--mlp-tile ", "--batch-size ", "--max-seq-len "] {
        assert!(suggestions.iter().any(|options| options.starts_with(kind)), "{kind}: {}", refused.stderr);
    }
    for (index, options) in suggestions.iter().enumerate() {
        let name = format!("suggested-{index}");
        let peak = runs.peak_of(&name, &format!("--memory {limit} {options}"));
        assert!(peak <= limit, "{options}: {peak} of {limit}");
        println!("{options}: {peak} of {limit} bytes, {free} without");
    }
}

#[test]
fn where_no_change_is_enough_all_are_put_together() {
    let runs = Runs::new();
    let free = runs.peak_of("free", "");
    // Less than half of this model's memory depends on anything but the weights.
    let mut found = None;
    for share in (1..20).rev() {
        let refused = runs.train("refused", &format!("--memory {}", free * share / 20));
        let suggestions = fitting(&refused.stderr);
        if refused.status == 1 && suggestions.len() == 1 && suggestions[0].contains("--offload disk --batch-size 1") {
            found = Some((free * share / 20, suggestions[0].clone()));
            break;
        }
    }
    let (limit, options) = found.expect("a limit that only several changes together keep");
    let peak = runs.peak_of("together", &format!("--memory {limit} {options}"));
    assert!(peak <= limit, "{options}: {peak} of {limit}");
    let hopeless = runs.train("hopeless", "--memory 1000");
    assert_eq!(hopeless.status, 1);
    assert!(
        fitting(&hopeless.stderr).is_empty() && hopeless.stderr.contains("which does not fit"),
        "{}",
        hopeless.stderr
    );
}

#[test]
fn auto_picks_the_least_that_fits_says_so_and_changes_no_bit() {
    let runs = Runs::new();
    let policies = ["none", "selective", "layers:0,1", "every:1"];
    let peaks = policies.map(|policy| runs.peak_of(policy, &format!("--checkpointing {policy}")));
    assert!(peaks.is_sorted_by(|a, b| a > b), "{peaks:?}");
    for (policy, peak) in policies.into_iter().zip(peaks) {
        let name = format!("auto-{peak}");
        let outcome = runs.train(&name, &format!("--checkpointing auto --memory {peak}")).succeeded();
        assert!(outcome.stderr.contains(&format!("; checkpointing {policy} chosen")), "{policy}: {}", outcome.stderr);
        assert!(runs.peak(&name) <= peak);
        assert_eq!(adapter_bytes(&runs.output(&name)), adapter_bytes(&runs.output("none")), "{policy}");
        let config = fs::read_to_string(runs.output(&name).join("config.toml")).unwrap();
        assert!(config.contains(&format!("checkpointing = \"{policy}\"\n")), "{config}");
    }
    let refused = runs.train("refused", &format!("--checkpointing auto --memory {}", peaks[3] / 2));
    assert!(refused.status == 1 && refused.stderr.contains("the run needs "), "{}", refused.stderr);
    runs.train("open", "--checkpointing auto").failed_with(&["checkpointing = auto, must be given with memory"]);
}

#[test]
fn a_plan_tells_what_a_limit_has_room_for() {
    let model = fixture("tiny-llama").join("model");
    let plan = |options: String| unsloth(line(&format!("plan --model {{}} {options}"), &[&model]));
    let peak = |seq: u64, batch: u64| {
        let found = plan(format!("--seq {seq} --batch {batch} --json")).succeeded().json();
        found["peak_bytes"].as_u64().unwrap()
    };
    for device in ["cpu", "vulkan:0"] {
        let limit = peak(100, 2) * 2;
        let found = plan(format!("--seq 100 --batch 2 --memory {limit} --json --device {device}")).succeeded().json();
        let [seq, batch] = ["largest_seq", "largest_batch"].map(|name| found[name].as_u64().unwrap());
        assert_eq!((&found["device"], &found["checkpointing"]), (&json!(device), &json!("none")));
        let fits = |seq: u64, batch: u64| {
            plan(format!("--seq {seq} --batch {batch} --memory {limit} --device {device}")).status == 0
        };
        assert!(fits(seq, 2) && !fits(seq + 16, 2), "{seq}");
        assert!(fits(100, batch) && !fits(100, batch + 1), "{batch}");
    }
    let few = peak(100, 4) * 2 / 3;
    let refused = plan(format!("--seq 100 --batch 4 --memory {few}"));
    assert_eq!(refused.status, 1);
    let suggestions = fitting(&refused.stderr);
    for kind in ["--checkpointing ", "--batch ", "--seq "] {
        assert!(suggestions.iter().any(|options| options.starts_with(kind)), "{kind}: {}", refused.stderr);
    }
    let chosen = plan(format!("--seq 100 --batch 4 --memory {few} --checkpointing auto")).succeeded().stdout;
    assert!(chosen.contains(" chosen\n") && chosen.contains("longest sequences at --batch 4: "), "{chosen}");

    let table = plan("--seq 100".into()).succeeded().stdout;
    let sizes: Vec<&str> = table.lines().filter_map(|line| line.split_once(" GB")).map(|(size, _)| size).collect();
    assert_eq!(sizes, ["8", "12", "16", "24", "32", "40", "48", "64", "80", "96", "128", "192"]);
}

/// Runs a command and gives the most memory that its process has had, by the operating system.
#[cfg(target_os = "linux")]
fn resident_peak(args: Vec<String>) -> u64 {
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_unsloth")).args(args).spawn().unwrap();
    let mut peak = 0;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        // What is read is itself the highest so far: a look before the end is enough.
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        peak = kilobytes.map_or(peak, |kilobytes| peak.max(1024 * kilobytes));
        std::thread::sleep(std::time::Duration::from_millis(10));
    };
    assert!(status.success());
    peak
}

/// Tiles and checkpointing on the same 24 layers, by the plan alone: each saves, and both together the most.
#[test]
fn tiles_and_checkpointing_add_up() {
    let model = tempfile::tempdir().unwrap();
    DEEP.write(model.path());
    for seq in [2048, 16384] {
        let peak = |options: &str| {
            let text = format!("plan --model {{}} --seq {seq} --json --threads 2 {options}");
            let plan = unsloth(line(&text, &[model.path()])).succeeded().json();
            let bytes = plan["peak_bytes"].as_u64().unwrap();
            println!("{seq} tokens, {options}: {} MB", bytes / 1_000_000);
            bytes
        };
        let [none, tiles, every] = ["--checkpointing none", "--mlp-tile 512", "--checkpointing every:1"].map(&peak);
        let both = peak("--checkpointing every:1 --mlp-tile 512");
        assert!(both < every && every < tiles && tiles * 5 < none * 3, "{seq}: {none}, {tiles}, {every}, {both}");
    }
}

/// What the ledger says that activations held when most was held, of the run that `unsloth train` has with these options.
fn activations_at_the_peak(options: &str, (model, data): (&Path, &Path), output: &Path) -> u64 {
    let mut config = TrainConfig {
        length: RunLength::Steps(2),
        packing: false,
        max_seq_len: Some(2048),
        ..TrainConfig::new(model.to_owned(), vec![data.to_owned()], output.to_owned())
    };
    let words: Vec<&str> = options.split(' ').collect();
    for option in words.chunks(2) {
        let &[name, value] = option else { panic!("{options}") };
        match name {
            "--checkpointing" => config.checkpointing = value.parse().unwrap(),
            "--offload" => config.offload = value.parse().unwrap(),
            "--mlp-tile" => config.mlp_tile = Some(value.parse().unwrap()),
            _ => panic!("{name}"),
        }
    }
    let cpu = CpuBackend::new(CpuOptions { num_threads: Some(2), ..CpuOptions::default() }).unwrap();
    let device = Device::new(cpu);
    train(&device, &config, &mut |_| (), &AtomicBool::new(false)).unwrap();
    device.usage().at_peak(Category::Activations)
}

/// What checkpointing saves on 24 layers at 2048 tokens: by the ledger, by the plan, and by the operating system.
#[cfg(target_os = "linux")]
#[test]
#[ignore = "full: minutes of training on a deep model"]
fn a_deep_model_holds_as_much_less_as_it_says() {
    /// What a process holds besides its buffers: the program, and what waits in the pool.
    const BESIDES: u64 = 64 << 20;
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (folder.path().join("model"), folder.path().join("data.jsonl"));
    fs::create_dir(&model).unwrap();
    DEEP.write(&model);
    let document = json!({"input_ids": (0..2048).map(|j| 3 * j % 1000).collect::<Vec<_>>()});
    fs::write(&data, format!("{document}\n{document}\n")).unwrap();
    let (mut first, mut every) = (None, 0);
    for (index, (options, most)) in [
        ("--checkpointing none", 1.0),
        ("--checkpointing selective", 0.75),
        ("--checkpointing sqrt", 0.3),
        ("--checkpointing every:1", 0.2),
        ("--checkpointing every:1 --offload host", 0.2),
        ("--checkpointing every:1 --offload disk", 0.2),
        ("--mlp-tile 512", 0.5),
    ]
    .into_iter()
    .enumerate()
    {
        let plan = unsloth(line(&format!("plan --model {{}} --seq 2048 --json --threads 2 {options}"), &[&model]));
        let plan = plan.succeeded().json();
        let number = |value: &Value| value.as_u64().unwrap();
        let (activations, planned) = (number(&plan["by_category"]["activations"]), number(&plan["peak_bytes"]));
        let output = folder.path().join(index.to_string());
        let text = format!(
            "train --model {{}} --data {{}} --output {{}} --steps 2 --packing false --max-seq-len 2048 --threads 2 --quiet \
             {options}"
        );
        let system = resident_peak(line(&text, &[&model, &data, &output]));
        let measured = number(&read_metrics(&output).last().unwrap()["peak_bytes"]);
        let held = activations_at_the_peak(options, (&model, &data), &folder.path().join(format!("{index} again")));
        let (none, none_system) = *first.get_or_insert((held, system));
        println!(
            "{options}: activations {held} ({activations} planned), all {measured} ({planned} planned), system {system}"
        );
        assert!(activations.abs_diff(held) * 20 <= held, "{options}: planned {activations}, held {held}");
        assert!(planned.abs_diff(measured) * 20 <= measured, "{options}: planned {planned}, measured {measured}");
        assert!(held as f64 <= most * none as f64, "{options}: {held} of {none}");
        let in_memory = if options.ends_with("host") { number(&plan["offloaded_bytes"]) } else { 0 };
        let ledger = measured + in_memory;
        // Weights that are mapped and not read since are not the process's.
        let range = ledger - ledger / 10..=ledger + ledger / 10 + BESIDES;
        assert!(range.contains(&system), "{options}: system {system}, ledger {ledger}");
        assert!(index == 0 || system < none_system, "{options}: system {system}, {none_system} without");
        // What is on disk is not in the process: less than the same policy without.
        match options {
            "--checkpointing every:1" => every = system,
            "--checkpointing every:1 --offload disk" => assert!(system < every, "{system} on disk, {every} without"),
            _ => {}
        }
    }
}

/// The same of a device whose memory is the process's: Mesa's software driver.
#[cfg(all(target_os = "linux", feature = "wgpu"))]
#[test]
#[ignore = "full: a minute of a software driver"]
fn a_software_device_holds_little_besides() {
    /// The driver with its compiler, compiled kernels, and what waits in CubeCL's pool.
    const BESIDES: u64 = 320 << 20;
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (folder.path().join("model"), folder.path().join("data.jsonl"));
    fs::create_dir(&model).unwrap();
    SMALL.write(&model);
    let document = json!({"input_ids": (0..256).map(|j| 3 * j % 1000).collect::<Vec<_>>()});
    fs::write(&data, format!("{document}\n{document}\n")).unwrap();
    for (index, options) in ["", "--checkpointing every:1", "--method full --checkpointing every:1"].iter().enumerate()
    {
        let output = folder.path().join(index.to_string());
        let text = format!(
            "train --model {{}} --data {{}} --output {{}} --steps 2 --packing false --max-seq-len 256 --device vulkan:0 \
             --quiet {options}"
        );
        let system = resident_peak(line(&text, &[&model, &data, &output]));
        let ledger = read_metrics(&output).last().unwrap()["peak_bytes"].as_u64().unwrap();
        println!("{options}: system {system}, ledger {ledger}");
        let range = ledger - ledger / 10..=ledger + ledger / 10 + BESIDES;
        assert!(range.contains(&system), "{options}: system {system}, ledger {ledger}");
    }
}
