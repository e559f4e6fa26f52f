//! `--keep-best`, through the binary: which checkpoint is kept, what the run gives, and that stopping and damage do not confuse it.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of a test may panic like the test itself")]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use support::{
    running::{Running, results},
    *,
};
use tempfile::TempDir;
use unsloth_rs::{
    device,
    recipe::{Event, TrainOptions, train},
};

/// Learns its forty documents by heart, so that the loss of the same tokens in another order falls and rises again.
const OPTIONS: &str = "--steps 30 --rank 4 --learning-rate 2e-2 --schedule constant --warmup-steps 0 --batch-size 4 --eval-data {} \
    --eval-every 3 --save-every 4 --keep-last 2";

struct Runs(TempDir);

impl Runs {
    /// With four documents from behind to evaluate on.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = fs::read_to_string(fixture("tiny-llama").join("train.jsonl")).unwrap();
        let reversed = |line: &str| {
            let mut document: Value = serde_json::from_str(line).unwrap();
            document["input_ids"].as_array_mut().unwrap().reverse();
            format!("{}\n", serde_json::json!({"input_ids": document["input_ids"]}))
        };
        fs::write(folder.path().join("eval.jsonl"), text.lines().take(4).map(reversed).collect::<String>()).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn arguments(&self, name: &str, more: &str) -> Vec<String> {
        let root = fixture("tiny-llama");
        let text = format!("train --model {{}} --data {{}} --output {{}} {OPTIONS} {more}");
        line(&text, &[&root.join("model"), &root.join("train.jsonl"), &self.path(name), &self.path("eval.jsonl")])
    }

    fn run(&self, name: &str, more: &str) -> Outcome {
        unsloth(self.arguments(name, more))
    }
}

/// Steps and losses of the evaluations, and which are said to be the best so far.
fn evaluations(output: &Path) -> Vec<(u64, f64, bool)> {
    let record = |line: &Value| {
        let best = line.get("best").is_some_and(|best| best.as_bool().unwrap());
        Some((line["step"].as_u64().unwrap(), line.get("eval_loss")?.as_f64().unwrap(), best))
    };
    read_metrics(output).iter().filter_map(record).collect()
}

/// The evaluation with the smallest loss, and whether any other is said to be better than all before it wrongly.
fn best(output: &Path) -> (u64, f64) {
    let mut best = (0, f64::INFINITY);
    for (step, loss, is_best) in evaluations(output) {
        assert_eq!(is_best, loss < best.1, "step {step}");
        if is_best {
            best = (step, loss);
        }
    }
    best
}

fn checkpoints(output: &Path) -> Vec<String> {
    names(&output.join("checkpoints"))
}

fn folder_of(step: u64) -> String {
    format!("step-{step:06}")
}

#[test]
fn the_best_is_kept_and_is_what_the_run_gives() {
    let runs = Runs::new();
    let outcome = runs.run("out", "--keep-best").succeeded();
    let output = runs.path("out");
    let (step, loss) = best(&output);
    assert!((3..24).contains(&step), "the loss has to rise again for this test: best behind step {step}");
    // Best behind steps that no other checkpoint is due at, too.
    assert_eq!(checkpoints(&output), [folder_of(step), folder_of(24), folder_of(28)]);
    let text = fs::read_to_string(output.join("checkpoints/step-000028/state.json")).unwrap();
    let state: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&state["best"]["step"], &state["best"]["eval_loss"]), (&step.into(), &loss.into()));
    let told = format!("the best {loss:.4} after step {step}, whose model it gives and {}", output.display());
    assert!(outcome.stderr.contains(&told), "{told}: {}", outcome.stderr);
    assert!(outcome.stderr.contains(&format!("step {step}/30  eval loss {loss:.4}")), "{}", outcome.stderr);

    let root = fixture("tiny-llama");
    let files = [&root.join("model"), &runs.path("eval.jsonl"), &output];
    let paths = files.map(PathBuf::as_path);
    let found = unsloth(line("eval --json --model {} --data {} --adapter {} --batch-size 4", &paths));
    let given = found.succeeded().json()["loss"].as_f64().unwrap();
    assert!((given - loss).abs() <= 1e-6 * loss, "{given}, evaluated as {loss}");
    // Without it the run ends with what its last step left, and all else is the same.
    runs.run("plain", "--quiet").succeeded();
    assert!(adapter_bytes(&runs.path("plain")) != adapter_bytes(&output));
    let losses = |name: &str| evaluations(&runs.path(name)).into_iter().map(|(step, loss, _)| (step, loss)).collect();
    let (plain, kept): (Vec<_>, Vec<_>) = (losses("plain"), losses("out"));
    assert_eq!(plain, kept);
    assert!(evaluations(&runs.path("plain")).iter().all(|record| !record.2));
}

