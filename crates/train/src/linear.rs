//! A linear layer that may carry a low-rank adapter.

use unsloth_autograd::{Matrix, Parameter, Tape, Var, Vector, ops};
use unsloth_core::{Category, DType, rng::Philox};

use crate::{Adapter, DrawRows, Error, LoraConfig, Result};

/// `y = x W^T + bias`, and `+ scale (drop(x) A^T) B^T` where there is an adapter.
#[derive(Clone, Debug)]
pub struct Linear {
    /// Module path as in the checkpoint, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// `[out_features, in_features]`
    pub weight: Matrix,
    /// `[out_features]`
    pub bias: Option<Vector>,
    /// Low-rank update.
    pub adapter: Option<Adapter>,
}

impl Linear {
    /// A layer without an adapter. Shapes are checked by the first [`Linear::forward`].
    pub fn new(name: impl Into<String>, weight: Matrix, bias: Option<Vector>) -> Self {
        Self { name: name.into(), weight, bias, adapter: None }
    }

    /// Columns of `x`.
    pub fn in_features(&self) -> usize {
        dimensions(&self.weight).1
    }

    /// Columns of `y`.
    pub fn out_features(&self) -> usize {
        dimensions(&self.weight).0
    }

    /// Applies the layer to `x`, `[rows, in_features]`. `draw` says where its rows stand in a run; without, as outside
    /// training, the adapter's dropout is off.
    ///
    /// # Errors
    /// Shape, dtype or device mismatch; [`unsloth_core::Error::OutOfMemory`].
    pub fn forward(&self, tape: &Tape, x: &Var, draw: Option<&DrawRows>) -> unsloth_core::Result<Var> {
        match &self.adapter {
            Some(adapter) => ops::lora_linear(tape, x, &self.weight, self.bias.as_ref(), &adapter.with(draw)),
            None => ops::linear(tape, x, &self.weight, self.bias.as_ref()),
        }
    }

    /// What of this layer is trained: weight and bias unless frozen, then `A` and `B` of the adapter.
    pub fn parameters(&self) -> Vec<Parameter> {
        let mut parameters = Vec::new();
        if let Matrix::Trainable(weight) = &self.weight {
            parameters.push(weight.clone());
        }
        if let Some(Vector::Trainable(bias)) = &self.bias {
            parameters.push(bias.clone());
        }
        if let Some(adapter) = &self.adapter {
            parameters.extend([adapter.lora_a.clone(), adapter.lora_b.clone()]);
        }
        parameters
    }

    /// Adds an f32 adapter that changes nothing yet: `A` is uniform in `(-1 / sqrt(in_features), 1 / sqrt(in_features))`
    /// (`kaiming_uniform_(a=sqrt(5))`, as PEFT) and `B` is zero.
    ///
    /// `A[i, j]` is a function of `seed`, `index` and `(i, j)` alone; give each layer its own `index`, which also tells the
    /// zeros of its dropout from those of others. The parameters are
    /// called `<name>.lora_A.weight` and `<name>.lora_B.weight`.
    ///
    /// # Errors
    /// As [`LoraConfig::validate`]; [`Error::InvalidRank`] for a rank above the smaller dimension of the layer;
    /// [`Error::AdapterExists`]; [`unsloth_core::Error::OutOfMemory`].
    pub fn add_adapter(&mut self, config: &LoraConfig, seed: u64, index: u32) -> Result<()> {
        let (out_features, in_features) = dimensions(&self.weight);
        let max_rank = out_features.min(in_features);
        if !(1..=max_rank).contains(&config.rank) {
            return Err(Error::InvalidRank { layer: self.name.clone(), rank: config.rank, max_rank });
        }
        config.validate()?;
        if self.adapter.is_some() {
            return Err(Error::AdapterExists { layer: self.name.clone() });
        }
        let device = self.weight.device();
        let a = initial_a(&Philox::new(seed, index), config.rank, in_features);
        let lora_a = device.from_slice(&a, [config.rank, in_features], Category::Adapters)?;
        let lora_b = device.zeros([out_features, config.rank], DType::F32, Category::Adapters)?;
        self.adapter = Some(Adapter {
            lora_a: Parameter::new(format!("{}.lora_A.weight", self.name), lora_a),
            lora_b: Parameter::new(format!("{}.lora_B.weight", self.name), lora_b),
            config: *config,
            index,
        });
        Ok(())
    }
}

/// `(out_features, in_features)`; 0 for dimensions that a malformed trainable matrix lacks, which `forward` then refuses.
fn dimensions(weight: &Matrix) -> (usize, usize) {
    match weight {
        Matrix::Trainable(parameter) => {
            let value = parameter.value();
            let dimension = |i: usize| value.shape().get(i).copied().unwrap_or(0);
            (dimension(0), dimension(1))
        }
        Matrix::Frozen(weight) => (weight.out_features(), weight.in_features()),
    }
}

fn initial_a(stream: &Philox, rank: usize, in_features: usize) -> Vec<f32> {
    let bound = 1.0 / (in_features as f64).sqrt();
    let element = |row: usize, column: usize| {
        let uniform = f64::from(stream.uniform(0, row as u32, 0, column as u32));
        ((2.0 * uniform - 1.0) * bound) as f32
    };
    (0..rank).flat_map(|row| (0..in_features).map(move |column| element(row, column))).collect()
}
