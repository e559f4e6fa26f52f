//! Runs that are stopped, killed or cannot save, and go on: through the binary, compared bit for bit with runs that were not.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of a test may panic like the test itself")]

mod support;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use support::{
    running::{Running, results},
    *,
};
use tempfile::TempDir;

const STEPS: usize = 30;

/// What every run is told, unless its options say otherwise: 40 documents of 48 tokens, two to a sequence, in micro-batches of two
/// sequences, three to a step. An epoch is four steps, the last of them short; the run crosses seven borders of shuffled epochs.
const COMMON: [(&str, &str); 6] = [
    ("--steps", "30"),
    ("--batch-size", "2"),
    ("--grad-accum", "3"),
    ("--max-seq-len", "100"),
    ("--learning-rate", "1e-2"),
    ("--seed", "5"),
];

fn arguments(output: &Path, options: &str) -> Vec<String> {
    let root = fixture("tiny-llama");
    let mut args = line("train --model {} --output {}", &[&root.join("model"), output]);
    args.extend(line(options, &[]));
    let data = root.join("train.jsonl");
    for (name, value) in COMMON.into_iter().chain([("--data", data.to_str().unwrap())]) {
        if !args.iter().any(|arg| arg == name || (name, &**arg) == ("--steps", "--epochs")) {
            args.extend([name.to_owned(), value.to_owned()]);
        }
    }
    args
}

struct Runs {
    folder: TempDir,
    /// Of every run: what is trained, and the rest that changes the result.
    options: &'static str,
}

impl Runs {
    fn new(options: &'static str) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), options }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn arguments(&self, name: &str, more: &str) -> Vec<String> {
        arguments(&self.path(name), &format!("{} {more}", self.options))
    }

    fn run(&self, name: &str, more: &str) -> Outcome {
        unsloth(self.arguments(name, more))
    }

    /// A run that nothing interrupts.
    fn whole(&self) -> PathBuf {
        self.run("whole", "--save-every 7 --quiet").succeeded();
        self.path("whole")
    }

    /// Asserts that a run equals the one that was not interrupted: what it learnt, what it told, and at step 28 its moments,
    /// its place in the data and its counters.
    #[track_caller]
    fn equals_whole(&self, name: &str, whole: &Path) {
        let output = self.path(name);
        let learnt = |folder: &Path| {
            let file =
                ["adapter_model.safetensors", "model.safetensors"].into_iter().find(|file| folder.join(file).exists());
            fs::read(folder.join(file.unwrap())).unwrap()
        };
        assert!(learnt(&output) == learnt(whole), "{name} has learnt something else");
        assert_eq!(results(&output), results(whole));
        let tensors = |folder: &Path| fs::read(folder.join("checkpoints/step-000028/state.safetensors")).unwrap();
        assert!(tensors(&output) == tensors(whole), "{name} has other moments");
        let state = |folder: &Path| {
            let text = fs::read(folder.join("checkpoints/step-000028/state.json")).unwrap();
            let mut state: serde_json::Value = serde_json::from_slice(&text).unwrap();
            state["progress"].as_object_mut().unwrap().remove("seconds");
            state
        };
        assert_eq!(state(&output), state(whole));
    }
}

/// Checkpoints under their proper names, the oldest first; a run that was killed may leave a half-written one besides.
fn steps_saved(output: &Path) -> Vec<String> {
    names(&output.join("checkpoints")).into_iter().filter(|name| !name.ends_with(".partial")).collect()
}

#[test]
fn a_killed_run_goes_on_with_the_same_bits() {
    let runs = Runs::new("--rank 4 --dropout 0.2");
    let whole = runs.whole();
    assert_eq!(steps_saved(&whole), ["step-000021", "step-000028"]);
    for (trial, steps) in [3, 8, 15, 22].into_iter().enumerate() {
        let name = format!("killed-{trial}");
        let mut running = Running::start(&runs.arguments(&name, "--save-every 2"));
        running.wait_for_steps(&runs.path(&name), steps);
        // Anywhere within the steps, saving included.
        std::thread::sleep(std::time::Duration::from_millis(7 * trial as u64));
        running.signal("KILL");
        assert_eq!(running.end().status, -1, "the run was over before it was killed");
        // Where moments wait may be another place than before.
        let place = ["none", "host"][trial % 2];
        let resumed = runs.run(&name, &format!("--save-every 7 --resume --offload-optimizer {place}")).succeeded();
        assert!(resumed.stderr.contains("resumed from "), "{}", resumed.stderr);
        runs.equals_whole(&name, &whole);
        let left = names(&runs.path(&name).join("checkpoints"));
        assert!(left.len() == 2 && left[1] == "step-000028" && !left[0].contains("partial"), "{left:?}");
    }
}

