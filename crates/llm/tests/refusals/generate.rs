//! Prompts, the end of a generation, and the tokenizer.

use std::fs;

use serde_json::json;
use unsloth_llm::{
    generate::{GenerateOptions, StopReason, generate},
    sampler::Sampling,
    tokenizer::Tokenizer,
};

use crate::{
    WEIGHTS,
    common::{Folder, Golden, load},
    decoder, refused,
};

const SHORT: GenerateOptions = GenerateOptions { max_new_tokens: 4, ignore_eos: false, sampling: Sampling::GREEDY };

#[test]
fn bad_prompts() {
    let decoder = load(&unsloth_cpu::device(), "tiny-llama");
    let generate = |prompt: &[i32]| generate(&decoder, prompt, SHORT, |_| ());
    refused(generate(&[]), &["prompt = 0 tokens", "at least 1"]);
    refused(generate(&[1, 1024]), &["prompt = id 1024", "0 to 1023"]);
    refused(generate(&[1, -1]), &["prompt = id -1", "0 to 1023"]);
    refused(generate(&[1; 513]), &["prompt = 513 tokens", "at most the model's 512"]);
}

#[test]
fn generation_stops() {
    let golden = Golden::open("tiny-llama");
    let (prompt, expected) = (golden.i32("gen_prompt"), golden.i32("gen_base"));
    let folder = Folder::copy("tiny-llama", "model");
    let generate = |max_new_tokens, ignore_eos| {
        let options = GenerateOptions { max_new_tokens, ignore_eos, sampling: Sampling::GREEDY };
        let generation = generate(&decoder(&folder).unwrap(), &prompt, options, |_| ()).unwrap();
        (generation.tokens, generation.stop_reason)
    };
    assert_eq!(generate(0, true), (vec![], StopReason::Length));
    assert_eq!(generate(5, true), (expected[..5].to_vec(), StopReason::Length));

    folder.set("config.json", "max_position_embeddings", json!(prompt.len() + 3));
    assert_eq!(generate(5, true), (expected[..3].to_vec(), StopReason::Context));
    assert_eq!(generate(3, true), (expected[..3].to_vec(), StopReason::Length));
    folder.set("config.json", "max_position_embeddings", json!(prompt.len()));
    assert_eq!(generate(1, true), (vec![], StopReason::Context));

    folder.set("config.json", "max_position_embeddings", json!(512));
    folder.set("generation_config.json", "eos_token_id", json!([1023, expected[6]]));
    let first = expected.iter().position(|token| *token == expected[6] || *token == 1023).unwrap();
    assert_eq!(generate(20, false), (expected[..=first].to_vec(), StopReason::Eos));
    assert_eq!(generate(20, true), (expected[..20].to_vec(), StopReason::Length));
}

#[test]
fn overflowed_logits_are_an_error() {
    let folder = Folder::copy("tiny-llama", "model");
    folder.edit_tensors(WEIGHTS, |tensors| {
        let norm = &mut tensors.get_mut("model.norm.weight").unwrap().bytes;
        norm[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let result = generate(&decoder(&folder).unwrap(), &[1, 2, 3], SHORT, |_| ());
    refused(result, &["behind token 3", "not numbers"]);
}

#[test]
fn tokenizer() {
    let golden = Golden::open("tiny-llama");
    let folder = Folder::copy("tiny-llama", "model");
    let tokenizer = Tokenizer::load(folder.path()).unwrap();
    let text = "Licensed under the Apache License, Version 2.0; you may not use this file except in";
    let ids = tokenizer.encode(text).unwrap();
    assert_eq!(ids, golden.i32("gen_prompt"));
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    refused(tokenizer.decode(&[5, -5]), &["token id = -5"]);
    fs::write(folder.file("tokenizer.json"), "{}").unwrap();
    refused(Tokenizer::load(folder.path()), &["tokenizer.json"]);
    fs::remove_file(folder.file("tokenizer.json")).unwrap();
    refused(Tokenizer::load(folder.path()), &["cannot read", "tokenizer.json"]);
}
