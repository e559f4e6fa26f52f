//! Table, linear layer with a low-rank adapter, RMSNorm, output matrix; `pytorch.py` holds the same model.

use unsloth_autograd::{
    Matrix, Parameter, Tape, Var, Vector,
    ops::{self, NormOptions},
};
use unsloth_core::{
    Category, DType, Device, Result, Tensor,
    ops::{cross_entropy::LossSpec, elementwise},
};
use unsloth_train::{
    AdamWConfig, Batch, Document, DrawRows, Linear, LoraConfig, Model, Schedule, ScheduleKind, TrainerConfig,
};

/// Sizes of a model.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) vocab_size: usize,
    pub(crate) hidden_size: usize,
    pub(crate) inner_size: usize,
    pub(crate) rank: usize,
}

pub(crate) const TINY: Sizes = Sizes { vocab_size: 11, hidden_size: 8, inner_size: 6, rank: 2 };

pub(crate) struct TinyModel {
    device: Device,
    activations: DType,
    table: Matrix,
    linear: Linear,
    norm: Vector,
    head: Matrix,
}

/// `offset + factor * sin(0.7 i + salt)`
fn values(count: usize, salt: f64, factor: f64, offset: f64) -> Vec<f32> {
    (0..count).map(|i| (offset + factor * (0.7 * i as f64 + salt).sin()) as f32).collect()
}

impl TinyModel {
    pub(crate) fn new(device: &Device, sizes: Sizes) -> Self {
        let Sizes { vocab_size, hidden_size, inner_size, rank } = sizes;
        let matrix = |rows: usize, columns: usize, salt: f64| {
            device.from_slice(&values(rows * columns, salt, 0.5, 0.0), [rows, columns], Category::Weights).unwrap()
        };
        let vector = |salt: f64, factor: f64, offset: f64| {
            device.from_slice(&values(inner_size, salt, factor, offset), [inner_size], Category::Weights).unwrap()
        };
        let trainable = |name: &str, value: Tensor| Matrix::Trainable(Parameter::new(name, value));
        let base = Matrix::Frozen(device.prepare_weight(matrix(inner_size, hidden_size, 3.0)).unwrap());
        let mut linear = Linear::new("linear", base, Some(Vector::Frozen(vector(4.0, 0.5, 0.0))));
        linear.add_adapter(&LoraConfig::new(rank, 3.0 * rank as f32), 0, 0).unwrap();
        let adapter = linear.adapter.as_ref().unwrap();
        adapter.lora_a.update(|a| a.write(&values(rank * hidden_size, 6.0, 0.5, 0.0))).unwrap();
        adapter.lora_b.update(|b| b.write(&values(inner_size * rank, 7.0, 0.1, 0.0))).unwrap();
        Self {
            device: device.clone(),
            activations: DType::F32,
            table: trainable("table", matrix(vocab_size, hidden_size, 1.0)),
            linear,
            norm: Vector::Trainable(Parameter::new("norm", vector(5.0, 0.1, 1.0))),
            head: trainable("head", matrix(vocab_size, inner_size, 2.0)),
        }
    }

    /// The same model whose adapter drops a share of its input.
    pub(crate) fn with_dropout(mut self, dropout: f32) -> Self {
        self.linear.adapter.as_mut().unwrap().config.dropout = dropout;
        self
    }

    /// The same model with activations of another type.
    pub(crate) fn with_activations(self, dtype: DType) -> Self {
        Self { activations: dtype, ..self }
    }

    /// The same model with activations, table and head in bf16.
    pub(crate) fn in_bf16(self) -> Self {
        let narrow = |matrix: &Matrix| {
            let parameter = matrix.parameter().unwrap();
            let value = elementwise::cast(&parameter.value(), DType::BF16).unwrap();
            Matrix::Trainable(Parameter::new(parameter.name(), value))
        };
        let (table, head) = (narrow(&self.table), narrow(&self.head));
        Self { table, head, ..self.with_activations(DType::BF16) }
    }

    pub(crate) fn parameter(&self, name: &str) -> Parameter {
        self.parameters().into_iter().find(|parameter| parameter.name() == name).unwrap()
    }

    /// All trained numbers, in a fixed order.
    pub(crate) fn snapshot(&self) -> Vec<u32> {
        let bits = |parameter: Parameter| parameter.value().to_vec::<f32>().unwrap().into_iter().map(f32::to_bits);
        self.parameters().into_iter().flat_map(bits).collect()
    }
}

impl Model for TinyModel {
    fn loss(&self, tape: &Tape, batch: &Batch, loss: LossSpec) -> Result<Var> {
        let x = ops::embedding(tape, &self.table, &batch.ids, self.activations)?;
        let x = self.linear.forward(tape, &x, DrawRows::new(batch)?.as_ref())?;
        let x = ops::rms_norm(tape, &x, &self.norm, NormOptions { eps: 1e-5, weight_offset: 0.0 })?;
        ops::linear_cross_entropy(tape, &x, &self.head, &batch.targets, loss)
    }

    fn parameters(&self) -> Vec<Parameter> {
        let (Matrix::Trainable(table), Matrix::Trainable(head), Vector::Trainable(norm)) =
            (&self.table, &self.head, &self.norm)
        else {
            panic!("table, head and norm are made trainable");
        };
        let mut parameters = vec![table.clone(), norm.clone(), head.clone()];
        parameters.extend(self.linear.parameters());
        parameters
    }

    fn device(&self) -> &Device {
        &self.device
    }
}

/// The four documents of a step, as ids and targets.
pub(crate) fn documents(step: usize) -> Vec<(Vec<i32>, Vec<i32>)> {
    let vocab_size = TINY.vocab_size;
    let document = |document: usize| {
        let length = 3 + (step + document) % 4;
        let ids: Vec<usize> = (0..length).map(|i| (7 * i + 3 * step + 5 * document) % vocab_size).collect();
        let target = |(i, id): (usize, &usize)| match (i + step) % 3 {
            0 => -100,
            _ => ((id * 3 + document) % vocab_size) as i32,
        };
        let targets = ids.iter().enumerate().map(target).collect();
        (ids.into_iter().map(|id| id as i32).collect(), targets)
    };
    (0..4).map(document).collect()
}

/// The documents of a step in micro-batches of `size` documents.
pub(crate) fn micro_batches(device: &Device, step: usize, size: usize) -> Vec<Batch> {
    let documents = documents(step);
    let documents: Vec<_> = documents.iter().map(|(ids, targets)| Document { ids, targets }).collect();
    documents.chunks(size).map(|chunk| Batch::new(device, chunk).unwrap()).collect()
}

/// The optimiser of `pytorch.py`.
pub(crate) const ADAMW: AdamWConfig = AdamWConfig { beta1: 0.8, beta2: 0.95, eps: 1e-6, weight_decay: 0.1 };

/// The configuration of `pytorch.py`.
pub(crate) fn config() -> TrainerConfig {
    TrainerConfig {
        optimizer: ADAMW.into(),
        schedule: Schedule {
            kind: ScheduleKind::Cosine,
            learning_rate: 2e-2,
            warmup_steps: 3,
            total_steps: 20,
            ..Schedule::default()
        },
        max_grad_norm: Some(0.8),
        ..TrainerConfig::default()
    }
}

/// The configuration of `pytorch.py` at a constant rate without warm-up.
pub(crate) fn constant(learning_rate: f64) -> TrainerConfig {
    let schedule = Schedule {
        kind: ScheduleKind::Constant,
        learning_rate,
        warmup_steps: 0,
        total_steps: 20,
        ..Schedule::default()
    };
    TrainerConfig { schedule, ..config() }
}