/// A number below `bound`.        Marsaglia 2003, "Xorshift RNGs"
fn next(state: &mut u64, bound: u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state % bound
}

/// Kills at random moments, before the first step and while saving included. `KILL_SEED` repeats a run of this test, `KILL_TRIALS`
/// makes it shorter or longer.
#[test]
#[ignore = "full: two hundred runs that are killed and go on take minutes"]
fn kills_at_random_moments_lose_no_more_than_the_step_in_flight() {
    const SAVE: &str = "--save-every 1 --keep-last 3";
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = number("KILL_SEED").unwrap_or(since_epoch.as_nanos() as u64 | 1);
    let trials = number("KILL_TRIALS").unwrap_or(200);
    println!("KILL_SEED={seed} KILL_TRIALS={trials}");
    let runs = Runs::new("--rank 2 --dropout 0.2");
    let start = std::time::Instant::now();
    runs.run("whole", &format!("{SAVE} --quiet")).succeeded();
    let (whole, longest) = (runs.path("whole"), start.elapsed().as_micros() as u64);
    let (mut state, mut counts) = (seed, [0; 3]);
    for trial in 0..trials {
        let (name, after) = (format!("trial-{trial}"), next(&mut state, longest));
        let running = Running::start(&runs.arguments(&name, SAVE));
        std::thread::sleep(std::time::Duration::from_micros(after));
        running.signal("KILL");
        let output = runs.path(&name);
        let context = format!("KILL_SEED={seed}, trial {trial}, after {after} us");
        if running.end().status != 0 {
            let steps = || read_metrics(&output).iter().filter(|line| line.get("loss").is_some()).count();
            let num_steps = if output.join("metrics.jsonl").exists() { steps() } else { 0 };
            if output.join("checkpoints").exists() && !steps_saved(&output).is_empty() {
                let resumed = runs.run(&name, &format!("{SAVE} --resume")).succeeded();
                let (_, step) = resumed.stderr.split_once(", after step ").unwrap();
                let step: usize = step.lines().next().unwrap().trim().parse().unwrap();
                assert!(step + 1 >= num_steps, "{context}: {num_steps} steps done, resumed after step {step}");
                counts[1] += 1;
            } else {
                assert!(num_steps <= 1, "{context}: {num_steps} steps done and nothing saved");
                runs.run(&name, &format!("{SAVE} --overwrite --quiet")).succeeded();
                counts[0] += 1;
            }
        } else {
            counts[2] += 1;
        }
        println!("{context}");
        runs.equals_whole(&name, &whole);
        fs::remove_dir_all(&output).unwrap();
    }
    let [anew, resumed, done] = counts;
    println!("{resumed} resumed, {anew} killed before their first checkpoint, {done} over before they were killed");
}

#[test]
fn a_folder_in_use_is_refused() {
    let runs = Runs::new("--rank 4");
    let mut running = Running::start(&runs.arguments("out", "--save-every 1 --epochs 1000"));
    running.wait_for_steps(&runs.path("out"), 2);
    for start in ["--resume", "--overwrite"] {
        let message = format!("another run is writing to `{}`", runs.path("out").display());
        runs.run("out", &format!("--epochs 1000 {start}")).failed_with(&[&message]);
    }
    running.signal("KILL");
    running.end();
}

