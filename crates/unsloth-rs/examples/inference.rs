//! Continues a text with a model folder, token by token, with or without an adapter.
//!
//! ```sh
//! cargo run --release -p unsloth-rs --example inference -- TEXT [MODEL [ADAPTER]]
//! ```
//!
//! For instance with `"Once there was" quickstart/model` behind a quickstart. Without a model it takes a tiny Llama from the tests.

use std::{error::Error, io::Write, path::PathBuf};

use unsloth_rs::{
    DType, device,
    llm::{
        generate::{GenerateOptions, generate},
        sampler::Sampling,
        text_stream::TextStream,
        tokenizer::Tokenizer,
    },
    recipe::load_model,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let text = arguments.next().unwrap_or_else(|| "Licensed under the".to_owned());
    let model = arguments.next().map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../llm/tests/fixtures/tiny-llama/model")),
        PathBuf::from,
    );
    let adapter = arguments.next().map(PathBuf::from);

    let decoder = load_model(&device("cpu")?, &model, adapter.as_deref(), DType::F32)?;
    let tokenizer = Tokenizer::load(&model)?;
    let sampling = Sampling { temperature: 0.8, top_p: Some(0.95), seed: 1, ..Sampling::GREEDY };
    let options = GenerateOptions { max_new_tokens: 60, ignore_eos: false, sampling };

    print!("{text}");
    let mut stream = TextStream::new(&tokenizer);
    let generation = generate(&decoder, &tokenizer.encode(&text)?, options, |token| {
        // A token may end within a character; its text comes with a later one.
        if let Ok(piece) = stream.push(token) {
            print!("{piece}");
            let _ = std::io::stdout().flush();
        }
    })?;
    println!("{}\n[{} tokens, stopped by {}]", stream.finish()?, generation.tokens.len(), generation.stop_reason);
    Ok(())
}
