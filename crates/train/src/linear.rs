//! A linear layer that may carry a low-rank adapter.

use unsloth_autograd::{Deferred, Matrix, Parameter, Tape, Var, Vector, ops};
use unsloth_core::{
    Category, DType, Tensor,
    ops::{dora, elementwise, linear as core_linear},
    rng::Philox,
};

use crate::{Adapter, DrawRows, Error, LoraConfig, LoraInit, Result, error::invalid, initial, svd::truncated_svd};

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
        self.deferred(tape, x, draw)?.compute()
    }

    /// [`Linear::forward`], computed when it is asked for where nothing else reads it: with DoRA its gradient does.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn deferred(&self, tape: &Tape, x: &Var, draw: Option<&DrawRows>) -> unsloth_core::Result<Deferred> {
        let (weight, bias) = (&self.weight, self.bias.as_ref());
        match &self.adapter {
            Some(adapter) if let Some(magnitude) = &adapter.magnitude => {
                ops::dora(tape, x, (weight, bias), &adapter.with(draw), magnitude).map(Deferred::from)
            }
            Some(adapter) => ops::deferred_lora_linear(tape, x, weight, bias, &adapter.with(draw)),
            None => ops::deferred_linear(tape, x, weight, bias),
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
            parameters.extend(adapter.parameters());
        }
        parameters
    }

    /// Adds an f32 adapter as [`LoraConfig::init`] says, with [`LoraConfig::dora`] and lengths as they are. It changes nothing yet, except that with [`LoraInit::Pissa`] the frozen
    /// weight is replaced by a copy without what the adapter has, as [`Linear::remove_principal`] makes it.
    ///
    /// A random `A[i, j]` is a function of `seed`, `index` and `(i, j)` alone; give each layer its own `index`, which also tells
    /// the zeros of its dropout from those of others. The parameters are called `<name>.lora_A.weight`,
    /// `<name>.lora_B.weight` and `<name>.lora_magnitude_vector`.
    ///
    /// # Errors
    /// As [`LoraConfig::validate`]; [`Error::InvalidRank`] for a rank above the smaller dimension of the layer;
    /// [`Error::AdapterExists`]; [`Error::InvalidConfig`] for PiSSA on a weight that is trained;
    /// [`unsloth_core::Error::OutOfMemory`]. The layer has not been changed then.
    pub fn add_adapter(&mut self, config: &LoraConfig, seed: u64, index: u32) -> Result<()> {
        self.check_adapter(config)?;
        let (out_features, in_features) = dimensions(&self.weight);
        let (a, b) = match config.init {
            LoraInit::Pissa { .. } => self.remove_principal(config)?,
            LoraInit::Kaiming => {
                let bound = 1.0 / (in_features as f64).sqrt();
                (initial::uniform_matrix(&Philox::new(seed, index), [config.rank, in_features], bound), Vec::new())
            }
            LoraInit::Gaussian => {
                let std = (1.0 / config.rank as f64) as f32;
                (initial::normal_matrix(seed, &self.name, [config.rank, in_features], std), Vec::new())
            }
        };
        let device = self.weight.device();
        let lora_a = device.from_slice(&a, [config.rank, in_features], Category::Adapters)?;
        let lora_b = match b.is_empty() {
            true => device.zeros([out_features, config.rank], DType::F32, Category::Adapters)?,
            false => device.from_slice(&b, [out_features, config.rank], Category::Adapters)?,
        };
        let mut adapter = Adapter {
            lora_a: Parameter::new(format!("{}.lora_A.weight", self.name), lora_a),
            lora_b: Parameter::new(format!("{}.lora_B.weight", self.name), lora_b),
            magnitude: None,
            config: *config,
            index,
        };
        if config.dora {
            let (a, b) = (adapter.lora_a.value(), adapter.lora_b.value());
            let lengths = dora::norms(&self.weight.weight()?, &a, &b, config.scale())?;
            lengths.retag(Category::Adapters);
            adapter.magnitude = Some(Parameter::new(format!("{}.lora_magnitude_vector", self.name), lengths));
        }
        self.adapter = Some(adapter);
        Ok(())
    }

    /// # Errors
    /// As [`Linear::add_adapter`].
    fn check_adapter(&self, config: &LoraConfig) -> Result<()> {
        let (out_features, in_features) = dimensions(&self.weight);
        let max_rank = out_features.min(in_features);
        if !(1..=max_rank).contains(&config.rank) {
            return Err(Error::InvalidRank { layer: self.name.clone(), rank: config.rank, max_rank });
        }
        config.validate()?;
        match self.adapter {
            Some(_) => Err(Error::AdapterExists { layer: self.name.clone() }),
            None => Ok(()),
        }
    }

    /// The weight with what the adapter adds to it, in its own type; the layer is left as it is. `None` without an adapter.
    ///
    /// # Errors
    /// [`unsloth_core::Error::OutOfMemory`]; [`unsloth_core::Error::Launch`] if the device failed.
    pub fn merged(&self) -> Result<Option<Tensor>> {
        let Some(adapter) = &self.adapter else { return Ok(None) };
        let (weight, scale) = (self.weight.weight()?, adapter.config.scale());
        let (lora_a, lora_b) = (adapter.lora_a.value(), adapter.lora_b.value());
        let update = update(&lora_a.to_vec::<f32>()?, &lora_b)?;
        let dense = elementwise::cast(&weight.to_dense()?, DType::F32)?;
        let mut merged = elementwise::add(elementwise::scale(update, scale)?, &dense)?;
        if let Some(magnitude) = &adapter.magnitude {
            let norms = dora::norms(&weight, &lora_a, &lora_b, scale)?.to_vec::<f32>()?;
            let (magnitude, mut values) = (magnitude.value().to_vec::<f32>()?, merged.to_vec::<f32>()?);
            let rows = values.chunks_exact_mut(weight.in_features()).zip(magnitude.iter().zip(&norms));
            for (row, (magnitude, norm)) in rows {
                row.iter_mut().for_each(|value| *value *= magnitude / norm);
            }
            merged = merged.device().from_slice(&values, *merged.shape(), Category::Weights)?;
        }
        let merged = elementwise::cast(&merged, weight.dtype())?;
        merged.retag(Category::Weights);
        Ok(Some(merged))
    }

    /// Takes the largest `rank` singular values out of the frozen weight, which becomes a copy of its own, and gives them as the
    /// two matrices of an adapter with this configuration: `scale * B A` is what was taken out, and `B^T B = A A^T`.
    ///
    /// What is found depends on the weight and the configuration alone: who loads an adapter that began so finds the same base.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a weight that is trained, or a configuration that does not ask for it;
    /// [`unsloth_core::Error::OutOfMemory`]. The layer has not been changed then.
    pub fn remove_principal(&mut self, config: &LoraConfig) -> Result<(Vec<f32>, Vec<f32>)> {
        let (LoraInit::Pissa { num_iterations }, Matrix::Frozen(weight)) = (config.init, &self.weight) else {
            return invalid("lora_init", config.init, "pissa, on frozen weights alone");
        };
        let found = truncated_svd(weight, config.rank, num_iterations)?;
        let scale = config.scale();
        // Half of each value for either matrix; the product must not have the scale twice.
        let roots: Vec<f64> = found.values.iter().map(|value| (value / f64::from(scale)).sqrt()).collect();
        let (out_features, in_features) = (weight.out_features(), weight.in_features());
        let scaled = |rows: &[f64], width: usize| -> Vec<f32> {
            let row = |(row, root): (&[f64], &f64)| row.iter().map(|value| (root * value) as f32).collect::<Vec<_>>();
            rows.chunks_exact(width).zip(&roots).flat_map(row).collect()
        };
        let a = scaled(&found.right, in_features);
        let b = transposed(&scaled(&found.left, out_features), out_features);
        let device = weight.device();
        let b_rows = device.from_slice(&b, [out_features, config.rank], Category::Workspace)?;
        let update = update(&a, &b_rows)?;
        let dense = elementwise::cast(&weight.to_dense()?, DType::F32)?;
        let rest = elementwise::add(elementwise::scale(update, -scale)?, &dense)?;
        let rest = elementwise::cast(&rest, weight.dtype())?;
        rest.retag(Category::Weights);
        self.weight = Matrix::Frozen(device.prepare_weight(rest)?);
        Ok((a, b))
    }
}

/// `B A`, f32 `[out_features, in_features]`, of `A` `[rank, in_features]` and `B` `[out_features, rank]`.
fn update(a: &[f32], b: &Tensor) -> Result<Tensor> {
    let (device, rank) = (b.device(), b.shape()[1]);
    let in_features = a.len() / rank;
    let columns = device.from_slice(&transposed(a, in_features), [in_features, rank], Category::Workspace)?;
    Ok(core_linear::forward(b, &device.prepare_weight(columns)?, None)?)
}

/// Columns as rows; `width` is the number of columns.
fn transposed(rows: &[f32], width: usize) -> Vec<f32> {
    (0..width).flat_map(|column| rows.iter().skip(column).step_by(width)).copied().collect()
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