#[test]
fn another_model_is_not_gone_on_with() {
    let runs = Runs::new("--rank 4");
    let model = runs.path("model");
    fs::create_dir(&model).unwrap();
    let source = fixture("tiny-llama").join("model");
    for name in names(&source) {
        fs::copy(source.join(&name), model.join(&name)).unwrap();
    }
    let arguments = |more: &str, model: &Path| -> Vec<String> {
        let given = runs.arguments("out", more);
        let place = given.iter().position(|arg| arg == "--model").unwrap() + 1;
        given
            .into_iter()
            .enumerate()
            .map(|(i, arg)| if i == place { model.display().to_string() } else { arg })
            .collect()
    };
    unsloth(arguments("--save-every 7 --quiet", &model)).succeeded();
    // The same model elsewhere is the same.
    unsloth(arguments("--save-every 7 --resume --quiet", &source)).succeeded();
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    fs::write(model.join("config.json"), config.replace("1e-05", "1e-06")).unwrap();
    let refused = unsloth(arguments("--save-every 7 --resume", &model));
    refused.failed_with(&["model = configuration and weights with SHA-256", "differs from the run to be resumed"]);
}

/// Stops a run by a signal and goes on with the command that it prints.
fn stopped_run_goes_on(options: &'static str, signal: &str) {
    let runs = Runs::new(options);
    let whole = runs.whole();
    let output = runs.path("stopped");
    let mut running = Running::start(&runs.arguments("stopped", "--save-every 7"));
    running.wait_for_steps(&output, 9);
    running.signal(signal);
    let stopped = running.end();
    assert_eq!(stopped.status, 130, "{}", stopped.stderr);
    let num_steps = read_metrics(&output).iter().filter(|line| line.get("loss").is_some()).count();
    assert!((7..STEPS).contains(&num_steps), "{num_steps}");
    let checkpoint = format!("checkpoints/step-{num_steps:06}");
    for part in [&format!("stopped after step {num_steps}, saved in "), &checkpoint] {
        assert!(stopped.stderr.contains(part), "{part}: {}", stopped.stderr);
    }
    let mut check = Command::new("sha256sum");
    check.args(["--check", "--strict", "SHA256SUMS"]).current_dir(output.join(&checkpoint));
    assert!(check.output().unwrap().status.success(), "sha256sum does not agree");
    assert!(output.join("loss.svg").exists() && output.join("tokenizer.json").exists());

    let (_, command) = stopped.stderr.split_once("go on with: unsloth ").unwrap();
    let outcome = unsloth(line(command, &[])).succeeded();
    assert!(outcome.stderr.contains(&format!("step {}/30", num_steps + 1)), "{}", outcome.stderr);
    assert!(!outcome.stderr.contains(&format!("step {num_steps}/30")), "{}", outcome.stderr);
    runs.equals_whole("stopped", &whole);
}

#[test]
fn an_interrupted_run_goes_on_with_the_same_bits() {
    stopped_run_goes_on("--rank 4 --eval-split 0.1 --eval-every 4", "INT");
}

#[test]
fn a_terminated_full_run_goes_on_with_the_same_bits() {
    stopped_run_goes_on("--method full --max-grad-norm 0.5", "TERM");
}

#[test]
fn an_interrupted_run_from_scratch_in_bf16_goes_on_with_the_same_bits() {
    stopped_run_goes_on("--method scratch --dtype bf16 --schedule linear", "INT");
}

#[test]
fn an_interrupted_run_in_f16_goes_on_with_its_loss_scale() {
    stopped_run_goes_on("--method full --dtype f16", "INT");
}

#[test]
fn an_interrupted_run_with_moments_elsewhere_goes_on_with_the_same_bits() {
    stopped_run_goes_on("--method full --offload-optimizer disk", "INT");
}

/// What is drawn depends on the step, not on when the run began.
#[test]
fn an_interrupted_run_without_masters_goes_on_with_the_same_bits() {
    stopped_run_goes_on("--method full --dtype bf16 --stochastic-rounding --optimizer muon", "INT");
}

/// Codes of 8 bits are saved as they are.
#[test]
fn an_interrupted_run_with_8_bit_moments_goes_on_with_the_same_bits() {
    stopped_run_goes_on("--method full --optimizer adamw8bit --schedule wsd --embedding-learning-rate 1e-3", "INT");
}

