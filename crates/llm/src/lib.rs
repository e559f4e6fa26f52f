//! Decoder language models from Hugging Face folders: configuration, weights, adapters, data, training recipes, generation.
//!
//! A [`decoder::Decoder`] is loaded from a folder as the Hub has it, gets adapters ([`decoder::Decoder::add_adapters`] or
//! [`peft::load`]), and is trained by [`unsloth_train::Trainer`] on packed batches made by [`dataset`] and [`packing`].
//! [`recipe`] puts the parts together; [`generate`] continues a prompt.

pub mod adapter;
mod atomic;
pub mod chat_template;
pub mod config;
pub mod dataset;
pub mod decoder;
mod digest;
mod error;
pub mod export;
mod family;
mod fields;
pub mod generate;
pub mod hub;
pub mod initial;
mod json;
mod layer;
mod loader;
pub mod packing;
pub mod peft;
pub mod recipe;
mod rope_config;
mod rope_tables;
pub mod sampler;
mod special_tokens;
mod tensor_file;
pub mod text_stream;
pub mod tokenizer;
pub mod weights;
mod windows;

pub use error::{Error, Result};
