//! Evaluation while training, and configuration files: through the binary.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of a test may panic like the test itself")]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use support::{running::results, *};
use tempfile::TempDir;

fn train_in(folder: &TempDir, name: &str, options: &str) -> (PathBuf, Outcome) {
    let (root, output) = (fixture("tiny-llama"), folder.path().join(name));
    let common = "train --model {} --data {} --output {} --steps 7 --rank 4 --learning-rate 1e-2";
    let mut args = line(common, &[&root.join("model"), &root.join("train.jsonl"), &output]);
    args.extend(line(options, &[&root.join("eval.jsonl"), &root.join("train.jsonl")]));
    (output, unsloth(args).succeeded())
}

/// Steps, losses and perplexities of the evaluations.
fn evaluations(output: &Path) -> Vec<(u64, f64, f64)> {
    let record = |line: Value| {
        let number = |name: &str| line[name].as_f64().unwrap();
        assert_eq!(line.as_object().unwrap().len(), 3);
        (line["step"].as_u64().unwrap(), number("eval_loss"), number("eval_perplexity"))
    };
    read_metrics(output).into_iter().filter(|line| line.get("eval_loss").is_some()).map(record).collect()
}

#[test]
fn evaluations_are_those_of_unsloth_eval_and_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (plain, _) = train_in(&folder, "plain", "");
    let (output, outcome) = train_in(&folder, "out", "--eval-data {} --eval-every 3 --batch-size 1");
    let found = evaluations(&output);
    assert_eq!(found.iter().map(|record| record.0).collect::<Vec<_>>(), [3, 6, 7]);
    assert!(found.iter().all(|&(_, loss, perplexity)| (perplexity / loss.exp() - 1.0).abs() < 1e-12));
    assert!(found[0].1 != found[1].1 && found[1].1 != found[2].1);
    let root = fixture("tiny-llama");
    let args = line(
        "eval --json --model {} --data {} --adapter {}",
        &[&root.join("model"), &root.join("eval.jsonl"), &output],
    );
    let expected = unsloth(args).succeeded().json()["loss"].as_f64().unwrap();
    assert!((found[2].1 - expected).abs() <= 1e-6 * expected, "{} {expected}", found[2].1);
    for part in ["evaluation: 2 examples, ", "step 3/7  eval loss ", "perplexity ", "eval loss "] {
        assert!(outcome.stderr.contains(part), "{part}: {}", outcome.stderr);
    }
    assert!(adapter_bytes(&output) == adapter_bytes(&plain), "evaluation has changed the training");
    let svg = fs::read_to_string(output.join("loss.svg")).unwrap();
    assert!(svg.contains("evaluation") && svg.contains("<polyline"));
    assert!(!fs::read_to_string(plain.join("loss.svg")).unwrap().contains("evaluation"));
}

#[test]
fn a_share_is_held_out_by_the_seed() {
    let folder = tempfile::tempdir().unwrap();
    let (output, outcome) = train_in(&folder, "out", "--eval-split 0.25");
    for part in ["data: 30 examples, 1440 tokens", "evaluation: 10 examples, 480 tokens"] {
        assert!(outcome.stderr.contains(part), "{part}: {}", outcome.stderr);
    }
    let losses = |name: &str, options: &str| evaluations(&train_in(&folder, name, options).0);
    assert_eq!(evaluations(&output).len(), 1);
    assert_eq!(losses("again", "--eval-split 0.25"), evaluations(&output));
    assert_ne!(losses("other", "--eval-split 0.25 --seed 1"), evaluations(&output));
}

#[test]
fn evaluation_examples_that_are_trained_on_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    // The first of the two examples to evaluate on happens to be one of the forty to train on.
    let (_, outcome) = train_in(&folder, "both", "--quiet --eval-data {} --eval-data {}");
    assert_eq!(outcome.stderr, "warning: 41 of the 42 evaluation examples are trained on too\n");
    let other = folder.path().join("other.jsonl");
    fs::write(&other, "{\"input_ids\": [1, 2, 3]}\n").unwrap();
    let (_, outcome) = train_in(&folder, "other", &format!("--quiet --eval-data {}", other.display()));
    assert_eq!(outcome.stderr, "");
}

/// A run in some folder, as a person would type it.
fn run_in(folder: &Path, text: &str) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_unsloth"));
    Outcome::of(command.args(line(text, &[])).current_dir(folder).output().unwrap())
}

#[test]
fn a_configuration_file_is_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    copy_model("tiny-llama", here);
    fs::copy(fixture("tiny-llama").join("train.jsonl"), here.join("d.jsonl")).unwrap();
    fs::create_dir(here.join("configs")).unwrap();
    let text = "model = \"model\"\ndata = \"d.jsonl\"\noutput = \"one\"\nsteps = 5\nrank = 4\nlearning_rate = 1e-2\n\
        targets = [\"q_proj\", \"v_proj\"]\neval_split = 0.1\nquiet = true\n";
    fs::write(here.join("configs/run.toml"), text).unwrap();
    let quiet = run_in(here, "train --config configs/run.toml").succeeded();
    assert_eq!(quiet.stderr, "");
    let flags = "train --model model --data d.jsonl --output two --steps 5 --rank 4 --learning-rate 1e-2 \
        --targets q_proj,v_proj --eval-split 0.1";
    run_in(here, flags).succeeded();
    let one = (adapter_bytes(&here.join("one")), results(&here.join("one")));
    assert!((adapter_bytes(&here.join("two")), results(&here.join("two"))) == one);

    // What a run writes describes it from any folder; flags win.
    run_in(&here.join("configs"), "train --config ../one/config.toml --output ../three").succeeded();
    assert!((adapter_bytes(&here.join("three")), results(&here.join("three"))) == one);
    run_in(here, "train --config one/config.toml --output four --epochs 0.1 --seed 3").succeeded();
    let four = fs::read_to_string(here.join("four/config.toml")).unwrap();
    for line in [
        "seed = 3\n",
        "epochs = 0.1\n",
        "rank = 4\n",
        "learning_rate = 0.01\n",
        "dtype = \"f32\"\n",
        "device = \"cpu\"\n",
    ] {
        assert!(four.contains(line), "{line}: {four}");
    }
    assert!(!four.contains("steps = "), "{four}");
    assert!(four.contains(&format!("model = \"{}\"", here.join("model").display())), "{four}");

    for (text, parts) in [
        ("learning_rat = 1\n", ["bad.toml`, line 1", "unknown field `learning_rat`"]),
        ("steps = \"many\"\n", ["bad.toml`, line 1", "string \"many\""]),
        ("steps = 1\nepochs = 2\n", ["bad.toml`", "`steps` and `epochs` exclude each other"]),
        ("steps = 1\n", ["model = missing", "given"]),
        (
            "model = \"model\"\ndata = \"d.jsonl\"\noutput = \"five\"\neval_every = 2\n",
            ["eval_every = 2", "eval_split"],
        ),
    ] {
        fs::write(here.join("bad.toml"), text).unwrap();
        run_in(here, "train --config bad.toml").failed_with(&parts);
    }
    run_in(here, "train --config nowhere.toml").failed_with(&["nowhere.toml", "No such file"]);
    assert!(!here.join("five").exists());
}

#[test]
fn threads_change_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    let run = |threads: &str| {
        let (output, _) = train_in(&folder, threads, &format!("--threads {threads} --batch-size 4"));
        (adapter_bytes(&output), results(&output))
    };
    assert!(run("1") == run("3"));
}