#[test]
fn a_second_signal_ends_the_run_at_once() {
    let runs = Runs::new("--rank 4");
    // One step over 24000 documents, which takes long enough not to be over before the signals.
    let data = runs.path("data.jsonl");
    fs::write(&data, fs::read_to_string(fixture("tiny-llama").join("train.jsonl")).unwrap().repeat(600)).unwrap();
    let options = format!("--steps 1 --grad-accum 100000 --data {}", data.display());
    let mut running = Running::start(&runs.arguments("out", &options));
    running.wait_for_steps(&runs.path("out"), 0);
    // The step begins at once.
    std::thread::sleep(std::time::Duration::from_millis(300));
    running.signal("INT");
    std::thread::sleep(std::time::Duration::from_millis(300));
    running.signal("INT");
    let outcome = running.end();
    assert_eq!(outcome.status, 130);
    assert!(outcome.stderr.contains("stopping after this step; once more to stop at once"), "{}", outcome.stderr);
    assert!(read_metrics(&runs.path("out")).is_empty() && !outcome.stderr.contains("step 1/1"), "{}", outcome.stderr);
    assert_eq!(names(&runs.path("out")), ["config.toml", "metrics.jsonl"]);
}

#[test]
fn a_run_that_is_stopped_before_its_first_step_changes_nothing() {
    let runs = Runs::new("--rank 4");
    runs.run("out", "--quiet --steps 2").succeeded();
    let before = adapter_bytes(&runs.path("out"));
    // The run waits for its data until the signal has come: opening a pipe waits for the other end.
    let data = runs.path("data.jsonl");
    assert!(Command::new("mkfifo").arg(&data).status().unwrap().success());
    let running = Running::start(&runs.arguments("out", &format!("--overwrite --data {}", data.display())));
    let mut pipe = fs::OpenOptions::new().write(true).open(&data).unwrap();
    running.signal("INT");
    pipe.write_all(&fs::read(fixture("tiny-llama").join("train.jsonl")).unwrap()).unwrap();
    drop(pipe);
    let outcome = running.end();
    assert_eq!(outcome.status, 130, "{}", outcome.stderr);
    let stopped = "stopped before a step was taken; the output folder is as it was\n";
    assert!(outcome.stderr.contains(stopped), "{}", outcome.stderr);
    assert!(adapter_bytes(&runs.path("out")) == before && read_metrics(&runs.path("out")).len() == 2);
}

#[test]
fn a_damaged_checkpoint_is_passed_over_and_named() {
    let runs = Runs::new("--rank 4");
    let whole = runs.whole();
    let mut running = Running::start(&runs.arguments("out", "--save-every 4 --keep-last 3"));
    running.wait_for_steps(&runs.path("out"), 14);
    running.signal("KILL");
    running.end();
    let output = runs.path("out");
    let saved = steps_saved(&output);
    let newest = output.join("checkpoints").join(saved.last().unwrap());
    let tensors = newest.join("state.safetensors");
    let mut bytes = fs::read(&tensors).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&tensors, &bytes).unwrap();
    let outcome = runs.run("out", "--save-every 7 --resume").succeeded();
    let warning = format!("warning: passed over a damaged checkpoint: `{}` is not what was saved", tensors.display());
    let from = format!("resumed from {}", output.join("checkpoints").join(&saved[saved.len() - 2]).display());
    for part in [warning, from] {
        assert!(outcome.stderr.contains(&part), "{part}: {}", outcome.stderr);
    }
    runs.equals_whole("out", &whole);

    for step in steps_saved(&output) {
        fs::remove_file(output.join("checkpoints").join(step).join("state.json")).unwrap();
    }
    runs.run("out", "--resume").failed_with(&[
        "no whole checkpoint",
        "step-000028/state.json` cannot be read",
        "step-000021",
    ]);
}

