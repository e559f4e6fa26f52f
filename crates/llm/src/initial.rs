//! Random weights of a model that is trained from scratch.

use std::path::Path;

use unsloth_core::{DType, Device, Tensor, ops::elementwise};
use unsloth_train::normal_matrix;

use crate::{
    Error, Result,
    config::DecoderConfig,
    fields::{Fields, read_object},
    weights::{Wanted, WeightSource},
};

/// Where the row of the padding token is kept at zero.
const EMBEDDING: &str = "model.embed_tokens.weight";

/// Random weights, as transformers initialises them: matrices and embeddings are normal with mean 0, biases are 0, norms
/// multiply by 1, and the embedding of the padding token is 0.
///
/// A weight is a function of the seed, its name and its shape alone: of no other weight, and of no order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RandomWeights {
    /// Of the whole model.
    pub seed: u64,
    /// Standard deviation of matrices and embeddings, 0 or more; `initializer_range`.
    pub std: f32,
    /// Token whose embedding is 0; `pad_token_id`.
    pub pad_token: Option<usize>,
    /// What a norm's weight holds where it multiplies by 1: 1, or 0 for families that add 1 to it.
    pub norm: f32,
}

impl RandomWeights {
    /// What `config.json` of a folder asks for: `initializer_range` (0.02 without) and `pad_token_id`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`]; [`Error::Config`] for a field out of its range.
    pub fn load(folder: &Path, config: &DecoderConfig, seed: u64) -> Result<Self> {
        let path = folder.join("config.json");
        let map = read_object(&path)?;
        let fields = Fields::new(&path, &map, |path, field, value, rule| Error::Config { path, field, value, rule });
        let std = fields.number("initializer_range")?.unwrap_or(0.02);
        if std < 0.0 {
            return Err(fields.refuse("initializer_range", "0 or more"));
        }
        let pad_token = match fields.number("pad_token_id")? {
            // -1 is how some older files spell `none`.
            None | Some(-1.0) => None,
            Some(_) => match fields.ids("pad_token_id")?[..] {
                [id] if (id as usize) < config.vocab_size => Some(id as usize),
                _ => return Err(fields.refuse("pad_token_id", "a token id below vocab_size")),
            },
        };
        Ok(Self { seed, std: std as f32, pad_token, norm: 1.0 - config.norm_weight_offset })
    }
}

impl WeightSource for RandomWeights {
    /// f32, which is what transformers makes where `config.json` names no other type.
    fn stored_dtype(&self, _name: &str) -> Result<DType> {
        Ok(DType::F32)
    }

    fn tensor(&self, device: &Device, wanted: &Wanted<'_>) -> Result<Tensor> {
        let values = match *wanted.shape {
            [rows, columns] => {
                let mut values = normal_matrix(self.seed, wanted.name, [rows, columns], self.std);
                if let Some(pad_token) = self.pad_token.filter(|_| wanted.name == EMBEDDING) {
                    values[pad_token * columns..][..columns].fill(0.0);
                }
                values
            }
            _ => vec![if wanted.name.ends_with(".bias") { 0.0 } else { self.norm }; wanted.shape.num_elements()],
        };
        let tensor = device.from_slice(&values, wanted.shape, wanted.category)?;
        Ok(elementwise::cast(&tensor, wanted.dtype)?)
    }

    fn tensor_copy(&self, device: &Device, wanted: &Wanted<'_>) -> Result<Tensor> {
        self.tensor(device, wanted)
    }
}