#[test]
fn a_run_that_goes_on_knows_the_best() {
    let runs = Runs::new();
    runs.run("whole", "--keep-best --quiet").succeeded();
    let whole = runs.path("whole");
    let (step, _) = best(&whole);
    for (signal, lines) in [("INT", 12), ("KILL", 20), ("KILL", 31)] {
        let name = format!("{signal}-{lines}");
        let mut running = Running::start(&runs.arguments(&name, "--keep-best"));
        running.wait_for_steps(&runs.path(&name), lines);
        running.signal(signal);
        assert_ne!(running.end().status, 0, "the run was over before it was stopped");
        runs.run(&name, "--keep-best --resume --quiet").succeeded();
        let output = runs.path(&name);
        assert_eq!(results(&output), results(&whole), "{name}");
        assert!(adapter_bytes(&output) == adapter_bytes(&whole), "{name} gives another model");
        assert_eq!(checkpoints(&output), [folder_of(step), folder_of(24), folder_of(28)]);
    }
}

fn damage(checkpoint: &Path) {
    let path = checkpoint.join("state.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_best_that_is_damaged_is_named() {
    let runs = Runs::new();
    runs.run("out", "--keep-best --quiet").succeeded();
    let output = runs.path("out");
    let (step, _) = best(&output);
    let checkpoint = output.join("checkpoints").join(folder_of(step));
    damage(&checkpoint);
    let outcome = runs.run("out", "--keep-best --resume --quiet").succeeded();
    let file = checkpoint.join("state.safetensors");
    let warning = format!("the best checkpoint is damaged, the best from now on takes its place: `{}`", file.display());
    assert!(outcome.stderr.contains(&warning), "{}", outcome.stderr);
    // The evaluation behind the last step is the only one since.
    let last = evaluations(&output).pop().unwrap();
    assert!(last.0 == 30 && last.2, "{last:?}");
    assert!(checkpoints(&output).contains(&folder_of(30)), "{:?}", checkpoints(&output));
}

#[test]
fn a_best_that_is_damaged_meanwhile_is_an_error_behind_the_last_step() {
    let runs = Runs::new();
    let folder = runs.path("out");
    let (root, options) = (fixture("tiny-llama"), runs.path("options.toml"));
    let text = format!(
        "model = {:?}\ndata = {:?}\noutput = {:?}\nsteps = 30\nrank = 4\nlearning_rate = 2e-2\nschedule = \"constant\"\nwarmup_steps = 0\n\
         batch_size = 4\neval_data = {:?}\neval_every = 3\nkeep_best = true\n",
        root.join("model"),
        root.join("train.jsonl"),
        folder,
        runs.path("eval.jsonl"),
    );
    fs::write(&options, text).unwrap();
    let config = TrainOptions::read(&options).unwrap().config().unwrap();
    let mut spoil = |event| {
        if let Event::Step(record) = event
            && record.step == 29
        {
            // Nothing is saved but what is the best.
            let names = checkpoints(&folder);
            damage(&folder.join("checkpoints").join(names.last().unwrap()));
        }
    };
    let error = train(&device("cpu").unwrap(), &config, &mut spoil, &AtomicBool::new(false)).unwrap_err().to_string();
    assert!(error.starts_with("the best checkpoint, of step ") && error.contains("is not what was saved"), "{error}");
    assert!(folder.join("adapter_model.safetensors").exists(), "what the last step left is saved");
}