#[test]
fn what_would_change_the_run_is_refused() {
    let runs = Runs::new("--rank 4");
    runs.run("none", "--resume").failed_with(&["none/checkpoints`: no checkpoint to resume from"]);
    assert!(!runs.path("none").exists());
    let whole = runs.whole();
    for (options, parts) in [
        ("--rank 4 --learning-rate 1e-3", ["learning_rate = 0.001", "has 0.01"]),
        ("--rank 4 --seed 6", ["seed = 6", "has 5"]),
        ("--rank 4 --steps 40", ["steps = 40", "has 30"]),
        ("--rank 4 --epochs 3", ["epochs = 3", "has absent"]),
        ("--rank 4 --dtype bf16", ["dtype = \"bf16\"", "has \"f32\""]),
        ("--rank 4 --packing false", ["packing = false", "has true"]),
        ("--rank 4 --eval-split 0.5", ["eval_split = 0.5", "has absent"]),
        ("--rank 2", ["rank = 2", "has 4"]),
    ] {
        let args = arguments(&whole, &format!("--save-every 7 --resume {options}"));
        unsloth(args).failed_with(&[&parts[..], &["differs from the run to be resumed", "step-000028"]].concat());
    }
    let data = runs.path("data.jsonl");
    let mut text = fs::read_to_string(fixture("tiny-llama").join("train.jsonl")).unwrap();
    fs::write(&data, &text).unwrap();
    let resume = |output: &Path| {
        let options = format!("--rank 4 --resume --save-every 3 --keep-last 1 --data {}", data.display());
        unsloth(arguments(output, &options))
    };
    // The same data elsewhere, in a folder that was moved, with other checkpoints: none of it changes the result.
    let (moved, expected) = (runs.path("moved"), (adapter_bytes(&whole), results(&whole)));
    fs::rename(&whole, &moved).unwrap();
    resume(&moved).succeeded();
    assert!((adapter_bytes(&moved), results(&moved)) == expected);
    text = text.replacen("1", "2", 1);
    fs::write(&data, &text).unwrap();
    resume(&moved).failed_with(&["data = examples with SHA-256", "differs from the run to be resumed"]);
}

#[test]
fn a_run_is_not_lost_unasked() {
    let runs = Runs::new("--rank 4");
    runs.run("out", "--save-every 7 --quiet").succeeded();
    let before = adapter_bytes(&runs.path("out"));
    let again = runs.run("out", "--quiet --adapter nowhere");
    again.failed_with(&["out` holds a run already (`checkpoints`)", "resume", "overwrite"]);
    // A run that cannot begin removes nothing.
    runs.run("out", "--quiet --overwrite --adapter nowhere").failed_with(&["nowhere"]);
    assert!(adapter_bytes(&runs.path("out")) == before && runs.path("out").join("checkpoints").exists());
    runs.run("out", "--quiet --overwrite").succeeded();
    assert!(adapter_bytes(&runs.path("out")) == before);
    assert!(!runs.path("out").join("checkpoints").exists());
    assert_eq!(read_metrics(&runs.path("out")).len(), STEPS);
}

#[test]
fn a_full_disk_leaves_the_last_checkpoint_whole() {
    let runs = Runs::new("--rank 4");
    let whole = runs.whole();
    let mut running = Running::start(&runs.arguments("out", "--save-every 3"));
    running.wait_for_steps(&runs.path("out"), 4);
    running.signal("KILL");
    running.end();
    let checkpoints = runs.path("out").join("checkpoints");
    let before: Vec<_> = steps_saved(&runs.path("out"));
    let newest = checkpoints.join(before.last().unwrap());
    // A limit on the size of files stands for a disk that is full; the signal that comes with it is ignored, as a disk sends none.
    let script = r#"trap "" XFSZ; ulimit -f 100; exec "$0" "$@""#;
    let output = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_unsloth")])
        .args(runs.arguments("out", "--save-every 3 --resume"))
        .output()
        .unwrap();
    let outcome = Outcome::of(output);
    let whole_one = format!("`{}` is whole, resume from it", newest.display());
    outcome.failed_with(&["could not be saved", &whole_one, "state.safetensors`", "File too large"]);
    assert_eq!(steps_saved(&runs.path("out")), before);
    let resumed = runs.run("out", "--save-every 7 --resume").succeeded();
    assert!(resumed.stderr.contains(&format!("resumed from {}", newest.display())), "{}", resumed.stderr);
    runs.equals_whole("out", &whole);
}
