//! Trains a LoRA adapter for a model folder.
//!
//! ```sh
//! cargo run --release -p unsloth-rs --example finetune -- MODEL DATA OUTPUT
//! ```
//!
//! For instance with `quickstart/model quickstart/data/questions.jsonl my-adapter` behind a quickstart. Without arguments it takes
//! a tiny Llama from the tests and writes into a temporary folder.

use std::{error::Error, path::PathBuf, sync::atomic::AtomicBool};

use unsloth_rs::{
    device,
    recipe::{AdapterSettings, Event, RunLength, Start, TrainConfig, train},
};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [model, data, output] = match <[PathBuf; 3]>::try_from(arguments) {
        Ok(paths) => paths,
        Err(arguments) if arguments.is_empty() => {
            let fixture = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../llm/tests/fixtures/tiny-llama"));
            let output = std::env::temp_dir().join("unsloth-finetune-example");
            [fixture.join("model"), fixture.join("train.jsonl"), output]
        }
        Err(_) => return Err("expected MODEL DATA OUTPUT, or nothing".into()),
    };

    // Everything that is not set is as `unsloth train` has it without options.
    let config = TrainConfig {
        start: Start::Overwrite,
        adapters: AdapterSettings {
            rank: Some(8),
            targets: Some("q_proj,v_proj".parse()?),
            ..AdapterSettings::default()
        },
        length: RunLength::Steps(20),
        batch_size: 4,
        learning_rate: 1e-2,
        ..TrainConfig::new(model, vec![data], output)
    };
    let mut on_event = |event| match event {
        Event::Prepared(prepared) => {
            println!("{} examples, {} steps", prepared.data.num_examples, prepared.total_steps)
        }
        Event::Step(record) => {
            println!("step {:>2}  loss {:.4}  {:.0} tokens/s", record.step, record.loss, record.tokens_per_second);
        }
        _ => {}
    };
    // Raised from elsewhere, by a signal handler or another thread, it would end the run after the step in flight.
    let stop = AtomicBool::new(false);
    let summary = train(&device("cpu")?, &config, &mut on_event, &stop)?;
    println!("loss {:.4} -> {:.4}; adapter in {}", summary.first_loss, summary.last_loss, summary.output.display());
    Ok(())
}
